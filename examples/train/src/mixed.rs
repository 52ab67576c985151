//! Mixed precision: the runs of a comparison again, with gradients of 16 bits.

use anyhow::{Result, bail};
use indicatif::ProgressBar;

use crate::contender::Contender;
use crate::task::{Start, Task};
use crate::training::{Device, Outcome, train};

/// A contender's runs on one device.
#[derive(Clone, Debug)]
pub struct Mixed {
    /// The contender's name.
    pub label: String,
    /// The device's name.
    pub device: String,
    /// The runs, by start.
    pub runs: Vec<MixedRun>,
}

/// A run from one start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MixedRun {
    /// The outcome of its control.
    pub outcome: Outcome,
    /// The training loss at its end.
    pub loss: f32,
    /// The training loss at the end of the run whose gradients are `f32`, clipped alike and never skipped.
    pub loss_f32: f32,
}

impl MixedRun {
    /// The distance of the losses, as a share of that of `f32`.
    #[must_use]
    pub fn apart(&self) -> f32 {
        (self.loss - self.loss_f32).abs() / self.loss_f32
    }
}

/// Runs every contender again, at the same learning rate and from the same starts, on devices in pairs: one with gradients
/// of 16 bits, and what that is compared with; `progress` counts runs.
///
/// # Errors
/// If a device fails, or has no control.
pub fn again(
    task: &Task,
    contenders: &[(Contender, f64)],
    starts: &[Start],
    devices: &[[&dyn Device; 2]],
    progress: &ProgressBar,
) -> Result<Vec<Mixed>> {
    let mut mixed = Vec::new();
    for (contender, lr) in contenders {
        let rule = contender.rule(*lr)?;
        for pair in devices {
            let mut runs = Vec::new();
            for start in starts {
                let run = |device: &dyn Device| {
                    let trained = train(device, (&rule, start), (task.steps(), true))?;
                    progress.inc(1);
                    match (trained.outcome, trained.losses.train.last()) {
                        (Some(outcome), Some(loss)) => Ok((outcome, *loss)),
                        _ => bail!("{} has no control", device.name()),
                    }
                };
                let [(outcome, loss), (_, loss_f32)] = [run(pair[0])?, run(pair[1])?];
                runs.push(MixedRun {
                    outcome,
                    loss,
                    loss_f32,
                });
            }
            mixed.push(Mixed {
                label: contender.label(),
                device: pair[0].name().to_owned(),
                runs,
            });
        }
    }
    Ok(mixed)
}
