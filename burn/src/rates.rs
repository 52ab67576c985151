//! The learning rates of a step.

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use wgpu_optim::{Optimizer, ParamGroups, Rule};

use crate::error::StepError;
use crate::stepped::Expected;

/// The learning rate of a step, and those of groups whose parameters have another one.
pub(crate) struct Rates {
    base: f64,
    /// By the name of the group, with its ratio to the default group's in it.
    of_groups: Vec<(String, f64)>,
}

impl Rates {
    /// The rates of the parameters of a step, each of which has that of its group.
    pub(crate) fn of<R: Rule>(
        lr: &ModuleLearningRate,
        expected: &[Expected],
        groups: &ParamGroups<R>,
    ) -> Result<Self, StepError> {
        let base = lr.base();
        // Of each group the first parameter's.
        let mut seen: Vec<(&str, f64, &str)> = Vec::new();
        for param in expected {
            let group = groups.group_of(&param.path);
            let actual = lr.lr_from_param(param.id, Some(&param.path));
            match seen.iter().find(|(seen, ..)| *seen == group) {
                // By their bits, so that NaN is one rate, and refused as such.
                Some((_, expected, first)) if expected.to_bits() != actual.to_bits() => {
                    return Err(StepError::Rates {
                        group: group.to_owned(),
                        param: param.path.clone(),
                        actual,
                        first: (*first).to_owned(),
                        expected: *expected,
                    });
                }
                Some(_) => {}
                None => seen.push((group, actual, &param.path)),
            }
        }
        let mut configs = groups.iter();
        let default = configs.next().map_or(0.0, |(_, config, _)| config.lr());
        let ratio = |group: &str| {
            let config = groups.iter().find(|(name, ..)| *name == group);
            let lr = config.map_or(default, |(_, config, _)| config.lr());
            if lr == default { 1.0 } else { lr / default }
        };
        let others = seen
            .into_iter()
            .filter(|(_, rate, _)| rate.to_bits() != base.to_bits());
        Ok(Self {
            base,
            of_groups: others
                .map(|(group, rate, _)| (group.to_owned(), ratio(group) * rate))
                .collect(),
        })
    }

    pub(crate) fn set(&self, optimizer: &mut impl Optimizer) -> Result<(), StepError> {
        optimizer.set_lr(self.base)?;
        for (group, rate) in &self.of_groups {
            optimizer.set_group_lr(group, *rate)?;
        }
        Ok(())
    }
}
