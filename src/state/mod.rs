//! What an optimizer remembers between steps, in a form that does not depend on where it runs.

mod error;
#[cfg(feature = "safetensors")]
mod file;
#[cfg(feature = "safetensors")]
mod format_1;
#[cfg(feature = "safetensors")]
mod pytorch;
#[cfg(feature = "safetensors")]
mod recorded;

use std::collections::{HashMap, HashSet};

use crate::control::ControlState;
use crate::rules::sgd::SgdConfig;
use crate::rules::{Groups, ParamGroups, Rule};
use crate::storage::{Key, MASTER_PARAMS, Masters, PARAMS_REST, Rounding, Storage, StorageType};
pub use error::{DuplicateName, StateError};
#[cfg(feature = "safetensors")]
pub use {
    error::{RecordError, StateFileError},
    file::{SlotEntry, StateRecord},
    recorded::Recorded,
};

/// What an optimizer remembers of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorState {
    /// The tensor's name.
    pub name: String,
    /// Its shape, first dimension first; empty where a file did not say, because it has no slots.
    pub shape: Vec<usize>,
    /// How many steps have been applied to it; a step at which it was frozen does not count.
    pub applied_steps: u64,
    /// What its slots mean, by [`Rule::meaning`] of its group's rule.
    pub meaning: String,
    /// The slots that its rule keeps, in the rule's order; none before its first applied step. A file does not say the
    /// order of another group's rule; from there they come in alphabetical order.
    pub slots: Vec<SlotState>,
}

impl TensorState {
    /// The values of a slot, one per element.
    #[must_use]
    pub fn slot(&self, name: &str) -> Option<&[f32]> {
        let slot = self.slots.iter().find(|slot| slot.name == name);
        slot.map(|slot| slot.values.as_slice())
    }
}

/// A slot of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotState {
    /// The slot's name: `momentum_buffer`, say.
    pub name: String,
    /// One value per element.
    pub values: Vec<f32>,
}

/// Whether a slot is not the rule's.
fn is_masters(slot: &SlotState) -> bool {
    [MASTER_PARAMS, PARAMS_REST].contains(&&*slot.name)
}

/// What an optimizer remembers.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerState<R = SgdConfig> {
    /// The configuration at the time, that of the default group where there are several: for the record, an optimizer
    /// that loads the state keeps its own.
    pub config: R,
    /// How many steps the optimizer has made, whatever was frozen: the position in a schedule.
    pub steps: u64,
    /// The states, in the order of the optimizer's tensors.
    pub tensors: Vec<TensorState>,
    /// What the control of its steps remembers. An optimizer does not know: a program that has one puts it here, so that both
    /// are in one file.
    pub control: Option<ControlState>,
}

/// No tensor of this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the optimizer has no tensor {tensor:?}")]
pub struct UnknownTensor {
    /// The name.
    pub tensor: String,
}

/// A tensor that an optimizer is to step, before it lies anywhere: `("weight", [10, 20])` is one of `f32`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name, used in errors and states; unique within an optimizer.
    pub name: String,
    /// Its shape, first dimension first.
    pub shape: Vec<usize>,
    /// What its parameters are stored as.
    pub params_type: StorageType,
    /// What its gradients are stored as.
    pub grads_type: StorageType,
}

impl TensorSpec {
    /// A tensor whose parameters and gradients are `f32`.
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self {
            name: name.into(),
            shape: shape.into(),
            params_type: StorageType::F32,
            grads_type: StorageType::F32,
        }
    }

    /// The same tensor, stored otherwise.
    #[must_use]
    pub fn stored_as(self, params_type: StorageType, grads_type: StorageType) -> Self {
        Self {
            params_type,
            grads_type,
            ..self
        }
    }
}

impl<N: Into<String>, S: Into<Vec<usize>>> From<(N, S)> for TensorSpec {
    fn from((name, shape): (N, S)) -> Self {
        Self::new(name, shape)
    }
}

/// How many of the recorded steps were skipped, if the device has counted so many applied ones, modulo 2^32.
pub(crate) fn skipped(recorded: u64, applied: u32) -> u64 {
    (recorded as u32).wrapping_sub(applied).into()
}

/// Number of elements, the product of a shape; the largest number where that does not fit.
pub(crate) fn numel(shape: &[usize]) -> u64 {
    shape
        .iter()
        .fold(1, |numel: u64, size| numel.saturating_mul(*size as u64))
}

/// A tensor as the host sees it.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) numel: u64,
    pub(crate) group: usize,
    /// How many slots its group keeps.
    pub(crate) slots: usize,
    pub(crate) storage: Storage,
    /// Steps applied to it, those under a control that are not known to have been skipped among them.
    pub(crate) applied_steps: u64,
    /// Of the last of these, how many may have been skipped for all that the host knows.
    pub(crate) unread: u64,
    /// Since the device was told `applied_steps`, how many the host knows to have been skipped.
    pub(crate) skipped: u64,
    /// Tensors that differ in it may have had different steps skipped.
    pub(crate) lineage: u64,
    /// The device does not know of `applied_steps` yet.
    pub(crate) is_recounted: bool,
    /// After so many applied steps its masters start as its parameters.
    pub(crate) fresh_at: Option<u64>,
    pub(crate) frozen: bool,
    /// It lies nowhere at the moment, and is left out as if it were frozen.
    pub(crate) absent: bool,
}

/// The tensors of an optimizer, in the order in which they were given, and how far it has come.
#[derive(Clone, Debug)]
pub(crate) struct Tensors {
    tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
    steps: u64,
    next_lineage: u64,
}

impl Tensors {
    pub(crate) fn new<R: Rule>(
        groups: &ParamGroups<R>,
        tensors: impl IntoIterator<Item: Into<TensorSpec>>,
    ) -> Result<Self, DuplicateName> {
        let fresh = |spec: TensorSpec| {
            let group = groups.index_of(&spec.name);
            let slots = groups.config(group).slots().kept().count();
            let precision = groups.precision(group);
            Tensor {
                group,
                slots,
                storage: Storage::new(spec.params_type, spec.grads_type, slots, precision),
                name: spec.name,
                numel: numel(&spec.shape),
                shape: spec.shape,
                applied_steps: 0,
                unread: 0,
                skipped: 0,
                lineage: 0,
                is_recounted: true,
                fresh_at: Some(0),
                frozen: false,
                absent: false,
            }
        };
        let tensors: Vec<_> = tensors.into_iter().map(Into::into).map(fresh).collect();
        let mut by_name = HashMap::with_capacity(tensors.len());
        for (index, tensor) in tensors.iter().enumerate() {
            if by_name.insert(tensor.name.clone(), index).is_some() {
                return Err(DuplicateName {
                    tensor: tensor.name.clone(),
                });
            }
        }
        Ok(Self {
            tensors,
            by_name,
            steps: 0,
            next_lineage: 0,
        })
    }

    pub(crate) fn as_slice(&self) -> &[Tensor] {
        &self.tensors
    }

    pub(crate) fn steps(&self) -> u64 {
        self.steps
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).map(|index| &self.tensors[*index])
    }

    pub(crate) fn name_of(&self, index: usize) -> String {
        self.tensors[index].name.clone()
    }

    pub(crate) fn index_of(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    fn get_mut(&mut self, name: &str) -> Result<&mut Tensor, UnknownTensor> {
        match self.by_name.get(name) {
            Some(index) => Ok(&mut self.tensors[*index]),
            None => Err(UnknownTensor {
                tensor: name.to_owned(),
            }),
        }
    }

    /// Returns whether that changed anything.
    pub(crate) fn set_frozen(&mut self, name: &str, frozen: bool) -> Result<bool, UnknownTensor> {
        let before = std::mem::replace(&mut self.get_mut(name)?.frozen, frozen);
        Ok(before != frozen)
    }

    pub(crate) fn set_absent(&mut self, absent: &[bool]) {
        for (tensor, absent) in self.tensors.iter_mut().zip(absent) {
            tensor.absent = *absent;
        }
    }

    pub(crate) fn set_applied_steps(
        &mut self,
        name: &str,
        steps: u64,
    ) -> Result<(), UnknownTensor> {
        let tensor = self.get_mut(name)?;
        tensor.recount(steps);
        // Masters are part of the state that the count goes with.
        tensor.fresh_at = (steps == 0).then_some(0);
        Ok(())
    }

    /// Counts a step that was skipped: as the position in a schedule.
    pub(crate) fn count_skipped_step(&mut self) {
        self.steps = self.steps.saturating_add(1);
    }

    /// Whether steps under a control have been recorded whose outcome the host does not know.
    pub(crate) fn are_unread(&self) -> bool {
        self.tensors.iter().any(|tensor| tensor.unread > 0)
    }

    /// Counts a step under a control: as an applied one, until it is known better.
    pub(crate) fn count_controlled_step(&mut self) {
        self.steps = self.steps.saturating_add(1);
        let left_out: HashSet<u64> = self
            .tensors
            .iter()
            .filter(|tensor| tensor.is_left_out())
            .map(|tensor| tensor.lineage)
            .collect();
        // Who takes part has from now on another past than who did not and had the same until now.
        let mut renamed = HashMap::new();
        for tensor in self.tensors.iter_mut().filter(|t| !t.is_left_out()) {
            tensor.applied_steps = tensor.applied_steps.saturating_add(1);
            tensor.unread += 1;
            if left_out.contains(&tensor.lineage) {
                let next = &mut self.next_lineage;
                tensor.lineage = *renamed.entry(tensor.lineage).or_insert_with(|| {
                    *next += 1;
                    *next
                });
            }
        }
    }

    /// Of each tensor, the steps that were recorded for it since the device was told, on top of what it was told.
    pub(crate) fn recorded(&self) -> impl Iterator<Item = u64> {
        let recorded = |tensor: &Tensor| tensor.applied_steps + tensor.skipped;
        self.tensors.iter().map(recorded)
    }

    /// Takes over what the device had counted, modulo 2^32, when so many steps of each tensor were
    /// [`recorded`](Self::recorded). Returns whether tensors may now share dispatches that could not.
    pub(crate) fn learn(&mut self, recorded: &[u64], applied: &[u32]) -> bool {
        let counts = recorded.iter().zip(applied);
        for (tensor, (recorded, applied)) in self.tensors.iter_mut().zip(counts) {
            let now = tensor.applied_steps + tensor.skipped;
            tensor.unread = tensor.unread.min(now.saturating_sub(*recorded));
            tensor.skipped = skipped(*recorded, *applied);
            tensor.applied_steps = now.saturating_sub(tensor.skipped);
        }
        let are_known = !self.are_unread();
        let differ = self.tensors.iter().any(|tensor| tensor.lineage != 0);
        if are_known && differ {
            for tensor in &mut self.tensors {
                tensor.lineage = 0;
            }
        }
        are_known && differ
    }

    /// The device knows all counts.
    pub(crate) fn set_told(&mut self) {
        for tensor in &mut self.tensors {
            tensor.is_recounted = false;
        }
    }

    /// Counts a step, and for every tensor that is not left out an applied one.
    pub(crate) fn count_step(&mut self) {
        // A loaded state may say any number.
        self.steps = self.steps.saturating_add(1);
        for tensor in self
            .tensors
            .iter_mut()
            .filter(|tensor| !tensor.is_left_out())
        {
            let steps = tensor.applied_steps.saturating_add(1);
            tensor.recount(steps);
        }
    }

    /// What the optimizer remembers; `slot_of` is asked for the slots that tensors keep which have been updated, and
    /// behind the last of them for the masters.
    pub(crate) fn state<R: Rule>(
        &self,
        groups: &Groups<R>,
        slot_of: impl Fn(usize, usize) -> Vec<f32>,
    ) -> OptimizerState<R> {
        let tensor_state = |(index, tensor): (usize, &Tensor)| {
            let config = groups.config(tensor.group);
            let slots = config.slots();
            let kept = slots.kept().map(|slot| slot.name).enumerate();
            let kept = kept.filter(|_| tensor.applied_steps > 0);
            // Either may be loaded without the other.
            let has_masters = tensor.has_masters() && !tensor.has_fresh_masters();
            let masters = has_masters.then(|| (tensor.slots, tensor.storage.masters.slot()));
            TensorState {
                name: tensor.name.clone(),
                shape: tensor.shape.clone(),
                applied_steps: tensor.applied_steps,
                meaning: config.meaning(),
                slots: kept
                    .chain(masters)
                    .map(|(slot, name)| SlotState {
                        name: name.to_owned(),
                        values: slot_of(index, slot),
                    })
                    .collect(),
            }
        };
        OptimizerState {
            config: groups.default_config().clone(),
            steps: self.steps,
            tensors: self.tensors.iter().enumerate().map(tensor_state).collect(),
            control: None,
        }
    }

    /// Checks a whole state against these tensors and returns the entry of each, in their order.
    pub(crate) fn match_state<'s, R: Rule>(
        &self,
        state: &'s OptimizerState<R>,
        groups: &Groups<R>,
    ) -> Result<Vec<&'s TensorState>, StateError> {
        let mut entries = HashMap::with_capacity(state.tensors.len());
        for entry in &state.tensors {
            if entries.insert(entry.name.as_str(), entry).is_some() {
                return Err(StateError::DuplicateTensor {
                    tensor: entry.name.clone(),
                });
            }
        }
        let take = |tensor: &Tensor| {
            let Some(entry) = entries.remove(tensor.name.as_str()) else {
                return Err(StateError::MissingTensor {
                    tensor: tensor.name.clone(),
                });
            };
            tensor.check(entry, groups.config(tensor.group))?;
            Ok(entry)
        };
        let matched = self
            .tensors
            .iter()
            .map(take)
            .collect::<Result<Vec<_>, _>>()?;
        match entries.into_keys().min() {
            Some(unknown) => Err(StateError::UnknownTensor {
                tensor: unknown.to_owned(),
            }),
            None => Ok(matched),
        }
    }

    /// Takes over the counts of a matched state. A state that did not come with it starts fresh, so its next step is
    /// the first.
    pub(crate) fn restore_counts(&mut self, steps: u64, matched: &[&TensorState]) {
        self.steps = steps;
        for (tensor, entry) in self.tensors.iter_mut().zip(matched) {
            let masters = entry.slots.iter().filter(|slot| is_masters(slot)).count();
            let fresh = tensor.slots > 0 && entry.slots.len() == masters;
            let steps = if fresh { 0 } else { entry.applied_steps };
            tensor.recount(steps);
            tensor.fresh_at = (masters == 0).then_some(steps);
        }
    }
}

impl Tensor {
    /// Whether the next step leaves it as it is.
    pub(crate) fn is_left_out(&self) -> bool {
        self.frozen || self.absent
    }

    /// Whether its masters start as its parameters at its next step.
    pub(crate) fn has_fresh_masters(&self) -> bool {
        self.fresh_at == Some(self.applied_steps)
    }

    /// Says how many steps have been applied to it, whatever the device counted.
    fn recount(&mut self, steps: u64) {
        self.applied_steps = steps;
        self.unread = 0;
        self.skipped = 0;
        self.is_recounted = true;
    }

    /// Whether it remembers its parameters as `f32`, in one way or another.
    pub(crate) fn has_masters(&self) -> bool {
        self.storage.masters != Masters::None
    }

    /// The random bits of its next step, if anything is rounded by them.
    pub(crate) fn key(&self, rounding: Rounding) -> Key {
        self.key_at(rounding, self.applied_steps)
    }

    /// Those of the step after so many applied ones.
    pub(crate) fn key_at(&self, rounding: Rounding, applied_steps: u64) -> Key {
        match rounding {
            Rounding::Stochastic { seed } if self.storage.is_stochastic => {
                Key::new(seed, &self.name, applied_steps)
            }
            _ => Key::default(),
        }
    }

    /// Checks that an entry is of this tensor, and has all slots that its rule keeps, or none. Masters may be there or
    /// missing, whatever else is.
    fn check(&self, entry: &TensorState, config: &impl Rule) -> Result<(), StateError> {
        let tensor = || self.name.clone();
        let expected = config.meaning();
        if entry.meaning != expected {
            return Err(StateError::Meaning {
                tensor: tensor(),
                expected,
                actual: entry.meaning.clone(),
            });
        }
        let slots = config.slots();
        let kept = || slots.kept();
        for slot in &entry.slots {
            let is_masters = match self.storage.masters {
                Masters::None => false,
                Masters::F32 => slot.name == MASTER_PARAMS,
                Masters::Rest => [MASTER_PARAMS, PARAMS_REST].contains(&&*slot.name),
            };
            if !is_masters && !kept().any(|kept| kept.name == slot.name) {
                return Err(StateError::UnexpectedSlot {
                    tensor: tensor(),
                    slot: slot.name.clone(),
                });
            }
            let (expected, actual) = (self.numel, slot.values.len() as u64);
            if actual != expected {
                return Err(StateError::Length {
                    tensor: tensor(),
                    slot: slot.name.clone(),
                    expected,
                    actual,
                });
            }
        }
        if entry.slots.is_empty() {
            return Ok(());
        }
        let missing = kept().find(|kept| entry.slot(kept.name).is_none());
        if let Some(missing) = missing.filter(|_| !entry.slots.iter().all(is_masters)) {
            return Err(StateError::MissingSlot {
                tensor: tensor(),
                slot: missing.name.to_owned(),
            });
        }
        // A flat shape fits any: it is what older files hold.
        if entry.shape != self.shape && entry.shape != [self.numel as usize] {
            return Err(StateError::Shape {
                tensor: tensor(),
                expected: self.shape.clone(),
                actual: entry.shape.clone(),
            });
        }
        Ok(())
    }
}
