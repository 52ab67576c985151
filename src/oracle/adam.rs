//! Adam, AdamW and AMSGrad in their libraries' own words.

use super::{Arithmetic, Bounded, Textbook};
use crate::rules::{AdamConfig, AdamForm, AmsGrad};

impl Textbook for AdamConfig {
    fn follow(&self, step: u64, theta: &mut f64, slots: &mut [f64], grad: f64) {
        let [m, v, largest, ..] = slots else { return };
        let (lr, t) = (self.lr(), step as f64);
        let (beta1, beta2) = (self.beta1(), self.beta2());
        // torch.optim.adam: maximize, L2, then the averages.
        let mut g = if self.maximize() { -grad } else { grad };
        if self.weight_decay() != 0.0 {
            g += self.weight_decay() * *theta;
        }
        *theta -= lr * self.decoupled_weight_decay() * *theta;
        *m += (g - *m) * (1.0 - beta1);
        *v = beta2 * *v + (1.0 - beta2) * g * g;
        let (bias1, bias2) = (1.0 - beta1.powf(t), 1.0 - beta2.powf(t));
        let mut v = *v;
        *theta -= match self.form() {
            // optax.scale_by_amsgrad keeps the largest corrected average.
            AdamForm::Corrected if self.amsgrad() == AmsGrad::OfCorrected => {
                *largest = largest.max(v / bias2);
                lr * (*m / bias1) / ((*largest + self.eps_root()).sqrt() + self.eps())
            }
            AdamForm::Corrected => {
                if self.amsgrad() == AmsGrad::OfAverage {
                    *largest = largest.max(v);
                    v = *largest;
                }
                lr * (*m / bias1) / ((v / bias2 + self.eps_root()).sqrt() + self.eps())
            }
            // keras.optimizers.Adam.update_step.
            AdamForm::EpsilonHat => {
                let alpha = lr * bias2.sqrt() / bias1;
                if self.amsgrad() == AmsGrad::OfAverage {
                    *largest = largest.max(v);
                    v = *largest;
                }
                *m * alpha / (v.sqrt() + self.eps())
            }
        };
    }

    fn bound(
        &self,
        step: u64,
        at: Arithmetic,
        theta: &mut Bounded,
        slots: &mut [Bounded],
        grad: Bounded,
    ) {
        let [m, v, largest, ..] = slots else { return };
        let t = step as f64;
        let scaled = |k: f64, x: Bounded| at.product(at.scalar(k), x);
        let (bias1, bias2) = (1.0 - self.beta1().powf(t), 1.0 - self.beta2().powf(t));
        let (a, r) = match self.form() {
            AdamForm::Corrected => (self.lr() / bias1, 1.0 / bias2),
            AdamForm::EpsilonHat => (self.lr() * bias2.sqrt() / bias1, 1.0),
        };
        let mut h = if self.maximize() {
            grad.negative()
        } else {
            grad
        };
        if self.weight_decay() != 0.0 {
            h = at.sum([h, scaled(self.weight_decay(), *theta)]);
        }
        *m = at.sum([scaled(self.beta1(), *m), scaled(1.0 - self.beta1(), h)]);
        let square = at.product(h, h);
        *v = at.sum([scaled(self.beta2(), *v), scaled(1.0 - self.beta2(), square)]);
        let w = match self.amsgrad() {
            AmsGrad::Off => scaled(r, *v),
            AmsGrad::OfAverage => {
                *largest = largest.max(*v);
                scaled(r, *largest)
            }
            AmsGrad::OfCorrected => {
                *largest = largest.max(scaled(r, *v));
                *largest
            }
        };
        let root = at.root(at.sum([w, at.scalar(self.eps_root())]));
        let update = at.quotient(*m, at.sum([root, at.scalar(self.eps())]));
        let rho = 1.0 - self.lr() * self.decoupled_weight_decay();
        *theta = at.difference(scaled(rho, *theta), scaled(a, update));
    }
}
