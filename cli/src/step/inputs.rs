//! What a step reads: parameters, gradients and state, paired by name.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use wgpu_optim::files::{Dtype, Header};
use wgpu_optim::storage::{MASTER_PARAMS, PARAMS_REST, Storage};
use wgpu_optim::{
    AnyRule, Masters, Precision, Rule as _, Slot, SlotEntry, StateRecord, StorageType,
};

use super::fingerprint::{self, Fingerprints};
use super::parts::{self, InParts, Part, Source};
use super::plan::At;
use crate::args::StepArgs;
use crate::files::{Model, Place, Shard, storage_type};
use crate::window::ELEM_BYTES;

/// The content of an input of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Params,
    Grads,
    State,
}

/// The option that names the input.
impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Params => "--params",
            Self::Grads => "--grads",
            Self::State => "--state",
        })
    }
}

/// The files of a step, opened; only their headers have been read.
#[derive(Debug)]
pub struct Inputs {
    pub params: Model,
    grads: Model,
    pub state: Option<State>,
}

/// What an earlier step left, in one file or several.
#[derive(Debug)]
pub struct State {
    pub record: StateRecord,
    /// Fingerprints of the parameters that it goes with.
    fingerprints: Fingerprints,
    files: Model,
    slots: SavedSlots,
    /// Slots that are read as files of their own.
    in_parts: Vec<InParts>,
}

/// The slots of each tensor, by its name.
type SavedSlots = HashMap<String, Vec<SavedSlot>>;

/// A slot of a tensor as it was saved.
#[derive(Debug)]
pub struct SavedSlot {
    pub name: String,
    pub at: At,
    pub bytes: u64,
}

/// A tensor that has a gradient.
#[derive(Debug)]
pub struct Updated {
    pub name: String,
    pub numel: u64,
    /// Of its values in the files.
    pub storage: Storage,
    /// Steps that count for it so far.
    pub applied_steps: u64,
    pub grads: At,
    /// Its slots in the rule's order, where it has them already.
    pub slots: Vec<At>,
    /// Its masters, where it has them already.
    pub masters: Option<At>,
    /// What its parameters leave of them, where it has that instead.
    pub rests: Option<At>,
}

impl Updated {
    /// Whether its parameters have 16 bits.
    pub fn is_16_bits(&self) -> bool {
        self.storage.params != StorageType::F32
    }

    pub fn has_masters(&self) -> bool {
        self.storage.masters != Masters::None
    }

    /// Whether each step rounds what the next one starts from.
    pub fn is_rounded(&self) -> bool {
        self.is_16_bits() && !self.has_masters()
    }
}

/// The tensors that have a gradient, by name, and how many have none that could be used.
#[derive(Debug, Default)]
pub struct Pairing {
    pub updated: HashMap<String, Updated>,
    /// Left as they are because their gradient holds no floating-point numbers.
    pub skipped_non_float: usize,
}

impl Inputs {
    pub fn open(args: &StepArgs, config: &AnyRule) -> Result<Self> {
        let params = Model::open(&args.params)?;
        let grads = Model::open(&args.grads)?;
        let first_file = params.shards().len() + grads.shards().len();
        let open_state = |path| {
            State::open(path, &params, config, first_file)
                .with_context(|| format!("state {}", path.display()))
        };
        let state = args.state.as_deref().map(open_state).transpose()?;
        Ok(Self {
            params,
            grads,
            state,
        })
    }

    /// Pairs gradients with parameters and slots.
    pub fn pair(
        &self,
        config: &AnyRule,
        precision: &Precision,
        skip_non_float: bool,
    ) -> Result<Pairing> {
        if precision.masters == Masters::None {
            self.check_no_masters()?;
        }
        let mut pairing = Pairing::default();
        for grad in self.grads.in_place_order() {
            let name = &grad.entry.name;
            let param = self
                .params
                .get(name)
                .with_context(|| format!("gradient {name:?} has no parameter of that name"))?;
            if !is_float(grad.entry.dtype) && skip_non_float {
                pairing.skipped_non_float += 1;
                continue;
            }
            ensure!(
                is_float(grad.entry.dtype),
                "tensor {name:?}: the gradient is {}, expected F32, BF16 or F16; --skip-non-float leaves tensors whose \
                 gradient holds no floating-point numbers as they are",
                grad.entry.dtype
            );
            let stored_as = |role, place: Place<'_>| {
                let dtype = place.entry.dtype;
                storage_type(dtype).with_context(|| {
                    format!("tensor {name:?}: the {role} is {dtype}, expected F32, BF16 or F16")
                })
            };
            let (params, grads) = (stored_as("parameter", param)?, stored_as("gradient", grad)?);
            ensure!(
                grad.entry.shape == param.entry.shape,
                "tensor {name:?}: the gradient has shape {:?}, expected {:?}",
                grad.entry.shape,
                param.entry.shape
            );
            let slots = config.slots().kept().count();
            let storage = Storage::new(params, grads, slots, precision);
            let updated = self.updated(config, storage, param, grad)?;
            pairing.updated.insert(name.clone(), updated);
        }
        ensure!(
            !pairing.updated.is_empty(),
            "--grads holds no gradient to step by, expected one at least; no step has been counted"
        );
        Ok(pairing)
    }

    fn updated(
        &self,
        config: &AnyRule,
        storage: Storage,
        param: Place<'_>,
        grad: Place<'_>,
    ) -> Result<Updated> {
        let (rule_slots, name) = (config.slots(), &param.entry.name);
        let (masters, saved): (Vec<_>, Vec<_>) = self
            .slots_of(name)
            .iter()
            .partition(|saved| is_masters(saved));
        let has_place = |saved: &SavedSlot| match storage.params {
            StorageType::F32 => false,
            StorageType::Bf16 => true,
            StorageType::F16 => saved.name == MASTER_PARAMS,
        };
        if let Some(lost) = masters.iter().find(|saved| !has_place(saved)) {
            bail!(
                "tensor {name:?}: the state holds its {}, expected none, because its parameters are {}",
                lost.name,
                param.entry.dtype
            );
        }
        let masters_named = |name: &str| {
            let mut masters = masters.iter();
            let saved = masters.find(|saved| saved.name == name);
            saved.map(|saved| saved.at)
        };
        let masters = masters_named(MASTER_PARAMS);
        if let Some(lost) = saved
            .iter()
            .find(|saved| !rule_slots.kept().any(|slot| slot.name == saved.name))
        {
            bail!(
                "tensor {name:?}: the state holds its {}, which the rule does not keep with these options",
                lost.name
            );
        }
        let slot_of = |slot: &Slot| {
            let found = saved.iter().find(|saved| saved.name == slot.name);
            let found = found.with_context(|| {
                format!(
                    "tensor {name:?}: the state has no {}, which the rule keeps",
                    slot.name
                )
            })?;
            Ok(found.at)
        };
        let slots = match &*saved {
            [] => Vec::new(),
            _ => rule_slots.kept().map(slot_of).collect::<Result<_>>()?,
        };
        let state = self.state.as_ref();
        let counted = state.and_then(|state| state.record.applied_steps.get(name));
        // Slots that are not there start fresh, so the next step is the first.
        let fresh = slots.len() < rule_slots.kept().count();
        Ok(Updated {
            name: name.clone(),
            numel: param.entry.numel(),
            storage,
            applied_steps: counted.copied().filter(|_| !fresh).unwrap_or(0),
            grads: self.at_grads(grad),
            slots,
            // As the library does where both are there.
            rests: masters_named(PARAMS_REST).filter(|_| masters.is_none()),
            masters,
        })
    }

    /// A state without them would say nothing of what they hold.
    fn check_no_masters(&self) -> Result<()> {
        let slots = self.state.iter().flat_map(|state| &state.slots);
        let masters = slots.filter_map(|(tensor, slots)| {
            let masters = slots.iter().find(|slot| is_masters(slot))?;
            Some((tensor, &masters.name))
        });
        match masters.min() {
            Some((tensor, slot)) => bail!(
                "tensor {tensor:?}: the state holds its {slot}, which --masters none would lose; --masters f32 goes on \
                 from them"
            ),
            None => Ok(()),
        }
    }

    /// All files that are read, in the order in which [`At::file`] counts them.
    pub fn files(&self) -> Vec<Source<'_>> {
        let shards = self.models().flat_map(|(_, model)| model.shards());
        let in_parts = self.state.iter().flat_map(|state| &state.in_parts);
        shards
            .map(|shard| Source::File(&shard.source))
            .chain(in_parts.map(Source::InParts))
            .collect()
    }

    pub fn at_params(&self, place: Place<'_>) -> At {
        At {
            file: place.shard,
            offset: place.offset,
        }
    }

    fn at_grads(&self, place: Place<'_>) -> At {
        At {
            file: self.params.shards().len() + place.shard,
            offset: place.offset,
        }
    }

    /// The slots that the state holds of a tensor.
    pub fn slots_of(&self, tensor: &str) -> &[SavedSlot] {
        let state = self.state.as_ref();
        let slots = state.and_then(|state| state.slots.get(tensor));
        slots.map_or(&[], Vec::as_slice)
    }

    /// The inputs in the order in which [`At::file`] counts their files.
    pub fn models(&self) -> impl Iterator<Item = (Content, &Model)> {
        let state = self
            .state
            .as_ref()
            .map(|state| (Content::State, &state.files));
        let others = [
            (Content::Params, &self.params),
            (Content::Grads, &self.grads),
        ];
        others.into_iter().chain(state)
    }

    /// The tensors of the state that have other parameters now than it was written with, as far as it says, and how many
    /// it says that of.
    pub fn of_other_params(&self) -> Result<(Vec<&str>, usize)> {
        let fingerprints = self.state.iter().flat_map(|state| &state.fingerprints);
        let (mut others, mut known) = (Vec::new(), 0);
        for (tensor, fingerprint) in fingerprints {
            let Some(place) = self.params.get(tensor) else {
                continue;
            };
            known += 1;
            if fingerprint::of_input(self, place)? != *fingerprint {
                others.push(tensor.as_str());
            }
        }
        Ok((others, known))
    }

    /// Makes sure that what has been read is one version of every file.
    pub fn check_unchanged(&self) -> Result<()> {
        self.models()
            .try_for_each(|(_, model)| model.check_unchanged())
    }
}

impl State {
    /// `first_file` is the number of its first file, as [`At::file`] counts.
    fn open(path: &Path, params: &Model, config: &AnyRule, first_file: usize) -> Result<Self> {
        let files = Model::open(path)?;
        let of_metadata = |metadata: &[(String, String)]| -> Result<StateRecord> {
            let header = Header::new(metadata.to_vec(), [])?;
            Ok(StateRecord::of(&header)?)
        };
        let index = files.index().filter(|index| !index.metadata.is_empty());
        let of_index = index.map(|index| (&*index.path, of_metadata(&index.metadata)));
        let shards = files.shards().iter();
        let of_shard = |shard: &Shard| -> Result<StateRecord> {
            Ok(StateRecord::of(&parts::as_whole(&shard.header)?)?)
        };
        let of_shards = shards.map(|shard| (shard.source.path(), of_shard(shard)));
        let mut record: Option<StateRecord> = None;
        for (path, of_file) in of_index.into_iter().chain(of_shards) {
            let of_file = of_file.with_context(|| path.display().to_string())?;
            record = Some(match record {
                None => of_file,
                Some(record) => join(record, of_file)
                    .with_context(|| format!("{} and the files before", path.display()))?,
            });
        }
        let record = record.context("it has no files")?;
        let (expected, actual) = (config.meaning(), record.config.meaning());
        ensure!(
            actual == expected,
            "it was made by the {actual} form, expected {expected}"
        );
        if let Some((tensor, actual)) = record.meanings.first_key_value() {
            bail!("tensor {tensor:?} was made by the {actual} form, expected {expected}");
        }
        for name in record.applied_steps.keys() {
            params
                .get(name)
                .with_context(|| format!("tensor {name:?} has no parameter of that name"))?;
        }
        let (slots, in_parts) = saved_slots(&files, params, first_file)?;
        let mut fingerprints = Fingerprints::new();
        for shard in files.shards() {
            fingerprints.extend(fingerprint::in_file(&shard.header)?);
        }
        Ok(Self {
            record,
            fingerprints,
            files,
            slots,
            in_parts,
        })
    }
}

/// Makes sure that no state with slots is where a fresh start is going to write its own.
pub fn check_no_state_is_lost(out_state: &Path) -> Result<()> {
    // What is no safetensors file is no state either.
    let Ok(existing) = Model::open(out_state) else {
        return Ok(());
    };
    let steps = |shard: &Shard| {
        let of = |key| {
            let mut metadata = shard.header.metadata.iter();
            metadata.find_map(|(name, value)| (name == key).then_some(value.clone()))
        };
        let is_state = !shard.header.tensors().is_empty() && of("applied_steps").is_some();
        of("steps").filter(|_| is_state)
    };
    if let Some(steps) = existing.shards().iter().find_map(steps) {
        bail!(
            "{path} is the state of {steps} steps, which a fresh start would lose: --state {path} goes on from it, \
             --overwrite-state starts afresh",
            path = out_state.display()
        );
    }
    Ok(())
}

/// Every slot in the files of a state, by tensor, and those of them that lie in parts.
fn saved_slots(
    files: &Model,
    params: &Model,
    first_file: usize,
) -> Result<(SavedSlots, Vec<InParts>)> {
    let mut slots: HashMap<_, Vec<_>> = HashMap::new();
    let mut scattered: BTreeMap<(&str, &str), Vec<Part>> = BTreeMap::new();
    for (shard, file) in files.shards().iter().enumerate() {
        for SlotEntry {
            tensor,
            slot,
            entry,
        } in SlotEntry::all_in(&file.header)
        {
            // An index may leave some out.
            let place = files.get(&entry.name).filter(|place| place.shard == shard);
            let (Some(place), Some(param)) = (place, params.get(tensor)) else {
                continue;
            };
            let at = At {
                file: first_file + shard,
                offset: place.offset,
            };
            let (name, elems) = parts::split(slot);
            let expected = match &elems {
                Some(elems) => vec![elems.end.saturating_sub(elems.start) as usize],
                None => param.entry.shape.clone(),
            };
            ensure!(
                entry.shape == expected,
                "tensor {tensor:?}: the {slot} has shape {:?}, expected {expected:?}",
                entry.shape,
            );
            match elems {
                Some(elems) => {
                    let parts = scattered.entry((tensor, name)).or_default();
                    parts.push(Part { elems, at });
                }
                None => slots.entry(tensor.to_owned()).or_default().push(SavedSlot {
                    name: slot.to_owned(),
                    at,
                    bytes: entry.data_bytes.end - entry.data_bytes.start,
                }),
            }
        }
    }
    let mut in_parts = Vec::new();
    for ((tensor, slot), parts) in scattered {
        let numel = params.get(tensor).map_or(0, |param| param.entry.numel());
        let joined = InParts::new(parts, numel);
        let joined = joined.with_context(|| format!("tensor {tensor:?}: the {slot}"))?;
        let saved = SavedSlot {
            name: slot.to_owned(),
            at: At {
                file: first_file + files.shards().len() + in_parts.len(),
                offset: 0,
            },
            bytes: numel * ELEM_BYTES,
        };
        let slots = slots.entry(tensor.to_owned()).or_default();
        ensure!(
            slots.iter().all(|slot| slot.name != saved.name),
            "tensor {tensor:?}: the {} is there as a whole and in parts",
            saved.name
        );
        slots.push(saved);
        in_parts.push(joined);
    }
    Ok((slots, in_parts))
}

/// One record of two files of a state.
fn join(mut record: StateRecord, other: StateRecord) -> Result<StateRecord> {
    ensure!(
        record.config == other.config && record.steps == other.steps,
        "they are not of one state: their configurations or steps ({} and {}) are not the same",
        record.steps,
        other.steps
    );
    for (tensor, steps) in other.applied_steps {
        // Files of ranks count all tensors each.
        let counted = record.applied_steps.get(&tensor).copied();
        ensure!(
            counted.is_none_or(|counted| counted == steps),
            "tensor {tensor:?} has {} steps in one of them, and {steps} in another",
            counted.unwrap_or_default()
        );
        record.applied_steps.insert(tensor, steps);
    }
    record.meanings.extend(other.meanings);
    Ok(record)
}

/// The record of a step: what was known, and `repeat` steps more for every tensor that is updated.
pub fn record_after(
    before: Option<&StateRecord>,
    config: AnyRule,
    pairing: &Pairing,
    repeat: u64,
) -> StateRecord {
    let (steps, mut applied_steps) = match before {
        Some(before) => (before.steps, before.applied_steps.clone()),
        None => (0, BTreeMap::new()),
    };
    for tensor in pairing.updated.values() {
        applied_steps.insert(
            tensor.name.clone(),
            tensor.applied_steps.saturating_add(repeat),
        );
    }
    StateRecord {
        config,
        steps: steps.saturating_add(repeat),
        applied_steps,
        // A state of several is refused.
        meanings: BTreeMap::new(),
        control: before.and_then(|before| before.control),
    }
}

/// Whether a slot is not the rule's.
fn is_masters(saved: &SavedSlot) -> bool {
    [MASTER_PARAMS, PARAMS_REST].contains(&&*saved.name)
}

fn is_float(dtype: Dtype) -> bool {
    !matches!(
        dtype,
        Dtype::BOOL
            | Dtype::U8
            | Dtype::I8
            | Dtype::U16
            | Dtype::I16
            | Dtype::U32
            | Dtype::I32
            | Dtype::U64
            | Dtype::I64
    )
}
