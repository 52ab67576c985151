//! Adadelta.

use super::config::{config, scalars};
use super::elementwise::{Element, ElementRule, Pass, shader};
use super::error::{check_held, check_range};
use super::{ConfigError, KnownRule, RulePreset, Slot, Slots};

config! {
    /// Checked hyper-parameters of Adadelta (Zeiler 2012, <https://arxiv.org/abs/1212.5701>).
    ///
    /// ```text
    /// h     = g + coupled_weight_decay*theta       g negated to maximize
    /// s     <- rho*s + (1 - rho)*h^2
    /// d     = sqrt(acc + eps) / sqrt(s + eps) * h
    /// acc   <- rho*acc + (1 - rho)*d^2
    /// theta <- (1 - lr*decoupled_weight_decay)*theta - lr*d
    /// ```
    ///
    /// Slots: `square_avg` (s) and `acc_delta` (acc); 28 bytes per element and step.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, AdadeltaConfig};
    ///
    /// let config = AdadeltaConfig::builder(1.0).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
    /// let mut weight = [1.0, -1.0];
    /// optimizer.step(&mut [&mut weight], &[&[0.5, -2.0]])?;
    /// assert!(weight[0] < 1.0 && weight[1] > -1.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub struct AdadeltaConfig, built by AdadeltaConfigBuilder {
        /// Decay of both averages, at most one.
        rho: f64 = 0.9,
        /// Added under both roots: without it nothing would ever move.
        eps: f64 = 1e-6,
    }

    /// PyTorch's `Adadelta`: rho 0.9, eps 1e-6; its learning rate is 1.
    pub const fn builder(lr);
}

impl AdadeltaConfig {
    fn check(&self) -> Result<(), ConfigError> {
        check_range("rho", self.rho, 1.0)?;
        check_held("eps", self.eps, 1.0)
    }
}

scalars! {
    struct Coefficients {
        keep, c, eps, lr,
    }
}

impl ElementRule for AdadeltaConfig {
    type K = Coefficients;
    shader!("adadelta");
    const IS_STATIONARY: bool = true;

    fn slots(&self) -> Slots {
        [Slot::new("square_avg"), Slot::new("acc_delta")].into()
    }

    fn coefficients(&self, _applied_steps: u64) -> Coefficients<f64> {
        Coefficients {
            keep: self.rho,
            c: 1.0 - self.rho,
            eps: self.eps,
            lr: self.lr,
        }
    }

    fn step(&self, pass: Pass<'_, '_>) {
        pass.over(*self);
    }
}

impl Element<Coefficients, 2> for AdadeltaConfig {
    #[inline(always)]
    fn update(self, k: Coefficients, theta: f32, h: f32, [s, acc]: [f32; 2]) -> (f32, [f32; 2]) {
        let s = k.keep * s + k.c * (h * h);
        let d = (acc + k.eps).sqrt() / (s + k.eps).sqrt() * h;
        let acc = k.keep * acc + k.c * (d * d);
        (theta - k.lr * d, [s, acc])
    }
}

impl KnownRule for AdadeltaConfig {
    const PRESETS: &'static [RulePreset] = &[
        RulePreset::new("adadelta", "pytorch", |lr| Self::builder(lr).into()),
        RulePreset::new("adadelta", "optax", |lr| Self::builder(lr).into()),
        RulePreset::new("adadelta", "keras", |lr| {
            Self::builder(lr).rho(0.95).eps(1e-7).decoupling(0.0).into()
        }),
    ];

    fn is_pytorchs(&self) -> bool {
        true
    }
}
