//! A round, bucket by bucket: local models in, the new global model and the outer state out.

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, anyhow, ensure};
use wgpu_optim::storage::{MASTER_PARAMS, round, unpack};
use wgpu_optim::{Rule as _, StorageType};
use wgpu_optim_cli::files::{Model, Outputs};
use wgpu_optim_cli::window::{Engine, Values};
use wgpu_optim_cli::{
    Choice, CommonArgs, Failure, Interrupt, Progress, peak_memory_bytes, print, warn,
};

use super::RoundArgs;
use super::models::{At, Models, Tensor};
use super::report::Report;
use super::state::State;
use crate::buckets::{Buckets, Memory, Staging, Stored, Weights};
use crate::checkpoint::Names;
use crate::ranks::{Ranks, Terms};
use crate::shares::{Shares, Slice};

pub fn run(ranks: &Ranks, common: &CommonArgs, args: &RoundArgs) -> Result<(), Failure> {
    let started = Instant::now();
    let interrupt = Interrupt::catch()?;
    let weights = super::weights(ranks, &args.weight)?;
    let opened = open(args).map_err(Failure::from);
    let (mut models, mut state) = ranks.all_well(opened)?;
    ranks.agree::<Failure>(Ok(&terms(args, &models, &state)))?;

    let numels: Vec<_> = models.tensors.iter().map(|tensor| tensor.numel).collect();
    let shares = Shares::new(&numels, ranks.size());
    let stored = models.tensors.iter().map(|tensor| Stored {
        params: tensor.of,
        grads: tensor.of,
        is_frozen: false,
    });
    let buckets = Buckets::new(shares, stored.collect(), args.bucket_bytes);
    let names = Names::agreed(ranks, &args.out_state)?;
    let shard_path = args.out_state.with_file_name(names.of(ranks.rank()));
    let staged = (|| {
        let mut outputs = Outputs::default();
        let copied = models.stage(&mut outputs, &args.out_global, state.record.steps)?;
        let is_state = |target: &Path| is_one_file(target, &args.out_state);
        ensure!(
            !outputs.iter().any(|output| is_state(output.target())),
            "--out-state and --out-global are one file: {}",
            args.out_state.display()
        );
        let share = (&buckets.shares, ranks.rank());
        let mut shard = Outputs::default();
        let header = state.stage(&mut shard, &shard_path, &models.tensors, share)?;
        Ok((outputs, copied, shard, header))
    })();
    let (outputs, copied, shard, header) = ranks.all_well(staged.map_err(Failure::Refused))?;
    let config = &state.record.config;
    let choice = ranks.all_well(Choice::for_updates(common))?;
    let engine = choice.engine(config.clone(), buckets.max_part_elems());
    let mut round = Round {
        models: &models,
        state: &state,
        outputs: &outputs,
        shard: &shard,
        own_starts: (0..models.tensors.len())
            .map(|tensor| buckets.shares.of_tensor(ranks.rank(), tensor).start)
            .collect(),
        engine: ranks.all_well(engine)?,
        values: Values {
            slots: vec![Vec::new(); state.slots.len()],
            ..Values::default()
        },
        bytes: Vec::new(),
        halves: Vec::new(),
        interrupt: &interrupt,
        progress: Progress::of_bytes(bytes_of(&models, &buckets, ranks.rank())),
        read: Cell::new(copied),
        written: Cell::new(copied),
    };
    let total = weights.iter().sum();
    let of_ranks = weights.clone();
    let mut staging = Staging::default();
    let weighted = Weights { of_ranks, total };
    buckets.reduce(
        ranks,
        &mut round,
        &weighted,
        &mut staging,
        Round::take_means,
    )?;
    buckets.gather(ranks, &mut round, &mut staging)?;
    let (read, written) = (round.read.get(), round.written.get());
    drop(round);

    let unchanged = models.check_unchanged().map_err(Failure::from);
    ranks.all_well(unchanged.and_then(|()| interrupt.check()))?;
    // All files of all ranks are on disk before the first takes its place, and the shards are seen, which no index names yet.
    let finished = outputs
        .finish()
        .and_then(|outputs| Ok((outputs, shard.finish()?)));
    let (finished, shard) = ranks.all_well(finished.map_err(Failure::from))?;
    let replaced = ranks
        .all_well(shard.replace_targets().map_err(Failure::from))
        .and_then(|mut warnings| {
            names.check_seen(ranks, &args.out_state, &shard_path)?;
            let replaced = finished.replace_targets().map_err(Failure::from);
            warnings.extend(ranks.all_well(replaced)?);
            Ok(warnings)
        });
    if replaced.is_err() {
        let _ = fs::remove_file(&shard_path);
    }
    let warnings = replaced?;
    names.replace_index(ranks, &args.out_state, &header)?;
    warnings.iter().for_each(|warning| warn(warning));

    let report = Report {
        ranks: ranks.size(),
        backend: choice.kind(),
        adapter: choice.name(),
        reason: choice.reason.clone(),
        outer_step: state.record.steps,
        tensors: models.tensors.len(),
        copied_tensors: models.copied,
        numel: models.tensors.iter().map(|tensor| tensor.numel).sum(),
        weights,
        bytes_read: super::sum(ranks, read),
        bytes_written: super::sum(ranks, written),
        bytes_sent: super::sum(ranks, ranks.traffic().sent),
        peak_memory_bytes: {
            let own = peak_memory_bytes().unwrap_or(0);
            let all = ranks.gather(own.to_le_bytes()).into_iter();
            all.map(u64::from_le_bytes).max().unwrap_or(own)
        },
        total_ms: started.elapsed().as_secs_f64() * 1e3,
    };
    match ranks.rank() {
        0 => print(common, &report, report.to_text()),
        _ => Ok(()),
    }
}

fn open(args: &RoundArgs) -> anyhow::Result<(Models, State)> {
    let config = args.rule.config()?;
    let models = Models::open(&args.local, &args.global)?;
    let state =
        State::open(args.state.as_deref(), config, &models.tensors).with_context(|| match &args
            .state
        {
            Some(path) => format!("state {}", path.display()),
            None => "state".to_owned(),
        })?;
    // What was killed while it replaced files may have left some of the round before.
    if let (Some(outer_steps), Some(before)) = (models.outer_steps()?, &state.before) {
        ensure!(
            outer_steps == before.record.steps,
            "{} is of round {outer_steps}, and the state of round {}",
            args.global.display(),
            before.record.steps
        );
    }
    Ok((models, state))
}

/// Whether two paths of files, which need not be there, lead to one.
fn is_one_file(one: &Path, other: &Path) -> bool {
    let folder = |path: &Path| match path.parent() {
        Some(parent) if parent != Path::new("") => parent.canonicalize().ok(),
        _ => Path::new(".").canonicalize().ok(),
    };
    one.file_name() == other.file_name() && folder(one) == folder(other)
}

/// What all ranks have to have alike.
fn terms(args: &RoundArgs, models: &Models, state: &State) -> Terms {
    let mut terms = Terms::default();
    terms.add("the version of wgpu-optim-mpi", env!("CARGO_PKG_VERSION"));
    terms.add("--bucket-bytes", args.bucket_bytes.to_string());
    terms.add("the rule", format!("{:?}", state.record.config));
    terms.add("the round", state.record.steps.to_string());
    terms.add("--out-state", args.out_state.display().to_string());
    for (index, (tensor, state)) in models.tensors.iter().zip(&state.tensors).enumerate() {
        let name = format!("{:?}", tensor.name);
        terms.add(format!("the name of tensor {index}"), name.clone());
        let (of, shape) = (tensor.of.name(), &tensor.shape);
        terms.add(format!("tensor {name}"), format!("{of} of {shape:?}"));
        let steps = state.applied_steps.to_string();
        terms.add(format!("the number of steps of tensor {name}"), steps);
    }
    terms.add("the number of tensors", models.tensors.len().to_string());
    terms
}

/// What this rank writes, for the progress bar.
fn bytes_of(models: &Models, buckets: &Buckets, rank: usize) -> u64 {
    let tensors = models.tensors.iter().enumerate();
    tensors
        .map(|(index, tensor)| {
            let own = buckets.shares.of_tensor(rank, index);
            (tensor.numel + own.end - own.start) * tensor.of.bytes()
        })
        .sum()
}

/// Local models are read, and the new global one is written, where they lie.
struct Round<'r> {
    models: &'r Models,
    state: &'r State,
    /// The new global model.
    outputs: &'r Outputs,
    /// This rank's part of the outer state.
    shard: &'r Outputs,
    /// The first element that this rank's share has of each tensor.
    own_starts: Vec<u64>,
    engine: Box<dyn Engine + 'r>,
    values: Values,
    bytes: Vec<u8>,
    halves: Vec<u16>,
    interrupt: &'r Interrupt,
    progress: Progress,
    read: Cell<u64>,
    written: Cell<u64>,
}

impl Round<'_> {
    fn read(&self, model: &Model, at: At, bytes: &mut [u8]) -> Result<(), Failure> {
        let source = &model.shards()[at.file].source;
        source.read_exact_at(bytes, at.offset)?;
        self.read.set(self.read.get() + bytes.len() as u64);
        Ok(())
    }

    fn write(&self, to: &Outputs, at: At, bytes: &[u8]) -> Result<(), Failure> {
        to.get(at.file).write_all_at(bytes, at.offset)?;
        self.written.set(self.written.get() + bytes.len() as u64);
        Ok(())
    }

    fn tensor_of(&self, slice: &Slice) -> &Tensor {
        &self.models.tensors[slice.tensor]
    }

    /// Steps slices of this rank's share by the mean of all local models.
    fn take_means(&mut self, slices: &[Slice], mut means: &[f64]) -> Result<(), Failure> {
        let steps_of = |slice: &Slice| self.state.tensors[slice.tensor].applied_steps;
        let runs: Vec<_> = slices
            .chunk_by(|left, right| steps_of(left) == steps_of(right))
            .collect();
        for run in runs {
            let numel: u64 = run.iter().map(Slice::numel).sum();
            let (own, others) = means.split_at(numel as usize);
            self.step(run, own)?;
            self.progress.advance("step", numel * 4);
            means = others;
        }
        Ok(())
    }

    /// Steps slices that are in one phase of the rule.
    fn step(&mut self, slices: &[Slice], means: &[f64]) -> Result<(), Failure> {
        let Some(first) = slices.first() else {
            return Ok(());
        };
        let phase = self
            .state
            .record
            .config
            .phase(self.state.tensors[first.tensor].applied_steps);
        let mut values = std::mem::take(&mut self.values);
        let stepped = self
            .load(slices, means, &mut values)
            .and_then(|()| self.engine.step(&mut values, phase, 1))
            .and_then(|()| self.store(slices, &values));
        self.values = values;
        stepped
    }

    /// Reads parameters and slots, and makes pseudo-gradients of the local models' means.
    fn load(
        &mut self,
        slices: &[Slice],
        means: &[f64],
        values: &mut Values,
    ) -> Result<(), Failure> {
        values.params.resize(means.len(), 0.0);
        values.grads.resize(means.len(), 0.0);
        for slots in &mut values.slots {
            slots.resize(means.len(), 0.0);
        }
        let (mut bytes, mut halves) = (
            std::mem::take(&mut self.bytes),
            std::mem::take(&mut self.halves),
        );
        let mut start = 0;
        for slice in slices {
            let (tensor, state) = (self.tensor_of(slice), &self.state.tensors[slice.tensor]);
            let own = start..start + slice.numel() as usize;
            start = own.end;
            bytes.resize(own.len() * tensor.of.bytes() as usize, 0);
            let at = tensor.global.elem(slice.elems.start, tensor.of);
            self.read(&self.models.global, at, &mut bytes)?;
            let params = &mut values.params[own.clone()];
            decode(tensor.of, &bytes, &mut halves, params);
            let pairs = params.iter().zip(&means[own.clone()]);
            for ((grad, (param, mean)), elem) in values.grads[own.clone()]
                .iter_mut()
                .zip(pairs)
                .zip(slice.elems.clone())
            {
                // What it has moved by, the other way round: rounded once.
                *grad = (f64::from(*param) - mean) as f32;
                if !param.is_finite() {
                    return Err(not_finite("global", tensor, elem).into());
                }
            }
            let Some(before) = &self.state.before else {
                for (slot, values) in self.state.slots.iter().zip(&mut values.slots) {
                    values[own.clone()].fill(slot.start.value());
                }
                continue;
            };
            let elems = slice.elems.clone();
            if state.has_masters {
                before.read(&tensor.name, MASTER_PARAMS, elems.clone(), params)?;
                self.read.set(self.read.get() + size_of_val(params) as u64);
                check_masters(tensor, slice, params, &halves)?;
            }
            for (slot, values) in self.state.slots.iter().zip(&mut values.slots) {
                let values = &mut values[own.clone()];
                match state.has_slots {
                    true => {
                        before.read(&tensor.name, slot.name, elems.clone(), values)?;
                        self.read.set(self.read.get() + size_of_val(values) as u64);
                    }
                    false => values.fill(slot.start.value()),
                }
            }
        }
        (self.bytes, self.halves) = (bytes, halves);
        Ok(())
    }

    /// Writes what has been stepped: parameters into the global model, slots and masters into this rank's shard.
    fn store(&mut self, slices: &[Slice], values: &Values) -> Result<(), Failure> {
        let mut halves = std::mem::take(&mut self.halves);
        let mut start = 0;
        for slice in slices {
            let (tensor, state) = (self.tensor_of(slice), &self.state.tensors[slice.tensor]);
            let own = start..start + slice.numel() as usize;
            start = own.end;
            let params = &values.params[own.clone()];
            let at = tensor.out.elem(slice.elems.start, tensor.of);
            match tensor.of {
                StorageType::F32 => self.write(self.outputs, at, bytemuck::cast_slice(params))?,
                of => {
                    halves.resize(params.len(), 0);
                    round(of, params, None, &mut halves);
                    self.write(self.outputs, at, bytemuck::cast_slice(&halves))?;
                }
            }
            let first = slice.elems.start - self.own_starts[slice.tensor];
            let slots = values.slots.iter().map(|slot| &slot[own.clone()]);
            let masters = (tensor.of != StorageType::F32).then_some(params);
            for (at, values) in state.out.iter().zip(slots.chain(masters)) {
                let at = at.elem(first, StorageType::F32);
                self.write(self.shard, at, bytemuck::cast_slice(values))?;
            }
        }
        self.halves = halves;
        Ok(())
    }
}

impl Memory for Round<'_> {
    type Error = Failure;

    fn read_grads(&self, slices: &[Slice], bytes: &mut Vec<u8>) -> Result<(), Failure> {
        self.interrupt.check()?;
        for slice in slices {
            let tensor = self.tensor_of(slice);
            let start = bytes.len();
            bytes.resize(start + (slice.numel() * tensor.of.bytes()) as usize, 0);
            let at = tensor.local.elem(slice.elems.start, tensor.of);
            self.read(&self.models.local, at, &mut bytes[start..])?;
            if let Some(elem) = first_not_finite(tensor.of, &bytes[start..]) {
                return Err(not_finite("local", tensor, slice.elems.start + elem).into());
            }
        }
        Ok(())
    }

    fn read_params(&self, slices: &[Slice], bytes: &mut Vec<u8>) -> Result<(), Failure> {
        self.interrupt.check()?;
        for slice in slices {
            let tensor = self.tensor_of(slice);
            let start = bytes.len();
            bytes.resize(start + (slice.numel() * tensor.of.bytes()) as usize, 0);
            let At { file, offset } = tensor.out.elem(slice.elems.start, tensor.of);
            let read = (bytes.len() - start) as u64;
            self.read.set(self.read.get() + read);
            self.outputs
                .get(file)
                .read_exact_at(&mut bytes[start..], offset)?;
        }
        Ok(())
    }

    fn write_params(&mut self, slices: &[Slice], bytes: &[u8]) -> Result<(), Failure> {
        let mut rest = bytes;
        for slice in slices {
            let tensor = self.tensor_of(slice);
            let (own, others) = rest.split_at((slice.numel() * tensor.of.bytes()) as usize);
            let at = tensor.out.elem(slice.elems.start, tensor.of);
            self.write(self.outputs, at, own)?;
            self.progress.advance("gather", own.len() as u64);
            rest = others;
        }
        Ok(())
    }
}

/// Values that lie in a file; `halves` is left with those of 16 bits.
fn decode(of: StorageType, bytes: &[u8], halves: &mut Vec<u16>, values: &mut [f32]) {
    match of {
        StorageType::F32 => bytemuck::cast_slice_mut(values).copy_from_slice(bytes),
        of => {
            halves.resize(values.len(), 0);
            bytemuck::cast_slice_mut(halves).copy_from_slice(bytes);
            unpack(of, halves, values);
        }
    }
}

/// The first value that is infinite or no number, by the exponent's bits.
fn first_not_finite(of: StorageType, bytes: &[u8]) -> Option<u64> {
    let all_ones = |bits: u32, exponent: u32| bits & exponent == exponent;
    let exponent = match of {
        StorageType::F32 => 0x7f80_0000,
        StorageType::Bf16 => 0x7f80,
        StorageType::F16 => 0x7c00,
    };
    let found = match of {
        StorageType::F32 => {
            let (words, _) = bytes.as_chunks();
            words
                .iter()
                .position(|word| all_ones(u32::from_le_bytes(*word), exponent))
        }
        _ => {
            let (halves, _) = bytes.as_chunks();
            halves
                .iter()
                .position(|half| all_ones(u16::from_le_bytes(*half).into(), exponent))
        }
    };
    found.map(|index| index as u64)
}

fn not_finite(model: &str, tensor: &Tensor, elem: u64) -> anyhow::Error {
    anyhow!(
        "tensor {:?}: the {model} model's element {elem} is infinite or NaN",
        tensor.name
    )
}

/// Makes sure that the parameters are what their masters round to.
fn check_masters(
    tensor: &Tensor,
    slice: &Slice,
    masters: &[f32],
    params: &[u16],
) -> anyhow::Result<()> {
    let mut rounded = vec![0; masters.len()];
    round(tensor.of, masters, None, &mut rounded);
    match rounded
        .iter()
        .zip(params)
        .position(|(rounded, param)| rounded != param)
    {
        None => Ok(()),
        Some(index) => Err(anyhow!(
            "tensor {:?}: the global model's element {} is not what its master in the state rounds to; they are not of the \
             same round",
            tensor.name,
            slice.elems.start + index as u64
        )),
    }
}
