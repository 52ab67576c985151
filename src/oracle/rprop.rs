//! Rprop in PyTorch's own words.

use super::arithmetic::sign;
use super::{Arithmetic, Bounded, Element, Textbook};
use crate::rules::{Hyperparameters as _, RpropConfig};

impl Textbook for RpropConfig {
    fn follow(&self, step: u64, element: &mut Element<f64>, grad: f64) {
        let (theta, [prev, step_size, ..]) = element.split();
        let mut grad = self.decay().follow(theta, grad);
        if step == 1 {
            *step_size = self.lr();
        }
        let agreement = grad * *prev;
        if agreement > 0.0 {
            *step_size *= self.eta_plus();
        } else if agreement < 0.0 {
            *step_size *= self.eta_minus();
            grad = 0.0;
        }
        *step_size = step_size.clamp(self.step_size_min(), self.step_size_max());
        *theta -= sign(grad) * *step_size;
        *prev = grad;
    }

    fn bound(&self, step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
        let (theta, [prev, size, ..]) = element.split();
        let h = self.decay().bound(at, theta, grad);
        if step == 1 {
            *size = at.scalar(self.lr());
        }
        let agreement = at.product(h.sign(), prev.sign());
        // Both rise with the agreement, so that they lie between what its ends make of them.
        let factor = |agreement: f64| match agreement {
            x if x > 0.0 => at.scalar(self.eta_plus()),
            x if x < 0.0 => at.scalar(self.eta_minus()),
            _ => at.scalar(1.0),
        };
        let factor = Bounded {
            exact: factor(agreement.exact).exact,
            low: factor(agreement.low).low,
            high: factor(agreement.high).high,
        };
        let kept = |agreement: f64| if agreement < 0.0 { 0.0 } else { 1.0 };
        let d = Bounded {
            exact: kept(agreement.exact) * h.exact,
            low: (kept(agreement.low) * h.low).min(kept(agreement.high) * h.low),
            high: (kept(agreement.low) * h.high).max(kept(agreement.high) * h.high),
        };
        let least = at.scalar(self.step_size_min());
        let most = at.scalar(self.step_size_max());
        let grown = at.product(*size, factor).max(least);
        *size = grown.negative().max(most.negative()).negative();
        *prev = d;
        *theta = at.difference(*theta, at.product(d.sign(), *size));
    }
}
