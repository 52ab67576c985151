//! SGD and momentum as libraries and papers have them.

use super::{MomentumForm, SgdConfig, SgdConfigBuilder};
use crate::rules::{KnownRule, RulePreset};

impl SgdConfig {
    /// optax's `ema(decay, debias=False)` followed by `scale(-lr)`: `v = mu*v + (1-mu)*g; theta -= lr*v`. The average
    /// starts at zero, so the first step is `v = (1-mu)*g`; there is no debiasing.
    /// <https://optax.readthedocs.io/en/latest/api/transformations.html#optax.ema>
    pub const fn optax_ema(lr: f64) -> SgdConfigBuilder {
        Self::builder(lr).form(MomentumForm::Ema)
    }

    /// Keras's `SGD`: `v = mu*v - lr*g; theta += v`, with Nesterov `theta += mu*v - lr*g`. Its weight decay is decoupled:
    /// `theta *= 1 - lr*weight_decay` before the step. The first step is `v = -lr*g`.
    /// <https://keras.io/api/optimizers/sgd/>
    ///
    /// ```
    /// use wgpu_optim::rules::sgd::MomentumForm;
    /// use wgpu_optim::SgdConfig;
    ///
    /// let config = SgdConfig::keras(0.1).momentum(0.9).nesterov(true).build()?;
    /// assert_eq!(config.form(), MomentumForm::LrInside);
    /// # Ok::<(), wgpu_optim::ConfigError>(())
    /// ```
    pub const fn keras(lr: f64) -> SgdConfigBuilder {
        Self::sutskever_2013(lr).decoupling(0.0)
    }

    /// Sutskever et al. 2013: `v = mu*v - lr*g; theta += v`. With Nesterov, theta is the point at which the gradient is
    /// taken, ahead of the paper's by `mu*v`, and the step is `theta += mu*v - lr*g`. The first step is `v = -lr*g`.
    /// <https://proceedings.mlr.press/v28/sutskever13.html>
    pub const fn sutskever_2013(lr: f64) -> SgdConfigBuilder {
        Self::builder(lr).form(MomentumForm::LrInside)
    }
}

impl KnownRule for SgdConfig {
    const PRESETS: &'static [RulePreset] = &[
        RulePreset::new("sgd", "pytorch", |lr| Self::builder(lr).into()),
        RulePreset::new("sgd", "optax-sgd", |lr| Self::builder(lr).into()),
        RulePreset::new("sgd", "optax-trace", |lr| Self::builder(lr).into()),
        RulePreset::new("sgd", "optax-ema", |lr| Self::optax_ema(lr).into()),
        RulePreset::new("sgd", "keras", |lr| Self::keras(lr).into()),
        RulePreset::new("sgd", "tensorflow-js", |lr| Self::builder(lr).into()),
        RulePreset::new("sgd", "sutskever-2013", |lr| {
            Self::sutskever_2013(lr).into()
        }),
    ];

    fn is_pytorchs(&self) -> bool {
        self.form() == MomentumForm::HeavyBall
    }

    /// PyTorch's `SGD` counts no steps.
    fn pytorch_scalars(&self, _applied_steps: u64) -> Option<Vec<(&'static str, f64)>> {
        self.is_pytorchs().then(Vec::new)
    }
}
