//! `step`: the update applied to a model held in safetensors files, as a stream of windows.

mod fingerprint;
mod inputs;
mod norm;
mod notes;
mod plan;
mod report;
mod stream;
mod threads;

use std::slice::from_ref;
use std::time::Instant;

use anyhow::Result;
use wgpu_optim::control::{GradNorms, Verdict};
use wgpu_optim::state::StateRecord;
use wgpu_optim::{AnyRule, CpuControl, Precision};
use wgpu_optim_files::Outputs;

use crate::args::{CommonArgs, NonFinite, StepArgs};
use crate::backend::{Backend, Choice};
use crate::interrupt::Interrupt;
use crate::{Failure, peak_memory_bytes, print, warn};
use inputs::{Inputs, Pairing, check_no_state_is_lost, record_after};
use plan::{Plan, Targets, Window};
use report::{GradientsReport, NonFiniteReport, Report, SixteenBitsReport};
use stream::{Stream, Streamed};

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
        norms: None,
        inputs: &inputs,
        interrupt: &interrupt,
    };

    let before = inputs.state.as_ref().map(|state| &state.saved.record);
    let record = record_after(before, config, &pairing, args.repeat.into());
    let plan = job.plan(&pairing, &record)?;
    let outputs = plan.stage(&inputs)?;
    let mut bytes_read = 0;
    if args.clip_norm.is_some() || args.clip_tensor_norm.is_some() {
        let (norms, bytes) = norm::of_grads(&inputs, &plan, &interrupt)?;
        job.verdict = control.decide(from_ref(&norms));
        job.norms = Some(norms);
        bytes_read = bytes;
    }
    let (choice, mut streamed) = job.compute_anywhere(common, &plan, &outputs)?;
    streamed.bytes_read += bytes_read;
    let mut report = job.report(choice, &pairing, &plan, streamed, notes);
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

/// The inputs that all ways to compute a step have in common.
struct Job<'j> {
    args: &'j StepArgs,
    config: AnyRule,
    precision: Precision,
    verdict: Verdict,
    /// The norms of the gradients, where they are clipped by one.
    norms: Option<GradNorms>,
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

    /// Writes the outputs, on another device where one has failed and nobody insists on it.
    fn compute_anywhere(
        &self,
        common: &CommonArgs,
        plan: &Plan<'_>,
        outputs: &Outputs,
    ) -> Result<(Choice, Streamed), Failure> {
        let choice = Choice::for_updates(common)?;
        match self.compute(&choice, plan, outputs) {
            Ok(streamed) => Ok((choice, streamed)),
            Err(failure) => {
                // What has been written is written again.
                let choice = choice.or_cpu(common, failure)?;
                let streamed = self.compute(&choice, plan, outputs)?;
                Ok((choice, streamed))
            }
        }
    }

    /// Writes the outputs.
    fn compute(
        &self,
        choice: &Choice,
        plan: &Plan<'_>,
        outputs: &Outputs,
    ) -> Result<Streamed, Failure> {
        let (max_elems, engines) = match choice.backend {
            Backend::Gpu(_) => (GPU_WINDOW_ELEMS, GPU_ENGINES),
            // One more than there are cores, which works while another waits for the disk.
            Backend::Cpu => (CPU_WINDOW_ELEMS, rayon::current_num_threads() + 1),
        };
        let windows = plan.windows(max_elems);
        let updates = windows.iter().filter_map(|window| match window {
            Window::Update { elems, .. } => Some(*elems),
            Window::Copy(_) => None,
        });
        let largest = updates.clone().max().unwrap_or(0);
        let engine = |_| choice.engine(self.config.clone(), largest);
        let engines = (0..engines.min(windows.len())).map(engine);
        let engines = engines.collect::<Result<Vec<_>, _>>()?;
        let stream = Stream {
            inputs: self.inputs,
            plan,
            windows: &windows,
            outputs,
            config: &self.config,
            verdict: &self.verdict,
            norms: self.norms.as_ref(),
            repeat: self.args.repeat,
            rounding: self.precision.rounding,
            nonfinite: self.args.nonfinite,
            interrupt: self.interrupt,
        };
        let mut streamed = stream.run(engines)?;
        if let Backend::Gpu(open) = &choice.backend {
            open.finish()?;
            streamed.dispatches = updates.count();
        }
        Ok(streamed)
    }

    fn report(
        &self,
        choice: Choice,
        pairing: &Pairing,
        plan: &Plan<'_>,
        streamed: Streamed,
        notes: Vec<String>,
    ) -> Report {
        Report {
            backend: choice.kind(),
            adapter: choice.name(),
            reason: choice.reason,
            tensors_updated: pairing.updated.len(),
            tensors_frozen: self.inputs.params.len() - pairing.updated.len(),
            tensors_skipped_non_float: pairing.skipped_non_float,
            sixteen_bits: SixteenBitsReport::new(self.args, &self.precision, pairing),
            numel: pairing.updated.values().map(|tensor| tensor.numel).sum(),
            dispatches: streamed.dispatches,
            repeat: self.args.repeat,
            gradients: GradientsReport::new(self.args, &self.verdict, self.norms.as_ref()),
            nonfinite: NonFiniteReport {
                mode: self.args.nonfinite,
                skipped: false,
                gradients: streamed.gradients,
                results: streamed.results,
            },
            dropped_metadata: plan.dropped_metadata.clone(),
            notes,
            bytes_read: streamed.bytes_read,
            bytes_written: streamed.bytes_written,
            peak_memory_bytes: None,
            total_ms: 0.0,
            gb_per_s: 0.0,
        }
    }

    /// Writes the inputs: parameters, state and counts as they were.
    fn skip(&self) -> Result<(Outputs, Streamed), Failure> {
        let nothing = Pairing::default();
        let record = match &self.inputs.state {
            Some(state) => state.saved.record.clone(),
            None => record_after(None, self.config.clone(), &nothing, 0),
        };
        let plan = self.plan(&nothing, &record)?;
        let outputs = plan.stage(self.inputs)?;
        let copied = self.compute(&Choice::cpu("nothing is computed"), &plan, &outputs)?;
        plan.write_fingerprints(self.inputs, &outputs)?;
        Ok((outputs, copied))
    }
}
