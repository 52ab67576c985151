//! Learning rate and momentum per step, as plain functions of the step's number, which starts at zero.
//!
//! They hold no state: a run that is resumed at step `n` goes on with `n`, which
//! [`OptimizerState::steps`](crate::OptimizerState::steps) remembers.
//!
//! ```
//! use wgpu_optim::{CpuOptimizer, Optimizer, SgdConfig, schedule};
//!
//! let config = SgdConfig::builder(0.1).momentum(0.5).build()?;
//! let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
//! let mut weight = [1.0, -1.0];
//! for _ in 0..100 {
//!     let step = optimizer.steps();
//!     optimizer.set_lr(schedule::warmup_cosine(step, 10, 100, 0.1, 0.001))?;
//!     optimizer.set_momentum(schedule::sutskever_momentum(step, 0.99))?;
//!     let grads = weight;
//!     optimizer.step(&mut [&mut weight], &[&grads])?;
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::f64::consts::PI;

/// Returns one value at every step.
#[must_use]
pub const fn constant(_step: u64, value: f64) -> f64 {
    value
}

/// Linear from `peak/warmup_steps` up to `peak` in `warmup_steps` steps, then half a cosine down to `floor` at
/// `total_steps` and `floor` from there on (Loshchilov and Hutter 2017, SGDR, without restarts).
#[must_use]
pub fn warmup_cosine(step: u64, warmup_steps: u64, total_steps: u64, peak: f64, floor: f64) -> f64 {
    let decay_steps = total_steps.saturating_sub(warmup_steps);
    with_warmup(step, warmup_steps, |step| {
        cosine_decay(step, decay_steps, peak, floor)
    })
}

/// Any schedule behind a linear warm-up: in `warmup_steps` steps from its first value over their number up to that value,
/// and then the schedule from its own step zero on.
///
/// ```
/// use wgpu_optim::schedule::{cosine_decay, step_decay, with_warmup};
///
/// let lr = |step| with_warmup(step, 4, |step| step_decay(step, 10, 0.1, 0.5));
/// assert_eq!([0, 1, 3, 4, 13, 14].map(lr), [0.025, 0.05, 0.1, 0.1, 0.1, 0.05]);
///
/// // Schedules are functions: one goes into another.
/// let lr = |step| with_warmup(step, 10, |step| cosine_decay(step, 90, 3e-4, 3e-5));
/// assert_eq!(lr(100), 3e-5);
/// ```
#[must_use]
pub fn with_warmup(step: u64, warmup_steps: u64, schedule: impl FnOnce(u64) -> f64) -> f64 {
    match step.checked_sub(warmup_steps) {
        Some(step) => schedule(step),
        None => schedule(0) * (step + 1) as f64 / warmup_steps as f64,
    }
}

/// Half a cosine from `peak` at step zero down to `floor` at `total_steps`, and `floor` from there on: PyTorch's
/// `CosineAnnealingLR`, which goes up again instead.
#[must_use]
pub fn cosine_decay(step: u64, total_steps: u64, peak: f64, floor: f64) -> f64 {
    cosine(progress(step, total_steps), peak, floor)
}

/// A line from `peak` at step zero down to `floor` at `total_steps`, and `floor` from there on: PyTorch's `LinearLR`.
#[must_use]
pub fn linear_decay(step: u64, total_steps: u64, peak: f64, floor: f64) -> f64 {
    let done = progress(step, total_steps);
    peak * (1.0 - done) + floor * done
}

/// `base * gamma^floor(step/period)`: PyTorch's `StepLR`. A period of zero counts as one.
#[must_use]
pub fn step_decay(step: u64, period: u64, base: f64, gamma: f64) -> f64 {
    base * gamma.powf((step / period.max(1)) as f64)
}

/// `base * gamma^step`: PyTorch's `ExponentialLR`.
#[must_use]
pub fn exponential(step: u64, base: f64, gamma: f64) -> f64 {
    base * gamma.powf(step as f64)
}

/// Learning rate and momentum of one step of [`one_cycle`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OneCycle {
    /// Highest learning rate, reached after `warmup_share` of the steps.
    pub max_lr: f64,
    /// The learning rate starts at `max_lr/start_divisor`.
    pub start_divisor: f64,
    /// The learning rate ends at its start over this.
    pub end_divisor: f64,
    /// Momentum at the start and at the end.
    pub max_momentum: f64,
    /// Momentum at the highest learning rate.
    pub min_momentum: f64,
    /// Share of the steps in which the learning rate rises.
    pub warmup_share: f64,
}

impl Default for OneCycle {
    /// PyTorch's `OneCycleLR` defaults with a highest learning rate of 0.1.
    fn default() -> Self {
        Self {
            max_lr: 0.1,
            start_divisor: 25.0,
            end_divisor: 1e4,
            max_momentum: 0.95,
            min_momentum: 0.85,
            warmup_share: 0.3,
        }
    }
}

/// Learning rate and momentum of one cycle: the learning rate rises and falls in half cosines while the momentum
/// falls and rises (Smith and Topin 2018; PyTorch's `OneCycleLR` with cosine annealing in two phases).
#[must_use]
pub fn one_cycle(step: u64, total_steps: u64, cycle: &OneCycle) -> (f64, f64) {
    let start = cycle.max_lr / cycle.start_divisor;
    let end = start / cycle.end_divisor;
    // The peak is at step `warmup_share*total - 1`, the end at the last step.
    let peak_at = cycle.warmup_share * total_steps as f64 - 1.0;
    let last = total_steps as f64 - 1.0;
    let step = (step as f64).min(last);
    if step <= peak_at {
        let done = if peak_at > 0.0 { step / peak_at } else { 1.0 };
        (
            cosine(done, start, cycle.max_lr),
            cosine(done, cycle.max_momentum, cycle.min_momentum),
        )
    } else {
        let done = (step - peak_at) / (last - peak_at);
        (
            cosine(done, cycle.max_lr, end),
            cosine(done, cycle.min_momentum, cycle.max_momentum),
        )
    }
}

/// `min(1 - 2^(-1 - log2(floor(step/250) + 1)), max)`: momentum that grows from 0.5 (Sutskever et al. 2013,
/// equation 5).
#[must_use]
pub fn sutskever_momentum(step: u64, max: f64) -> f64 {
    (1.0 - 0.5 / ((step / 250 + 1) as f64)).min(max)
}

/// Half a cosine from `from` at zero to `to` at one.
fn cosine(done: f64, from: f64, to: f64) -> f64 {
    to + (from - to) * 0.5 * (1.0 + (PI * done).cos())
}

/// How much of `total` steps is done, at most all.
fn progress(step: u64, total: u64) -> f64 {
    if step >= total {
        1.0
    } else {
        step as f64 / total as f64
    }
}
