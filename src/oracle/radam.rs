//! RAdam in its libraries' own words.

use super::arithmetic::bias_correction;
use super::{Arithmetic, Bounded, Element, Textbook};
use crate::rules::{AdamForm, Hyperparameters as _, RAdamConfig};

/// The rectification of `torch.optim.radam`, as far as there is one.
fn rectification(beta2: f64, t: f64) -> Option<f64> {
    let rho_inf = 2.0 / (1.0 - beta2) - 1.0;
    let rho_t = rho_inf - 2.0 * t * beta2.powf(t) / (1.0 - beta2.powf(t));
    (rho_t > 5.0).then(|| {
        ((rho_t - 4.0) * (rho_t - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho_t))
            .sqrt()
    })
}

impl Textbook for RAdamConfig {
    fn follow(&self, step: u64, element: &mut Element<f64>, grad: f64) {
        let (theta, [m, v, ..]) = element.split();
        let (lr, t) = (self.lr(), step as f64);
        let g = self.decay().follow(theta, grad);
        *m += (g - *m) * (1.0 - self.beta1());
        *v = self.beta2() * *v + (1.0 - self.beta2()) * g * g;
        let [bias1, bias2] = [self.beta1(), self.beta2()].map(|beta| bias_correction(beta, step));
        let corrected = *m / bias1;
        *theta -= match (rectification(self.beta2(), t), self.form()) {
            (None, _) => lr * corrected,
            (Some(rect), AdamForm::EpsilonHat) => {
                lr * corrected * rect * bias2.sqrt() / (v.sqrt() + self.eps())
            }
            // optax.scale_by_radam.
            (Some(rect), AdamForm::Corrected) => {
                lr * rect * corrected / ((*v / bias2 + self.eps_root()).sqrt() + self.eps())
            }
        };
    }

    fn bound(&self, step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
        let (theta, [m, v, ..]) = element.split();
        let t = step as f64;
        let [bias1, bias2] = [self.beta1(), self.beta2()].map(|beta| bias_correction(beta, step));
        let h = self.decay().bound(at, theta, grad);
        *m = at.average(self.beta1(), *m, h);
        *v = at.average(self.beta2(), *v, at.product(h, h));
        let mut a = self.lr() / bias1;
        let mut u = *m;
        if let Some(rect) = rectification(self.beta2(), t) {
            a *= rect;
            let w = match self.form() {
                AdamForm::EpsilonHat => {
                    a *= bias2.sqrt();
                    *v
                }
                AdamForm::Corrected => {
                    at.sum([at.scaled(1.0 / bias2, *v), at.scalar(self.eps_root())])
                }
            };
            u = at.quotient(*m, at.sum([at.root(w), at.scalar(self.eps())]));
        }
        *theta = at.difference(*theta, at.scaled(a, u));
    }
}
