//! `step`: the update applied to a model held in safetensors files, as a stream of windows.

mod fingerprint;
mod inputs;
mod norm;
mod notes;
mod parts;
mod plan;
mod reader;
mod stream;
mod threads;

use std::fmt::Write as _;
use std::time::Instant;

use anyhow::{Result, anyhow};
use serde::Serialize;
use wgpu_optim::storage::Rounding;
use wgpu_optim::{AnyRule, CpuControl, Precision, StateRecord, Verdict};

use crate::args::{CommonArgs, MastersArg, NonFinite, RoundingArg, StepArgs};
use crate::backend::{Backend, Choice, OpenGpu};
use crate::files::Outputs;
use crate::interrupt::Interrupt;
use crate::window::{Engine, OnCpu, OnGpu};
use crate::{Failure, peak_memory_bytes, print, warn};
use inputs::{Inputs, Pairing, Updated, check_no_state_is_lost, record_after};
use plan::{Plan, Targets, Window};
use stream::{NonFiniteElems, Stream, Streamed};

/// Elements of a window on the CPU: it stays in the caches from its reading to its writing.
const CPU_WINDOW_ELEMS: u64 = 1 << 18;

/// Elements of a window on the GPU: large enough that a submission's own cost is small beside it, small enough for
/// any device's bindings.
const GPU_WINDOW_ELEMS: u64 = 1 << 21;

/// Windows in flight on the GPU: one is read or written while another is computed and a third is moved.
const GPU_ENGINES: usize = 3;

/// Dispatches of a step over so many elements, one for each window, where all of them are in one phase of the rule.
pub fn gpu_dispatches(numel: u64) -> u64 {
    numel.div_ceil(GPU_WINDOW_ELEMS)
}

/// What was done, as printed.
#[derive(Debug, Serialize)]
struct Report {
    backend: &'static str,
    adapter: String,
    reason: String,
    tensors_updated: usize,
    tensors_frozen: usize,
    /// Of the frozen ones, those whose gradient held no floating-point numbers.
    tensors_skipped_non_float: usize,
    sixteen_bits: SixteenBitsReport,
    numel: u64,
    /// Of one step.
    dispatches: usize,
    repeat: u32,
    gradients: GradientsReport,
    nonfinite: NonFiniteReport,
    dropped_metadata: Vec<String>,
    /// Sentences on what is allowed, and may not be meant.
    notes: Vec<String>,
    bytes_read: u64,
    bytes_written: u64,
    /// Of this process, as far as the system says.
    peak_memory_bytes: Option<u64>,
    total_ms: f64,
    gb_per_s: f64,
}

/// How the parameters of 16 bits are remembered.
#[derive(Debug, Serialize)]
struct SixteenBitsReport {
    /// Of the updated ones, those that have such.
    tensors: usize,
    masters: MastersArg,
    /// The file that holds the masters.
    masters_in: Option<String>,
    rounding: RoundingArg,
    /// Of stochastic rounding.
    seed: Option<u64>,
}

/// What became of the gradients before they were applied.
#[derive(Debug, Serialize)]
struct GradientsReport {
    /// What they were divided by.
    scale: Option<f64>,
    /// Of all of them, divided; where it was asked for. JSON has null for one that is not finite.
    norm: Option<f64>,
    clip_norm: Option<f64>,
    /// What they were multiplied by for their norm.
    clip_factor: Option<f32>,
    clip_value: Option<f64>,
}

#[derive(Debug, Serialize)]
struct NonFiniteReport {
    mode: NonFinite,
    /// The step was skipped: the outputs are the inputs.
    skipped: bool,
    gradients: Vec<NonFiniteElems>,
    /// What the step would leave.
    results: Vec<NonFiniteElems>,
}

pub fn run(common: &CommonArgs, args: &StepArgs) -> Result<(), Failure> {
    let started = Instant::now();
    let interrupt = Interrupt::catch()?;
    let config = args.rule.config()?;
    let precision = args.precision()?;
    let mut control = CpuControl::new(args.control()?);
    if args.state.is_none() && !args.overwrite_state {
        check_no_state_is_lost(&args.out_state)?;
    }
    let inputs = Inputs::open(args, &config)?;
    let pairing = inputs.pair(&config, &precision, args.skip_non_float)?;
    let notes = notes::of_inputs(&inputs, &pairing, &config, precision.rounding)?;
    let mut job = Job {
        args,
        config: config.clone(),
        precision,
        verdict: control.decide(&[]),
        inputs: &inputs,
        interrupt: &interrupt,
    };

    let before = inputs.state.as_ref().map(|state| &state.record);
    let record = record_after(before, config, &pairing, args.repeat.into());
    let plan = job.plan(&pairing, &record)?;
    let outputs = plan.stage(&inputs)?;
    let (mut bytes_read, mut norm) = (0, None);
    if args.clip_norm.is_some() {
        let (of_grads, bytes) = norm::of_grads(&inputs, &plan, &interrupt)?;
        job.verdict = control.decide(&[vec![of_grads]]);
        // The record's own is an f32, which may be too small for it.
        norm = Some(of_grads.value() / f64::from(job.verdict.record().scale));
        bytes_read += bytes;
    }
    let mut choice = Choice::for_updates(common)?;
    let (streamed, dispatches) = match job.compute(&choice, &plan, &outputs) {
        Ok(done) => done,
        Err(failure) => {
            // What has been written is written again.
            choice = choice.or_cpu(common, failure)?;
            job.compute(&choice, &plan, &outputs)?
        }
    };
    let mut report = Report {
        backend: choice.kind(),
        adapter: choice.name(),
        reason: choice.reason,
        tensors_updated: pairing.updated.len(),
        tensors_frozen: inputs.params.len() - pairing.updated.len(),
        tensors_skipped_non_float: pairing.skipped_non_float,
        sixteen_bits: SixteenBitsReport::new(args, &precision, &pairing),
        numel: pairing.updated.values().map(|tensor| tensor.numel).sum(),
        dispatches,
        repeat: args.repeat,
        gradients: GradientsReport::new(args, &job.verdict, norm),
        nonfinite: NonFiniteReport {
            mode: args.nonfinite,
            skipped: false,
            gradients: streamed.gradients,
            results: streamed.results,
        },
        dropped_metadata: plan.dropped_metadata.clone(),
        notes,
        bytes_read: bytes_read + streamed.bytes_read,
        bytes_written: streamed.bytes_written,
        peak_memory_bytes: None,
        total_ms: 0.0,
        gb_per_s: 0.0,
    };

    let outputs = if report.nonfinite.is_empty() {
        plan.write_fingerprints(&inputs, &outputs)?;
        outputs
    } else if args.nonfinite == NonFinite::Skip {
        drop(outputs);
        report.tensors_frozen += report.tensors_updated;
        report.tensors_updated = 0;
        report.sixteen_bits.tensors = 0;
        report.nonfinite.skipped = true;
        let (outputs, copied) = job.skip()?;
        report.bytes_read += copied.bytes_read;
        report.bytes_written += copied.bytes_written;
        outputs
    } else {
        return Err(report.nonfinite.refusal(args.grad_scale).into());
    };
    interrupt.check()?;
    for warning in outputs.replace_targets()? {
        warn(&warning);
    }

    let total = started.elapsed().as_secs_f64();
    report.total_ms = total * 1e3;
    report.gb_per_s = (report.bytes_read + report.bytes_written) as f64 / total.max(1e-9) / 1e9;
    report.peak_memory_bytes = peak_memory_bytes();
    // Whoever is told that the step has failed makes it again.
    if let Err(failure) = print(common, &report, report.to_text()) {
        warn(&format!(
            "the step is made and its outputs are in place, but the report cannot be printed: {failure}"
        ));
    }
    Ok(())
}

/// What all ways to compute a step have in common.
struct Job<'j> {
    args: &'j StepArgs,
    config: AnyRule,
    precision: Precision,
    verdict: Verdict,
    inputs: &'j Inputs,
    interrupt: &'j Interrupt,
}

impl Job<'_> {
    fn plan<'p>(&self, pairing: &'p Pairing, record: &StateRecord) -> Result<Plan<'p>> {
        let targets = Targets {
            params: &self.args.out_params,
            state: &self.args.out_state,
        };
        Plan::new(self.inputs, pairing, record, targets, &self.config)
    }

    /// Writes the outputs; returns the dispatches of a step, too.
    fn compute(
        &self,
        choice: &Choice,
        plan: &Plan<'_>,
        outputs: &Outputs,
    ) -> Result<(Streamed, usize), Failure> {
        match &choice.backend {
            Backend::Gpu(open) => self.on_gpu(open, plan, outputs),
            Backend::Cpu => Ok((self.on_cpu(plan, outputs)?, 0)),
        }
    }

    fn on_cpu(&self, plan: &Plan<'_>, outputs: &Outputs) -> Result<Streamed, Failure> {
        // One more than there are cores, which works while another waits for the disk.
        let threads = rayon::current_num_threads() + 1;
        let engine = |_| -> Box<dyn Engine> { Box::new(OnCpu::new(self.config.clone())) };
        let windows = plan.windows(CPU_WINDOW_ELEMS);
        let engines = (0..threads.min(windows.len())).map(engine).collect();
        self.stream(plan, &windows, outputs).run(engines)
    }

    fn on_gpu(
        &self,
        open: &OpenGpu,
        plan: &Plan<'_>,
        outputs: &Outputs,
    ) -> Result<(Streamed, usize), Failure> {
        let windows = plan.windows(GPU_WINDOW_ELEMS);
        let updates = windows.iter().filter_map(|window| match window {
            Window::Update { elems, .. } => Some(*elems),
            Window::Copy(_) => None,
        });
        let largest = updates.clone().max().unwrap_or(0);
        let engine = |_| -> Result<Box<dyn Engine + '_>, Failure> {
            let max_elems = largest.next_multiple_of(4).max(4);
            let engine = OnGpu::new(open, self.config.clone(), max_elems)?;
            Ok(Box::new(engine))
        };
        let engines = (0..GPU_ENGINES.min(windows.len())).map(engine);
        let engines = engines.collect::<Result<Vec<_>, _>>()?;
        let streamed = self.stream(plan, &windows, outputs).run(engines)?;
        open.finish()?;
        Ok((streamed, updates.count()))
    }

    fn stream<'s>(
        &'s self,
        plan: &'s Plan<'s>,
        windows: &'s [Window],
        outputs: &'s Outputs,
    ) -> Stream<'s> {
        Stream {
            inputs: self.inputs,
            plan,
            windows,
            outputs,
            config: &self.config,
            verdict: &self.verdict,
            repeat: self.args.repeat,
            rounding: self.precision.rounding,
            nonfinite: self.args.nonfinite,
            interrupt: self.interrupt,
        }
    }

    /// Writes the inputs: parameters, state and counts as they were.
    fn skip(&self) -> Result<(Outputs, Streamed), Failure> {
        let nothing = Pairing::default();
        let record = match &self.inputs.state {
            Some(state) => state.record.clone(),
            None => record_after(None, self.config.clone(), &nothing, 0),
        };
        let plan = self.plan(&nothing, &record)?;
        let outputs = plan.stage(self.inputs)?;
        let copied = self.on_cpu(&plan, &outputs)?;
        plan.write_fingerprints(self.inputs, &outputs)?;
        Ok((outputs, copied))
    }
}

impl NonFiniteReport {
    fn is_empty(&self) -> bool {
        self.gradients.is_empty() && self.results.is_empty()
    }

    /// Says what forbids the step, and the ways out.
    fn refusal(&self, grad_scale: Option<f64>) -> anyhow::Error {
        let mut message = String::new();
        if let [gradient, others @ ..] = &*self.gradients {
            message += &format!(
                "tensor {:?}: {} of {} gradient elements are infinite or NaN, the first at index {}",
                gradient.tensor, gradient.count, gradient.numel, gradient.first_index
            );
            if let Some(scale) = grad_scale {
                message += &format!(", divided by --grad-scale {scale}");
            }
            if !others.is_empty() {
                message += &format!(", and {} more tensors have such", others.len());
            }
        } else if let [result, others @ ..] = &*self.results {
            message += &format!(
                "tensor {:?}: the step would leave {} of the {} elements of its {} infinite or NaN, the first at index {}",
                result.tensor,
                result.count,
                result.numel,
                result.values.as_deref().unwrap_or_default(),
                result.first_index
            );
            if !others.is_empty() {
                message += &format!(", and such in {} more parameters and slots", others.len());
            }
        }
        anyhow!(
            "{message}; --nonfinite skip leaves the model as it is, --nonfinite apply takes them as they are"
        )
    }
}

impl GradientsReport {
    fn new(args: &StepArgs, verdict: &Verdict, norm: Option<f64>) -> Self {
        Self {
            scale: args.grad_scale,
            norm,
            clip_norm: args.clip_norm,
            clip_factor: norm.map(|_| verdict.record().clip_factor),
            clip_value: args.clip_value,
        }
    }

    /// Nothing, where nothing was to be done.
    fn to_text(&self) -> Option<String> {
        let mut done = Vec::new();
        if let Some(scale) = self.scale {
            done.push(format!("divided by {scale}"));
        }
        if let (Some(norm), Some(factor)) = (self.norm, self.clip_factor) {
            done.push(format!("norm {norm}, multiplied by {factor}"));
        }
        if let Some(value) = self.clip_value {
            done.push(format!("cut off at {value}"));
        }
        (!done.is_empty()).then(|| done.join(", "))
    }
}

impl SixteenBitsReport {
    fn new(args: &StepArgs, precision: &Precision, pairing: &Pairing) -> Self {
        let tensors = pairing.updated.values();
        let with_masters = tensors.clone().any(Updated::has_masters);
        Self {
            tensors: tensors.filter(|tensor| tensor.is_16_bits()).count(),
            masters: args.masters,
            masters_in: with_masters.then(|| args.out_state.display().to_string()),
            rounding: args.rounding.unwrap_or_default(),
            seed: match precision.rounding {
                Rounding::Nearest => None,
                Rounding::Stochastic { seed } => Some(seed),
            },
        }
    }

    fn to_text(&self) -> String {
        let how = match (&self.masters_in, self.seed) {
            (Some(file), _) => format!("masters in {file}"),
            (None, None) => "no masters, rounded to the nearest".to_owned(),
            (None, Some(seed)) => format!("no masters, rounded stochastically, seed {seed}"),
        };
        format!("{} of the updated; {how}", self.tensors)
    }
}

impl Report {
    fn to_text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{name:<12}{value}");
        };
        line("device", format!("{}: {}", self.backend, self.adapter));
        line("why", self.reason.clone());
        let mut tensors = format!(
            "{} updated, {} frozen",
            self.tensors_updated, self.tensors_frozen
        );
        if self.tensors_skipped_non_float > 0 {
            tensors += &format!(
                ", {} of them because their gradient holds no floating-point numbers",
                self.tensors_skipped_non_float
            );
        }
        line("tensors", tensors);
        if self.sixteen_bits.tensors > 0 {
            line("16 bits", self.sixteen_bits.to_text());
        }
        line("parameters", self.numel.to_string());
        if let Some(gradients) = self.gradients.to_text() {
            line("gradients", gradients);
        }
        for gradient in &self.nonfinite.gradients {
            line(
                "not finite",
                format!(
                    "{} of {} gradient elements of tensor {:?}, the first at index {}",
                    gradient.count, gradient.numel, gradient.tensor, gradient.first_index
                ),
            );
        }
        for result in &self.nonfinite.results {
            line(
                "not finite",
                format!(
                    "would be {} of the {} elements of the {} of tensor {:?}, the first at index {}",
                    result.count,
                    result.numel,
                    result.values.as_deref().unwrap_or_default(),
                    result.tensor,
                    result.first_index
                ),
            );
        }
        if self.nonfinite.skipped {
            line("skipped", "the outputs are the inputs".to_owned());
        }
        if !self.dropped_metadata.is_empty() {
            let keys = self.dropped_metadata.join(", ");
            line("left out", format!("{keys}: hashes of what has changed"));
        }
        for note in &self.notes {
            line("note", note.clone());
        }
        if self.backend == "gpu" {
            line("dispatches", self.dispatches.to_string());
        }
        line("steps", self.repeat.to_string());
        let mut files = format!(
            "{:.3} GB read, {:.3} GB written",
            self.bytes_read as f64 / 1e9,
            self.bytes_written as f64 / 1e9
        );
        if let Some(bytes) = self.peak_memory_bytes {
            files += &format!(", {} MiB of memory at most", bytes >> 20);
        }
        line("files", files);
        line(
            "total",
            format!("{:.3} ms, {:.2} GB/s", self.total_ms, self.gb_per_s),
        );
        text
    }
}
