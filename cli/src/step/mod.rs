//! `step`: the update applied to a model held in safetensors files, as a stream of windows.

mod fingerprint;
mod inputs;
mod norm;
mod notes;
mod plan;
mod report;
pub mod round;
mod stream;
mod threads;

use std::slice::from_ref;
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;
use wgpu_optim::CpuControl;
use wgpu_optim::control::{GradNorms, Verdict};
use wgpu_optim::state::StateRecord;
use wgpu_optim::storage::Rounding;
use wgpu_optim_files::Outputs;
use wgpu_optim_files::round::WeightedSum;

use crate::args::{CommonArgs, NonFinite, StepArgs};
use crate::backend::{Backend, Choice};
use crate::groups::{Group, Groups};
use crate::interrupt::Interrupt;
use crate::{Failure, peak_memory_bytes, print, warn};
use inputs::{Flags, Inputs, Pairing, check_no_state_is_lost, record_after};
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

/// Windows of a step over so many elements on the CPU, likewise.
pub fn cpu_windows(numel: u64) -> u64 {
    numel.div_ceil(CPU_WINDOW_ELEMS)
}

pub fn run(common: &CommonArgs, args: &StepArgs) -> Result<(), Failure> {
    let started = Instant::now();
    let interrupt = Interrupt::catch()?;
    let precision = args.precision()?;
    let mut control = CpuControl::new(args.control()?);
    if args.state.is_none() && !args.overwrite_state {
        check_no_state_is_lost(&args.out_state)?;
    }
    let state = args.state.as_deref();
    let inputs = Inputs::open(&Flags::STEP, &args.params, from_ref(&args.grads), state)?;
    let rule = args.rule.resumed(inputs.saved_rule(), None)?;
    let groups = inputs.groups(&args.groups, &rule, state)?;
    let pairing = inputs.pair(&groups, &precision, args.skip_non_float)?;
    let notes = notes::of_inputs(&inputs, &pairing, &groups, precision.rounding)?;
    let mut job = Job {
        targets: Targets {
            params: &args.out_params,
            state: &args.out_state,
            outer_steps: None,
        },
        groups: &groups,
        repeat: args.repeat,
        rounding: precision.rounding,
        nonfinite: args.nonfinite,
        mean: None,
        verdict: control.decide(&[]),
        norms: None,
        inputs: &inputs,
        interrupt: &interrupt,
    };

    let before = inputs.state.as_ref().map(|state| &state.saved.record);
    let record = record_after(before, rule.config.clone(), &pairing, args.repeat.into());
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
    let mut report = Report {
        backend: choice.kind(),
        adapter: choice.name(),
        reason: choice.reason,
        groups: pairing.groups(&groups),
        rule,
        state: args.state.clone(),
        tensors_updated: pairing.updated.len(),
        tensors_frozen: inputs.params.len() - pairing.updated.len(),
        tensors_skipped_non_float: pairing.skipped_non_float,
        sixteen_bits: SixteenBitsReport::new(args, &precision, &pairing),
        numel: pairing.updated.values().map(|tensor| tensor.numel).sum(),
        dispatches: streamed.dispatches,
        repeat: args.repeat,
        gradients: GradientsReport::new(args, &job.verdict, job.norms.as_ref()),
        nonfinite: NonFiniteReport {
            mode: args.nonfinite,
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
    };
    let outputs = if report.nonfinite.is_empty() {
        plan.write_fingerprints(&inputs, &outputs)?;
        outputs
    } else if args.nonfinite == NonFinite::Skip {
        drop(outputs);
        report.tensors_frozen += report.tensors_updated;
        report.tensors_updated = 0;
        report.sixteen_bits.tensors = 0;
        report.groups.clear();
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
    print_done(common, &report, report.to_text());
    Ok(())
}

/// Prints the report of a step whose outputs are in place: whoever is told that it has failed makes it again.
fn print_done(common: &CommonArgs, report: &impl Serialize, text: String) {
    if let Err(failure) = print(common, report, text) {
        warn(&format!(
            "the step is made and its outputs are in place, but the report cannot be printed: {failure}"
        ));
    }
}

/// The inputs that all ways to compute a step have in common.
struct Job<'j> {
    targets: Targets<'j>,
    groups: &'j Groups,
    repeat: u32,
    rounding: Rounding,
    nonfinite: NonFinite,
    /// The weights of local models whose mean parameters move by.
    mean: Option<&'j WeightedSum>,
    verdict: Verdict,
    /// The norms of the gradients, where they are clipped by one.
    norms: Option<GradNorms>,
    inputs: &'j Inputs,
    interrupt: &'j Interrupt,
}

impl<'j> Job<'j> {
    fn plan(&self, pairing: &'j Pairing, record: &StateRecord) -> Result<Plan<'j>> {
        Plan::new(self.inputs, pairing, record, self.targets, self.groups)
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
        let mut largest = vec![0; self.groups.iter().len()];
        let mut dispatches = 0;
        for window in &windows {
            if let Window::Update { elems, group, .. } = window {
                largest[*group] = (*elems).max(largest[*group]);
                dispatches += 1;
            }
        }
        let engine =
            |(group, largest): (&Group, &u64)| choice.engine(group.config.clone(), *largest);
        let of_thread = |_| self.groups.iter().zip(&largest).map(engine).collect();
        let engines = (0..engines.min(windows.len())).map(of_thread);
        let engines = engines.collect::<Result<Vec<Vec<_>>, _>>()?;
        let stream = Stream {
            inputs: self.inputs,
            plan,
            windows: &windows,
            outputs,
            mean: self.mean,
            verdict: &self.verdict,
            norms: self.norms.as_ref(),
            repeat: self.repeat,
            rounding: self.rounding,
            nonfinite: self.nonfinite,
            interrupt: self.interrupt,
        };
        let mut streamed = stream.run(engines)?;
        if let Backend::Gpu(open) = &choice.backend {
            open.finish()?;
            streamed.dispatches = dispatches;
        }
        Ok(streamed)
    }

    /// Writes the inputs: parameters, state and counts as they were.
    fn skip(&self) -> Result<(Outputs, Streamed), Failure> {
        let nothing = Pairing::default();
        let config = self.groups.config();
        let record = match &self.inputs.state {
            Some(state) => state.saved.record.clone(),
            None => record_after(None, config.clone(), &nothing, 0),
        };
        let plan = Plan::new(self.inputs, &nothing, &record, self.targets, self.groups)?;
        let outputs = plan.stage(self.inputs)?;
        let copied = self.compute(&Choice::cpu("nothing is computed"), &plan, &outputs)?;
        plan.write_fingerprints(self.inputs, &outputs)?;
        Ok((outputs, copied))
    }
}
