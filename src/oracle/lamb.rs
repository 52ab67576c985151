//! LAMB, as timm's and optax's source says it.

use super::arithmetic::bias_correction;
use super::{Arithmetic, Bounded, Element, Textbook};
use crate::rules::{Hyperparameters as _, LambConfig, MAX_SUMS};

impl LambConfig {
    /// The averages, and the update before it is scaled.
    fn follow_update(&self, step: u64, element: &Element<f64>, grad: f64) -> (f64, f64, f64) {
        let Element { theta, slots, .. } = *element;
        let h = self.decay().follow_direction(theta, grad);
        let [m, v, ..] = slots;
        let m = self.beta1() * m + (1.0 - self.beta1()) * h;
        let v = self.beta2() * v + (1.0 - self.beta2()) * h * h;
        let [bias1, bias2] = [self.beta1(), self.beta2()].map(|beta| bias_correction(beta, step));
        let adam = (m / bias1) / ((v / bias2 + self.eps_root()).sqrt() + self.eps());
        (m, v, adam + self.decoupled_weight_decay() * theta)
    }

    fn bound_update(
        &self,
        step: u64,
        at: Arithmetic,
        element: &Element<Bounded>,
        grad: Bounded,
    ) -> [Bounded; 3] {
        let Element { theta, slots, .. } = *element;
        let h = self.decay().bound_direction(at, theta, grad);
        let [m, v, ..] = slots;
        let m = at.between(m, h, 1.0 - self.beta1());
        let v = at.average(self.beta2(), v, at.product(h, h));
        let [bias1, bias2] = [self.beta1(), self.beta2()].map(|beta| bias_correction(beta, step));
        let root = at.root(at.sum([v, at.scalar(self.eps_root() * bias2)]));
        let divisor = at.sum([root, at.scalar(self.eps() * bias2.sqrt())]);
        let adam = at.scaled(bias2.sqrt() / bias1, at.quotient(m, divisor));
        let decay = at.scaled(self.decoupled_weight_decay(), theta);
        [m, v, at.sum([adam, decay])]
    }
}

impl Textbook for LambConfig {
    fn follow(&self, step: u64, element: &mut Element<f64>, grad: f64) {
        let (m, v, update) = self.follow_update(step, element, grad);
        let [params_norm, update_norm] = [element.sums[0], element.sums[1]].map(f64::sqrt);
        let mut trust_ratio = match params_norm > 0.0 && update_norm > 0.0 && self.adapts() {
            true => params_norm / update_norm,
            false => 1.0,
        };
        if self.trust_clip() {
            trust_ratio = trust_ratio.min(1.0);
        }
        (element.slots[0], element.slots[1]) = (m, v);
        element.theta -= self.lr() * trust_ratio * update;
    }

    fn bound(&self, step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
        let [m, v, update] = self.bound_update(step, at, element, grad);
        let [params_sq, update_sq, ..] = element.sums;
        let is_there = |sum: Bounded| sum.exact > 0.0;
        let mut lr = at.scalar(self.lr());
        if self.adapts() && is_there(params_sq) && is_there(update_sq) {
            let mut ratio = at.quotient(at.root(params_sq), at.root(update_sq));
            if self.trust_clip() {
                ratio = ratio.negative().max(at.scalar(-1.0)).negative();
            }
            lr = at.product(lr, ratio);
        }
        (element.slots[0], element.slots[1]) = (m, v);
        element.theta = at.difference(element.theta, at.product(lr, update));
    }

    fn follow_sums(&self, step: u64, element: &Element<f64>, grad: f64) -> [f64; MAX_SUMS] {
        let (_, _, update) = self.follow_update(step, element, grad);
        [element.theta.powi(2), update.powi(2), 0.0, 0.0]
    }

    fn bound_sums(
        &self,
        step: u64,
        at: Arithmetic,
        element: &Element<Bounded>,
        grad: Bounded,
    ) -> [Bounded; MAX_SUMS] {
        let [_, _, update] = self.bound_update(step, at, element, grad);
        let mut sums = [Bounded::default(); MAX_SUMS];
        sums[0] = at.square(element.theta);
        sums[1] = at.square(update);
        sums
    }
}
