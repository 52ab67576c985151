//! The inputs of a step: parameters, gradients and state, paired by name.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use wgpu_optim::files::Dtype;
use wgpu_optim::state::StateRecord;
use wgpu_optim::storage::{MASTER_PARAMS, PARAMS_REST, Storage};
use wgpu_optim::{AnyRule, Masters, Precision, Rule as _, StorageType};
use wgpu_optim_files::{
    Model, Part, Place, SavedState, SavedTensor, Shard, SourceFile, round, storage_type,
};

use super::fingerprint::{self, Fingerprints};
use crate::groups::{GroupArgs, GroupReport, Groups};
use crate::rule::Resumed;

/// The content of an input of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Params,
    Grads,
    State,
}

/// The options that name the files of a step.
#[derive(Debug)]
pub struct Flags {
    params: &'static str,
    grads: &'static str,
    state: &'static str,
    pub out_params: &'static str,
    pub out_state: &'static str,
}

impl Flags {
    /// Those of the command `step`.
    pub const STEP: Self = Self {
        params: "--params",
        grads: "--grads",
        state: "--state",
        out_params: "--out-params",
        out_state: "--out-state",
    };

    /// Those of the command `round`.
    pub const ROUND: Self = Self {
        params: "--global",
        grads: "--local",
        state: "--state",
        out_params: "--out-global",
        out_state: "--out-state",
    };

    /// The option that names an input.
    pub const fn of(&self, content: Content) -> &'static str {
        match content {
            Content::Params => self.params,
            Content::Grads => self.grads,
            Content::State => self.state,
        }
    }
}

/// The files of a step, opened; only their headers have been read.
#[derive(Debug)]
pub struct Inputs {
    pub params: Model,
    /// The gradients, or the local models that pseudo-gradients are made of.
    pub grads: Vec<Model>,
    pub state: Option<State>,
    pub flags: &'static Flags,
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
    /// Its parameter group.
    pub group: usize,
    /// The types of its values in the files.
    pub storage: Storage,
    pub params: Part,
    /// The tensor's gradient, or its values in each local model.
    pub grads: Vec<Part>,
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

impl Pairing {
    /// What each group has of the tensors that are updated.
    pub fn groups(&self, groups: &Groups) -> Vec<GroupReport> {
        let tensors = self.updated.values();
        groups.report(tensors.map(|tensor| (tensor.group, tensor.numel)))
    }
}

impl Inputs {
    /// Opens the files; of the state only what it says of the rule has been looked at.
    pub fn open(
        flags: &'static Flags,
        params: &Path,
        grads: &[PathBuf],
        state: Option<&Path>,
    ) -> Result<Self> {
        let open_state =
            |path: &Path| State::open(path).with_context(|| format!("state {}", path.display()));
        Ok(Self {
            params: Model::open(params)?,
            grads: grads
                .iter()
                .map(|path| Model::open(path))
                .collect::<Result<_, _>>()?,
            state: state.map(open_state).transpose()?,
            flags,
        })
    }

    /// The configuration that the state was made with.
    pub fn saved_rule(&self) -> Option<&AnyRule> {
        let state = self.state.as_ref();
        state.map(|state| &state.saved.record.config)
    }

    /// The groups of a rule over the parameters, which has to be the one that made the state.
    pub fn groups(&self, args: &GroupArgs, rule: &Resumed, path: Option<&Path>) -> Result<Groups> {
        let state = self.state.as_ref();
        if let Some(state) = state {
            let checked = state.check(&self.params, &rule.config);
            checked.with_context(|| {
                let path = path.map_or_else(String::new, |path| format!(" {}", path.display()));
                format!("state{path}")
            })?;
        }
        Groups::new(
            args,
            rule,
            state.map(|state| &state.saved.files),
            &self.params,
        )
    }

    /// Pairs gradients with parameters and slots.
    pub fn pair(
        &self,
        groups: &Groups,
        precision: &Precision,
        skip_non_float: bool,
    ) -> Result<Pairing> {
        if precision.masters == Masters::None {
            self.check_no_masters()?;
        }
        let mut pairing = Pairing::default();
        for grad in self.grads.iter().flat_map(Model::in_place_order) {
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
            stored_as("parameter", param)?;
            let grads = stored_as("gradient", grad)?;
            ensure!(
                grad.entry.shape == param.entry.shape,
                "tensor {name:?}: the gradient has shape {:?}, expected {:?}",
                grad.entry.shape,
                param.entry.shape
            );
            let updated = self.updated(groups, precision, param, (grads, &[grad]))?;
            pairing.updated.insert(name.clone(), updated);
        }
        ensure!(
            !pairing.updated.is_empty(),
            "--grads holds no gradient to step by, expected one at least; no step has been counted"
        );
        Ok(pairing)
    }

    /// Pairs the tensors of all local models with the global one's and slots.
    pub fn pair_locals(&self, groups: &Groups) -> Result<Pairing> {
        let paired = self.grads.iter().map(|local| {
            let named = || format!("local model {}", local.path().display());
            round::tensors_of(&self.params, local).with_context(named)
        });
        let paired = paired.collect::<Result<Vec<_>>>()?;
        let mut pairing = Pairing::default();
        for (index, (param, _)) in paired.first().into_iter().flatten().enumerate() {
            let Some(of) = storage_type(param.entry.dtype) else {
                continue;
            };
            let locals: Vec<_> = paired.iter().map(|pairs| pairs[index].1).collect();
            let precision = Precision::default();
            let updated = self.updated(groups, &precision, *param, (of, &locals))?;
            pairing.updated.insert(updated.name.clone(), updated);
        }
        Ok(pairing)
    }

    /// A tensor and its values in each of the models of gradients, which are stored as the first says.
    fn updated(
        &self,
        groups: &Groups,
        precision: &Precision,
        param: Place<'_>,
        (grads_type, grads): (StorageType, &[Place<'_>]),
    ) -> Result<Updated> {
        let (name, shape, numel) = (&param.entry.name, &param.entry.shape, param.entry.numel());
        let params_type = stored_as("parameter", param)?;
        let group = groups.of(name);
        let slots = &groups.get(group).slots;
        let kept = slots.iter().map(|slot| slot.name);
        let storage = Storage::new(params_type, grads_type, kept, precision);
        let saved = match &self.state {
            Some(state) => state.saved.of_tensor(name, shape, params_type, slots)?,
            None => SavedTensor::default(),
        };
        let mut first = self.state_files() + self.params.shards().len();
        let mut parts = Vec::new();
        for (grad, model) in grads.iter().zip(&self.grads) {
            parts.push(Part::whole(numel, grad.at(first), grads_type));
            first += model.shards().len();
        }
        Ok(Updated {
            name: name.clone(),
            numel,
            group,
            storage,
            params: Part::whole(numel, param.at(self.state_files()), params_type),
            grads: parts,
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
        let models = state.chain([&self.params]).chain(&self.grads);
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
        let params = [(Content::Params, &self.params)];
        let grads = self.grads.iter().map(|model| (Content::Grads, model));
        params.into_iter().chain(grads).chain(state)
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
    fn open(path: &Path) -> Result<Self> {
        let saved = SavedState::new(Model::open(path)?)?;
        let mut fingerprints = Fingerprints::new();
        for shard in saved.files.shards() {
            fingerprints.extend(fingerprint::in_file(&shard.header)?);
        }
        Ok(Self {
            saved,
            fingerprints,
        })
    }

    /// Makes sure that it is one of these parameters and this rule.
    fn check(&self, params: &Model, config: &AnyRule) -> Result<()> {
        let record: &StateRecord = &self.saved.record;
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
            for slot in self.saved.slots_of(name) {
                self.saved.parts_of(name, slot, &param.entry.shape)?;
            }
        }
        Ok(())
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

/// The storage type of a tensor that is to be stepped; `role` is how messages call it.
fn stored_as(role: &str, place: Place<'_>) -> Result<StorageType> {
    let (name, dtype) = (&place.entry.name, place.entry.dtype);
    storage_type(dtype).with_context(|| {
        format!("tensor {name:?}: the {role} is {dtype}, expected F32, BF16 or F16")
    })
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
