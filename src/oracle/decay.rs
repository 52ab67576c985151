//! Maximizing and the two weight decays, in the words of `torch.optim`.

use super::{Arithmetic, Bounded};
use crate::rules::Decay;

impl Decay {
    /// Returns the gradient that the rule sees, and decays the parameter.
    pub(super) fn follow(self, theta: &mut f64, grad: f64) -> f64 {
        let grad = self.follow_direction(*theta, grad);
        *theta -= self.lr * self.decoupled * *theta;
        grad
    }

    /// Returns the gradient that the rule sees.
    pub(super) fn follow_direction(self, theta: f64, grad: f64) -> f64 {
        let grad = if self.maximize { -grad } else { grad };
        match self.coupled {
            0.0 => grad,
            coupled => grad + coupled * theta,
        }
    }

    pub(super) fn bound(self, at: Arithmetic, theta: &mut Bounded, grad: Bounded) -> Bounded {
        let h = self.bound_direction(at, *theta, grad);
        *theta = at.scaled(self.rho(), *theta);
        h
    }

    pub(super) fn bound_direction(self, at: Arithmetic, theta: Bounded, grad: Bounded) -> Bounded {
        let h = if self.maximize { grad.negative() } else { grad };
        match self.coupled {
            0.0 => h,
            coupled => at.sum([h, at.scaled(coupled, theta)]),
        }
    }
}
