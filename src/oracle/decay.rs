//! Maximizing and the two weight decays, in the words of `torch.optim`.

use super::{Arithmetic, Bounded};

/// The treatment of gradient and parameter before a rule's own work.
#[derive(Clone, Copy, Debug)]
pub(super) struct Decay {
    pub(super) lr: f64,
    pub(super) maximize: bool,
    pub(super) weight_decay: f64,
    pub(super) decoupled_weight_decay: f64,
}

impl Decay {
    /// Returns the gradient that the rule sees, and decays the parameter.
    pub(super) fn follow(self, theta: &mut f64, grad: f64) -> f64 {
        let mut grad = if self.maximize { -grad } else { grad };
        if self.weight_decay != 0.0 {
            grad += self.weight_decay * *theta;
        }
        *theta -= self.lr * self.decoupled_weight_decay * *theta;
        grad
    }

    pub(super) fn bound(self, at: Arithmetic, theta: &mut Bounded, grad: Bounded) -> Bounded {
        let mut h = if self.maximize { grad.negative() } else { grad };
        if self.weight_decay != 0.0 {
            h = at.sum([h, at.product(at.scalar(self.weight_decay), *theta)]);
        }
        let rho = 1.0 - self.lr * self.decoupled_weight_decay;
        *theta = at.product(at.scalar(rho), *theta);
        h
    }
}

/// The decays of a configuration.
macro_rules! decay {
    ($config:ident) => {
        crate::oracle::decay::Decay {
            lr: $config.lr(),
            maximize: $config.maximize(),
            weight_decay: $config.coupled_weight_decay(),
            decoupled_weight_decay: $config.decoupled_weight_decay(),
        }
    };
}
pub(super) use decay;
