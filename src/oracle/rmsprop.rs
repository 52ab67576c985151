//! RMSprop in its libraries' own words.

use super::{Arithmetic, Bounded, Element, Textbook};
use crate::rules::{Hyperparameters as _, RmsPropConfig};

impl Textbook for RmsPropConfig {
    fn follow(&self, _step: u64, element: &mut Element<f64>, grad: f64) {
        let (theta, [square_avg, momentum_buffer, grad_avg, ..]) = element.split();
        let (lr, alpha, eps) = (self.lr(), self.alpha(), self.eps());
        let g = self.decay().follow(theta, grad);
        *square_avg = alpha * *square_avg + (1.0 - alpha) * g * g;
        let mut variance = *square_avg;
        if self.centered() {
            *grad_avg += (g - *grad_avg) * (1.0 - alpha);
            variance = (variance - *grad_avg * *grad_avg).max(0.0);
        }
        let scaled = match self.eps_in_sqrt() {
            // optax.scale_by_rms, keras.optimizers.RMSprop.
            true => g / (variance + eps).sqrt(),
            // torch.optim.rmsprop.
            false => g / (variance.sqrt() + eps),
        };
        let trace = |trace: &mut f64, update: f64| {
            *trace = update + self.momentum() * *trace;
            match self.nesterov() {
                true => update + self.momentum() * *trace,
                false => *trace,
            }
        };
        *theta -= match (self.momentum() != 0.0, self.lr_inside()) {
            (false, _) => lr * scaled,
            (true, true) => trace(momentum_buffer, lr * scaled),
            (true, false) => lr * trace(momentum_buffer, scaled),
        };
    }

    fn bound(&self, _step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
        let (theta, [s, b, avg, ..]) = element.split();
        let (alpha, eps) = (self.alpha(), at.scalar(self.eps()));
        let h = self.decay().bound(at, theta, grad);
        *s = at.average(alpha, *s, at.product(h, h));
        let mut w = *s;
        if self.centered() {
            *avg = at.average(alpha, *avg, h);
            w = at
                .difference(*s, at.product(*avg, *avg))
                .max(Bounded::default());
        }
        let denominator = match self.eps_in_sqrt() {
            true => at.root(at.sum([w, eps])),
            false => at.sum([at.root(w), eps]),
        };
        let d = at.quotient(h, denominator);
        let trace = |b: &mut Bounded, d: Bounded| {
            *b = at.sum([at.scaled(self.momentum(), *b), d]);
            match self.nesterov() {
                true => at.sum([at.scaled(self.momentum(), *b), d]),
                false => *b,
            }
        };
        let update = match (self.momentum() != 0.0, self.lr_inside()) {
            (false, _) => at.scaled(self.lr(), d),
            (true, true) => trace(b, at.scaled(self.lr(), d)),
            (true, false) => at.scaled(self.lr(), trace(b, d)),
        };
        *theta = at.difference(*theta, update);
    }
}
