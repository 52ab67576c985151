//! Mixed precision: the runs of a comparison again, with gradients of 16 bits.

use anyhow::{Result, bail};
use indicatif::ProgressBar;

use crate::comparison::Comparison;
use crate::contender::Contender;
use crate::task::{Start, Task};
use crate::training::{Device, Outcome, train};

/// A contender's runs on one device.
#[derive(Clone, Debug)]
pub struct Mixed {
    /// What the contender is called.
    pub label: String,
    /// What was computed on.
    pub device: String,
    /// By start.
    pub runs: Vec<MixedRun>,
}

/// A run from one start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MixedRun {
    /// What its control came to.
    pub outcome: Outcome,
    /// The training loss at its end.
    pub loss: f32,
    /// That of the comparison's run, whose gradients are `f32`, neither scaled nor clipped.
    pub loss_f32: f32,
}

impl MixedRun {
    /// How far the losses are apart, as a share of that of `f32`.
    #[must_use]
    pub fn apart(&self) -> f32 {
        (self.loss - self.loss_f32).abs() / self.loss_f32
    }
}

/// Runs every contender of a comparison again, at the same learning rate and from the same starts, on devices with other
/// [gradients](crate::training::Gradients) in the same order; `progress` counts runs.
///
/// # Errors
/// If a device fails, or has no control.
pub fn again(
    task: &Task,
    contenders: &[(Contender, f64)],
    starts: &[Start],
    devices: &[&dyn Device],
    comparison: &Comparison,
    progress: &ProgressBar,
) -> Result<Vec<Mixed>> {
    let mut mixed = Vec::new();
    for ((contender, lr), measured) in contenders.iter().zip(&comparison.contenders) {
        let rule = contender.rule(*lr)?;
        for (device, of_f32) in devices.iter().zip(&measured.runs) {
            let mut runs = Vec::new();
            for (start, of_f32) in starts.iter().zip(of_f32) {
                let trained = train(*device, (&rule, start), (task.steps(), true))?;
                let (losses, losses_f32) = (&trained.losses.train, &of_f32.losses.train);
                let (Some(outcome), [.., loss], [.., loss_f32]) =
                    (trained.outcome, losses.as_slice(), losses_f32.as_slice())
                else {
                    bail!("{} has no control", device.name());
                };
                runs.push(MixedRun {
                    outcome,
                    loss: *loss,
                    loss_f32: *loss_f32,
                });
                progress.inc(1);
            }
            mixed.push(Mixed {
                label: measured.label.clone(),
                device: device.name().to_owned(),
                runs,
            });
        }
    }
    Ok(mixed)
}
