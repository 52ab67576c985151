//! The comparison of all contenders from the same starts on every device: steps and seconds to the same loss.

use anyhow::{Context as _, Result};
use indicatif::ProgressBar;

use crate::contender::Contender;
use crate::task::{Losses, Start, Task};
use crate::training::{Device, train};

/// The measurements of all contenders.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// The least loss that the first contender reaches from every start.
    pub target: f32,
    /// The names of the devices.
    pub devices: Vec<String>,
    /// The contenders' measurements, in their order.
    pub contenders: Vec<Measured>,
    /// Steps from one evaluation to the next.
    pub steps_per_epoch: usize,
}

/// A contender's runs.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The contender's name.
    pub label: String,
    /// The contender's learning rate.
    pub lr: f64,
    /// The runs by device, then by start.
    pub runs: Vec<Vec<MeasuredRun>>,
}

/// A run from one start.
#[derive(Clone, Debug)]
pub struct MeasuredRun {
    /// The losses of the whole run.
    pub losses: Losses,
    /// Steps until the target is reached, if it ever is.
    pub steps: Option<usize>,
    /// Seconds that so many steps take when nothing is evaluated.
    pub seconds: Option<f64>,
}

/// Runs everything; `progress` counts runs, two for each contender, start and device.
///
/// # Errors
/// If a device fails.
pub fn compare(
    task: &Task,
    contenders: &[(Contender, f64)],
    starts: &[Start],
    devices: &[&dyn Device],
    progress: &ProgressBar,
) -> Result<Comparison> {
    let mut measured = Vec::new();
    for (contender, lr) in contenders {
        let rule = contender.rule(*lr)?;
        let mut runs = vec![Vec::new(); devices.len()];
        for start in starts {
            for (device, runs) in devices.iter().zip(&mut runs) {
                let trained = train(*device, (&rule, start), (task.steps(), true))?;
                runs.push(MeasuredRun {
                    losses: trained.losses,
                    steps: None,
                    seconds: None,
                });
                progress.inc(1);
            }
        }
        measured.push(Measured {
            label: contender.label(),
            lr: *lr,
            runs,
        });
    }

    let first = measured.first().context("no rule to compare")?;
    let reached = first
        .runs
        .iter()
        .flatten()
        .map(|run| least(&run.losses.train));
    let target = reached.fold(f32::NEG_INFINITY, f32::max);

    for (measured, (contender, lr)) in measured.iter_mut().zip(contenders) {
        let rule = contender.rule(*lr)?;
        for (index, start) in starts.iter().enumerate() {
            for (device, runs) in devices.iter().zip(&mut measured.runs) {
                let run = &mut runs[index];
                run.steps = steps_to(&run.losses.train, target, task.steps_per_epoch());
                if let Some(steps) = run.steps {
                    let timed = train(*device, (&rule, start), (steps, false))?;
                    run.seconds = Some(timed.seconds);
                }
                progress.inc(1);
            }
        }
    }
    Ok(Comparison {
        target,
        devices: devices
            .iter()
            .map(|device| device.name().to_owned())
            .collect(),
        contenders: measured,
        steps_per_epoch: task.steps_per_epoch(),
    })
}

impl Comparison {
    /// The largest difference between the training losses of a run on two devices, as a share of the loss.
    #[must_use]
    pub fn apart(&self) -> f32 {
        let runs = self.contenders.iter().flat_map(|contender| {
            let (first, others) = contender.runs.split_at(1);
            others
                .iter()
                .flat_map(move |other| first[0].iter().zip(other))
        });
        let losses = runs.flat_map(|(a, b)| a.losses.train.iter().zip(&b.losses.train));
        let shares = losses.map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() / a.abs() });
        shares.fold(0.0, f32::max)
    }
}

impl Measured {
    /// Steps to the target on the first device: the median over the starts, infinite where most never reach it.
    #[must_use]
    pub fn steps(&self) -> f64 {
        median(self.all_steps())
    }

    /// The least and the most steps of a start, infinite for one that never reaches the target.
    #[must_use]
    pub fn least_and_most_steps(&self) -> (f64, f64) {
        let steps = self.all_steps().map(|steps| steps.unwrap_or(f64::INFINITY));
        let (least, most) = (f64::INFINITY, f64::NEG_INFINITY);
        steps.fold((least, most), |(least, most), steps| {
            (least.min(steps), most.max(steps))
        })
    }

    /// The median over the starts of what the losses of a run on the first device come to.
    #[must_use]
    pub fn typical(&self, of: impl Fn(&Losses) -> f32) -> f64 {
        let of_runs = self.runs[0].iter().map(|run| of(&run.losses));
        median(of_runs.map(|loss| Some(f64::from(loss))))
    }

    fn all_steps(&self) -> impl Iterator<Item = Option<f64>> {
        let steps = self.runs[0].iter().map(|run| run.steps);
        steps.map(|steps| steps.map(|steps| steps as f64))
    }
}

/// The steps after which a loss is first at or below the target.
#[must_use]
pub fn steps_to(losses: &[f32], target: f32, steps_per_epoch: usize) -> Option<usize> {
    let epoch = losses.iter().position(|loss| *loss <= target)?;
    Some(epoch * steps_per_epoch)
}

/// The least of the losses; NaN is none.
#[must_use]
pub fn least(losses: &[f32]) -> f32 {
    losses.iter().copied().fold(f32::INFINITY, f32::min)
}

/// The middle one, of an even number the upper; infinite where that many are missing.
#[must_use]
pub fn median(values: impl IntoIterator<Item = Option<f64>>) -> f64 {
    let values = values
        .into_iter()
        .map(|value| value.unwrap_or(f64::INFINITY));
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
