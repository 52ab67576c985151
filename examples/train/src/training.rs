//! The loop, whatever computes a step.

use std::time::Instant;

use anyhow::Result;
use wgpu_optim::AnyRule;

use crate::task::{Losses, Start};

/// What can train.
pub trait Device {
    /// What it is.
    fn name(&self) -> &str;

    /// Starts over with a rule. With `evaluates` the run measures its loss at the start and after each epoch.
    ///
    /// # Errors
    /// If the device fails.
    fn start<'d>(
        &'d self,
        rule: &AnyRule,
        start: &'d Start,
        evaluates: bool,
    ) -> Result<Box<dyn Run + 'd>>;
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
}

/// What came out of a run.
#[derive(Clone, Debug)]
pub struct Trained {
    /// What was measured.
    pub losses: Losses,
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
        seconds,
    })
}
