//! The report of a step, as printed.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::anyhow;
use serde::Serialize;
use wgpu_optim::Precision;
use wgpu_optim::control::{GradNorm, GradNorms, Verdict};
use wgpu_optim::storage::Rounding;

use super::inputs::{Pairing, Updated};
use super::stream::NonFiniteElems;
use crate::args::{MastersArg, NonFinite, RoundingArg, StepArgs};
use crate::groups::GroupReport;
use crate::rule::Resumed;

/// All that is printed.
#[derive(Debug, Serialize)]
pub struct Report {
    pub backend: &'static str,
    pub adapter: String,
    pub reason: String,
    pub rule: Resumed,
    /// None where all tensors are in one.
    pub groups: Vec<GroupReport>,
    /// The file that the run goes on from.
    pub state: Option<PathBuf>,
    pub tensors_updated: usize,
    pub tensors_frozen: usize,
    /// Frozen tensors whose gradient held no floating-point numbers.
    pub tensors_skipped_non_float: usize,
    pub sixteen_bits: SixteenBitsReport,
    pub numel: u64,
    /// Dispatches of one step.
    pub dispatches: usize,
    pub repeat: u32,
    pub gradients: GradientsReport,
    pub nonfinite: NonFiniteReport,
    pub dropped_metadata: Vec<String>,
    /// Sentences on what is allowed, and may not be meant.
    pub notes: Vec<String>,
    pub bytes_read: u64,
    pub bytes_written: u64,
    /// The most memory that this process took, as far as the system says.
    pub peak_memory_bytes: Option<u64>,
    pub total_ms: f64,
    pub gb_per_s: f64,
}

/// The treatment of parameters of 16 bits.
#[derive(Debug, Serialize)]
pub struct SixteenBitsReport {
    /// Updated tensors that have parameters of 16 bits.
    pub tensors: usize,
    pub masters: MastersArg,
    /// The file that holds the masters.
    pub masters_in: Option<String>,
    pub rounding: RoundingArg,
    /// The seed of stochastic rounding.
    pub seed: Option<u64>,
}

/// The treatment of the gradients before they were applied.
#[derive(Debug, Serialize)]
pub struct GradientsReport {
    /// The scale that they were divided by.
    pub scale: Option<f64>,
    /// The norm of all of them, divided; where a norm clips. JSON has null for one that is not finite.
    pub norm: Option<f64>,
    pub clip_norm: Option<f64>,
    pub clip_tensor_norm: Option<f64>,
    /// The factor that they were multiplied by for their norm; the smallest, where tensors are clipped one by one.
    pub clip_factor: Option<f32>,
    pub clip_value: Option<f64>,
}

#[derive(Debug, Serialize)]
pub struct NonFiniteReport {
    pub mode: NonFinite,
    /// The step was skipped: the outputs are the inputs.
    pub skipped: bool,
    pub gradients: Vec<NonFiniteElems>,
    /// The values that the step would leave.
    pub results: Vec<NonFiniteElems>,
}

impl NonFiniteReport {
    pub fn is_empty(&self) -> bool {
        self.gradients.is_empty() && self.results.is_empty()
    }

    /// Says what forbids the step, and the ways out.
    pub fn refusal(&self, grad_scale: Option<f64>) -> anyhow::Error {
        anyhow!(
            "{}; --nonfinite skip leaves the model as it is, --nonfinite apply takes them as they are",
            self.message(grad_scale)
        )
    }

    /// Says what forbids the step.
    pub fn message(&self, grad_scale: Option<f64>) -> String {
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
        message
    }
}

impl GradientsReport {
    pub fn new(args: &StepArgs, verdict: &Verdict, norms: Option<&GradNorms>) -> Self {
        let record = verdict.record();
        // The record's own norm is an f32, which may be too small for it.
        let norm_of = |norms: &GradNorms| {
            let norms = norms.shared.iter().copied();
            let norm = norms.fold(GradNorm::default(), GradNorm::and);
            norm.value() / f64::from(record.scale)
        };
        Self {
            scale: args.grad_scale,
            norm: norms.map(norm_of),
            clip_norm: args.clip_norm,
            clip_tensor_norm: args.clip_tensor_norm,
            clip_factor: norms.map(|_| record.clip_factor),
            clip_value: args.clip_value,
        }
    }

    /// Nothing, where nothing was to be done.
    pub fn to_text(&self) -> Option<String> {
        let mut done = Vec::new();
        if let Some(scale) = self.scale {
            done.push(format!("divided by {scale}"));
        }
        if let (Some(norm), Some(factor)) = (self.norm, self.clip_factor) {
            done.push(match self.clip_tensor_norm {
                Some(_) => format!("norm {norm}, each tensor multiplied by at least {factor}"),
                None => format!("norm {norm}, multiplied by {factor}"),
            });
        }
        if let Some(value) = self.clip_value {
            done.push(format!("cut off at {value}"));
        }
        (!done.is_empty()).then(|| done.join(", "))
    }
}

impl SixteenBitsReport {
    pub fn new(args: &StepArgs, precision: &Precision, pairing: &Pairing) -> Self {
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

    pub fn to_text(&self) -> String {
        let how = match (&self.masters_in, self.seed) {
            (Some(file), _) => format!("masters in {file}"),
            (None, None) => "no masters, rounded to the nearest".to_owned(),
            (None, Some(seed)) => format!("no masters, rounded stochastically, seed {seed}"),
        };
        format!("{} of the updated; {how}", self.tensors)
    }
}

impl Report {
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{name:<12}{value}");
        };
        line("device", format!("{}: {}", self.backend, self.adapter));
        line("why", self.reason.clone());
        line("rule", self.rule.to_text(self.state.as_deref()));
        for group in &self.groups {
            line("group", group.to_text(self.state.as_deref()));
        }
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
