//! Momentum as mechanics: mass, friction and time step <-> learning rate and momentum.
//!
//! # Derivation
//!
//! A particle of mass `m` slides over a landscape with height `U(theta)` through a medium of friction `eps`. Its
//! velocity obeys
//!
//! ```text
//! m*dv/dt = -kappa*grad U - eps*v,    dtheta/dt = v
//! ```
//!
//! where `kappa` scales the force. One step of length `dt`, with the derivative of the velocity taken at the start
//! of the step, gives
//!
//! ```text
//! v     <- (1 - eps*dt/m)*v - (kappa*dt/m)*grad U
//! theta <- theta + dt*v
//! ```
//!
//! in which `theta` moves with the *new* velocity. This is semi-implicit (symplectic) Euler. Moving with the old
//! velocity would be explicit Euler, which adds energy at every step: without friction a particle in a bowl then
//! spirals outwards, while the semi-implicit one keeps its energy within `O(dt)` for ever (Hairer, Lubich and
//! Wanner, *Geometric Numerical Integration*, section I.1).
//!
//! Comparing with momentum descent, whose update is `dt*v`:
//!
//! ```text
//! mu  = 1 - eps*dt/m
//! eta = kappa*dt^2/m
//! ```
//!
//! A widely read answer on the subject has `alpha = eta*eps/m` for the momentum instead, which does not follow from
//! its own previous line: friction would then *be* the momentum, and a particle without friction would have none.
//!
//! # Limits
//!
//! - `m -> 0` with `eps*dt/m = 1`: momentum zero, plain gradient descent with `eta = kappa*dt/eps`.
//! - `m -> inf`: `mu -> 1` and `eta -> 0`, the velocity stays as it is.
//! - `eps = 0`: `mu = 1`, a ball that never comes to rest.
//! - The velocity starts at zero.

use super::{MomentumForm, SgdConfig};
use crate::rules::ConfigError;

/// A particle in a medium, and how finely its time is cut.
///
/// Units are the caller's; `friction` is force per velocity, `force_scale` force per slope.
///
/// ```
/// use wgpu_optim::rules::sgd::physics::Particle;
///
/// let particle = Particle { mass: 2.0, friction: 0.5, time_step: 0.4, force_scale: 1.0 };
/// let config = particle.config()?;
/// assert_eq!(config.momentum(), 1.0 - 0.5 * 0.4 / 2.0);
/// assert_eq!(config.lr(), 0.4 * 0.4 / 2.0);
/// # Ok::<(), wgpu_optim::ConfigError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Particle {
    /// m, above zero.
    pub mass: f64,
    /// eps, at least zero, and at most `mass/time_step`, where a step takes all velocity away.
    pub friction: f64,
    /// dt, above zero.
    pub time_step: f64,
    /// kappa, at least zero: how hard a slope pushes.
    pub force_scale: f64,
}

impl Particle {
    /// The momentum update that moves this particle.
    ///
    /// # Errors
    /// [`ConfigError`] naming the quantity that is out of range: friction so strong that it would turn the
    /// velocity around in one step, say.
    pub fn config(&self) -> Result<SgdConfig, ConfigError> {
        let out_of_range = |field, value, expected| ConfigError::OutOfRange {
            field,
            value,
            expected,
        };
        for (field, value) in [("mass", self.mass), ("time_step", self.time_step)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(out_of_range(field, value, "a positive number"));
            }
        }
        for (field, value) in [
            ("friction", self.friction),
            ("force_scale", self.force_scale),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(out_of_range(field, value, "zero or a positive number"));
            }
        }
        if self.friction * self.time_step > self.mass {
            return Err(out_of_range(
                "friction",
                self.friction,
                "at most mass/time_step",
            ));
        }
        SgdConfig::builder(self.force_scale * self.time_step * self.time_step / self.mass)
            .momentum(1.0 - self.friction * self.time_step / self.mass)
            .time_step(self.time_step)
            .form(MomentumForm::Particle)
            .build()
    }

    /// The particle of this mass that a configuration moves, in steps of `time_step`.
    ///
    /// A configuration fixes two numbers, `lr` and `momentum`, so mass and time step are free: friction and force
    /// follow.
    ///
    /// ```
    /// use wgpu_optim::rules::sgd::physics::Particle;
    /// use wgpu_optim::SgdConfig;
    ///
    /// let config = SgdConfig::builder(0.5).momentum(0.75).build()?;
    /// let particle = Particle::of(&config, 2.0, 1.0);
    /// assert_eq!((particle.friction, particle.force_scale), (0.5, 1.0));
    /// # Ok::<(), wgpu_optim::ConfigError>(())
    /// ```
    #[must_use]
    pub fn of(config: &SgdConfig, mass: f64, time_step: f64) -> Self {
        let mu = config.momentum();
        let eta = match config.form() {
            MomentumForm::Ema => config.lr() * (1.0 - mu),
            _ => config.lr(),
        };
        Self {
            mass,
            friction: (1.0 - mu) * mass / time_step,
            time_step,
            force_scale: eta * mass / (time_step * time_step),
        }
    }
}
