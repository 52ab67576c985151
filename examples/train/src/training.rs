//! The loop, whatever computes a step.

use std::time::Instant;

use anyhow::Result;
use wgpu_optim::{AnyRule, ConfigError, LossScale, StepControl, StorageType};

use crate::task::{Losses, Start};

/// The storage of gradients, and their treatment before a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gradients {
    /// The type that the backward pass rounds them to: `f32` or `f16`.
    pub stored_as: StorageType,
    /// The control of the steps. Without one the loss has no scale and every step is applied.
    pub control: Option<StepControl>,
}

impl Gradients {
    /// The most that their norm may be.
    pub const MAX_NORM: f64 = 0.5;

    /// Gradients of 32 bits, clipped by their norm, to compare [`f16`](Self::f16) with.
    ///
    /// # Errors
    /// None: all numbers are in range.
    pub fn f32_clipped() -> Result<Self, ConfigError> {
        let control = StepControl::builder().max_norm(Self::MAX_NORM);
        Ok(Self {
            stored_as: StorageType::F32,
            control: Some(control.build()?),
        })
    }

    /// Gradients of 16 bits, under a loss scale that starts too high and soon grows too high again, and clipped by
    /// their norm.
    ///
    /// # Errors
    /// None: all numbers are in range.
    pub fn f16() -> Result<Self, ConfigError> {
        let loss_scale = LossScale {
            initial: f64::from(1 << 24),
            growth_interval: 50,
            ..LossScale::default()
        };
        let control = StepControl::builder().loss_scale(loss_scale);
        Ok(Self {
            stored_as: StorageType::F16,
            control: Some(control.max_norm(Self::MAX_NORM).build()?),
        })
    }
}

/// The outcome of a control.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// The number of steps that were skipped.
    pub skipped: u64,
    /// The loss scale of the last step.
    pub scale: f32,
}

/// A run that was started, if the device could.
pub type Started<'d> = Result<Box<dyn Run + 'd>>;

/// A device that can train.
pub trait Device {
    /// The device's name.
    fn name(&self) -> &str;

    /// Starts over with a rule. With `evaluates` the run measures its loss at the start and after each epoch.
    ///
    /// # Errors
    /// If the device fails.
    fn start<'d>(&'d self, rule: &AnyRule, from: &'d Start, evaluates: bool) -> Started<'d>;
}

/// A run under way.
pub trait Run {
    /// The gradients of the next batch, and a step by them. A device may still be busy with it afterwards.
    ///
    /// # Errors
    /// If the device fails.
    fn step(&mut self) -> Result<()>;

    /// Waits until all steps are done.
    ///
    /// # Errors
    /// If the device fails.
    fn wait(&mut self) -> Result<()>;

    /// The losses so far.
    ///
    /// # Errors
    /// If the device fails.
    fn losses(&self) -> Result<Losses>;

    /// The outcome of the control, if there is one.
    ///
    /// # Errors
    /// If the device fails.
    fn outcome(&self) -> Result<Option<Outcome>>;
}

/// The result of a run.
#[derive(Clone, Debug)]
pub struct Trained {
    /// The losses of the run.
    pub losses: Losses,
    /// The outcome of the control, if there was one.
    pub outcome: Option<Outcome>,
    /// The seconds from the first step's recording to the last one's end.
    pub seconds: f64,
}

/// Trains for so many steps.
///
/// # Errors
/// If the device fails.
pub fn train(
    device: &dyn Device,
    (rule, start): (&AnyRule, &Start),
    (steps, evaluates): (usize, bool),
) -> Result<Trained> {
    let mut run = device.start(rule, start, evaluates)?;
    let began = Instant::now();
    for _ in 0..steps {
        run.step()?;
    }
    run.wait()?;
    let seconds = began.elapsed().as_secs_f64();
    Ok(Trained {
        losses: run.losses()?,
        outcome: run.outcome()?,
        seconds,
    })
}
