//! Lion: the sign of an average.

use super::config::{config, scalars};
use super::elementwise::{Element, ElementRule, Momentum, Pass, shader, sign};
use super::error::check_betas;
use super::{ConfigError, KnownRule, RulePreset, Slot, Slots};

config! {
    /// Checked hyper-parameters of Lion (Chen et al. 2023, <https://arxiv.org/abs/2302.06675>).
    ///
    /// ```text
    /// h     = g + coupled_weight_decay*theta       g negated to maximize
    /// theta <- (1 - lr*decoupled_weight_decay)*theta - lr*sign(beta1*m + (1 - beta1)*h)
    /// m     <- beta2*m + (1 - beta2)*h
    /// ```
    ///
    /// with `sign(0) = 0`. Slot: `exp_avg` (m); 20 bytes per element and step.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, LionConfig};
    ///
    /// let config = LionConfig::builder(1e-4).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
    /// let mut weight = [1.0, -1.0];
    /// optimizer.step(&mut [&mut weight], &[&[0.5, -2.0]])?;
    /// assert!(weight[0] < 1.0 && weight[1] > -1.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub struct LionConfig, built by LionConfigBuilder {
        /// Share of `exp_avg` in what the sign is taken of, below one.
        beta1: f64 = 0.9,
        /// Decay of `exp_avg`, below one.
        beta2: f64 = 0.99,
    }

    /// optax's `lion`: betas 0.9 and 0.99, a decoupled weight decay of 1e-3.
    pub const fn builder(lr) where decoupled_weight_decay = 1e-3;
}

impl LionConfig {
    fn check(&self) -> Result<(), ConfigError> {
        check_betas(self.beta1, self.beta2)
    }
}

scalars! {
    struct Coefficients {
        beta1, c1, beta2, c2, lr,
    }
}

impl ElementRule for LionConfig {
    type K = Coefficients;
    shader!("lion");
    const IS_STATIONARY: bool = true;

    fn slots(&self) -> Slots {
        [Slot::new("exp_avg")].into()
    }

    fn momentum(&mut self) -> Momentum<'_> {
        Momentum::Beta1(&mut self.beta1)
    }

    fn coefficients(&self, _applied_steps: u64) -> Coefficients<f64> {
        Coefficients {
            beta1: self.beta1,
            c1: 1.0 - self.beta1,
            beta2: self.beta2,
            c2: 1.0 - self.beta2,
            lr: self.lr,
        }
    }

    fn step(&self, pass: Pass<'_, '_>) {
        pass.over(*self);
    }
}

impl Element<Coefficients, 1> for LionConfig {
    #[inline(always)]
    fn update(self, k: Coefficients, theta: f32, h: f32, [m]: [f32; 1]) -> (f32, [f32; 1]) {
        let u = sign(k.beta1 * m + k.c1 * h);
        let m = k.beta2 * m + k.c2 * h;
        (theta - k.lr * u, [m])
    }
}

impl KnownRule for LionConfig {
    const PRESETS: &'static [RulePreset] = &[
        RulePreset::new("lion", "optax", |lr| Self::builder(lr).into()),
        RulePreset::new("lion", "keras", |lr| {
            Self::builder(lr).decoupling(0.0).into()
        }),
    ];
}
