//! What a step reads: parameters, gradients and state, paired by name.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use wgpu_optim::files::{Dtype, Header};
use wgpu_optim::{SgdConfig, StateRecord};

use super::plan::At;
use crate::args::StepArgs;
use crate::files::{Model, Place, Shard, SourceFile};

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
    velocities: Model,
}

/// A tensor that has a gradient.
#[derive(Debug)]
pub struct Updated {
    pub name: String,
    pub numel: u64,
    /// Steps that count for it so far.
    pub applied_steps: u64,
    pub grads: At,
    /// Its velocity, where it has one already.
    pub velocity: Option<At>,
}

/// The tensors that have a gradient, by name, and how many have none that could be used.
#[derive(Debug, Default)]
pub struct Pairing {
    pub updated: HashMap<String, Updated>,
    /// Left as they are because their gradient holds no floating-point numbers.
    pub skipped_non_float: usize,
}

impl Inputs {
    pub fn open(args: &StepArgs, config: &SgdConfig) -> Result<Self> {
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

    /// Pairs gradients with parameters and velocities.
    pub fn pair(&self, config: &SgdConfig, skip_non_float: bool) -> Result<Pairing> {
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
                "tensor {name:?}: the gradient is {}, expected F32; --skip-non-float leaves tensors whose gradient \
                 holds no floating-point numbers as they are",
                grad.entry.dtype
            );
            for (role, place) in [("parameter", param), ("gradient", grad)] {
                ensure!(
                    place.entry.dtype == Dtype::F32,
                    "tensor {name:?}: the {role} is {}, expected F32",
                    place.entry.dtype
                );
            }
            ensure!(
                grad.entry.shape == param.entry.shape,
                "tensor {name:?}: the gradient has shape {:?}, expected {:?}",
                grad.entry.shape,
                param.entry.shape
            );
            let updated = self.updated(config, name, param, grad)?;
            pairing.updated.insert(name.clone(), updated);
        }
        Ok(pairing)
    }

    fn updated(
        &self,
        config: &SgdConfig,
        name: &str,
        param: Place<'_>,
        grad: Place<'_>,
    ) -> Result<Updated> {
        let state = self.state.as_ref();
        let velocity = state.and_then(|state| state.velocities.get(name));
        if velocity.is_some() && !config.has_velocity() {
            bail!("the state holds a velocity for tensor {name:?}, but the momentum is zero");
        }
        let counted = state.and_then(|state| state.record.applied_steps.get(name));
        // A velocity that is not there starts fresh under momentum, so the next step is the first.
        let fresh = config.has_velocity() && velocity.is_none();
        Ok(Updated {
            name: name.to_owned(),
            numel: param.entry.numel(),
            applied_steps: counted.copied().filter(|_| !fresh).unwrap_or(0),
            grads: self.at_grads(grad),
            velocity: velocity.map(|velocity| self.at_velocity(velocity)),
        })
    }

    /// All files that are read, in the order in which [`At::file`] counts them.
    pub fn files(&self) -> Vec<&SourceFile> {
        let shards = self.models().flat_map(Model::shards);
        shards.map(|shard| &shard.source).collect()
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

    fn at_velocity(&self, place: Place<'_>) -> At {
        At {
            file: self.params.shards().len() + self.grads.shards().len() + place.shard,
            offset: place.offset,
        }
    }

    /// The velocity that the state holds for a tensor, and its size in bytes.
    pub fn velocity(&self, tensor: &str) -> Option<(At, u64)> {
        let place = self.state.as_ref()?.velocities.get(tensor)?;
        let bytes = &place.entry.data_bytes;
        Some((self.at_velocity(place), bytes.end - bytes.start))
    }

    /// Every index among the inputs with the files that belong to it.
    pub fn shards_by_index(&self) -> impl Iterator<Item = (&Path, &[Shard])> {
        let models = self
            .models()
            .filter_map(|model| Some((model.index()?, model)));
        models.map(|(index, model)| (index.path.as_path(), model.shards()))
    }

    fn models(&self) -> impl Iterator<Item = &Model> {
        let velocities = self.state.as_ref().map(|state| &state.velocities);
        [&self.params, &self.grads].into_iter().chain(velocities)
    }

    /// Makes sure that what has been read is one version of every file.
    pub fn check_unchanged(&self) -> Result<()> {
        self.models().try_for_each(Model::check_unchanged)
    }
}

impl State {
    fn open(path: &Path, params: &Model, config: &SgdConfig) -> Result<Self> {
        let velocities = Model::open(path)?;
        let of_metadata = |metadata: &[(String, String)]| {
            let header = Header::new(metadata.to_vec(), [])?;
            StateRecord::of(&header)
        };
        let index = velocities
            .index()
            .filter(|index| !index.metadata.is_empty());
        let of_index = index.map(|index| (&*index.path, of_metadata(&index.metadata)));
        let shards = velocities.shards().iter();
        let of_shards = shards.map(|shard| (shard.source.path(), StateRecord::of(&shard.header)));
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
        ensure!(
            record.config.form() == config.form(),
            "it was made by the {} form, expected {}",
            record.config.form(),
            config.form()
        );
        for name in record.applied_steps.keys() {
            let param = params
                .get(name)
                .with_context(|| format!("tensor {name:?} has no parameter of that name"))?;
            if let Some(velocity) = velocities.get(name) {
                ensure!(
                    velocity.entry.shape == param.entry.shape,
                    "tensor {name:?}: the velocity has shape {:?}, expected {:?}",
                    velocity.entry.shape,
                    param.entry.shape
                );
            }
        }
        Ok(Self { record, velocities })
    }
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
        if record.applied_steps.contains_key(&tensor) {
            bail!("tensor {tensor:?} is in two of them");
        }
        record.applied_steps.insert(tensor, steps);
    }
    Ok(record)
}

/// The record of a step: what was known, and `repeat` steps more for every tensor that is updated.
pub fn record_after(
    before: Option<&StateRecord>,
    config: SgdConfig,
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
