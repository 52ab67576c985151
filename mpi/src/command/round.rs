//! A round, bucket by bucket: local models in, the new global model and the outer state out.

use std::fs;
use std::path::{Path, PathBuf};
use std::slice::from_ref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context as _, anyhow, ensure};
use wgpu_optim::Rule as _;
use wgpu_optim::files::Header;
use wgpu_optim_cli::{
    Choice, CommonArgs, Failure, Interrupt, Over, Progress, Resumed, RoundReport, outer_rule,
    peak_memory_bytes, print, warn,
};
use wgpu_optim_files::round::{RoundError, check_round, first_not_finite, pseudo_gradients};
use wgpu_optim_files::window::{Engine, NotRounded, Reader, Values, Writer, runs};
use wgpu_optim_files::{Outputs, directory_of};

use super::RoundArgs;
use super::models::{Models, Tensor};
use super::state::{State, open_saved};
use crate::buckets::{Buckets, Memory, Staging, Stored};
use crate::checkpoint::Names;
use crate::ranks::{Ranks, Terms};
use crate::shares::{Shares, Slice};

pub fn run(ranks: &Ranks, common: &CommonArgs, args: &RoundArgs) -> Result<(), Failure> {
    let started = Instant::now();
    let interrupt = Interrupt::catch()?;
    let weights = super::weights(ranks, &args.weight)?;
    let opened = open(args).map_err(Failure::from);
    let (mut models, mut state, rule) = ranks.all_well(opened)?;
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
    let share = (&buckets.shares, ranks.rank());
    let staged = Staged::new(args, &names, &mut models, &mut state, share);
    let staged = ranks.all_well(staged.map_err(Failure::Refused))?;
    let choice = ranks.all_well(Choice::for_updates(common))?;
    let engine = choice.engine(state.record.config.clone(), buckets.max_part_elems());
    let (read, written) = (AtomicU64::new(staged.copied), AtomicU64::new(staged.copied));
    let count = |bytes, all: &AtomicU64| {
        all.fetch_add(bytes, Ordering::Relaxed);
    };
    let count_read = |bytes| count(bytes, &read);
    let count_written = |bytes| count(bytes, &written);
    let (global, local) = (models.global.sources(), models.local.sources());
    let before = state.before.as_ref();
    let before = before.map_or_else(Vec::new, |before| before.files.sources());
    let mut round = Round {
        models: &models,
        state: &state,
        local: Reader::new(&local, &count_read),
        global: Reader::new(&global, &count_read),
        before: Reader::new(&before, &count_read),
        outputs: &staged.outputs,
        count_read: &count_read,
        out: Writer::new(&staged.outputs, &count_written),
        shard: Writer::new(&staged.shard, &count_written),
        engine: ranks.all_well(engine)?,
        values: Values::new(state.slots.len()),
        interrupt: &interrupt,
        progress: Progress::of_bytes(bytes_of(&models, &buckets, ranks.rank())),
    };
    let mut staging = Staging::default();
    let take = Round::take_means;
    buckets.reduce(ranks, &mut round, &weights, &mut staging, take)?;
    buckets.gather(ranks, &mut round, &mut staging)?;
    drop(round);
    let unchanged = models.check_unchanged().map_err(Failure::from);
    ranks.all_well(unchanged.and_then(|()| interrupt.check()))?;
    staged.put_in_place(ranks, &names, &args.out_state)?;

    let report = RoundReport {
        over: Over::Ranks {
            ranks: ranks.size(),
            bytes_sent: ranks.gather_numbers(ranks.traffic().sent).sum(),
        },
        backend: choice.kind(),
        adapter: choice.name(),
        reason: choice.reason.clone(),
        rule,
        groups: Vec::new(),
        state: args.state.clone(),
        outer_step: state.record.steps,
        tensors: models.tensors.len(),
        copied_tensors: models.copied,
        numel: numels.iter().sum(),
        weights: weights.factors,
        notes: Vec::new(),
        bytes_read: ranks.gather_numbers(read.into_inner()).sum(),
        bytes_written: ranks.gather_numbers(written.into_inner()).sum(),
        peak_memory_bytes: {
            let own = peak_memory_bytes().unwrap_or(0);
            ranks.gather_numbers(own).max().unwrap_or(own)
        },
        total_ms: started.elapsed().as_secs_f64() * 1e3,
    };
    match ranks.rank() {
        0 => print(common, &report, report.to_text()),
        _ => Ok(()),
    }
}

/// The files of a rank, which are made beside their targets.
struct Staged {
    /// The new global model.
    outputs: Outputs,
    /// Bytes of it that were copied.
    copied: u64,
    /// This rank's part of the outer state, where it goes, and its header.
    shard: Outputs,
    shard_path: PathBuf,
    header: Header,
}

impl Staged {
    fn new(
        args: &RoundArgs,
        names: &Names,
        models: &mut Models,
        state: &mut State,
        share: (&Shares, usize),
    ) -> anyhow::Result<Self> {
        let (mut outputs, mut shard) = (Outputs::default(), Outputs::default());
        let shard_path = args.out_state.with_file_name(names.of(share.1));
        let copied = models.stage(&mut outputs, &args.out_global, state.record.steps)?;
        let is_state = |target: &Path| is_one_file(target, &args.out_state);
        ensure!(
            !outputs.iter().any(|output| is_state(output.target())),
            "--out-state and --out-global are one file: {}",
            args.out_state.display()
        );
        Ok(Self {
            header: state.stage(&mut shard, &shard_path, &models.tensors, share)?,
            outputs,
            copied,
            shard,
            shard_path,
        })
    }

    /// Lets the files of all ranks take their places: they are on disk before the first does, and the first rank has seen the
    /// shards, which no index names yet.
    fn put_in_place(self, ranks: &Ranks, names: &Names, index: &Path) -> Result<(), Failure> {
        let finished = (self.outputs.finish()).and_then(|model| Ok((model, self.shard.finish()?)));
        let (model, shard) = ranks.all_well(finished.map_err(Failure::from))?;
        let replaced = ranks
            .all_well(shard.replace_targets().map_err(Failure::from))
            .and_then(|mut warnings| {
                names.check_seen(ranks, index, &self.shard_path)?;
                let replaced = model.replace_targets().map_err(Failure::from);
                warnings.extend(ranks.all_well(replaced)?);
                Ok(warnings)
            });
        if replaced.is_err() {
            let _ = fs::remove_file(&self.shard_path);
        }
        let warnings = replaced?;
        names.replace_index(ranks, index, &self.header)?;
        warnings.iter().for_each(|warning| warn(warning));
        Ok(())
    }
}

fn open(args: &RoundArgs) -> anyhow::Result<(Models, State, Resumed)> {
    let of_state = || match &args.state {
        Some(path) => format!("state {}", path.display()),
        None => "state".to_owned(),
    };
    let saved = args.state.as_deref().map(open_saved).transpose();
    let saved = saved.with_context(of_state)?;
    let before = saved.as_ref().map(|saved| &saved.record.config);
    let rule = outer_rule(&args.rule, before)?;
    let models = Models::open(&args.local, &args.global)?;
    let state = State::after(saved, rule.config.clone(), &models.tensors).with_context(of_state)?;
    let before = state.before.as_ref().map(|before| before.record.steps);
    check_round(&models.global, before)
        .with_context(|| format!("global model {}", args.global.display()))?;
    Ok((models, state, rule))
}

/// Whether two paths of files, which need not be there, lead to one.
fn is_one_file(one: &Path, other: &Path) -> bool {
    let folder = |path: &Path| directory_of(path).canonicalize().ok();
    one.file_name() == other.file_name() && folder(one) == folder(other)
}

/// The properties that all ranks have to have alike.
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
        let steps = state.saved.applied_steps.to_string();
        terms.add(format!("the number of steps of tensor {name}"), steps);
    }
    terms.add("the number of tensors", models.tensors.len().to_string());
    terms
}

/// The bytes that this rank writes, for the progress bar.
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
    local: Reader<'r>,
    global: Reader<'r>,
    /// Reads the outer state of the round before.
    before: Reader<'r>,
    /// The new global model.
    outputs: &'r Outputs,
    count_read: &'r dyn Fn(u64),
    out: Writer<'r>,
    /// Writes this rank's part of the outer state.
    shard: Writer<'r>,
    engine: Box<dyn Engine + 'r>,
    values: Values,
    interrupt: &'r Interrupt,
    progress: Progress,
}

impl Round<'_> {
    fn tensor_of(&self, slice: &Slice) -> &Tensor {
        &self.models.tensors[slice.tensor]
    }

    /// Appends what is read of each slice, by its tensor and first element.
    fn read_each(
        &self,
        slices: &[Slice],
        bytes: &mut Vec<u8>,
        read: impl Fn(&Tensor, u64, &mut [u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        self.interrupt.check()?;
        for slice in slices {
            let tensor = self.tensor_of(slice);
            let start = bytes.len();
            bytes.resize(start + (slice.numel() * tensor.of.bytes()) as usize, 0);
            read(tensor, slice.elems.start, &mut bytes[start..])?;
        }
        Ok(())
    }

    /// Steps slices of this rank's share by the mean of all local models.
    fn take_means(&mut self, slices: &[Slice], mut means: &[f64]) -> Result<(), Failure> {
        let steps_of = |slice: &Slice| self.state.tensors[slice.tensor].saved.applied_steps;
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
            .phase(self.state.tensors[first.tensor].saved.applied_steps);
        let mut values = std::mem::take(&mut self.values);
        self.load(slices, means, &mut values)?;
        self.engine.step(&mut values, phase, 1)?;
        let tensors = &self.models.tensors;
        let out = |tensor: usize| from_ref(&tensors[tensor].out);
        self.out.write(&runs(slices, out), &values.params)?;
        let state = |tensor: usize| &*self.state.tensors[tensor].out;
        self.shard.write_state(slices, state, &values)?;
        self.values = values;
        Ok(())
    }

    /// Reads parameters and slots, and makes pseudo-gradients of the local models' means.
    fn load(
        &mut self,
        slices: &[Slice],
        means: &[f64],
        values: &mut Values,
    ) -> Result<(), Failure> {
        let tensors = &self.models.tensors;
        let of = |tensor: usize| tensors[tensor].of;
        let global = |tensor: usize| from_ref(&tensors[tensor].global);
        values.params.resize(means.len(), 0.0);
        self.global
            .read(&runs(slices, global), &mut values.params)?;
        if let Some(elem) = values.params.iter().position(|param| !param.is_finite()) {
            let (tensor, elem) = Slice::find(slices, elem).unwrap_or_default();
            return Err(not_finite("global", &tensors[tensor], elem));
        }
        pseudo_gradients(&values.params, means, &mut values.grads);
        let saved = |tensor: usize| &self.state.tensors[tensor].saved;
        let params = &mut values.params;
        if let Some(NotRounded { tensor, elem, .. }) =
            self.before.read_masters(slices, saved, of, params)?
        {
            return Err(anyhow!(
                "tensor {:?}: the global model's element {elem} is not what its master in the state rounds to; they are not \
                 of the same round",
                tensors[tensor].name,
            )
            .into());
        }
        let slots = &self.state.slots;
        Ok(self.before.read_slots(slices, saved, slots, values)?)
    }
}

impl Memory for Round<'_> {
    type Error = Failure;

    fn read_grads(&self, slices: &[Slice], bytes: &mut Vec<u8>) -> Result<(), Failure> {
        self.read_each(slices, bytes, |tensor, start, read| {
            self.local.read_bytes(tensor.local.place(start), read)?;
            match first_not_finite(tensor.of, read) {
                Some(elem) => Err(not_finite("local", tensor, start + elem as u64)),
                None => Ok(()),
            }
        })
    }

    fn read_params(&self, slices: &[Slice], bytes: &mut Vec<u8>) -> Result<(), Failure> {
        self.read_each(slices, bytes, |tensor, start, read| {
            let at = tensor.out.place(start);
            let output = self.outputs.get(at.file);
            output.read_exact_at(read, at.offset)?;
            (self.count_read)(read.len() as u64);
            Ok(())
        })
    }

    fn write_params(&mut self, slices: &[Slice], bytes: &[u8]) -> Result<(), Failure> {
        let mut rest = bytes;
        for slice in slices {
            let tensor = self.tensor_of(slice);
            let (own, others) = rest.split_at((slice.numel() * tensor.of.bytes()) as usize);
            let at = tensor.out.place(slice.elems.start);
            self.out.write_bytes(at, own)?;
            self.progress.advance("gather", own.len() as u64);
            rest = others;
        }
        Ok(())
    }
}

fn not_finite(model: &'static str, tensor: &Tensor, elem: u64) -> Failure {
    let error = RoundError::NotFinite {
        tensor: tensor.name.clone(),
        model,
        elem,
    };
    Failure::Refused(error.into())
}
