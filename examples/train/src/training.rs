//! The loop, whatever computes a step.

use std::time::Instant;

use anyhow::Result;
use wgpu_optim::{AnyRule, ConfigError, LossScale, StepControl, StorageType};

use crate::task::{Losses, Start};

/// How gradients are stored, and what stands between them and a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gradients {
    /// What the backward pass rounds them to: `f32` or `f16`.
    pub stored_as: StorageType,
    /// Without one the loss has no scale and every step is applied.
    pub control: Option<StepControl>,
}

impl Gradients {
    /// The most that their norm may be.
    pub const MAX_NORM: f64 = 0.5;

    /// Of 32 bits, clipped by their norm: what [`f16`](Self::f16) is compared with.
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

    /// Of 16 bits, under a loss scale that starts too high and soon grows too high again, and clipped by their norm.
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

/// What a control came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// How many steps were skipped.
    pub skipped: u64,
    /// The loss scale of the last step.
    pub scale: f32,
}

/// A run that was started, if the device could.
pub type Started<'d> = Result<Box<dyn Run + 'd>>;

/// What can train.
pub trait Device {
    /// What it is.
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

    /// What was measured so far.
    ///
    /// # Errors
    /// If the device fails.
    fn losses(&self) -> Result<Losses>;

    /// What the control came to, if there is one.
    ///
    /// # Errors
    /// If the device fails.
    fn outcome(&self) -> Result<Option<Outcome>>;
}

/// What came out of a run.
#[derive(Clone, Debug)]
pub struct Trained {
    /// What was measured.
    pub losses: Losses,
    /// Of the control, if there was one.
    pub outcome: Option<Outcome>,
    /// From the first step's recording to the last one's end.
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
