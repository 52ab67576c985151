//! The memory of an optimizer between steps, in a form that does not depend on where it runs.

mod checkpoint;
mod error;
#[cfg(feature = "safetensors")]
mod file;
#[cfg(feature = "safetensors")]
mod format_1;
#[cfg(feature = "safetensors")]
mod pytorch;
#[cfg(feature = "safetensors")]
mod recorded;
mod section;

use std::borrow::Cow;
use std::collections::HashMap;

use crate::control::ControlState;
use crate::rules::sgd::SgdConfig;
use crate::rules::{Groups, ParamGroups, Rule, Slots};
use crate::storage::{
    Codec, Key, MASTER_PARAMS, PARAMS_REST, Rounding, SectionValues, Storage, StorageType,
};
pub use checkpoint::{Checkpoint, CheckpointMismatch, TensorParams};
pub use error::{DuplicateName, StateError};
pub(crate) use section::Section;
#[cfg(feature = "safetensors")]
pub use {
    checkpoint::CheckpointFileError,
    error::{RecordError, StateFileError},
    file::{SlotEntry, StateRecord},
    recorded::Recorded,
};

/// The state of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorState {
    /// The tensor's name.
    pub name: String,
    /// The tensor's shape, first dimension first; empty where a file did not say, because it has no slots.
    pub shape: Vec<usize>,
    /// The number of steps that have been applied to it; a step at which it was frozen does not count.
    pub applied_steps: u64,
    /// The kind of its slots: [`Rule::state_kind`] of its group's rule.
    pub state_kind: String,
    /// The slots that its rule keeps, in the rule's order; none before its first applied step. A file does not say the
    /// order of another group's rule; from there they come in alphabetical order.
    pub slots: Vec<SlotState>,
}

impl TensorState {
    /// The values of a slot as `f32`, one per element.
    #[must_use]
    pub fn slot(&self, name: &str) -> Option<Vec<f32>> {
        self.stored(name).map(SectionValues::to_f32)
    }

    fn stored(&self, name: &str) -> Option<&SectionValues> {
        let slot = self.slots.iter().find(|slot| slot.name == name);
        slot.map(|slot| &slot.values)
    }

    /// The values of a section, by its codec; none where it starts afresh. Low bits are also found in masters.
    pub(crate) fn section(&self, section: &Section) -> Option<Cow<'_, SectionValues>> {
        let masters = self.stored(MASTER_PARAMS).filter(|_| section.is_masters);
        let values = masters.or_else(|| self.stored(section.name));
        values.map(|values| values.by(section.codec))
    }
}

/// A slot of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotState {
    /// The slot's name: `momentum_buffer`, say.
    pub name: String,
    /// One value per element, as it is stored.
    pub values: SectionValues,
}

/// Whether a slot is not the rule's.
fn is_masters(slot: &SlotState) -> bool {
    [MASTER_PARAMS, PARAMS_REST].contains(&&*slot.name)
}

/// The state of an optimizer.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerState<R = SgdConfig> {
    /// The configuration at the time, that of the default group where there are several: for the record, an optimizer
    /// that loads the state keeps its own.
    pub config: R,
    /// The number of steps that the optimizer has made, whatever was frozen: the position in a schedule.
    pub steps: u64,
    /// The states, in the order of the optimizer's tensors.
    pub tensors: Vec<TensorState>,
    /// The memory of the control of its steps. An optimizer does not know: a program that has one puts it here, so that both
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
    /// The tensor's name, used in errors and states; unique within an optimizer.
    pub name: String,
    /// The tensor's shape, first dimension first.
    pub shape: Vec<usize>,
    /// The storage type of its parameters.
    pub params_type: StorageType,
    /// The storage type of its gradients.
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

    /// Returns the tensor with parameters of another storage type.
    #[must_use]
    pub const fn params_type(mut self, params_type: StorageType) -> Self {
        self.params_type = params_type;
        self
    }

    /// Returns the tensor with gradients of another storage type.
    #[must_use]
    pub const fn grads_type(mut self, grads_type: StorageType) -> Self {
        self.grads_type = grads_type;
        self
    }
}

impl<N: Into<String>, S: Into<Vec<usize>>> From<(N, S)> for TensorSpec {
    fn from((name, shape): (N, S)) -> Self {
        Self::new(name, shape)
    }
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
    pub(crate) storage: Storage,
    pub(crate) frozen: bool,
    /// It lies nowhere at the moment, and is left out as if it were frozen.
    pub(crate) absent: bool,
}

/// The counts of steps of an optimizer and its tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Steps, whatever was frozen.
    pub(crate) steps: u64,
    /// Steps applied to each tensor.
    pub(crate) applied: Vec<u64>,
}

/// A tensor, by its name, that an optimizer or what it is to load has not, or has twice.
enum Unpaired {
    Duplicate(String),
    Missing(String),
    Unknown(String),
}

impl From<Unpaired> for StateError {
    fn from(unpaired: Unpaired) -> Self {
        match unpaired {
            Unpaired::Duplicate(tensor) => Self::DuplicateTensor { tensor },
            Unpaired::Missing(tensor) => Self::MissingTensor { tensor },
            Unpaired::Unknown(tensor) => Self::UnknownTensor { tensor },
        }
    }
}

/// The tensors of an optimizer, in the order in which they were given.
#[derive(Clone, Debug)]
pub(crate) struct Tensors {
    tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
}

impl Tensors {
    pub(crate) fn new<R: Rule>(
        groups: &ParamGroups<R>,
        tensors: impl IntoIterator<Item: Into<TensorSpec>>,
    ) -> Result<Self, DuplicateName> {
        let fresh = |spec: TensorSpec| {
            let group = groups.index_of(&spec.name);
            let slots = groups.config(group).slots();
            let precision = groups.precision(group);
            let (params, grads) = (spec.params_type, spec.grads_type);
            Tensor {
                group,
                storage: Storage::new(params, grads, slots.kept_names(), precision),
                name: spec.name,
                numel: numel(&spec.shape),
                shape: spec.shape,
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
        Ok(Self { tensors, by_name })
    }

    pub(crate) fn as_slice(&self) -> &[Tensor] {
        &self.tensors
    }

    pub(crate) fn name_of(&self, index: usize) -> String {
        self.tensors[index].name.clone()
    }

    pub(crate) fn names(&self) -> Vec<&str> {
        let tensors = self.tensors.iter();
        tensors.map(|tensor| &*tensor.name).collect()
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

    /// The state of the optimizer; `values_of` is asked for the sections of tensors by their indices.
    pub(crate) fn state<R: Rule>(
        &self,
        groups: &Groups<R>,
        counts: &Counts,
        values_of: impl Fn(usize, usize) -> SectionValues,
    ) -> OptimizerState<R> {
        let tensor_state = |(index, tensor): (usize, &Tensor)| {
            let config = groups.config(tensor.group);
            let applied_steps = counts.applied[index];
            let slot_state = |(index_of_section, section): (usize, Section)| {
                // Before the first step slots are what they start as, and masters what the parameters are.
                let has_masters = section.is_masters && tensor.numel > 0;
                if applied_steps == 0 && !has_masters {
                    return None;
                }
                let values = values_of(index, index_of_section);
                let is_known = !has_masters || values.bytes().iter().any(|byte| *byte != 0);
                is_known.then(|| SlotState {
                    name: section.name.to_owned(),
                    values,
                })
            };
            let slots = config.slots();
            let sections = Section::all(&slots, &tensor.storage).enumerate();
            TensorState {
                name: tensor.name.clone(),
                shape: tensor.shape.clone(),
                applied_steps,
                state_kind: config.state_kind(),
                slots: sections.filter_map(slot_state).collect(),
            }
        };
        OptimizerState {
            config: groups.default_config().clone(),
            steps: counts.steps,
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
        let matched = self.pair(&state.tensors, |entry| &*entry.name)?;
        for (tensor, entry) in self.tensors.iter().zip(&matched) {
            tensor.check(entry, groups.config(tensor.group))?;
        }
        Ok(matched)
    }

    /// A state of fewer tensors, or of tensors with fewer rows, as one of these: what it does not have starts as the rule says.
    pub(crate) fn grown<R: Rule>(
        &self,
        state: &OptimizerState<R>,
        groups: &Groups<R>,
    ) -> OptimizerState<R> {
        let mut grown = state.clone();
        let positions = state.tensors.iter().enumerate();
        let positions: HashMap<_, _> = positions.map(|(at, of)| (&*of.name, at)).collect();
        for tensor in &self.tensors {
            let config = groups.config(tensor.group);
            match positions.get(&*tensor.name) {
                Some(at) => tensor.grow(&mut grown.tensors[*at], &config.slots()),
                None => grown.tensors.push(TensorState {
                    name: tensor.name.clone(),
                    shape: tensor.shape.clone(),
                    applied_steps: 0,
                    state_kind: config.state_kind(),
                    slots: Vec::new(),
                }),
            }
        }
        grown
    }

    /// Pairs each tensor with the one of these entries that has its name.
    fn pair<'e, E>(
        &self,
        entries: &'e [E],
        name_of: impl Fn(&E) -> &str,
    ) -> Result<Vec<&'e E>, Unpaired> {
        let mut by_name = HashMap::with_capacity(entries.len());
        for entry in entries {
            let name = name_of(entry);
            if by_name.insert(name.to_owned(), entry).is_some() {
                return Err(Unpaired::Duplicate(name.to_owned()));
            }
        }
        let take = |tensor: &Tensor| {
            let entry = by_name.remove(&tensor.name);
            entry.ok_or_else(|| Unpaired::Missing(tensor.name.clone()))
        };
        let paired = self.tensors.iter().map(take);
        let paired = paired.collect::<Result<Vec<_>, _>>()?;
        match by_name.into_keys().min() {
            Some(unknown) => Err(Unpaired::Unknown(unknown)),
            None => Ok(paired),
        }
    }

    /// The counts of a matched state. A tensor that came without its slots starts fresh, so its next step is the first.
    pub(crate) fn counts_of(&self, steps: u64, matched: &[&TensorState]) -> Counts {
        let tensors = self.tensors.iter().zip(matched);
        let applied = tensors.map(|(tensor, entry)| {
            let has_slots = !tensor.storage.slots().is_empty();
            let is_fresh = has_slots && entry.slots.iter().all(is_masters);
            if is_fresh { 0 } else { entry.applied_steps }
        });
        Counts {
            steps,
            applied: applied.collect(),
        }
    }
}

impl Counts {
    /// Before the first step.
    pub(crate) fn new(tensors: usize) -> Self {
        Self {
            steps: 0,
            applied: vec![0; tensors],
        }
    }

    /// Counts a step, and for every tensor that is not left out an applied one.
    pub(crate) fn count_step(&mut self, tensors: &Tensors) {
        self.count_skipped_step();
        for (applied, tensor) in self.applied.iter_mut().zip(&tensors.tensors) {
            *applied = applied.saturating_add((!tensor.is_left_out()).into());
        }
    }

    /// Counts a step that was skipped: as the position in a schedule.
    pub(crate) fn count_skipped_step(&mut self) {
        // A loaded state may say any number.
        self.steps = self.steps.saturating_add(1);
    }
}

impl Tensor {
    /// Whether the next step leaves it as it is.
    pub(crate) fn is_left_out(&self) -> bool {
        self.frozen || self.absent
    }

    /// The random bits of its step after so many applied ones, if anything is rounded by them.
    pub(crate) fn key(&self, rounding: Rounding, applied_steps: u64) -> Key {
        match rounding {
            Rounding::Stochastic { seed } if self.storage.is_stochastic => {
                Key::new(seed, &self.name, applied_steps)
            }
            _ => Key::default(),
        }
    }

    /// Appends the rows that an entry of this tensor lacks.
    fn grow(&self, entry: &mut TensorState, slots: &Slots) {
        let (Some((before, width)), Some((now, own_width))) =
            (entry.shape.split_first(), self.shape.split_first())
        else {
            return;
        };
        // All else is for the check of a state to say.
        if before >= now || width != own_width {
            return;
        }
        let had = numel(&entry.shape);
        for slot in &mut entry.slots {
            let mut sections = Section::all(slots, &self.storage);
            let Some(section) = sections.find(|section| section.name == slot.name) else {
                continue;
            };
            if slot.values.len() as u64 == had {
                let rows = (self.numel - had) as usize;
                slot.values.extend(section.start.value(), rows);
            }
        }
        entry.shape.clone_from(&self.shape);
    }

    /// Checks that an entry is of this tensor, and has all slots that its rule keeps, or none. Masters may be there or
    /// missing, whatever else is.
    fn check(&self, entry: &TensorState, config: &impl Rule) -> Result<(), StateError> {
        let tensor = || self.name.clone();
        let expected = config.state_kind();
        if entry.state_kind != expected {
            return Err(StateError::StateKind {
                tensor: tensor(),
                expected,
                actual: entry.state_kind.clone(),
            });
        }
        let slots = config.slots();
        let sections = || Section::all(&slots, &self.storage);
        for slot in &entry.slots {
            let is_known = |section: Section| {
                section.name == slot.name || section.is_masters && slot.name == MASTER_PARAMS
            };
            if !sections().any(is_known) {
                return Err(StateError::UnexpectedSlot {
                    tensor: tensor(),
                    slot: slot.name.clone(),
                });
            }
            let actual = slot.values.codec();
            if (actual == Codec::LowBits) != (slot.name == PARAMS_REST) {
                return Err(StateError::Codec {
                    tensor: tensor(),
                    slot: slot.name.clone(),
                    actual: actual.name(),
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
        let missing = slots.kept().find(|slot| entry.stored(slot.name).is_none());
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
