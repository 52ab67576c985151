//! NAdam in its libraries' own words.

use super::{Arithmetic, Bounded, Element, Textbook};
use crate::rules::{Hyperparameters as _, NAdamConfig};

/// `mu_t` and the product of all up to it, of `torch.optim.nadam`; optax has `beta1` throughout.
fn momenta(config: &NAdamConfig, step: u64) -> (f64, f64, f64) {
    let mu = |t: f64| match config.momentum_schedule() {
        true => config.beta1() * (1.0 - 0.5 * 0.96_f64.powf(t * config.momentum_decay())),
        false => config.beta1(),
    };
    let product = (1..=step).map(|t| mu(t as f64)).product();
    (mu(step as f64), mu(step as f64 + 1.0), product)
}

impl Textbook for NAdamConfig {
    fn follow(&self, step: u64, element: &mut Element<f64>, grad: f64) {
        let (theta, [m, v, ..]) = element.split();
        let lr = self.lr();
        let g = self.decay().follow(theta, grad);
        *m += (g - *m) * (1.0 - self.beta1());
        *v = self.beta2() * *v + (1.0 - self.beta2()) * g * g;
        let bias2 = 1.0 - self.beta2().powf(step as f64);
        let denominator = (*v / bias2 + self.eps_root()).sqrt() + self.eps();
        let (mu, mu_next, product) = momenta(self, step);
        *theta -= lr * (1.0 - mu) / (1.0 - product) * g / denominator;
        *theta -= lr * mu_next / (1.0 - product * mu_next) * *m / denominator;
    }

    fn bound(&self, step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
        let (theta, [m, v, ..]) = element.split();
        let (lr, bias2) = (self.lr(), 1.0 - self.beta2().powf(step as f64));
        let (mu, mu_next, product) = momenta(self, step);
        let h = self.decay().bound(at, theta, grad);
        *m = at.average(self.beta1(), *m, h);
        *v = at.average(self.beta2(), *v, at.product(h, h));
        let root = at.root(at.sum([at.scaled(1.0 / bias2, *v), at.scalar(self.eps_root())]));
        let of_m = at.scaled(lr * mu_next / (1.0 - product * mu_next), *m);
        let of_h = at.scaled(lr * (1.0 - mu) / (1.0 - product), h);
        let denominator = at.sum([root, at.scalar(self.eps())]);
        let update = at.quotient(at.sum([of_m, of_h]), denominator);
        *theta = at.difference(*theta, update);
    }
}
