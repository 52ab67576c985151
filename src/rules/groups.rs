//! Parameter groups: tensors with hyper-parameters of their own, as in PyTorch.

use std::fmt;

use super::sgd::SgdConfig;
use super::{ConfigError, GroupError, IntoRule, Real, Rule, UnknownSlot};
use crate::storage::{Precision, Rounding};

/// Name of the group of all tensors that no other group takes.
const DEFAULT: &str = "default";

/// The configuration of each tensor, by groups. Groups with momentum and groups without may be mixed; a tensor without has
/// no velocity. So may rules, by [`AnyRule`](crate::AnyRule).
///
/// ```
/// use wgpu_optim::{CpuOptimizer, Optimizer, ParamGroups, SgdConfig};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let decay = SgdConfig::builder(0.1).momentum(0.9).weight_decay(0.01);
/// let no_decay = decay.weight_decay(0.0).build()?;
/// let groups = ParamGroups::new(decay.build()?)
///     .with("no_decay", no_decay, |tensor| tensor.ends_with("bias") || tensor.contains("norm"))?;
/// let mut optimizer = CpuOptimizer::with_groups(&groups, [("fc.weight", [4]), ("fc.bias", [2])])?;
/// optimizer.set_group_lr("no_decay", 0.05)?;
///
/// assert_eq!(groups.group_of("fc.bias"), "no_decay");
/// let names: Vec<_> = groups.iter().map(|(name, ..)| name).collect();
/// assert_eq!(names, ["default", "no_decay"]);
/// # Ok(())
/// # }
/// ```
pub struct ParamGroups<R = SgdConfig> {
    /// The default group first.
    groups: Vec<(Group<R>, Matcher)>,
}

type Matcher = Box<dyn Fn(&str) -> bool + Send + Sync>;

impl<R: Rule> ParamGroups<R> {
    /// One group, named `default`, of all tensors.
    #[must_use]
    pub fn new(config: R) -> Self {
        let group = Group {
            name: DEFAULT.to_owned(),
            config,
            lr_factor: Some(1.0),
            precision: Precision::default(),
        };
        Self {
            groups: vec![(group, Box::new(|_| true))],
        }
    }

    /// Adds a group of the tensors whose names `takes` accepts and no earlier group has taken. The ratio of its
    /// learning rate to the default group's stays when the optimizer's learning rate changes. Where the default group's
    /// is zero and this one's is not, there is no ratio, and only `set_group_lr` changes this one:
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, Optimizer, ParamGroups, SgdConfig};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let groups = ParamGroups::new(SgdConfig::builder(0.0).build()?)
    ///     .with("xyz", SgdConfig::builder(1.6e-4).build()?, |tensor| tensor == "xyz")?
    ///     .with("opacity", SgdConfig::builder(0.05).build()?, |tensor| tensor == "opacity")?;
    /// let mut optimizer = CpuOptimizer::with_groups(&groups, [("xyz", [3]), ("opacity", [1])])?;
    /// optimizer.set_group_lr("xyz", 1.6e-5)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`GroupError::NameTaken`] if there is a group of this name.
    pub fn with(
        mut self,
        name: impl Into<String>,
        config: impl IntoRule<R>,
        takes: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> Result<Self, GroupError> {
        let (name, config) = (name.into(), config.into_rule());
        let default = &self.groups[0].0.config;
        if self.groups.iter().any(|(group, _)| group.name == name) {
            return Err(GroupError::NameTaken { group: name });
        }
        let is_zero = |config: &R| f32::from_f64(config.lr()) == 0.0;
        let lr_factor = match (is_zero(&config), is_zero(default)) {
            (true, true) => Some(1.0),
            (false, true) => None,
            _ => Some(config.lr() / default.lr()),
        };
        let group = Group {
            name,
            config,
            lr_factor,
            precision: self.groups[0].0.precision,
        };
        self.groups.push((group, Box::new(takes)));
        Ok(self)
    }

    /// Sets how tensors are remembered and rounded, in every group that there is and in those that are added later.
    #[must_use]
    pub fn with_precision(mut self, precision: Precision) -> Self {
        for (group, _) in &mut self.groups {
            group.precision = precision;
        }
        self
    }

    /// Sets how the tensors of one group are remembered and rounded. The group of all others is `default`, whose
    /// precision those get that are added later.
    ///
    /// # Errors
    /// [`GroupError::Unknown`] if there is no such group.
    pub fn with_group_precision(
        mut self,
        name: &str,
        precision: Precision,
    ) -> Result<Self, GroupError> {
        let mut groups = self.groups.iter_mut();
        let group = groups.find(|(group, _)| group.name == name);
        let (group, _) = group.ok_or_else(|| GroupError::Unknown {
            group: name.to_owned(),
        })?;
        group.precision = precision;
        Ok(self)
    }

    /// Every group with its configuration and precision, the default group first.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &R, &Precision)> {
        let groups = self.groups.iter();
        groups.map(|(group, _)| (&*group.name, &group.config, &group.precision))
    }

    /// The name of the group that takes a tensor of this name: the first that was added and accepts it, else the default.
    #[must_use]
    pub fn group_of(&self, tensor: &str) -> &str {
        &self.groups[self.index_of(tensor)].0.name
    }

    /// The configuration of a group by its place.
    pub(crate) fn index_of(&self, tensor: &str) -> usize {
        let mut added = self.groups.iter().skip(1);
        added
            .position(|(_, takes)| takes(tensor))
            .map_or(0, |index| index + 1)
    }

    pub(crate) fn config(&self, index: usize) -> &R {
        &self.groups[index].0.config
    }

    pub(crate) fn precision(&self, index: usize) -> &Precision {
        &self.groups[index].0.precision
    }

    /// Checks that every slot with a storage type of its own is one of some group's rule.
    pub(crate) fn check_slots(&self) -> Result<(), UnknownSlot> {
        let slots = || self.groups.iter().map(|(group, _)| group.config.slots());
        for (group, _) in &self.groups {
            for (slot, _) in group.precision.slots {
                if !slots().any(|slots| slots.iter().any(|known| known.name == *slot)) {
                    let own = group.config.slots();
                    let names: Vec<_> = own.iter().map(|slot| slot.name).collect();
                    return Err(UnknownSlot {
                        group: group.name.clone(),
                        slot: (*slot).to_owned(),
                        expected: names.join(", "),
                    });
                }
            }
        }
        Ok(())
    }

    pub(crate) fn groups(&self) -> Groups<R> {
        Groups(self.groups.iter().map(|(group, _)| group.clone()).collect())
    }
}

impl<R: Rule> fmt::Debug for ParamGroups<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.groups.iter().map(|(group, _)| group))
            .finish()
    }
}

#[derive(Clone, Debug)]
struct Group<R> {
    name: String,
    config: R,
    /// Learning rate over the default group's, if there is such a ratio.
    lr_factor: Option<f64>,
    precision: Precision,
}

/// The parameter groups of an optimizer with their hyper-parameters of the next step; the default group first. They are
/// read and set by the methods of [`Optimizer`](crate::Optimizer).
#[derive(Clone, Debug)]
pub struct Groups<R>(Vec<Group<R>>);

impl<R: Rule> Groups<R> {
    /// The default group's configuration.
    pub(crate) fn default_config(&self) -> &R {
        &self.0[0].config
    }

    pub(crate) fn configs(&self) -> impl ExactSizeIterator<Item = &R> {
        self.0.iter().map(|group| &group.config)
    }

    pub(crate) fn config(&self, index: usize) -> &R {
        &self.0[index].config
    }

    pub(crate) fn name(&self, index: usize) -> &str {
        &self.0[index].name
    }

    /// The rounding of the tensors of a group.
    pub(crate) fn rounding(&self, index: usize) -> Rounding {
        self.0[index].precision.rounding
    }

    pub(crate) fn by_name(&self, name: &str) -> Option<&R> {
        let group = self.0.iter().find(|group| group.name == name);
        group.map(|group| &group.config)
    }

    /// Sets the learning rate of every group that has a factor, by that; all or none.
    pub(crate) fn set_lr(&mut self, lr: f64) -> Result<(), ConfigError> {
        self.change(|group| match group.lr_factor {
            Some(factor) => group.config.with_lr(lr * factor),
            None => Ok(group.config.clone()),
        })
    }

    /// Sets the momentum of every group that has one, all or none; it is an error where no group has.
    pub(crate) fn set_momentum(&mut self, momentum: f64) -> Result<(), ConfigError> {
        let none_has = self.configs().all(|config| config.momentum().is_none());
        self.change(|group| {
            if group.config.momentum().is_some() || none_has {
                group.config.with_momentum(momentum)
            } else {
                Ok(group.config.clone())
            }
        })
    }

    /// Sets one group's learning rate, with a factor until all are set again.
    pub(crate) fn set_group_lr(&mut self, name: &str, lr: f64) -> Result<(), GroupError> {
        let group = self.0.iter_mut().find(|group| group.name == name);
        let group = group.ok_or_else(|| GroupError::Unknown {
            group: name.to_owned(),
        })?;
        group.config = group.config.with_lr(lr)?;
        Ok(())
    }

    fn change(
        &mut self,
        new: impl Fn(&Group<R>) -> Result<R, ConfigError>,
    ) -> Result<(), ConfigError> {
        // Checked before any is changed; done twice rather than allocating at every step.
        self.0.iter().try_for_each(|group| new(group).map(drop))?;
        for group in &mut self.0 {
            group.config = new(group)?;
        }
        Ok(())
    }
}
