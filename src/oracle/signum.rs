//! Signum and signSGD in the paper's own words.

use super::arithmetic::sign;
use super::decay::decay;
use super::{Arithmetic, Bounded, Textbook};
use crate::rules::SignumConfig;

impl Textbook for SignumConfig {
    fn follow(&self, _step: u64, theta: &mut f64, slots: &mut [f64], grad: f64) {
        let [m, ..] = slots else { return };
        let g = decay!(self).follow(theta, grad);
        *theta -= self.lr()
            * match self.momentum() {
                0.0 => sign(g),
                beta => {
                    *m = beta * *m + (1.0 - beta) * g;
                    sign(*m)
                }
            };
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
        let u = match self.momentum() {
            0.0 => h.sign(),
            beta => {
                *m = at.sum([scaled(beta, *m), scaled(1.0 - beta, h)]);
                m.sign()
            }
        };
        *theta = at.difference(*theta, scaled(self.lr(), u));
    }
}
