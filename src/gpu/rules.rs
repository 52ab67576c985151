//! The rules of an optimizer's parameter groups, as kernels and scalars see them: by group, and without their type.

use crate::plan::Access;
use crate::rules::{Groups, Rule, Scalars, Slots};
use crate::storage::Rounding;
use crate::wgsl::KernelVariant;

/// The rules of parameter groups. A group is known by its index, the default group first.
pub trait GroupRules {
    /// The number of groups.
    fn groups(&self) -> usize;
    /// The name of a group.
    fn name(&self, group: usize) -> &str;
    /// The rounding of the tensors of a group.
    fn rounding(&self, group: usize) -> Rounding;
    /// The slots of a group's rule.
    fn slots(&self, group: usize) -> Slots;
    /// Whether a group's rule takes sums over tensors; see [`Rule::sums`].
    fn has_sums(&self, group: usize) -> bool;
    /// The number of scalars that a group's rule takes.
    fn scalar_count(&self, group: usize) -> usize;
    /// The phase of a group's step after so many applied ones; see [`Rule::phase`].
    fn phase(&self, group: usize, applied_steps: u64) -> u64;
    /// The scalars of a phase.
    fn scalars(&self, group: usize, phase: u64) -> Scalars;
    /// A kernel of a group's rule; see [`KernelVariant::new`].
    fn variant(&self, group: usize, access: Access, tensors: usize) -> KernelVariant;
}

impl<R: Rule> GroupRules for Groups<R> {
    fn groups(&self) -> usize {
        self.configs().len()
    }

    fn name(&self, group: usize) -> &str {
        self.name(group)
    }

    fn rounding(&self, group: usize) -> Rounding {
        self.rounding(group)
    }

    fn slots(&self, group: usize) -> Slots {
        self.config(group).slots()
    }

    fn has_sums(&self, group: usize) -> bool {
        !self.config(group).sums().is_empty()
    }

    fn scalar_count(&self, group: usize) -> usize {
        self.config(group).scalar_names().len()
    }

    fn phase(&self, group: usize, applied_steps: u64) -> u64 {
        self.config(group).phase(applied_steps)
    }

    fn scalars(&self, group: usize, phase: u64) -> Scalars {
        self.config(group).scalars(phase)
    }

    fn variant(&self, group: usize, access: Access, tensors: usize) -> KernelVariant {
        KernelVariant::new(self.config(group), access, tensors)
    }
}
