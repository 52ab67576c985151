//! The oracle: every form in its own textbook words, in `f64`, not through the coefficients, and beside each
//! value a bound on how far an `f32` computation of it may be off.
//!
//! The bound is a running error analysis (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed.,
//! sections 3.1 and 3.3). A term that passes through `n` roundings has a relative error of at most
//! `gamma(n) = n*u / (1 - n*u)`: one rounding for the coefficient, one for the product, and one for each sum
//! on the way. Sums are bounded by the sum of their terms' magnitudes, so that the bound holds in whatever
//! order a compiler adds, and fusing a product into a sum only removes a rounding. Errors of earlier steps are
//! carried along. It holds while no intermediate leaves the range of `f32`.

mod adam;

use approx::AbsDiffEq;

pub use adam::AdamOracle;

use crate::rules::sgd::{Coefficients, MomentumForm, SgdConfig, Terms};

/// How the arithmetic under test rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rounding {
    /// Largest relative error of a sum, a difference or a product.
    unit: f64,
    /// How many of these a quotient is worth.
    division: u32,
    /// How many a square root is worth.
    root: u32,
}

impl Rounding {
    /// To nearest, as Rust computes on a CPU: half an ULP, `2^-24`.
    pub const NEAREST: Self = Self {
        unit: 1.0 / (1u32 << 24) as f64,
        division: 1,
        root: 1,
    };

    /// To either neighbour, all that WGSL promises for `+`, `-` and `*`: one ULP, `2^-23`. A quotient may be off by 2.5
    /// ULP, and a root by as much as `1/inverseSqrt(x)`, where `inverseSqrt` may be off by 2.
    pub const WGSL: Self = Self {
        unit: 1.0 / (1u32 << 23) as f64,
        division: 3,
        root: 5,
    };

    fn gamma(self, roundings: u32) -> f64 {
        let nu = f64::from(roundings) * self.unit;
        nu / (1.0 - nu)
    }
}

/// One element's exact trajectory and the bounds on its `f32` twin.
#[derive(Clone, Copy, Debug)]
struct Element {
    theta: f64,
    theta_bound: f64,
    velocity: f64,
    velocity_bound: f64,
}

impl Element {
    fn step(&mut self, config: &SgdConfig, first_step: bool, rounding: Rounding, grad: f64) {
        let before = *self;
        let d = self.follow_textbook(config, first_step, grad);
        self.widen_bounds(config, first_step, rounding, &before, grad, d);
    }

    /// The step in the form's own words; returns the direction.
    fn follow_textbook(&mut self, config: &SgdConfig, first_step: bool, grad: f64) -> f64 {
        let (lr, mu) = (config.lr(), config.momentum());
        let ascent_or_descent = if config.maximize() { -grad } else { grad };
        let d = match config.weight_decay() {
            0.0 => ascent_or_descent,
            lambda => ascent_or_descent + lambda * self.theta,
        };
        if config.decoupled_weight_decay() != 0.0 {
            self.theta *= 1.0 - lr * config.decoupled_weight_decay();
        }
        if mu == 0.0 {
            self.theta -= lr * d;
            return d;
        }
        match config.form() {
            MomentumForm::HeavyBall => {
                let taken_in = if first_step {
                    d
                } else {
                    (1.0 - config.dampening()) * d
                };
                self.velocity = mu * self.velocity + taken_in;
                self.theta -= lr
                    * if config.nesterov() {
                        d + mu * self.velocity
                    } else {
                        self.velocity
                    };
            }
            MomentumForm::Ema => {
                self.velocity = mu * self.velocity + (1.0 - mu) * d;
                self.theta -= lr * self.velocity;
            }
            MomentumForm::LrInside => {
                self.velocity = mu * self.velocity - lr * d;
                self.theta += if config.nesterov() {
                    mu * self.velocity - lr * d
                } else {
                    self.velocity
                };
            }
            MomentumForm::Particle => {
                // m*dv/dt = F - eps*v and F = -kappa*d, where lr = kappa*dt^2/m and mu = 1 - eps*dt/m.
                let dt = config.time_step();
                self.velocity = mu * self.velocity - lr / dt * d;
                self.theta += dt * self.velocity;
            }
        }
        d
    }

    /// The error analysis of the kernel's statements; `before` is the element before the step.
    fn widen_bounds(
        &mut self,
        config: &SgdConfig,
        first_step: bool,
        rounding: Rounding,
        before: &Self,
        grad: f64,
        d: f64,
    ) {
        let k = Coefficients::new(config, first_step);
        let has = Terms::of(config);
        let gamma = |roundings| rounding.gamma(roundings);
        // A result below the normal range may be flushed to zero.
        let magnitude = 1.0 + before.theta.abs() + before.velocity.abs() + d.abs();
        let flush = f64::from(f32::MIN_POSITIVE) * magnitude;

        // d = g + lambda*theta, up to the sign.
        let theta_reach = before.theta.abs() + before.theta_bound;
        let mut d_bound = 0.0;
        if has.lambda {
            let lambda = k.lambda.abs();
            d_bound = lambda * before.theta_bound
                + gamma(1) * grad.abs()
                + gamma(3) * lambda * theta_reach
                + 2.0 * flush;
        }
        let d_reach = d.abs() + d_bound;

        // v = alpha*v + c*d
        if has.velocity {
            let (alpha, c) = (k.alpha.abs(), k.c.abs());
            let old_reach = before.velocity.abs() + before.velocity_bound;
            self.velocity_bound = alpha * before.velocity_bound
                + c * d_bound
                + gamma(3) * (alpha * old_reach + c * d_reach)
                + 3.0 * flush;
        }

        // theta = rho*theta - (a*v + b*d)
        let (rho, theta_roundings) = if has.rho { (k.rho.abs(), 4) } else { (1.0, 2) };
        let mut bound = rho * before.theta_bound + gamma(theta_roundings) * rho * theta_reach;
        if has.velocity {
            let reach = self.velocity.abs() + self.velocity_bound;
            bound += k.a.abs() * self.velocity_bound + gamma(4) * k.a.abs() * reach;
        }
        if has.b {
            bound += k.b.abs() * d_bound + gamma(4) * k.b.abs() * d_reach;
        }
        self.theta_bound = bound + 5.0 * flush;
    }
}

/// The exact trajectory of one tensor.
///
/// ```
/// use wgpu_optim::oracle::{Oracle, Rounding};
/// use wgpu_optim::{CpuOptimizer, SgdConfig};
///
/// let config = SgdConfig::builder(0.1).momentum(0.9).build()?;
/// let mut params = [0.3, -0.7];
/// let grads = [0.2, 0.1];
///
/// let mut oracle = Oracle::new(&params, Rounding::NEAREST);
/// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
/// for _ in 0..10 {
///     optimizer.step(&mut [&mut params], &[&grads])?;
///     oracle.step(&config, &grads);
/// }
/// let agreement = oracle.check_params(&params)?;
/// assert!(agreement.worst_ulp < 10.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Oracle {
    elements: Vec<Element>,
    rounding: Rounding,
    applied_steps: u64,
}

impl Oracle {
    /// Starts from these parameters with zero velocity.
    #[must_use]
    pub fn new(params: &[f32], rounding: Rounding) -> Self {
        Self {
            elements: params
                .iter()
                .map(|theta| Element::at(*theta, 0.0))
                .collect(),
            rounding,
            applied_steps: 0,
        }
    }

    /// Starts from these parameters and this velocity (of the same length), after `applied_steps` steps.
    #[must_use]
    pub fn resume(
        params: &[f32],
        velocity: &[f32],
        applied_steps: u64,
        rounding: Rounding,
    ) -> Self {
        let elements = params.iter().zip(velocity);
        Self {
            elements: elements.map(|(t, v)| Element::at(*t, *v)).collect(),
            rounding,
            applied_steps,
        }
    }

    /// Applies one step; `grads` holds one gradient per parameter.
    pub fn step(&mut self, config: &SgdConfig, grads: &[f32]) {
        let first_step = self.applied_steps == 0;
        for (element, grad) in self.elements.iter_mut().zip(grads) {
            element.step(config, first_step, self.rounding, f64::from(*grad));
        }
        self.applied_steps += 1;
    }

    /// The exact parameters.
    pub fn params(&self) -> impl ExactSizeIterator<Item = f64> {
        self.elements.iter().map(|element| element.theta)
    }

    /// The exact velocity.
    pub fn velocity(&self) -> impl ExactSizeIterator<Item = f64> {
        self.elements.iter().map(|element| element.velocity)
    }

    /// Compares every parameter.
    ///
    /// # Errors
    /// [`Disagreement`] naming the element that exceeds its bound the most.
    pub fn check_params(&self, actual: &[f32]) -> Result<Agreement, Disagreement> {
        let expected = self.elements.iter().map(|e| (e.theta, e.theta_bound));
        check("params", expected, actual)
    }

    /// Compares every velocity.
    ///
    /// # Errors
    /// [`Disagreement`] naming the element that exceeds its bound the most.
    pub fn check_velocity(&self, actual: &[f32]) -> Result<Agreement, Disagreement> {
        let expected = self.elements.iter().map(|e| (e.velocity, e.velocity_bound));
        check("velocity", expected, actual)
    }
}

impl Element {
    fn at(theta: f32, velocity: f32) -> Self {
        Self {
            theta: theta.into(),
            theta_bound: 0.0,
            velocity: velocity.into(),
            velocity_bound: 0.0,
        }
    }
}

/// Every element lies within its bound.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Agreement {
    /// Largest error in units in the last place of the exact value. Where terms cancel, the exact value is
    /// small and so is its ULP: many ULPs may then be a small share of the bound.
    pub worst_ulp: f64,
    /// Element with the largest error in ULPs.
    pub worst_index: usize,
    /// Largest error as a share of that element's bound, at most 1.
    pub worst_share_of_bound: f64,
}

impl Agreement {
    /// The worse of both; `other` starts at element `offset`.
    #[must_use]
    pub fn worst(self, other: Self, offset: usize) -> Self {
        let (worst_ulp, worst_index) = if other.worst_ulp > self.worst_ulp {
            (other.worst_ulp, other.worst_index + offset)
        } else {
            (self.worst_ulp, self.worst_index)
        };
        Self {
            worst_ulp,
            worst_index,
            worst_share_of_bound: self.worst_share_of_bound.max(other.worst_share_of_bound),
        }
    }
}

/// An element lies outside its bound.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Disagreement {
    /// Not one value per element.
    #[error("{what}: expected {expected} values, got {actual}")]
    Length {
        /// `params` or `velocity`.
        what: &'static str,
        /// Number of elements.
        expected: usize,
        /// Number of values.
        actual: usize,
    },
    /// The worst of the wrong elements.
    #[error(
        "{what}[{index}]: expected {expected:e}, got {actual:e}: off by {error_ulp:.2} ULP, \
         allowed are {bound_ulp:.2} ({wrong} elements are wrong)"
    )]
    Value {
        /// `params` or `velocity`.
        what: &'static str,
        /// The element.
        index: usize,
        /// Its exact value.
        expected: f64,
        /// What was computed.
        actual: f32,
        /// The error.
        error_ulp: f64,
        /// The bound.
        bound_ulp: f64,
        /// How many elements lie outside their bound.
        wrong: usize,
    },
}

fn check(
    what: &'static str,
    expected: impl ExactSizeIterator<Item = (f64, f64)>,
    actual: &[f32],
) -> Result<Agreement, Disagreement> {
    if expected.len() != actual.len() {
        return Err(Disagreement::Length {
            what,
            expected: expected.len(),
            actual: actual.len(),
        });
    }
    let mut agreement = Agreement::default();
    let mut wrong = 0;
    let mut worst_excess = 0.0;
    let mut worst_wrong = None;
    for (index, ((expected, bound), actual)) in expected.zip(actual).enumerate() {
        let value = f64::from(*actual);
        // What is not finite has no distance: it is the same or it is wrong.
        let same = value == expected || (value.is_nan() && expected.is_nan());
        let error = if same { 0.0 } else { (value - expected).abs() };
        if same || value.abs_diff_eq(&expected, bound) {
            let error_ulp = error / ulp(expected);
            if error_ulp > agreement.worst_ulp {
                agreement.worst_ulp = error_ulp;
                agreement.worst_index = index;
            }
            if error > 0.0 {
                agreement.worst_share_of_bound = agreement.worst_share_of_bound.max(error / bound);
            }
            continue;
        }
        wrong += 1;
        let excess = error / bound.max(f64::MIN_POSITIVE);
        if worst_wrong.is_none() || excess.is_nan() || excess > worst_excess {
            worst_excess = excess;
            worst_wrong = Some((
                index,
                expected,
                *actual,
                error / ulp(expected),
                bound / ulp(expected),
            ));
        }
    }
    match worst_wrong {
        None => Ok(agreement),
        Some((index, expected, actual, error_ulp, bound_ulp)) => Err(Disagreement::Value {
            what,
            index,
            expected,
            actual,
            error_ulp,
            bound_ulp,
            wrong,
        }),
    }
}

/// The distance from the `f32` nearest to `value` to the next larger one in magnitude.
fn ulp(value: f64) -> f64 {
    let nearest = (value as f32).abs();
    f64::from(nearest.next_up()) - f64::from(nearest)
}
