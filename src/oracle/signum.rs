//! Signum and signSGD in the paper's own words.

use super::arithmetic::sign;
use super::{Arithmetic, Bounded, Element, Textbook};
use crate::rules::{Hyperparameters as _, SignumConfig};

impl Textbook for SignumConfig {
    fn follow(&self, _step: u64, element: &mut Element<f64>, grad: f64) {
        let (theta, [m, ..]) = element.split();
        let g = self.decay().follow(theta, grad);
        *theta -= self.lr()
            * match self.momentum() {
                0.0 => sign(g),
                beta => {
                    *m = beta * *m + (1.0 - beta) * g;
                    sign(*m)
                }
            };
    }

    fn bound(&self, _step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
        let (theta, [m, ..]) = element.split();
        let h = self.decay().bound(at, theta, grad);
        let u = match self.momentum() {
            0.0 => h.sign(),
            beta => {
                *m = at.average(beta, *m, h);
                m.sign()
            }
        };
        *theta = at.difference(*theta, at.scaled(self.lr(), u));
    }
}
