//! Config x step -> the seven numbers of the one recurrence behind the whole momentum family.

use crate::reference::Real;
use crate::sgd::{MomentumForm, SgdConfig};

/// The coefficients of
///
/// ```text
/// d     = s*g + lambda*theta
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
///
/// `s` is -1 to maximize and 1 otherwise, `lambda` is the coupled decay, `rho = 1 - eta*lambda_d`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coefficients<T = f64> {
    /// Gradient scale.
    pub s: T,
    /// Coupled (L2) weight decay.
    pub lambda: T,
    /// What the velocity keeps of itself.
    pub alpha: T,
    /// What the velocity takes in of the direction.
    pub c: T,
    /// What the parameter takes in of the velocity.
    pub a: T,
    /// What the parameter takes in of the direction.
    pub b: T,
    /// What the parameter keeps of itself: decoupled weight decay.
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
            }
        } else {
            (0.0, 0.0, 0.0, eta)
        };
        Self {
            s: if config.maximize() { -1.0 } else { 1.0 },
            lambda: config.weight_decay(),
            alpha,
            c,
            a,
            b,
            rho: 1.0 - eta * config.decoupled_weight_decay(),
        }
    }

    /// Rounds each coefficient once to the precision of the kernel.
    #[must_use]
    pub fn cast<T: Real>(&self) -> Coefficients<T> {
        Coefficients {
            s: T::from_f64(self.s),
            lambda: T::from_f64(self.lambda),
            alpha: T::from_f64(self.alpha),
            c: T::from_f64(self.c),
            a: T::from_f64(self.a),
            b: T::from_f64(self.b),
            rho: T::from_f64(self.rho),
        }
    }
}

/// Which terms of the recurrence a config has. A term that is absent is compiled out of the kernels, never
/// multiplied by zero, because `0 * inf` is NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Terms {
    /// There is a velocity: `alpha`, `c` and `a` count.
    pub velocity: bool,
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
            lambda: config.weight_decay() != 0.0,
            b: config.nesterov() || !config.has_velocity(),
            rho: config.decoupled_weight_decay() != 0.0,
        }
    }

    /// Every combination a config can have: eight with a velocity, four without.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..16u8)
            .map(|bits| Self {
                velocity: bits & 1 != 0,
                lambda: bits & 2 != 0,
                b: bits & 4 != 0,
                rho: bits & 8 != 0,
            })
            .filter(|terms| terms.velocity || terms.b)
    }

    /// Bytes that one step moves per element: 20 with a velocity (read theta, v, g; write theta, v), else 12.
    #[must_use]
    pub const fn bytes_per_elem(self) -> u64 {
        if self.velocity { 20 } else { 12 }
    }
}
