//! The inputs of a step: parameters, gradients and state, paired by name.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use wgpu_optim::files::Dtype;
use wgpu_optim::rules::Slot;
use wgpu_optim::state::StateRecord;
use wgpu_optim::storage::{MASTER_PARAMS, PARAMS_REST, Storage};
use wgpu_optim::{AnyRule, Masters, Precision, Rule as _, StorageType};
use wgpu_optim_files::{
    Model, Part, Place, SavedState, SavedTensor, Shard, SourceFile, storage_type,
};

use super::fingerprint::{self, Fingerprints};
use crate::args::StepArgs;

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

/// The state of an earlier step, in one file or several.
#[derive(Debug)]
pub struct State {
    pub saved: SavedState,
    /// Fingerprints of the parameters that it goes with.
    fingerprints: Fingerprints,
}

/// A tensor that has a gradient.
#[derive(Debug)]
pub struct Updated {
    pub name: String,
    pub numel: u64,
    /// The types of its values in the files.
    pub storage: Storage,
    pub params: Part,
    pub grads: Part,
    /// The tensor's entry of the saved state.
    pub saved: SavedTensor,
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
        let open_state = |path| {
            State::open(path, &params, config).with_context(|| format!("state {}", path.display()))
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
        let slots: Vec<_> = config.slots().kept().copied().collect();
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
            let storage =
                Storage::new(params, grads, slots.iter().map(|slot| slot.name), precision);
            let updated = self.updated(&slots, storage, param, grad)?;
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
        slots: &[Slot],
        storage: Storage,
        param: Place<'_>,
        grad: Place<'_>,
    ) -> Result<Updated> {
        let (name, shape, numel) = (&param.entry.name, &param.entry.shape, param.entry.numel());
        let saved = match &self.state {
            Some(state) => state.saved.of_tensor(name, shape, storage.params, slots)?,
            None => SavedTensor::default(),
        };
        let grads_at = grad.at(self.state_files() + self.params.shards().len());
        Ok(Updated {
            name: name.clone(),
            numel,
            storage,
            params: Part::whole(numel, param.at(self.state_files()), storage.params),
            grads: Part::whole(numel, grads_at, storage.grads),
            saved,
        })
    }

    /// A state without them would say nothing of what they hold.
    fn check_no_masters(&self) -> Result<()> {
        let mut slots = self.state.iter().flat_map(|state| state.saved.slots());
        match slots.find(|(_, slot)| [MASTER_PARAMS, PARAMS_REST].contains(slot)) {
            Some((tensor, slot)) => bail!(
                "tensor {tensor:?}: the state holds its {slot}, which --masters none would lose; --masters f32 goes on \
                 from them"
            ),
            None => Ok(()),
        }
    }

    /// All files that are read, by their numbers in [`At`](wgpu_optim_files::At): those of the state, of the parameters, and
    /// of the gradients.
    pub fn files(&self) -> Vec<&SourceFile> {
        let state = self.state.iter().map(|state| &state.saved.files);
        let models = state.chain([&self.params, &self.grads]);
        models.flat_map(Model::sources).collect()
    }

    /// The number of files of the state.
    pub fn state_files(&self) -> usize {
        let state = self.state.as_ref();
        state.map_or(0, |state| state.saved.files.shards().len())
    }

    /// The inputs, by what they hold.
    pub fn models(&self) -> impl Iterator<Item = (Content, &Model)> {
        let state = self
            .state
            .as_ref()
            .map(|state| (Content::State, &state.saved.files));
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
        Ok(self
            .models()
            .try_for_each(|(_, model)| model.check_unchanged())?)
    }
}

impl State {
    fn open(path: &Path, params: &Model, config: &AnyRule) -> Result<Self> {
        let saved = SavedState::new(Model::open(path)?)?;
        let record: &StateRecord = &saved.record;
        let (expected, actual) = (config.state_kind(), record.config.state_kind());
        ensure!(
            actual == expected,
            "it was made by the {actual} form, expected {expected}"
        );
        if let Some((tensor, actual)) = record.state_kinds.first_key_value() {
            bail!("tensor {tensor:?} was made by the {actual} form, expected {expected}");
        }
        for name in record.applied_steps.keys() {
            let param = params
                .get(name)
                .with_context(|| format!("tensor {name:?} has no parameter of that name"))?;
            for slot in saved.slots_of(name) {
                saved.parts_of(name, slot, &param.entry.shape)?;
            }
        }
        let mut fingerprints = Fingerprints::new();
        for shard in saved.files.shards() {
            fingerprints.extend(fingerprint::in_file(&shard.header)?);
        }
        Ok(Self {
            saved,
            fingerprints,
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
            tensor.saved.applied_steps.saturating_add(repeat),
        );
    }
    StateRecord {
        config,
        steps: steps.saturating_add(repeat),
        applied_steps,
        // A state of several is refused.
        state_kinds: BTreeMap::new(),
        control: before.and_then(|before| before.control),
    }
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
