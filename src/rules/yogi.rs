//! Yogi: Adam whose second average moves by a bounded step.

use super::config::{config, scalars};
use super::elementwise::{Element, ElementRule, Momentum, Pass, shader, sign};
use super::error::{check_betas, check_held};
use super::{ConfigError, KnownRule, RulePreset, Slot, Slots};

config! {
    /// Checked hyper-parameters of Yogi (Zaheer et al. 2018,
    /// <https://papers.nips.cc/paper/2018/hash/90365351ccc7437a1309dc64e4db32a3-Abstract.html>).
    ///
    /// ```text
    /// h     = g + coupled_weight_decay*theta       g negated to maximize
    /// m     <- beta1*m + (1 - beta1)*h             both from initial_accumulator_value
    /// v     <- v - (1 - beta2)*sign(v - h^2)*h^2
    /// theta <- (1 - lr*decoupled_weight_decay)*theta - lr * (m/bc1) / (sqrt(v/bc2) + eps)
    /// ```
    ///
    /// with `bc1 = 1 - beta1^t`, `bc2 = 1 - beta2^t` at step `t`, which counts from one. Slots: `exp_avg` (m) and
    /// `exp_avg_sq` (v); 28 bytes per element and step.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, YogiConfig};
    ///
    /// let config = YogiConfig::builder(1e-2).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
    /// let mut weight = [1.0, -1.0];
    /// optimizer.step(&mut [&mut weight], &[&[0.5, -2.0]])?;
    /// assert!(weight[0] < 1.0 && weight[1] > -1.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub struct YogiConfig, built by YogiConfigBuilder {
        /// Decay of `exp_avg`, below one.
        beta1: f64 = 0.9,
        /// One less the share of the square by which `exp_avg_sq` moves, below one.
        beta2: f64 = 0.999,
        /// Added to the root.
        eps: f64 = 1e-3,
        /// The first value of both averages.
        initial_accumulator_value: f64 = 1e-6,
    }

    /// optax's `yogi`: betas 0.9 and 0.999, eps 1e-3, averages from 1e-6.
    pub const fn builder(lr);
}

impl YogiConfig {
    fn check(&self) -> Result<(), ConfigError> {
        check_betas(self.beta1, self.beta2)?;
        check_held("eps", self.eps, 1.0)?;
        check_held(
            "initial_accumulator_value",
            self.initial_accumulator_value,
            1.0,
        )
    }
}

scalars! {
    struct Coefficients {
        beta1, c1, c2, r, eps, a,
    }
}

impl ElementRule for YogiConfig {
    type K = Coefficients;
    shader!("yogi");

    fn slots(&self) -> Slots {
        let start = self.initial_accumulator_value as f32;
        [
            Slot::new("exp_avg").starting_at(start),
            Slot::new("exp_avg_sq").starting_at(start),
        ]
        .into()
    }

    fn momentum(&mut self) -> Momentum<'_> {
        Momentum::Beta1(&mut self.beta1)
    }

    fn coefficients(&self, applied_steps: u64) -> Coefficients<f64> {
        let t = applied_steps as f64 + 1.0;
        Coefficients {
            beta1: self.beta1,
            c1: 1.0 - self.beta1,
            c2: 1.0 - self.beta2,
            r: 1.0 / (1.0 - self.beta2.powf(t)),
            eps: self.eps,
            a: self.lr / (1.0 - self.beta1.powf(t)),
        }
    }

    fn step(&self, pass: Pass<'_, '_>) {
        pass.over(*self);
    }
}

impl Element<Coefficients, 2> for YogiConfig {
    #[inline(always)]
    fn update(self, k: Coefficients, theta: f32, h: f32, [m, v]: [f32; 2]) -> (f32, [f32; 2]) {
        let m = k.beta1 * m + k.c1 * h;
        let square = h * h;
        let v = v - k.c2 * (sign(v - square) * square);
        let update = k.a * (m / ((k.r * v).sqrt() + k.eps));
        (theta - update, [m, v])
    }
}

impl KnownRule for YogiConfig {
    const PRESETS: &'static [RulePreset] = &[RulePreset::new("yogi", "optax", |lr| {
        Self::builder(lr).into()
    })];
}
