//! Adagrad.

use super::config::{config, scalars};
use super::elementwise::{Element, ElementRule, Pass, shader};
use super::error::{check_held, check_range, unsupported};
use super::{ConfigError, KnownRule, RulePreset, Slot, Slots};

config! {
    /// Checked hyper-parameters of Adagrad (Duchi, Hazan and Singer 2011,
    /// <https://jmlr.org/papers/v12/duchi11a.html>).
    ///
    /// ```text
    /// h     = g + coupled_weight_decay*theta       g negated to maximize
    /// sum   <- sum + h^2                           from initial_accumulator_value
    /// theta <- (1 - lr*decoupled_weight_decay)*theta
    ///          - lr/(1 + (t-1)*lr_decay) * h / (sqrt(sum) + eps)
    /// ```
    ///
    /// at step `t`, which counts from one; with [`eps_in_sqrt`](Self::eps_in_sqrt) `h / sqrt(sum + eps)`. Slot: `sum`;
    /// 20 bytes per element and step.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, AdagradConfig};
    ///
    /// let config = AdagradConfig::builder(1e-2).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
    /// let mut weight = [1.0, -1.0];
    /// optimizer.step(&mut [&mut weight], &[&[0.5, -2.0]])?;
    /// assert!(weight[0] < 1.0 && weight[1] > -1.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub struct AdagradConfig, built by AdagradConfigBuilder {
        /// The rate at which the learning rate falls with the steps.
        lr_decay: f64 = 0.0,
        /// Keeps the denominator from zero.
        eps: f64 = 1e-10,
        /// Whether epsilon is added under the root, as in optax and Keras, or to it, as in PyTorch.
        eps_in_sqrt: bool = false,
        /// The first value of `sum`.
        initial_accumulator_value: f64 = 0.0,
    }

    /// PyTorch's `Adagrad`: eps 1e-10 beside the root, sums from zero, no decay.
    pub const fn builder(lr);
}

impl AdagradConfig {
    /// optax's `adagrad`: eps 1e-7 under the root, sums from 0.1. Keras's `Adagrad` is the same with a decoupled decay.
    pub const fn optax(lr: f64) -> AdagradConfigBuilder {
        Self::builder(lr)
            .eps(1e-7)
            .eps_in_sqrt(true)
            .initial_accumulator_value(0.1)
    }

    fn check(&self) -> Result<(), ConfigError> {
        check_range("lr_decay", self.lr_decay, f64::INFINITY)?;
        check_held("eps", self.eps, 1.0)?;
        check_held(
            "initial_accumulator_value",
            self.initial_accumulator_value,
            1.0,
        )?;
        if self.eps_in_sqrt && self.eps == 0.0 {
            return unsupported(
                "eps_in_sqrt, eps",
                "an epsilon under the root is above zero",
            );
        }
        Ok(())
    }
}

scalars! {
    struct Coefficients {
        eps, a,
    }
}

impl ElementRule for AdagradConfig {
    type K = Coefficients;
    shader!("adagrad");

    fn slots(&self) -> Slots {
        let start = self.initial_accumulator_value as f32;
        [Slot::new("sum").starting_at(start)].into()
    }

    fn terms(&self) -> Vec<(&'static str, bool)> {
        vec![("EPS_IN_SQRT", self.eps_in_sqrt)]
    }

    /// Only the decay of the learning rate tells steps apart.
    fn phase(&self, applied_steps: u64) -> u64 {
        match self.lr_decay {
            0.0 => 0,
            _ => applied_steps,
        }
    }

    fn coefficients(&self, applied_steps: u64) -> Coefficients<f64> {
        Coefficients {
            eps: self.eps,
            a: self.lr / (1.0 + applied_steps as f64 * self.lr_decay),
        }
    }

    fn step(&self, pass: Pass<'_, '_>) {
        pass.over(*self);
    }
}

impl Element<Coefficients, 1> for AdagradConfig {
    #[inline(always)]
    fn update(self, k: Coefficients, theta: f32, h: f32, [sum]: [f32; 1]) -> (f32, [f32; 1]) {
        let sum = sum + h * h;
        let d = if self.eps_in_sqrt {
            h / (sum + k.eps).sqrt()
        } else {
            h / (sum.sqrt() + k.eps)
        };
        (theta - k.a * d, [sum])
    }
}

impl KnownRule for AdagradConfig {
    const PRESETS: &'static [RulePreset] = &[
        RulePreset::new("adagrad", "pytorch", |lr| Self::builder(lr).into()),
        RulePreset::new("adagrad", "optax", |lr| Self::optax(lr).into()),
        RulePreset::new("adagrad", "keras", |lr| {
            Self::optax(lr).decoupling(0.0).into()
        }),
    ];

    fn is_pytorchs(&self) -> bool {
        !self.eps_in_sqrt
    }
}
