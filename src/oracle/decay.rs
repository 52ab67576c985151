//! Maximizing and the two weight decays, in the words of `torch.optim`.

use super::{Arithmetic, Bounded};
use crate::rules::Decay;

impl Decay {
    /// Returns the gradient that the rule sees, and decays the parameter.
    pub(super) fn follow(self, theta: &mut f64, grad: f64) -> f64 {
        let mut grad = if self.maximize { -grad } else { grad };
        if self.coupled != 0.0 {
            grad += self.coupled * *theta;
        }
        *theta -= self.lr * self.decoupled * *theta;
        grad
    }

    pub(super) fn bound(self, at: Arithmetic, theta: &mut Bounded, grad: Bounded) -> Bounded {
        let mut h = if self.maximize { grad.negative() } else { grad };
        if self.coupled != 0.0 {
            h = at.sum([h, at.scaled(self.coupled, *theta)]);
        }
        *theta = at.scaled(self.rho(), *theta);
        h
    }
}
