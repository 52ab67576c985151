//! Update rules by the name of what a user is coming from.

use std::fmt;
use std::str::FromStr;

use super::{MomentumForm, SgdConfig, SgdConfigBuilder};
use crate::rules::config::preset;
use crate::rules::{ConfigError, KnownRule, RulePreset};

/// An optimizer of another library or paper; it chooses the form and what weight decay means.
///
/// ```
/// use wgpu_optim::{MomentumForm, Preset};
///
/// let config = Preset::Keras.builder(0.1).momentum(0.9).nesterov(true).build()?;
/// assert_eq!(config.form(), MomentumForm::LrInside);
/// # Ok::<(), wgpu_optim::ConfigError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Preset {
    /// `torch.optim.SGD`: `d = g + weight_decay*theta; v = mu*v + (1-tau)*d; theta -= lr*v`, with Nesterov
    /// `theta -= lr*(d + mu*v)`. The first step of each tensor is undampened: `v = d`.
    /// <https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html>
    PyTorch,
    /// `optax.sgd`: `v = g + mu*v; theta -= lr*v`, with Nesterov `theta -= lr*(g + mu*v)`. The trace starts at
    /// zero, so the first step is `v = g`.
    /// <https://optax.readthedocs.io/en/latest/api/optimizers.html#optax.sgd>
    OptaxSgd,
    /// `optax.trace(decay)` followed by `optax.scale(-lr)`: the transformation inside `optax.sgd`, with the
    /// decay as momentum.
    /// <https://optax.readthedocs.io/en/latest/api/transformations.html#optax.trace>
    OptaxTrace,
    /// `optax.ema(decay, debias=False)` followed by `optax.scale(-lr)`: `v = mu*v + (1-mu)*g; theta -= lr*v`.
    /// The average starts at zero, so the first step is `v = (1-mu)*g`; there is no debiasing.
    /// <https://optax.readthedocs.io/en/latest/api/transformations.html#optax.ema>
    OptaxEma,
    /// `keras.optimizers.SGD`: `v = mu*v - lr*g; theta += v`, with Nesterov `theta += mu*v - lr*g`. Weight decay
    /// is decoupled: `theta *= 1 - lr*weight_decay` before the step. The first step is `v = -lr*g`.
    /// <https://keras.io/api/optimizers/sgd/>
    Keras,
    /// `tf.train.momentum` of TensorFlow.js, and "classical" momentum in most lecture notes:
    /// `v = mu*v + g; theta -= lr*v`, with Nesterov `theta -= lr*(g + mu*v)`. The first step is `v = g`.
    /// <https://js.tensorflow.org/api/latest/#train.momentum>
    TensorFlowJs,
    /// Sutskever et al. 2013: `v = mu*v - lr*g; theta += v`. With Nesterov, theta is the point at which the
    /// gradient is taken, ahead of the paper's by `mu*v`, and the step is `theta += mu*v - lr*g`. The first step
    /// is `v = -lr*g`. <https://proceedings.mlr.press/v28/sutskever13.html>
    Sutskever2013,
}

impl Preset {
    /// Every preset.
    pub const ALL: [Self; 7] = [
        Self::PyTorch,
        Self::OptaxSgd,
        Self::OptaxTrace,
        Self::OptaxEma,
        Self::Keras,
        Self::TensorFlowJs,
        Self::Sutskever2013,
    ];

    /// The name used on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::PyTorch => "pytorch",
            Self::OptaxSgd => "optax-sgd",
            Self::OptaxTrace => "optax-trace",
            Self::OptaxEma => "optax-ema",
            Self::Keras => "keras",
            Self::TensorFlowJs => "tensorflow-js",
            Self::Sutskever2013 => "sutskever-2013",
        }
    }

    /// The form that the library or paper computes in.
    #[must_use]
    pub const fn form(self) -> MomentumForm {
        match self {
            Self::PyTorch | Self::OptaxSgd | Self::OptaxTrace | Self::TensorFlowJs => {
                MomentumForm::HeavyBall
            }
            Self::OptaxEma => MomentumForm::Ema,
            Self::Keras | Self::Sutskever2013 => MomentumForm::LrInside,
        }
    }

    /// Whether the library's own `weight_decay` is decoupled.
    #[must_use]
    pub const fn decouples_weight_decay(self) -> bool {
        matches!(self, Self::Keras)
    }

    /// A configuration in this preset's form, whose `weight_decay` is of the library's kind.
    pub const fn builder(self, lr: f64) -> SgdConfigBuilder {
        let builder = SgdConfig::builder(lr).form(self.form());
        match self.decouples_weight_decay() {
            true => builder.decoupling(0.0),
            false => builder,
        }
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Preset {
    type Err = ConfigError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|preset| preset.name() == name)
            .ok_or_else(|| ConfigError::UnknownPreset {
                name: name.to_owned(),
                expected: Self::ALL.map(Self::name).join(", "),
            })
    }
}

/// A preset of SGD as a preset of the rule.
macro_rules! of_sgd {
    ($preset:ident) => {
        preset!("sgd", Preset::$preset.name(), |lr| Preset::$preset
            .builder(lr))
    };
}

impl KnownRule for SgdConfig {
    const PRESETS: &'static [RulePreset] = &[
        of_sgd!(PyTorch),
        of_sgd!(OptaxSgd),
        of_sgd!(OptaxTrace),
        of_sgd!(OptaxEma),
        of_sgd!(Keras),
        of_sgd!(TensorFlowJs),
        of_sgd!(Sutskever2013),
    ];

    /// PyTorch's `SGD` counts no steps.
    fn pytorch_scalars(&self, _applied_steps: u64) -> Option<Vec<(&'static str, f64)>> {
        (self.form() == MomentumForm::HeavyBall).then(Vec::new)
    }
}
