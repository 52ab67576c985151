//! Adadelta in PyTorch's own words.

use super::decay::decay;
use super::{Arithmetic, Bounded, Textbook};
use crate::rules::AdadeltaConfig;

impl Textbook for AdadeltaConfig {
    fn follow(&self, _step: u64, theta: &mut f64, slots: &mut [f64], grad: f64) {
        let [square_avg, acc_delta, ..] = slots else {
            return;
        };
        let (rho, eps) = (self.rho(), self.eps());
        let g = decay!(self).follow(theta, grad);
        *square_avg = rho * *square_avg + (1.0 - rho) * g * g;
        let std = (*square_avg + eps).sqrt();
        let delta = (*acc_delta + eps).sqrt() / std * g;
        *acc_delta = rho * *acc_delta + (1.0 - rho) * delta * delta;
        *theta -= self.lr() * delta;
    }

    fn bound(
        &self,
        _step: u64,
        at: Arithmetic,
        theta: &mut Bounded,
        slots: &mut [Bounded],
        grad: Bounded,
    ) {
        let [s, acc, ..] = slots else { return };
        let scaled = |k: f64, x: Bounded| at.product(at.scalar(k), x);
        let (rho, eps) = (self.rho(), at.scalar(self.eps()));
        let h = decay!(self).bound(at, theta, grad);
        *s = at.sum([scaled(rho, *s), scaled(1.0 - rho, at.product(h, h))]);
        let roots = [*acc, *s].map(|x| at.root(at.sum([x, eps])));
        let d = at.product(at.quotient(roots[0], roots[1]), h);
        *acc = at.sum([scaled(rho, *acc), scaled(1.0 - rho, at.product(d, d))]);
        *theta = at.difference(*theta, scaled(self.lr(), d));
    }
}
