//! Yogi in optax's own words.

use super::arithmetic::{bias_correction, sign};
use super::{Arithmetic, Bounded, Element, Textbook};
use crate::rules::{Hyperparameters as _, YogiConfig};

impl Textbook for YogiConfig {
    fn follow(&self, step: u64, element: &mut Element<f64>, grad: f64) {
        let (theta, [mu, nu, ..]) = element.split();
        let t = step as f64;
        let (b1, b2) = (self.beta1(), self.beta2());
        let g = self.decay().follow(theta, grad);
        *mu = (1.0 - b1) * g + b1 * *mu;
        *nu -= (1.0 - b2) * sign(*nu - g * g) * g * g;
        let mu_hat = *mu / (1.0 - b1.powf(t));
        let nu_hat = *nu / (1.0 - b2.powf(t));
        *theta -= self.lr() * mu_hat / (nu_hat.sqrt() + self.eps());
    }

    fn bound(&self, step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
        let (theta, [m, v, ..]) = element.split();
        let [bias1, bias2] = [self.beta1(), self.beta2()].map(|beta| bias_correction(beta, step));
        let h = self.decay().bound(at, theta, grad);
        *m = at.average(self.beta1(), *m, h);
        let square = at.product(h, h);
        let moved = at.product(at.difference(*v, square).sign(), square);
        *v = at.difference(*v, at.scaled(1.0 - self.beta2(), moved));
        let root = at.root(at.scaled(1.0 / bias2, *v));
        let update = at.quotient(*m, at.sum([root, at.scalar(self.eps())]));
        *theta = at.difference(*theta, at.scaled(self.lr() / bias1, update));
    }
}
