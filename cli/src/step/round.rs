//! `round`: a step of an outer optimizer, by what a global model is more than the mean of the local ones that have been
//! trained from it.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use wgpu_optim::storage::Rounding;
use wgpu_optim::{AnyRule, CpuControl, SgdConfig, StepControl};
use wgpu_optim_files::round::{WeightedSum, check_round};

use super::inputs::{Flags, Inputs, check_no_state_is_lost, record_after};
use super::plan::Targets;
use super::report::NonFiniteReport;
use super::{Job, notes, print_done};
use crate::args::{CommonArgs, NonFinite, RoundArgs};
use crate::groups::GroupReport;
use crate::interrupt::Interrupt;
use crate::rule::{Resumed, RuleArgs};
use crate::{Failure, peak_memory_bytes, warn};

/// The outer rule of a round that goes on from what the state of the last one was made with, or starts with `DiLoCo`'s, and
/// what was typed in place of that.
///
/// # Errors
/// If the rule does not have what was typed.
pub fn outer_rule(args: &RuleArgs, saved: Option<&AnyRule>) -> Result<Resumed> {
    let diloco = SgdConfig::builder(0.7).momentum(0.9).nesterov(true);
    args.resumed(saved, Some(&diloco.build()?.into()))
}

/// The report of a round, as printed.
#[derive(Debug, Serialize)]
pub struct RoundReport {
    /// The models of the round.
    #[serde(flatten)]
    pub over: Over,
    /// The backend; over MPI that of the first rank, and so are the two after it.
    pub backend: &'static str,
    /// The name of the adapter, or of the processor.
    pub adapter: String,
    /// Why the backend was chosen.
    pub reason: String,
    /// The outer rule.
    pub rule: Resumed,
    /// Its groups; none where all tensors are in one.
    pub groups: Vec<GroupReport>,
    /// The file that the round goes on from.
    pub state: Option<PathBuf>,
    /// Which round this was.
    pub outer_step: u64,
    /// How many tensors have been stepped.
    pub tensors: usize,
    /// Tensors of other dtypes, as the global model has them.
    pub copied_tensors: usize,
    /// The number of elements that have been stepped.
    pub numel: u64,
    /// The weights of the local models.
    pub weights: Vec<f64>,
    /// Sentences on what is allowed, and may not be meant.
    pub notes: Vec<String>,
    /// Bytes of files; over MPI the sum over all ranks.
    pub bytes_read: u64,
    /// Bytes of files; over MPI the sum over all ranks.
    pub bytes_written: u64,
    /// The most memory of the process, or of any rank, as far as the system says.
    pub peak_memory_bytes: u64,
    /// How long it took.
    pub total_ms: f64,
}

/// The models that a round is made over.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Over {
    /// One of each rank.
    Ranks {
        /// How many there are.
        ranks: usize,
        /// Bytes that they have sent to each other.
        bytes_sent: u64,
    },
    /// Several of one process.
    Files {
        /// How many there are.
        local_models: usize,
    },
}

impl RoundReport {
    /// In lines.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{name:<12}{value}");
        };
        match self.over {
            Over::Ranks { ranks, .. } => line("ranks", ranks.to_string()),
            Over::Files { local_models } => line("models", format!("{local_models} local")),
        }
        line("device", format!("{}: {}", self.backend, self.adapter));
        line("why", self.reason.clone());
        line("rule", self.rule.to_text(self.state.as_deref()));
        for group in &self.groups {
            line("group", group.to_text(self.state.as_deref()));
        }
        line("round", self.outer_step.to_string());
        let mut tensors = format!("{} updated", self.tensors);
        if self.copied_tensors > 0 {
            tensors += &format!(", {} copied, of other dtypes", self.copied_tensors);
        }
        line("tensors", tensors);
        line("parameters", self.numel.to_string());
        let weights: Vec<_> = self.weights.iter().map(f64::to_string).collect();
        line("weights", weights.join(", "));
        for note in &self.notes {
            line("note", note.clone());
        }
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        let (read, written) = (mib(self.bytes_read), mib(self.bytes_written));
        let peak = mib(self.peak_memory_bytes);
        match self.over {
            Over::Ranks { bytes_sent, .. } => {
                let sent = mib(bytes_sent);
                let moved =
                    format!("{read} read, {written} written, {sent} sent, by all ranks together");
                line("moved", moved);
                line("memory", format!("{peak} at most on a rank"));
            }
            Over::Files { .. } => {
                line("moved", format!("{read} read, {written} written"));
                line("memory", format!("{peak} at most"));
            }
        }
        line("time", format!("{:.1} ms", self.total_ms));
        text
    }
}

/// The weights of so many local models.
fn weights(typed: &[f64], models: usize) -> Result<WeightedSum> {
    let weights = match typed {
        [] => vec![1.0; models],
        typed => typed.to_vec(),
    };
    ensure!(
        weights.len() == models,
        "--weights has {} numbers, expected one for each of {models} local models",
        weights.len()
    );
    Ok(WeightedSum::mean(weights)?)
}

/// Makes a round over files.
pub fn run(common: &CommonArgs, args: &RoundArgs) -> Result<(), Failure> {
    let started = Instant::now();
    let interrupt = Interrupt::catch()?;
    let mean = weights(&args.weights, args.local.len())?;
    let (state, out_global) = (
        args.state.as_deref(),
        args.out_global.as_ref().unwrap_or(&args.global),
    );
    let out_state = args.out_state.as_deref().or(state);
    let out_state = out_state.context("--out-state is missing, the file for the outer state")?;
    if state.is_none() && !args.overwrite_state {
        check_no_state_is_lost(out_state)?;
    }
    let inputs = Inputs::open(&Flags::ROUND, &args.global, &args.local, state)?;
    let rule = outer_rule(&args.rule, inputs.saved_rule())?;
    let groups = inputs.groups(&args.groups, &rule, state)?;
    let before = inputs.state.as_ref().map(|state| &state.saved.record);
    check_round(&inputs.params, before.map(|before| before.steps))
        .with_context(|| format!("global model {}", args.global.display()))?;
    let pairing = inputs.pair_locals(&groups)?;
    let notes = notes::of_inputs(&inputs, &pairing, &groups, Rounding::Nearest)?;
    let record = record_after(before, rule.config.clone(), &pairing, 1);
    let nothing = StepControl::builder().build().map_err(Failure::failed)?;
    let job = Job {
        targets: Targets {
            params: out_global,
            state: out_state,
            outer_steps: Some(record.steps),
        },
        groups: &groups,
        repeat: 1,
        rounding: Rounding::Nearest,
        nonfinite: NonFinite::Refuse,
        mean: Some(&mean),
        verdict: CpuControl::new(nothing).decide(&[]),
        norms: None,
        inputs: &inputs,
        interrupt: &interrupt,
    };
    let plan = job.plan(&pairing, &record)?;
    let outputs = plan.stage(&inputs)?;
    let (choice, streamed) = job.compute_anywhere(common, &plan, &outputs)?;
    let nonfinite = NonFiniteReport {
        mode: NonFinite::Refuse,
        skipped: false,
        gradients: streamed.gradients,
        results: streamed.results,
    };
    if !nonfinite.is_empty() {
        return Err(anyhow::anyhow!(nonfinite.message(None)).into());
    }
    interrupt.check()?;
    for warning in outputs.replace_targets()? {
        warn(&warning);
    }
    let report = RoundReport {
        over: Over::Files {
            local_models: args.local.len(),
        },
        backend: choice.kind(),
        adapter: choice.name(),
        reason: choice.reason,
        groups: pairing.groups(&groups),
        rule,
        state: args.state.clone(),
        outer_step: record.steps,
        tensors: pairing.updated.len(),
        copied_tensors: inputs.params.len() - pairing.updated.len(),
        numel: pairing.updated.values().map(|tensor| tensor.numel).sum(),
        weights: mean.factors.clone(),
        notes,
        bytes_read: streamed.bytes_read,
        bytes_written: streamed.bytes_written,
        peak_memory_bytes: peak_memory_bytes().unwrap_or(0),
        total_ms: started.elapsed().as_secs_f64() * 1e3,
    };
    print_done(common, &report, report.to_text());
    Ok(())
}
