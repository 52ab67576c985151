//! Adamax in its libraries' own words.

use super::{Arithmetic, Bounded, Element, Textbook};
use crate::rules::{AdamaxConfig, Hyperparameters as _};

impl Textbook for AdamaxConfig {
    fn follow(&self, step: u64, element: &mut Element<f64>, grad: f64) {
        let (theta, [m, u, ..]) = element.split();
        let g = self.decay().follow(theta, grad);
        *m += (g - *m) * (1.0 - self.beta1());
        let clr = self.lr() / (1.0 - self.beta1().powf(step as f64));
        *theta -= match self.eps_in_norm() {
            // torch.optim.adamax, optax.scale_by_adamax.
            true => {
                *u = f64::max(*u * self.beta2(), g.abs() + self.eps());
                clr * *m / *u
            }
            // keras.optimizers.Adamax.update_step.
            false => {
                *u = f64::max(self.beta2() * *u, g.abs());
                clr * *m / (*u + self.eps())
            }
        };
    }

    fn bound(&self, step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
        let (theta, [m, u, ..]) = element.split();
        let h = self.decay().bound(at, theta, grad);
        *m = at.average(self.beta1(), *m, h);
        let eps = at.scalar(self.eps());
        let (in_norm, outside) = match self.eps_in_norm() {
            true => (eps, Bounded::default()),
            false => (Bounded::default(), eps),
        };
        *u = at
            .scaled(self.beta2(), *u)
            .max(at.sum([h.magnitude(), in_norm]));
        let a = self.lr() / (1.0 - self.beta1().powf(step as f64));
        let update = at.scaled(a, at.quotient(*m, at.sum([*u, outside])));
        *theta = at.difference(*theta, update);
    }
}
