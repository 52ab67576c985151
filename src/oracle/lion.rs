//! Lion in optax's own words.

use super::arithmetic::sign;
use super::{Arithmetic, Bounded, Element, Textbook};
use crate::rules::{Hyperparameters as _, LionConfig};

impl Textbook for LionConfig {
    fn follow(&self, _step: u64, element: &mut Element<f64>, grad: f64) {
        let (theta, [m, ..]) = element.split();
        let g = self.decay().follow(theta, grad);
        *theta -= self.lr() * sign((1.0 - self.beta1()) * g + self.beta1() * *m);
        *m = (1.0 - self.beta2()) * g + self.beta2() * *m;
    }

    fn bound(&self, _step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
        let (theta, [m, ..]) = element.split();
        let h = self.decay().bound(at, theta, grad);
        let between = |beta: f64, m: Bounded| at.average(beta, m, h);
        let u = between(self.beta1(), *m).sign();
        *m = between(self.beta2(), *m);
        *theta = at.difference(*theta, at.scaled(self.lr(), u));
    }
}
