//! The momentum family in the words of its forms.

use super::{Arithmetic, Bounded, Element, Textbook};
use crate::rules::sgd::{Coefficients, MomentumForm, SgdConfig, Terms};

impl Textbook for SgdConfig {
    fn follow(&self, step: u64, element: &mut Element<f64>, grad: f64) {
        let (lr, mu) = (self.lr(), self.momentum());
        let (theta, [velocity, ..]) = element.split();
        let ascent_or_descent = if self.maximize() { -grad } else { grad };
        let d = match self.coupled_weight_decay() {
            0.0 => ascent_or_descent,
            lambda => ascent_or_descent + lambda * *theta,
        };
        if self.decoupled_weight_decay() != 0.0 {
            *theta *= 1.0 - lr * self.decoupled_weight_decay();
        }
        if mu == 0.0 {
            *theta -= lr * d;
            return;
        }
        match self.form() {
            MomentumForm::HeavyBall => {
                let taken_in = if step == 1 {
                    d
                } else {
                    (1.0 - self.dampening()) * d
                };
                *velocity = mu * *velocity + taken_in;
                *theta -= lr
                    * if self.nesterov() {
                        d + mu * *velocity
                    } else {
                        *velocity
                    };
            }
            MomentumForm::Ema => {
                *velocity = mu * *velocity + (1.0 - mu) * d;
                *theta -= lr * *velocity;
            }
            MomentumForm::LrInside => {
                *velocity = mu * *velocity - lr * d;
                *theta += if self.nesterov() {
                    mu * *velocity - lr * d
                } else {
                    *velocity
                };
            }
            MomentumForm::Particle => {
                // m*dv/dt = F - eps*v and F = -kappa*d, where lr = kappa*dt^2/m and mu = 1 - eps*dt/m.
                let dt = self.time_step();
                *velocity = mu * *velocity - lr / dt * d;
                *theta += dt * *velocity;
            }
        }
    }

    fn bound(&self, step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
        let k = Coefficients::new(self, step == 1);
        let has = Terms::of(self);
        let (theta, [velocity, ..]) = element.split();
        let mut d = grad;
        if has.lambda {
            d = at.sum([grad, at.scaled(k.lambda, *theta)]);
        }
        let decayed = if has.rho {
            at.scaled(k.rho, *theta)
        } else {
            *theta
        };
        let of_d = if has.b {
            at.scaled(k.b, d)
        } else {
            Bounded::default()
        };
        let mut of_velocity = Bounded::default();
        if has.velocity {
            let taken_in = if has.c { at.scaled(k.c, d) } else { d };
            *velocity = at.sum([at.scaled(k.alpha, *velocity), taken_in]);
            of_velocity = at.scaled(k.a, *velocity);
        }
        *theta = at.sum([decayed, of_velocity.negative(), of_d.negative()]);
    }
}
