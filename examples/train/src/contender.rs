//! Rules that compete, and the learning rate of each.

use std::str::FromStr;

use anyhow::{Context as _, Result, anyhow, bail};
use indicatif::ProgressBar;
use rayon::prelude::*;
use wgpu_optim::{AnyRule, ConfigError, SgdConfig};

use crate::cpu::Twin;
use crate::task::{Start, Task};
use crate::training::train;

const MOMENTUM: f64 = 0.9;
/// Learning rates are tried a factor of four apart, and around the best one closer: down to a factor of the root of two.
const FIRST_LRS: [f64; 7] = [
    1.0 / 4096.0,
    1.0 / 1024.0,
    1.0 / 256.0,
    1.0 / 64.0,
    1.0 / 16.0,
    1.0 / 4.0,
    1.0,
];
const CLOSER: [f64; 2] = [2.0, std::f64::consts::SQRT_2];
/// The number of learning rates that are tried for a rule.
const TRIED: usize = FIRST_LRS.len() + 2 * CLOSER.len();

/// A rule by name, as it is typed: `NAME[:LIBRARY][@LR]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Contender {
    /// `plain`, `momentum`, `nesterov`, or a rule of [`AnyRule::preset`].
    pub name: String,
    /// The library that the preset is of.
    pub library: Option<String>,
    /// The source of its learning rate.
    pub lr: Lr,
}

/// The source of a learning rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lr {
    /// The best one of those tried.
    Best,
    /// `@same`: that of the first contender.
    Same,
    /// `@0.1`, say.
    Given(f64),
}

impl FromStr for Contender {
    type Err = anyhow::Error;

    fn from_str(typed: &str) -> Result<Self> {
        let (rule, lr) = match typed.split_once('@') {
            None => (typed, Lr::Best),
            Some((rule, "same")) => (rule, Lr::Same),
            Some((rule, lr)) => {
                let lr = lr.parse().with_context(|| {
                    format!("{typed}: after @ comes a learning rate, or `same`")
                })?;
                (rule, Lr::Given(lr))
            }
        };
        let (name, library) = match rule.split_once(':') {
            None => (rule, None),
            Some((name, library)) => (name, Some(library.to_owned())),
        };
        let contender = Self {
            name: name.to_owned(),
            library,
            lr,
        };
        // A name that nobody has is found here, not after minutes.
        let lr = if let Lr::Given(lr) = lr { lr } else { 0.1 };
        contender.rule(lr).with_context(|| typed.to_owned())?;
        Ok(contender)
    }
}

impl Contender {
    /// The rule at a learning rate.
    ///
    /// # Errors
    /// [`ConfigError`] if there is no such rule, or the learning rate is out of range.
    pub fn rule(&self, lr: f64) -> Result<AnyRule, ConfigError> {
        let sgd = SgdConfig::builder(lr);
        Ok(match (self.name.to_lowercase().as_str(), &self.library) {
            ("plain", None) => sgd.build()?.into(),
            ("momentum", None) => sgd.momentum(MOMENTUM).build()?.into(),
            ("nesterov", None) => sgd.momentum(MOMENTUM).nesterov(true).build()?.into(),
            (name, library) => AnyRule::preset(name, library.as_deref(), lr)?,
        })
    }

    /// The contender's name, as pictures and tables have it.
    #[must_use]
    pub fn label(&self) -> String {
        match (self.name.to_lowercase().as_str(), &self.library) {
            ("plain", None) => "plain descent".to_owned(),
            ("momentum", None) => format!("momentum {MOMENTUM}"),
            ("nesterov", None) => format!("Nesterov {MOMENTUM}"),
            (_, None) => self.name.clone(),
            (_, Some(library)) => format!("{} of {library}", self.name),
        }
    }
}

/// The most runs that [`learning_rates`] takes.
#[must_use]
pub fn runs_of_sweep(contenders: &[Contender], starts: usize) -> usize {
    let tuned = contenders.iter().filter(|c| c.lr == Lr::Best).count();
    tuned * TRIED * starts
}

/// The learning rate of each contender. The best one is that at which the mean logarithm of the training loss is least,
/// over all epochs and starts, on the CPU twin. `progress` counts runs.
///
/// # Errors
/// If a rule diverges at every learning rate, or the first contender asks for that of the first.
pub fn learning_rates(
    task: &Task,
    contenders: &[Contender],
    starts: &[Start],
    progress: &ProgressBar,
) -> Result<Vec<f64>> {
    let mut lrs: Vec<f64> = Vec::new();
    for contender in contenders {
        let lr = match (contender.lr, lrs.first()) {
            (Lr::Given(lr), _) => lr,
            (Lr::Best, _) => best_lr(task, contender, starts, progress)?,
            (Lr::Same, Some(first)) => *first,
            (Lr::Same, None) => bail!("{}: @same, but it is the first", contender.name),
        };
        lrs.push(lr);
    }
    Ok(lrs)
}

fn best_lr(
    task: &Task,
    contender: &Contender,
    starts: &[Start],
    progress: &ProgressBar,
) -> Result<f64> {
    let mean_over_starts = |lr: f64| -> Result<(f64, f64)> {
        let rule = contender.rule(lr)?;
        let losses = starts.par_iter().map(|start| {
            let loss = mean_log_loss(task, &rule, start);
            progress.inc(1);
            loss
        });
        let losses = losses.collect::<Result<Vec<_>>>()?;
        Ok((lr, losses.iter().sum::<f64>() / losses.len() as f64))
    };
    let best = |tried: &[(f64, f64)]| {
        let finite = tried.iter().filter(|(_, loss)| loss.is_finite());
        let best = finite.min_by(|(_, a), (_, b)| a.total_cmp(b));
        let diverges = || anyhow!("{} diverges at every learning rate", contender.label());
        best.map(|(lr, _)| *lr).ok_or_else(diverges)
    };
    let lrs = FIRST_LRS.into_par_iter().map(mean_over_starts);
    let mut tried = lrs.collect::<Result<Vec<_>>>()?;
    for factor in CLOSER {
        let lr = best(&tried)?;
        let lrs = [lr / factor, lr * factor].into_par_iter();
        tried.extend(lrs.map(mean_over_starts).collect::<Result<Vec<_>>>()?);
    }
    best(&tried)
}

fn mean_log_loss(task: &Task, rule: &AnyRule, start: &Start) -> Result<f64> {
    let twin = Twin::new(task);
    let trained = train(&twin, (rule, start), (task.steps(), true))?;
    let losses = trained.losses.train;
    let logarithms = losses.iter().map(|loss| f64::from(*loss).ln());
    Ok(logarithms.sum::<f64>() / losses.len() as f64)
}
