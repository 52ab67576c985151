//! SGD and momentum as libraries and papers have them.

use super::{MomentumForm, SgdConfig, SgdConfigBuilder};
use crate::rules::{KnownRule, RulePreset};

impl SgdConfig {
    /// PyTorch's `SGD`: `d = g + weight_decay*theta; v = mu*v + (1-tau)*d; theta -= lr*v`, with Nesterov
    /// `theta -= lr*(d + mu*v)`. The first step of each tensor is undampened: `v = d`. No momentum until one is set.
    /// <https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html>
    ///
    /// So are optax's `sgd` (<https://optax.readthedocs.io/en/latest/api/optimizers.html#optax.sgd>), its `trace(decay)`
    /// followed by `scale(-lr)`, with the decay as momentum
    /// (<https://optax.readthedocs.io/en/latest/api/transformations.html#optax.trace>), and TensorFlow.js's
    /// `train.momentum` (<https://js.tensorflow.org/api/latest/#train.momentum>), all three without dampening.
    pub const fn builder(lr: f64) -> SgdConfigBuilder {
        SgdConfigBuilder::new(Self {
            lr,
            momentum: 0.0,
            dampening: 0.0,
            nesterov: false,
            coupled_weight_decay: 0.0,
            decoupled_weight_decay: 0.0,
            maximize: false,
            form: MomentumForm::HeavyBall,
            time_step: 1.0,
        })
    }

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

    /// PyTorch's `SGD` counts no steps.
    fn pytorch_scalars(&self, _applied_steps: u64) -> Option<Vec<(&'static str, f64)>> {
        (self.form() == MomentumForm::HeavyBall).then(Vec::new)
    }
}
