//! Adagrad in its libraries' own words.

use super::{Arithmetic, Bounded, Element, Textbook};
use crate::rules::{AdagradConfig, Hyperparameters as _};

impl Textbook for AdagradConfig {
    fn follow(&self, step: u64, element: &mut Element<f64>, grad: f64) {
        let (theta, [sum, ..]) = element.split();
        let g = self.decay().follow(theta, grad);
        // torch.optim.adagrad.
        let clr = self.lr() / (1.0 + (step as f64 - 1.0) * self.lr_decay());
        *sum += g * g;
        *theta -= match self.eps_in_sqrt() {
            // optax.scale_by_rss, keras.optimizers.Adagrad.
            true => clr * g / (*sum + self.eps()).sqrt(),
            false => clr * g / (sum.sqrt() + self.eps()),
        };
    }

    fn bound(&self, step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
        let (theta, [sum, ..]) = element.split();
        let eps = at.scalar(self.eps());
        let h = self.decay().bound(at, theta, grad);
        *sum = at.sum([*sum, at.product(h, h)]);
        let denominator = match self.eps_in_sqrt() {
            true => at.root(at.sum([*sum, eps])),
            false => at.sum([at.root(*sum), eps]),
        };
        let a = self.lr() / (1.0 + (step as f64 - 1.0) * self.lr_decay());
        let update = at.product(at.scalar(a), at.quotient(h, denominator));
        *theta = at.difference(*theta, update);
    }
}
