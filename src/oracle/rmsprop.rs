//! RMSprop in its libraries' own words.

use super::decay::decay;
use super::{Arithmetic, Bounded, Textbook};
use crate::rules::RmsPropConfig;

impl Textbook for RmsPropConfig {
    fn follow(&self, _step: u64, theta: &mut f64, slots: &mut [f64], grad: f64) {
        let [square_avg, momentum_buffer, grad_avg, ..] = slots else {
            return;
        };
        let (lr, alpha, eps) = (self.lr(), self.alpha(), self.eps());
        let g = decay!(self).follow(theta, grad);
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

    fn bound(
        &self,
        _step: u64,
        at: Arithmetic,
        theta: &mut Bounded,
        slots: &mut [Bounded],
        grad: Bounded,
    ) {
        let [s, b, avg, ..] = slots else { return };
        let scaled = |k: f64, x: Bounded| at.product(at.scalar(k), x);
        let (alpha, eps) = (self.alpha(), at.scalar(self.eps()));
        let h = decay!(self).bound(at, theta, grad);
        *s = at.sum([scaled(alpha, *s), scaled(1.0 - alpha, at.product(h, h))]);
        let mut w = *s;
        if self.centered() {
            *avg = at.sum([scaled(alpha, *avg), scaled(1.0 - alpha, h)]);
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
            *b = at.sum([scaled(self.momentum(), *b), d]);
            match self.nesterov() {
                true => at.sum([scaled(self.momentum(), *b), d]),
                false => *b,
            }
        };
        let update = match (self.momentum() != 0.0, self.lr_inside()) {
            (false, _) => scaled(self.lr(), d),
            (true, true) => trace(b, scaled(self.lr(), d)),
            (true, false) => scaled(self.lr(), trace(b, d)),
        };
        *theta = at.difference(*theta, update);
    }
}
