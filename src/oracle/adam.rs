//! Adam, AdamW and AMSGrad in their libraries' own words.

use super::{Agreement, Disagreement, Rounding, check};
use crate::rules::{AdamConfig, AdamForm, AmsGrad};

/// A value and a bound on how far its `f32` twin may be off.
#[derive(Clone, Copy, Debug, Default)]
struct Bounded {
    exact: f64,
    bound: f64,
}

impl Bounded {
    /// The most that the twin can be in magnitude.
    fn reach(self) -> f64 {
        self.exact.abs() + self.bound
    }

    /// The larger of two values that are not negative: no farther off than the one that is farther off.
    fn max(self, other: Self) -> Self {
        Self {
            exact: self.exact.max(other.exact),
            bound: self.bound.max(other.bound),
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Element {
    theta: Bounded,
    exp_avg: Bounded,
    exp_avg_sq: Bounded,
    max_exp_avg_sq: Bounded,
}

/// The exact trajectory of one tensor under Adam.
///
/// ```
/// use wgpu_optim::oracle::{AdamOracle, Rounding};
/// use wgpu_optim::{AdamConfig, CpuOptimizer};
///
/// let config = AdamConfig::adamw(1e-2).build()?;
/// let mut params = [0.3, -0.7];
/// let mut oracle = AdamOracle::new(&params, Rounding::NEAREST);
/// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
/// for grads in [[0.2, 0.1], [0.0, -0.3]] {
///     optimizer.step(&mut [&mut params], &[&grads])?;
///     oracle.step(&config, &grads);
/// }
/// oracle.check_params(&params)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct AdamOracle {
    elements: Vec<Element>,
    rounding: Rounding,
    applied_steps: u64,
}

impl AdamOracle {
    /// Starts from these parameters with averages of zero.
    #[must_use]
    pub fn new(params: &[f32], rounding: Rounding) -> Self {
        let at = |theta: &f32| Element {
            theta: Bounded {
                exact: f64::from(*theta),
                bound: 0.0,
            },
            ..Element::default()
        };
        Self {
            elements: params.iter().map(at).collect(),
            rounding,
            applied_steps: 0,
        }
    }

    /// Applies one step; `grads` holds one gradient per parameter.
    pub fn step(&mut self, config: &AdamConfig, grads: &[f32]) {
        self.applied_steps += 1;
        for (element, grad) in self.elements.iter_mut().zip(grads) {
            let before = *element;
            element.follow_textbook(config, self.applied_steps, f64::from(*grad));
            element.widen_bounds(
                config,
                self.applied_steps,
                self.rounding,
                &before,
                f64::from(*grad),
            );
        }
    }

    /// The exact parameters.
    pub fn params(&self) -> impl ExactSizeIterator<Item = f64> {
        self.elements.iter().map(|element| element.theta.exact)
    }

    /// The exact values of a slot.
    pub fn slot(&self, slot: &str) -> impl ExactSizeIterator<Item = f64> {
        let bounded = Element::slot(slot);
        self.elements
            .iter()
            .map(move |element| bounded(element).exact)
    }

    /// Compares every parameter.
    ///
    /// # Errors
    /// [`Disagreement`] naming the element that exceeds its bound the most.
    pub fn check_params(&self, actual: &[f32]) -> Result<Agreement, Disagreement> {
        let expected = self.elements.iter().map(|e| (e.theta.exact, e.theta.bound));
        check("params", expected, actual)
    }

    /// Compares every value of a slot.
    ///
    /// # Errors
    /// [`Disagreement`] naming the element that exceeds its bound the most.
    pub fn check_slot(
        &self,
        slot: &'static str,
        actual: &[f32],
    ) -> Result<Agreement, Disagreement> {
        let bounded = Element::slot(slot);
        let expected = self.elements.iter().map(|element| {
            let value = bounded(element);
            (value.exact, value.bound)
        });
        check(slot, expected, actual)
    }
}

impl Element {
    fn slot(slot: &str) -> fn(&Self) -> Bounded {
        match slot {
            "exp_avg" => |element| element.exp_avg,
            "exp_avg_sq" => |element| element.exp_avg_sq,
            _ => |element| element.max_exp_avg_sq,
        }
    }

    /// The step in the library's own words, not through the kernel's scalars.
    fn follow_textbook(&mut self, config: &AdamConfig, t: u64, grad: f64) {
        let (lr, t) = (config.lr(), t as f64);
        let (beta1, beta2) = (config.beta1(), config.beta2());
        let theta = &mut self.theta.exact;
        // torch.optim.adam: maximize, L2, then the averages.
        let mut g = if config.maximize() { -grad } else { grad };
        if config.weight_decay() != 0.0 {
            g += config.weight_decay() * *theta;
        }
        *theta -= lr * config.decoupled_weight_decay() * *theta;
        let m = &mut self.exp_avg.exact;
        *m += (g - *m) * (1.0 - beta1);
        let v = &mut self.exp_avg_sq.exact;
        *v = beta2 * *v + (1.0 - beta2) * g * g;
        let (m, v) = (*m, *v);
        let largest = &mut self.max_exp_avg_sq.exact;
        let (bias1, bias2) = (1.0 - beta1.powf(t), 1.0 - beta2.powf(t));
        *theta -= match config.form() {
            // optax.scale_by_amsgrad keeps the largest corrected average.
            AdamForm::Corrected if config.amsgrad() == AmsGrad::OfCorrected => {
                *largest = largest.max(v / bias2);
                lr * (m / bias1) / ((*largest + config.eps_root()).sqrt() + config.eps())
            }
            AdamForm::Corrected => {
                let mut v = v;
                if config.amsgrad() == AmsGrad::OfAverage {
                    *largest = largest.max(v);
                    v = *largest;
                }
                lr * (m / bias1) / ((v / bias2 + config.eps_root()).sqrt() + config.eps())
            }
            // keras.optimizers.Adam.update_step.
            AdamForm::EpsilonHat => {
                let alpha = lr * bias2.sqrt() / bias1;
                let mut v = v;
                if config.amsgrad() == AmsGrad::OfAverage {
                    *largest = largest.max(v);
                    v = *largest;
                }
                m * alpha / (v.sqrt() + config.eps())
            }
        };
    }

    /// The error analysis of the kernel's statements; `before` is the element before the step.
    fn widen_bounds(
        &mut self,
        config: &AdamConfig,
        t: u64,
        rounding: Rounding,
        before: &Self,
        grad: f64,
    ) {
        let gamma = |roundings| rounding.gamma(roundings);
        // What is below the normal range may be flushed to zero, before and after an operation.
        let tiny = f64::from(f32::MIN_POSITIVE);
        let t = t as f64;
        let (beta1, beta2) = (config.beta1(), config.beta2());
        let (bias1, bias2) = (1.0 - beta1.powf(t), 1.0 - beta2.powf(t));

        // h = g + lambda*theta
        let lambda = config.weight_decay();
        let sign = if config.maximize() { -1.0 } else { 1.0 };
        let h = Bounded {
            exact: sign * grad + lambda * before.theta.exact,
            bound: match lambda {
                0.0 => 0.0,
                lambda => {
                    lambda * before.theta.bound
                        + gamma(1) * grad.abs()
                        + gamma(3) * lambda * before.theta.reach()
                        + 2.0 * tiny * (1.0 + lambda)
                }
            },
        };

        // m = beta1*m + c1*h
        let c1 = 1.0 - beta1;
        self.exp_avg.bound = beta1 * before.exp_avg.bound
            + c1 * h.bound
            + gamma(3) * (beta1 * before.exp_avg.reach() + c1 * h.reach())
            + 4.0 * tiny;

        // v = beta2*v + c2*h^2
        let c2 = 1.0 - beta2;
        let square_bound = h.bound * (2.0 * h.exact.abs() + h.bound);
        self.exp_avg_sq.bound = beta2 * before.exp_avg_sq.bound
            + c2 * square_bound
            + gamma(4) * (beta2 * before.exp_avg_sq.reach() + c2 * h.reach() * h.reach())
            + 5.0 * tiny;

        // w = r*v, and the largest of either
        let r = match config.form() {
            AdamForm::Corrected => 1.0 / bias2,
            AdamForm::EpsilonHat => 1.0,
        };
        let corrected = |w: Bounded| Bounded {
            exact: r * w.exact,
            bound: r * w.bound + gamma(2) * r * w.reach() + tiny * (1.0 + r),
        };
        let largest = &mut self.max_exp_avg_sq;
        let w = match config.amsgrad() {
            AmsGrad::Off => corrected(self.exp_avg_sq),
            AmsGrad::OfAverage => {
                largest.bound = before.max_exp_avg_sq.max(self.exp_avg_sq).bound;
                corrected(*largest)
            }
            AmsGrad::OfCorrected => {
                largest.bound = before.max_exp_avg_sq.max(corrected(self.exp_avg_sq)).bound;
                *largest
            }
        };

        // sqrt(w + eps_root) + eps
        let under = Bounded {
            exact: w.exact + config.eps_root(),
            bound: w.bound + gamma(2) * (w.reach() + config.eps_root()),
        };
        let root = under.exact.sqrt();
        let moved = (under.exact + under.bound).sqrt() - root;
        let moved = moved.max(root - (under.exact - under.bound).max(0.0).sqrt());
        let root = Bounded {
            exact: root,
            bound: moved + gamma(rounding.root) * (root + moved),
        };
        let denominator = Bounded {
            exact: root.exact + config.eps(),
            bound: root.bound + gamma(2) * (root.reach() + config.eps()) + tiny,
        };

        // a * m / denominator
        let quotient = self.exp_avg.exact / denominator.exact;
        let least = denominator.exact - denominator.bound;
        let mut bound = match self.exp_avg.reach() {
            0.0 => 0.0,
            _ if least <= 0.0 => f64::INFINITY,
            _ => (self.exp_avg.bound + quotient.abs() * denominator.bound) / least,
        };
        bound += gamma(rounding.division) * (quotient.abs() + bound) + tiny;
        let a = match config.form() {
            AdamForm::Corrected => config.lr() / bias1,
            AdamForm::EpsilonHat => config.lr() * bias2.sqrt() / bias1,
        };
        let update = Bounded {
            exact: a * quotient,
            bound: a * bound + gamma(2) * a * (quotient.abs() + bound) + tiny * (1.0 + a),
        };

        // theta = rho*theta - update
        let rho = 1.0 - config.lr() * config.decoupled_weight_decay();
        let rho_roundings = match config.decoupled_weight_decay() {
            0.0 => 1,
            _ => 3,
        };
        self.theta.bound = rho * before.theta.bound
            + gamma(rho_roundings) * rho * before.theta.reach()
            + update.bound
            + gamma(1) * update.reach()
            + 2.0 * tiny;
    }
}
