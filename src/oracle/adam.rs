//! Adam, AdamW and AMSGrad in their libraries' own words.

use super::arithmetic::bias_correction;
use super::{Arithmetic, Bounded, Element, Textbook};
use crate::rules::{AdamConfig, AdamForm, AmsGrad, Hyperparameters as _};

impl Textbook for AdamConfig {
    fn follow(&self, step: u64, element: &mut Element<f64>, grad: f64) {
        let (theta, [m, v, largest, ..]) = element.split();
        let (lr, beta1, beta2) = (self.lr(), self.beta1(), self.beta2());
        // torch.optim.adam.
        let g = self.decay().follow(theta, grad);
        *m += (g - *m) * (1.0 - beta1);
        *v = beta2 * *v + (1.0 - beta2) * g * g;
        let [bias1, bias2] = [beta1, beta2].map(|beta| bias_correction(beta, step));
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

    fn bound(&self, step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
        let (theta, [m, v, largest, ..]) = element.split();
        let [bias1, bias2] = [self.beta1(), self.beta2()].map(|beta| bias_correction(beta, step));
        let is_corrected = self.amsgrad() == AmsGrad::OfCorrected;
        // What stands outside the root, by which a and eps are multiplied.
        let (taken_out, eps_scale) = match (self.form(), is_corrected) {
            (AdamForm::Corrected, true) => (1.0, 1.0),
            (AdamForm::Corrected, false) => (bias2.sqrt(), bias2.sqrt()),
            (AdamForm::EpsilonHat, _) => (bias2.sqrt(), 1.0),
        };
        let h = self.decay().bound(at, theta, grad);
        *m = at.between(*m, h, 1.0 - self.beta1());
        *v = at.average(self.beta2(), *v, at.product(h, h));
        let w = match self.amsgrad() {
            AmsGrad::Off => *v,
            AmsGrad::OfAverage => {
                *largest = largest.max(*v);
                *largest
            }
            AmsGrad::OfCorrected => {
                *largest = largest.max(at.scaled(1.0 / bias2, *v));
                *largest
            }
        };
        let eps_root = at.scalar(self.eps_root() * eps_scale * eps_scale);
        let root = at.root(at.sum([w, eps_root]));
        let update = at.quotient(*m, at.sum([root, at.scalar(self.eps() * eps_scale)]));
        let a = self.lr() * taken_out / bias1;
        *theta = at.difference(*theta, at.scaled(a, update));
    }
}
