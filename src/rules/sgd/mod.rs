//! The momentum family: its forms and hyper-parameters, checked when built.

mod coefficients;
mod convert;
pub mod physics;
mod presets;
pub mod reference;
mod vector;

use std::fmt;
use std::str::FromStr;

use crate::rules::config::{changed_momentum, config};
use crate::rules::error::{check_below_one, check_range, unsupported};
use crate::rules::{ConfigError, Hyperparameters, Real, Rule, Scalars, Slot, Slots, Twin};

pub use coefficients::{Coefficients, Terms};
pub use convert::{FormConversion, FormConversionError};

/// The place of the learning rate in the momentum recurrence.
///
/// With a constant learning rate the heavy-ball and lr-inside forms visit the same points; they part as
/// soon as the learning rate changes, because the first stores gradients and the second stores updates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "safetensors",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "kebab-case")
)]
#[non_exhaustive]
pub enum MomentumForm {
    /// `v <- mu*v + (1-tau)*d; theta <- theta - eta*v`: the learning rate stays outside the velocity, which
    /// holds gradients. PyTorch `torch.optim.SGD`, optax `sgd` and `trace`.
    #[default]
    HeavyBall,
    /// `v <- mu*v + (1-mu)*d; theta <- theta - eta*v`: the velocity is an exponential moving average of the
    /// gradients. optax `ema` without debiasing.
    Ema,
    /// `v <- mu*v - eta*d; theta <- theta + v`: the velocity holds updates. Sutskever et al. 2013, Keras.
    LrInside,
    /// `v <- mu*v - (eta/dt)*d; theta <- theta + dt*v`: the velocity of a particle, in distance per time; see
    /// [`Particle`](crate::rules::sgd::physics::Particle) for mass and friction. With `dt = 1` the same as `LrInside`.
    Particle,
}

impl MomentumForm {
    /// Every form, in the order of the documentation.
    pub const ALL: [Self; 4] = [Self::HeavyBall, Self::Ema, Self::LrInside, Self::Particle];

    /// The name used on the command line and in saved states.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::HeavyBall => "heavy-ball",
            Self::Ema => "ema",
            Self::LrInside => "lr-inside",
            Self::Particle => "particle",
        }
    }
}

impl fmt::Display for MomentumForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for MomentumForm {
    type Err = ConfigError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|form| form.name() == name)
            .ok_or_else(|| ConfigError::UnknownForm {
                name: name.to_owned(),
            })
    }
}

config! {
    /// Checked hyper-parameters of one momentum update.
    ///
    /// Made by [`SgdConfig::builder`]; a value of this type is always valid. Hyper-parameters are `f64`, as in
    /// the Python libraries, and are rounded to `f32` once, after the coefficients have been computed. What is too small
    /// for a normal `f32` is zero there, so that a schedule may decay for as long as it likes.
    ///
    /// ```
    /// use wgpu_optim::rules::sgd::MomentumForm;
    /// use wgpu_optim::SgdConfig;
    ///
    /// let config = SgdConfig::builder(0.1).momentum(0.9).nesterov(true).build()?;
    /// assert_eq!(config.form(), MomentumForm::HeavyBall);
    ///
    /// // PyTorch forbids Nesterov momentum with dampening, and so do we.
    /// let refused = SgdConfig::builder(0.1).momentum(0.9).nesterov(true).dampening(0.5).build();
    /// assert!(refused.is_err());
    /// # Ok::<(), wgpu_optim::ConfigError>(())
    /// ```
    pub struct SgdConfig, built by SgdConfigBuilder {
        /// Momentum mu, `0 <= mu <= 1` (below 1 for [`MomentumForm::Ema`]). Zero, the default, is plain gradient
        /// descent without a velocity buffer.
        momentum: f64 = 0.0,
        /// Dampening tau, `0 <= tau <= 1`: the velocity takes in `(1-tau)*d`, except at the first applied step of
        /// each tensor, which is undampened (PyTorch's rule). Heavy-ball form only.
        dampening: f64 = 0.0,
        /// Nesterov's look-ahead as PyTorch, optax and Keras write it. Needs momentum and zero dampening.
        nesterov: bool = false,
        /// The place of the learning rate; heavy ball by default.
        form: MomentumForm = MomentumForm::HeavyBall,
        /// Time step dt of the particle form, above zero; 1 in the others.
        time_step: f64 = 1.0,
    }

    /// PyTorch's `SGD`: `d = g + weight_decay*theta; v = mu*v + (1-tau)*d; theta -= lr*v`, with Nesterov
    /// `theta -= lr*(d + mu*v)`. The first step of each tensor is undampened: `v = d`. No momentum until one is set.
    /// <https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html>
    ///
    /// So are optax's `sgd` (<https://optax.readthedocs.io/en/latest/api/optimizers.html#optax.sgd>), its `trace(decay)`
    /// followed by `scale(-lr)`, with the decay as momentum
    /// (<https://optax.readthedocs.io/en/latest/api/transformations.html#optax.trace>), and TensorFlow.js's
    /// `train.momentum` (<https://js.tensorflow.org/api/latest/#train.momentum>), all three without dampening.
    pub const fn builder(lr);
}

impl SgdConfig {
    /// Returns the configuration at another momentum. A velocity that is there stays, also at momentum zero, for which
    /// the smallest number that is not zero then stands.
    ///
    /// # Errors
    /// [`ConfigError`] if `momentum` is out of range, or would give a velocity to a configuration that has none.
    pub fn with_momentum(self, momentum: f64) -> Result<Self, ConfigError> {
        let momentum = changed_momentum(self.momentum, momentum)?;
        Self { momentum, ..self }.checked()
    }

    /// Whether the update keeps a velocity buffer: it does unless `momentum` is zero. However small, a momentum that is
    /// not zero keeps one.
    #[must_use]
    pub fn has_velocity(&self) -> bool {
        self.momentum != 0.0
    }

    fn check(&self) -> Result<(), ConfigError> {
        match self.form {
            // At mu = 1 it would never let a gradient in.
            MomentumForm::Ema => check_below_one("momentum", self.momentum)?,
            _ => check_range("momentum", self.momentum, 1.0)?,
        }
        check_range("dampening", self.dampening, 1.0)?;
        check_range("time_step", self.time_step, f64::INFINITY)?;
        if f32::from_f64(self.time_step) == 0.0 {
            return Err(ConfigError::OutOfRange {
                field: "time_step",
                value: self.time_step,
                expected: "a positive number that f32 can hold",
            });
        }
        // By the particle's time step, by which its velocity takes in the gradient.
        check_range("lr/time_step", self.lr / self.time_step, f64::INFINITY)?;

        let forbid = |condition: bool, fields, why| {
            if condition {
                return unsupported(fields, why);
            }
            Ok(())
        };
        forbid(
            self.nesterov && self.momentum == 0.0,
            "nesterov, momentum",
            "Nesterov momentum needs a momentum above zero",
        )?;
        forbid(
            self.nesterov && self.dampening != 0.0,
            "nesterov, dampening",
            "Nesterov momentum needs zero dampening",
        )?;
        forbid(
            self.nesterov && matches!(self.form, MomentumForm::Ema | MomentumForm::Particle),
            "nesterov, form",
            "Nesterov momentum is defined for the heavy-ball and lr-inside forms only",
        )?;
        forbid(
            self.time_step != 1.0 && self.form != MomentumForm::Particle,
            "time_step, form",
            "only the particle form has a time step",
        )?;
        forbid(
            self.dampening != 0.0 && self.momentum == 0.0,
            "dampening, momentum",
            "dampening acts on the velocity, so it needs a momentum above zero",
        )?;
        forbid(
            self.dampening != 0.0 && self.form != MomentumForm::HeavyBall,
            "dampening, form",
            "dampening is defined for the heavy-ball form only",
        )
    }
}

impl Rule for SgdConfig {
    fn stem(&self) -> &'static str {
        if self.has_velocity() {
            "sgd"
        } else {
            "sgd_plain"
        }
    }

    fn slots(&self) -> Slots {
        [Slot::new("momentum_buffer").kept_if(self.has_velocity())].into()
    }

    fn terms(&self) -> Vec<(&'static str, bool)> {
        let has = Terms::of(self);
        vec![
            ("HAS_VELOCITY", has.velocity),
            ("HAS_C", has.c),
            ("HAS_LAMBDA", has.lambda),
            ("HAS_B", has.b),
            ("HAS_RHO", has.rho),
        ]
    }

    fn wgsl(&self) -> String {
        include_str!("../../../shaders/rules/sgd.wgsl").to_owned()
    }

    fn scalar_names(&self) -> &'static [&'static str] {
        &["lambda", "alpha", "c", "a", "b", "rho"]
    }

    fn phase(&self, applied_steps: u64) -> u64 {
        // Only dampening tells a first step from a later one.
        match self.dampening {
            0.0 => 0,
            _ => applied_steps.min(1),
        }
    }

    fn scalars(&self, phase: u64) -> Scalars {
        Coefficients::new(self, phase == 0).cast().to_scalars()
    }

    fn state_kind(&self) -> String {
        self.form.to_string()
    }

    fn lr(&self) -> f64 {
        self.lr
    }

    fn with_lr(&self, lr: f64) -> Result<Self, ConfigError> {
        Self::with_lr(*self, lr)
    }

    fn momentum(&self) -> Option<f64> {
        self.has_velocity().then_some(self.momentum)
    }

    fn with_momentum(&self, momentum: f64) -> Result<Self, ConfigError> {
        Self::with_momentum(*self, momentum)
    }
}

impl Twin for SgdConfig {
    fn step(&self, scalars: &Scalars, params: &mut [f32], state: &mut [&mut [f32]], grads: &[f32]) {
        let velocity = match state {
            [velocity, ..] => velocity,
            [] => &mut [][..],
        };
        let k = Coefficients::of_scalars(scalars);
        vector::step(&k, Terms::of(self), params, velocity, grads);
    }

    fn step_in_turn(
        &self,
        scalars: &Scalars,
        params: &mut [f32],
        state: &mut [&mut [f32]],
        grads: &[f32],
    ) {
        let k = Coefficients::of_scalars(scalars);
        match state {
            [velocity, ..] => reference::sgd(&k, Terms::of(self), params, velocity, grads),
            [] => reference::sgd_plain(&k, Terms::of(self), params, grads),
        }
    }
}
