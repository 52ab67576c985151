//! States as safetensors files (feature `safetensors`).
//!
//! A state file holds a tensor `TENSOR.SLOT`, of the tensor's shape, for each slot of each tensor that has been stepped,
//! masters of 16-bit parameters included ([`Masters::slot`](crate::Masters::slot)): F32, BF16 or F16 as it is stored, and
//! U16 for the low bits of masters, which older files hold as whole numbers in F32. Its metadata are
//! `format_version`, `rule` (the configuration, by [`Recorded`]), `steps`, `applied_steps` (a JSON map from tensor name
//! to count) and, where the slots of some tensors are of another kind than the rule's, `meanings` (a JSON map from their
//! names to [`Rule::state_kind`](crate::Rule::state_kind)), and `control` (JSON of a [`ControlState`]) where the program
//! has put one there. Files of format 1 are still read.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use serde::de::DeserializeOwned;

use super::{OptimizerState, Recorded, SlotState, StateFileError, TensorState, format_1};
use crate::control::ControlState;
use crate::files::{Content, Entries, Header, TensorEntry, serialize};
use crate::rules::{AnyRule, Slots};
use crate::storage::{Codec, MASTER_PARAMS, PARAMS_REST, SectionValues};

const FORMAT_VERSION: &str = "2";

/// The metadata of a control.
const CONTROL: &str = "control";

/// The older version that is read, too.
const FORMAT_1: &str = "1";

/// A slot as it lies in a state file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotEntry<'h> {
    /// The tensor whose slot it is.
    pub tensor: &'h str,
    /// The slot: `momentum_buffer`, say.
    pub slot: &'h str,
    /// The slot's shape and place.
    pub entry: &'h TensorEntry,
}

impl<'h> SlotEntry<'h> {
    /// Every slot in a file whose header [`StateRecord::of`] takes, in the order of their data.
    pub fn all_in(header: &'h Header) -> impl Iterator<Item = Self> {
        let is_format_1 = is_format_1(header);
        let entries = header.in_place_order();
        entries.filter_map(move |entry| Self::of(entry, is_format_1))
    }

    /// The slot that an entry of a file of the latest format is, if its name is one.
    pub(super) fn of_entry(entry: &'h TensorEntry) -> Option<Self> {
        Self::of(entry, false)
    }

    fn of(entry: &'h TensorEntry, is_format_1: bool) -> Option<Self> {
        let (tensor, slot) = match is_format_1 {
            true => (entry.name.as_str(), format_1::SLOT),
            false => split_name(&entry.name)?,
        };
        Some(Self {
            tensor,
            slot,
            entry,
        })
    }

    /// The name of a slot in a file: `TENSOR.SLOT`. No two slots have one, because a slot's own name has no dot.
    ///
    /// # Errors
    /// [`StateFileError::SlotName`] if `slot` is empty or has a dot.
    pub fn name(tensor: &str, slot: &str) -> Result<String, StateFileError> {
        let name = format!("{tensor}.{slot}");
        match split_name(&name) {
            Some(parts) if parts == (tensor, slot) => Ok(name),
            _ => Err(StateFileError::SlotName { name }),
        }
    }
}

/// Tensor and slot of a name in a file; a tensor's name may have dots.
fn split_name(name: &str) -> Option<(&str, &str)> {
    name.rsplit_once('.').filter(|(_, slot)| !slot.is_empty())
}

/// The record of a state, in the metadata of its file: `format_version`, `rule`, `steps`, `applied_steps` and,
/// where there are any, `meanings` and `control`, always in this order.
///
/// [`OptimizerState`] has it together with the slots; a program that does not want them in memory all at once reads
/// and writes it with a file's [`Header`], and finds them by [`SlotEntry`].
#[derive(Clone, Debug, PartialEq)]
pub struct StateRecord<R = AnyRule> {
    /// The configuration at the time; see [`OptimizerState::config`].
    pub config: R,
    /// The number of steps that the optimizer has made.
    pub steps: u64,
    /// The number of steps that have been applied to each tensor, by name. A tensor without slots is in it, too.
    pub applied_steps: BTreeMap<String, u64>,
    /// The kind of the slots of those tensors whose group has a rule of another kind than `config`: `meanings` in the
    /// file.
    pub state_kinds: BTreeMap<String, String>,
    /// The memory of the control of the optimizer's steps, if there is one.
    pub control: Option<ControlState>,
}

impl<R: Recorded> StateRecord<R> {
    /// The record as a file's metadata.
    ///
    /// # Errors
    /// [`StateFileError`] if a part of it cannot be written.
    pub fn to_metadata(&self) -> Result<Vec<(String, String)>, StateFileError> {
        let mut entries = vec![
            ("format_version", FORMAT_VERSION.to_owned()),
            ("rule", self.config.to_record()?),
            ("steps", self.steps.to_string()),
            ("applied_steps", serde_json::to_string(&self.applied_steps)?),
        ];
        if !self.state_kinds.is_empty() {
            entries.push(("meanings", serde_json::to_string(&self.state_kinds)?));
        }
        if let Some(control) = &self.control {
            entries.push((CONTROL, serde_json::to_string(control)?));
        }
        let entries = entries.into_iter();
        Ok(entries
            .map(|(key, value)| (key.to_owned(), value))
            .collect())
    }

    /// The record in the header of a state file.
    ///
    /// # Errors
    /// [`StateFileError`] naming what is missing or wrong: a metadata entry, another rule, a tensor that is no slot of
    /// the rule, is not of floats, has another shape than the tensor's other slots, or has no count.
    pub fn of(header: &Header) -> Result<Self, StateFileError> {
        let record = Self::of_metadata(header)?;
        record.check_slots(header, header.in_place_order())?;
        Ok(record)
    }

    /// The record in the metadata of a header, whatever tensors that has.
    pub(super) fn of_metadata(header: &Header) -> Result<Self, StateFileError> {
        let version = required(header, "format_version")?;
        let (rule, meanings) = match version {
            FORMAT_1 => {
                let (form, config) = (required(header, "form")?, required(header, "config")?);
                let config = format_1::config(form, config)?;
                (AnyRule::from(config).to_record()?.into(), None)
            }
            FORMAT_VERSION => {
                let rule = Cow::from(required(header, "rule")?);
                (rule, metadata(header, "meanings"))
            }
            _ => {
                return Err(StateFileError::Version {
                    expected: "1 or 2",
                    actual: version.to_owned(),
                });
            }
        };
        let config = R::from_record(&rule)?;
        let steps = required(header, "steps")?
            .parse()
            .map_err(|error: std::num::ParseIntError| malformed("steps", error))?;
        let counts: Entries<u64> = map("applied_steps", required(header, "applied_steps")?)?;
        if let Some(tensor) = counts.duplicate() {
            return Err(StateFileError::DuplicateCount {
                tensor: tensor.to_owned(),
            });
        }
        let meanings: Entries<String> = map("meanings", meanings.unwrap_or("{}"))?;
        if let Some(tensor) = meanings.duplicate() {
            let message = format!("tensor {tensor:?} comes twice");
            return Err(malformed("meanings", message));
        }
        let control = metadata(header, CONTROL).map(control).transpose()?;
        let own = config.state_kind();
        let others = meanings.0.into_iter();
        let record = Self {
            control,
            config,
            steps,
            applied_steps: counts.0.into_iter().collect(),
            state_kinds: others.filter(|(_, kind)| *kind != own).collect(),
        };
        for tensor in record.state_kinds.keys() {
            record.check_count(tensor)?;
        }
        Ok(record)
    }

    /// Checks that these tensors of a file are slots of the rule, each of its tensor's shape.
    pub(super) fn check_slots<'h>(
        &self,
        header: &Header,
        entries: impl Iterator<Item = &'h TensorEntry>,
    ) -> Result<(), StateFileError> {
        let (slots, is_format_1) = (self.config.slots(), is_format_1(header));
        let mut shapes = HashMap::new();
        for entry in entries {
            let Some(SlotEntry { tensor, slot, .. }) = SlotEntry::of(entry, is_format_1) else {
                return Err(StateFileError::SlotName {
                    name: entry.name.clone(),
                });
            };
            self.check_count(tensor)?;
            self.check_slot(&slots, tensor, slot)?;
            codec_of(tensor, slot, entry)?;
            let expected = *shapes.entry(tensor).or_insert(&entry.shape);
            check_shape(tensor, slot, entry, expected)?;
        }
        Ok(())
    }

    fn check_count(&self, tensor: &str) -> Result<(), StateFileError> {
        match self.applied_steps.contains_key(tensor) {
            true => Ok(()),
            false => Err(StateFileError::MissingCount {
                tensor: tensor.to_owned(),
            }),
        }
    }

    /// Whether the rule may keep this slot, or the tensor its masters there. Of another group's rule only the kind of
    /// its slots is known, and an optimizer that loads the state asks that rule.
    fn check_slot(&self, slots: &Slots, tensor: &str, slot: &str) -> Result<(), StateFileError> {
        let is_known = slots.iter().any(|known| known.name == slot);
        let is_masters = [MASTER_PARAMS, PARAMS_REST].contains(&slot);
        if is_known || is_masters || self.state_kinds.contains_key(tensor) {
            return Ok(());
        }
        let expected: Vec<_> = slots.iter().map(|slot| slot.name).collect();
        Err(StateFileError::UnknownSlot {
            tensor: tensor.to_owned(),
            slot: slot.to_owned(),
            expected: expected.join(", "),
        })
    }
}

impl<R: Recorded> OptimizerState<R> {
    /// The content of a state file. The same state makes the same bytes.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, OptimizerState, SgdConfig};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let config = SgdConfig::builder(0.1).momentum(0.9).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
    /// optimizer.step(&mut [&mut [1.0, 2.0]], &[&[0.5, -0.5]])?;
    /// let file = optimizer.state().to_safetensors()?;
    ///
    /// let mut resumed = CpuOptimizer::new(config, [("weight", [2])])?;
    /// resumed.load_state(&OptimizerState::from_safetensors(&file)?)?;
    /// assert_eq!(resumed.state(), optimizer.state());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`StateFileError`] if a slot does not have as many elements as its tensor's shape says, a name comes twice, or
    /// a slot is none of the rule's or has a name that no file can hold.
    pub fn to_safetensors(&self) -> Result<Vec<u8>, StateFileError> {
        let (record, slots) = self.record_and_slots()?;
        Ok(serialize(record.to_metadata()?, slots)?)
    }

    /// The record of a file, and its slots.
    pub(super) fn record_and_slots(
        &self,
    ) -> Result<(StateRecord<R>, Vec<Content<'_>>), StateFileError> {
        let (record, known) = (self.record()?, self.config.slots());
        let mut slots = Vec::new();
        for tensor in &self.tensors {
            let name = &tensor.name;
            for slot in &tensor.slots {
                let name_in_file = SlotEntry::name(name, &slot.name)?;
                record.check_slot(&known, name, &slot.name)?;
                let (dtype, bytes) = (slot.values.codec().into(), slot.values.bytes());
                slots.push((name_in_file, dtype, &*tensor.shape, bytes));
            }
        }
        Ok((record, slots))
    }

    /// The record that a file of the state has beside its slots.
    ///
    /// # Errors
    /// [`StateFileError::DuplicateCount`] if a tensor's name comes twice.
    pub fn record(&self) -> Result<StateRecord<R>, StateFileError> {
        let own = self.config.state_kind();
        let mut record = StateRecord {
            config: self.config.clone(),
            steps: self.steps,
            applied_steps: BTreeMap::new(),
            state_kinds: BTreeMap::new(),
            control: self.control,
        };
        for tensor in &self.tensors {
            let name = &tensor.name;
            let counts = &mut record.applied_steps;
            if counts.insert(name.clone(), tensor.applied_steps).is_some() {
                return Err(StateFileError::DuplicateCount {
                    tensor: name.clone(),
                });
            }
            if tensor.state_kind != own {
                record
                    .state_kinds
                    .insert(name.clone(), tensor.state_kind.clone());
            }
        }
        Ok(record)
    }

    /// Reads the content of a state file, of this format or an older one. Tensors come in alphabetical order.
    ///
    /// # Errors
    /// [`StateFileError`] naming what is missing or wrong.
    pub fn from_safetensors(file: &[u8]) -> Result<Self, StateFileError> {
        let header = Header::of(file)?;
        let slots = SlotEntry::all_in(&header);
        let slots = slots.map(|slot| (slot, header.data(file, slot.entry).to_vec()));
        StateRecord::of(&header)?.with_slots(slots)
    }
}

impl<R: Recorded> StateRecord<R> {
    /// The state of a record with slots that have been checked, each with its bytes. Tensors come in alphabetical order.
    pub(super) fn with_slots<'h>(
        self,
        all: impl IntoIterator<Item = (SlotEntry<'h>, Vec<u8>)>,
    ) -> Result<OptimizerState<R>, StateFileError> {
        let Self {
            config,
            steps,
            applied_steps,
            state_kinds,
            control,
        } = self;
        let mut slots: HashMap<&str, Vec<(SlotEntry<'_>, Vec<u8>)>> = HashMap::new();
        for (slot, bytes) in all {
            slots.entry(slot.tensor).or_default().push((slot, bytes));
        }
        let (own, order) = (config.state_kind(), config.slots());
        let place_of = |(slot, _): &(SlotEntry<'_>, Vec<u8>)| {
            let place = order.iter().position(|known| known.name == slot.slot);
            place.unwrap_or(order.len())
        };
        let tensor_state = |(name, applied_steps): (String, u64)| {
            let mut slots = slots.remove(name.as_str()).unwrap_or_default();
            slots.sort_by_key(place_of);
            let first = slots.first();
            let shape = first.map_or_else(Vec::new, |(slot, _)| slot.entry.shape.clone());
            let slot_state = |(slot, bytes): (SlotEntry<'_>, Vec<u8>)| {
                let codec = codec_of(slot.tensor, slot.slot, slot.entry)?;
                Ok(SlotState {
                    name: slot.slot.to_owned(),
                    values: SectionValues::from_bytes(codec, bytes).of_slot(slot.slot),
                })
            };
            let slot_states = slots.into_iter().map(slot_state);
            Ok(TensorState {
                slots: slot_states.collect::<Result<_, StateFileError>>()?,
                shape,
                applied_steps,
                state_kind: state_kinds.get(&name).unwrap_or(&own).clone(),
                name,
            })
        };
        let tensors = applied_steps.into_iter().map(tensor_state);
        Ok(OptimizerState {
            config,
            steps,
            tensors: tensors.collect::<Result<_, StateFileError>>()?,
            control,
        })
    }
}

fn metadata<'h>(header: &'h Header, key: &str) -> Option<&'h str> {
    let mut entries = header.metadata.iter();
    let entry = entries.find(|(name, _)| name == key);
    entry.map(|(_, value)| value.as_str())
}

fn is_format_1(header: &Header) -> bool {
    metadata(header, "format_version") == Some(FORMAT_1)
}

fn required<'h>(header: &'h Header, key: &'static str) -> Result<&'h str, StateFileError> {
    metadata(header, key).ok_or(StateFileError::MissingMetadata { key })
}

fn malformed(key: &'static str, error: impl ToString) -> StateFileError {
    StateFileError::MalformedMetadata {
        key,
        message: error.to_string(),
    }
}

/// The memory of a control, which no step has left otherwise.
fn control(json: &str) -> Result<ControlState, StateFileError> {
    let control: ControlState =
        serde_json::from_str(json).map_err(|error| malformed(CONTROL, error))?;
    match control.scale.is_normal() && control.scale > 0.0 {
        true => Ok(control),
        false => Err(malformed(CONTROL, format!("a scale of {}", control.scale))),
    }
}

/// A JSON map of tensors.
fn map<V: DeserializeOwned>(key: &'static str, json: &str) -> Result<Entries<V>, StateFileError> {
    serde_json::from_str(json).map_err(|error| malformed(key, error))
}

/// The codec of a slot in a file. Low bits of masters are whole numbers in F32 in older files.
pub(super) fn codec_of(
    tensor: &str,
    slot: &str,
    entry: &TensorEntry,
) -> Result<Codec, StateFileError> {
    let is_low_bits = slot == PARAMS_REST;
    match Codec::try_from(entry.dtype) {
        Ok(codec) if is_low_bits == (codec == Codec::LowBits) => Ok(codec),
        Ok(Codec::F32) if is_low_bits => Ok(Codec::F32),
        _ => Err(StateFileError::Dtype {
            tensor: tensor.to_owned(),
            slot: slot.to_owned(),
            expected: match is_low_bits {
                true => "U16 or F32",
                false => "F32, BF16 or F16",
            },
            actual: entry.dtype.to_string(),
        }),
    }
}

pub(super) fn check_shape(
    tensor: &str,
    slot: &str,
    entry: &TensorEntry,
    expected: &[usize],
) -> Result<(), StateFileError> {
    if entry.shape == expected {
        return Ok(());
    }
    Err(StateFileError::Shape {
        tensor: tensor.to_owned(),
        slot: slot.to_owned(),
        expected: expected.to_vec(),
        actual: entry.shape.clone(),
    })
}
