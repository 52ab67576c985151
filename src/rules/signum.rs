//! Signum and signSGD: the sign of the gradient, or of its average.

use super::config::{config, scalars};
use super::elementwise::{Element, ElementRule, Momentum, Pass, shader, sign};
use super::error::check_below_one;
use super::{ConfigError, KnownRule, RulePreset, Slot, Slots};

config! {
    /// Checked hyper-parameters of Signum and signSGD (Bernstein et al. 2018, <https://arxiv.org/abs/1802.04434>).
    ///
    /// ```text
    /// h     = g + coupled_weight_decay*theta       g negated to maximize
    /// m     <- momentum*m + (1 - momentum)*h
    /// theta <- (1 - lr*decoupled_weight_decay)*theta - lr*sign(m)
    /// ```
    ///
    /// with `sign(0) = 0`; without momentum it is signSGD, `sign(h)`. Slot: `momentum_buffer` (m); 20 bytes per element and
    /// step, 12 without.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, SignumConfig};
    ///
    /// let config = SignumConfig::builder(1e-4).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
    /// let mut weight = [1.0, -1.0];
    /// optimizer.step(&mut [&mut weight], &[&[0.5, -2.0]])?;
    /// assert!(weight[0] < 1.0 && weight[1] > -1.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub struct SignumConfig, built by SignumConfigBuilder {
        /// Decay of the average, below one; zero keeps none.
        momentum: f64 = 0.9,
    }

    /// Signum with the paper's momentum of 0.9.
    pub const fn builder(lr);
}

impl SignumConfig {
    /// signSGD: no momentum. optax's `sign_sgd`.
    pub const fn sign_sgd(lr: f64) -> SignumConfigBuilder {
        Self::builder(lr).momentum(0.0)
    }

    fn check(&self) -> Result<(), ConfigError> {
        check_below_one("momentum", self.momentum)
    }
}

scalars! {
    struct Coefficients {
        mu, c, lr,
    }
}

impl ElementRule for SignumConfig {
    type K = Coefficients;
    shader!("signum");
    const IS_STATIONARY: bool = true;

    fn stem(&self) -> &'static str {
        match self.momentum {
            0.0 => "sign_sgd",
            _ => "signum",
        }
    }

    fn slots(&self) -> Slots {
        [Slot::new("momentum_buffer").kept_if(self.momentum != 0.0)].into()
    }

    fn terms(&self) -> Vec<(&'static str, bool)> {
        vec![("HAS_MOMENTUM", self.momentum != 0.0)]
    }

    fn momentum(&mut self) -> Momentum<'_> {
        Momentum::Buffered(&mut self.momentum)
    }

    fn coefficients(&self, _applied_steps: u64) -> Coefficients<f64> {
        Coefficients {
            mu: self.momentum,
            c: 1.0 - self.momentum,
            lr: self.lr,
        }
    }

    fn step(&self, pass: Pass<'_, '_>) {
        match self.momentum {
            0.0 => pass.over::<_, 0>(*self),
            _ => pass.over::<_, 1>(*self),
        }
    }
}

impl Element<Coefficients, 1> for SignumConfig {
    #[inline(always)]
    fn update(self, k: Coefficients, theta: f32, h: f32, [m]: [f32; 1]) -> (f32, [f32; 1]) {
        let m = k.mu * m + k.c * h;
        (theta - k.lr * sign(m), [m])
    }
}

impl Element<Coefficients, 0> for SignumConfig {
    #[inline(always)]
    fn update(self, k: Coefficients, theta: f32, h: f32, []: [f32; 0]) -> (f32, [f32; 0]) {
        (theta - k.lr * sign(h), [])
    }
}

impl KnownRule for SignumConfig {
    const PRESETS: &'static [RulePreset] = &[
        RulePreset::new("signum", "paper", |lr| Self::builder(lr).into()),
        RulePreset::new("sign-sgd", "optax", |lr| Self::sign_sgd(lr).into()),
    ];
}
