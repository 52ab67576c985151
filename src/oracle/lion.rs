//! Lion in optax's own words.

use super::arithmetic::sign;
use super::decay::decay;
use super::{Arithmetic, Bounded, Textbook};
use crate::rules::LionConfig;

impl Textbook for LionConfig {
    fn follow(&self, _step: u64, theta: &mut f64, slots: &mut [f64], grad: f64) {
        let [m, ..] = slots else { return };
        let g = decay!(self).follow(theta, grad);
        *theta -= self.lr() * sign((1.0 - self.beta1()) * g + self.beta1() * *m);
        *m = (1.0 - self.beta2()) * g + self.beta2() * *m;
    }

    fn bound(
        &self,
        _step: u64,
        at: Arithmetic,
        theta: &mut Bounded,
        slots: &mut [Bounded],
        grad: Bounded,
    ) {
        let [m, ..] = slots else { return };
        let scaled = |k: f64, x: Bounded| at.product(at.scalar(k), x);
        let h = decay!(self).bound(at, theta, grad);
        let between = |beta: f64, m: Bounded| at.sum([scaled(beta, m), scaled(1.0 - beta, h)]);
        let u = between(self.beta1(), *m).sign();
        *m = between(self.beta2(), *m);
        *theta = at.difference(*theta, scaled(self.lr(), u));
    }
}
