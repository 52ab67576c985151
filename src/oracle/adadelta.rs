//! Adadelta in PyTorch's own words.

use super::{Arithmetic, Bounded, Element, Textbook};
use crate::rules::{AdadeltaConfig, Hyperparameters as _};

impl Textbook for AdadeltaConfig {
    fn follow(&self, _step: u64, element: &mut Element<f64>, grad: f64) {
        let (theta, [square_avg, acc_delta, ..]) = element.split();
        let (rho, eps) = (self.rho(), self.eps());
        let g = self.decay().follow(theta, grad);
        *square_avg = rho * *square_avg + (1.0 - rho) * g * g;
        let std = (*square_avg + eps).sqrt();
        let delta = (*acc_delta + eps).sqrt() / std * g;
        *acc_delta = rho * *acc_delta + (1.0 - rho) * delta * delta;
        *theta -= self.lr() * delta;
    }

    fn bound(&self, _step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
        let (theta, [s, acc, ..]) = element.split();
        let (rho, eps) = (self.rho(), at.scalar(self.eps()));
        let h = self.decay().bound(at, theta, grad);
        *s = at.average(rho, *s, at.product(h, h));
        let roots = [*acc, *s].map(|x| at.root(at.sum([x, eps])));
        let d = at.product(at.quotient(roots[0], roots[1]), h);
        *acc = at.average(rho, *acc, at.product(d, d));
        *theta = at.difference(*theta, at.scaled(self.lr(), d));
    }
}
