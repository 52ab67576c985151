//! Config x step -> the six numbers of the one recurrence behind the whole momentum family.

use super::{MomentumForm, SgdConfig};
use crate::rules::{Real, Scalars};

/// The coefficients of
///
/// ```text
/// d     = g + lambda*theta
/// v     <- alpha*v + c*d
/// theta <- rho*theta - (a*v + b*d)
/// ```
///
/// | form | alpha | c | a | b |
/// |---|---|---|---|---|
/// | plain gradient descent (no velocity) | | | 0 | eta |
/// | heavy ball | mu | 1 - tau (1 at a tensor's first applied step) | eta | 0 |
/// | heavy ball, Nesterov | mu | 1 | eta*mu | eta |
/// | EMA | mu | 1 - mu | eta | 0 |
/// | lr inside | mu | -eta | -1 | 0 |
/// | lr inside, Nesterov | mu | -eta | -mu | eta |
/// | particle with time step dt | mu | -eta/dt | -dt | 0 |
///
/// `lambda` is the coupled decay, `rho = 1 - eta*lambda_d`. To maximize, `lambda`, `c` and `b` change sign: the
/// direction `-g + lambda*theta` is `-(g - lambda*theta)`, and a change of sign rounds nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coefficients<T = f64> {
    /// Coupled (L2) weight decay.
    pub lambda: T,
    /// The share of itself that the velocity keeps.
    pub alpha: T,
    /// The share of the direction that the velocity takes in.
    pub c: T,
    /// The share of the velocity that the parameter takes in.
    pub a: T,
    /// The share of the direction that the parameter takes in.
    pub b: T,
    /// The share of itself that the parameter keeps: decoupled weight decay.
    pub rho: T,
}

impl Coefficients {
    /// The numbers for one step; `first_step` says whether it is the tensor's first applied step.
    #[must_use]
    pub fn new(config: &SgdConfig, first_step: bool) -> Self {
        let (eta, mu) = (config.lr(), config.momentum());
        let (alpha, c, a, b) = if config.has_velocity() {
            match (config.form(), config.nesterov()) {
                (MomentumForm::HeavyBall, true) => (mu, 1.0, eta * mu, eta),
                (MomentumForm::HeavyBall, false) => {
                    let dampening = if first_step { 0.0 } else { config.dampening() };
                    (mu, 1.0 - dampening, eta, 0.0)
                }
                (MomentumForm::Ema, _) => (mu, 1.0 - mu, eta, 0.0),
                (MomentumForm::LrInside, true) => (mu, -eta, -mu, eta),
                (MomentumForm::LrInside, false) => (mu, -eta, -1.0, 0.0),
                (MomentumForm::Particle, _) => {
                    (mu, -eta / config.time_step(), -config.time_step(), 0.0)
                }
            }
        } else {
            (0.0, 0.0, 0.0, eta)
        };
        let sign = if config.maximize() { -1.0 } else { 1.0 };
        Self {
            lambda: sign * config.coupled_weight_decay(),
            alpha,
            c: sign * c,
            a,
            b: sign * b,
            rho: 1.0 - eta * config.decoupled_weight_decay(),
        }
    }

    /// Rounds each coefficient once to the precision of the kernel.
    #[must_use]
    pub fn cast<T: Real>(&self) -> Coefficients<T> {
        Coefficients {
            lambda: T::from_f64(self.lambda),
            alpha: T::from_f64(self.alpha),
            c: T::from_f64(self.c),
            a: T::from_f64(self.a),
            b: T::from_f64(self.b),
            rho: T::from_f64(self.rho),
        }
    }
}

impl Coefficients<f32> {
    pub(super) fn to_scalars(self) -> Scalars {
        [self.lambda, self.alpha, self.c, self.a, self.b, self.rho].into()
    }

    pub(super) fn of_scalars(scalars: &Scalars) -> Self {
        let [lambda, alpha, c, a, b, rho, ..] = *scalars.values();
        Self {
            lambda,
            alpha,
            c,
            a,
            b,
            rho,
        }
    }
}

/// The terms of the recurrence that a config has. A term that is absent is compiled out of the kernels, never
/// multiplied by zero, because `0 * inf` is NaN; so is a factor that is always one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Terms {
    /// There is a velocity: `alpha` and `a` count.
    pub velocity: bool,
    /// `c` multiplies what the velocity takes in; without it that is the direction itself.
    pub c: bool,
    /// `lambda*theta` joins the direction.
    pub lambda: bool,
    /// `b*d` joins the update beside the velocity (always so without a velocity).
    pub b: bool,
    /// `rho` multiplies theta.
    pub rho: bool,
}

impl Terms {
    /// The terms of a config; they do not depend on the learning rate or the step.
    #[must_use]
    pub fn of(config: &SgdConfig) -> Self {
        Self {
            velocity: config.has_velocity(),
            c: config.has_velocity()
                && (config.maximize()
                    || config.dampening() != 0.0
                    || config.form() != MomentumForm::HeavyBall),
            lambda: config.coupled_weight_decay() != 0.0,
            b: config.nesterov() || !config.has_velocity(),
            rho: config.decoupled_weight_decay() != 0.0,
        }
    }

    /// Every combination a config can have: sixteen with a velocity, four without.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..32u8)
            .map(|bits| Self {
                velocity: bits & 1 != 0,
                c: bits & 2 != 0,
                lambda: bits & 4 != 0,
                b: bits & 8 != 0,
                rho: bits & 16 != 0,
            })
            .filter(|terms| terms.velocity || (terms.b && !terms.c))
    }

    /// Bytes that one step moves per element: 20 with a velocity (read theta, v, g; write theta, v), else 12.
    #[must_use]
    pub const fn bytes_per_elem(self) -> u64 {
        if self.velocity { 20 } else { 12 }
    }
}
