//! `info`: the adapters of this machine and what the kernels would use on each.

use std::fmt::Write as _;

use serde::Serialize;
use wgpu_optim::plan::{DeviceLimits, Plan};
use wgpu_optim::{ArenaLayout, OPTIONAL_FEATURES, ScalarPath, adapters, wgpu};

use crate::args::{CommonArgs, InfoArgs};
use crate::backend::{Adapter, NO_ADAPTER_HINT};
use crate::{Failure, files, print};

#[derive(Debug, Serialize)]
struct Report {
    adapters: Vec<AdapterReport>,
    cpu_threads: usize,
}

#[derive(Debug, Serialize)]
struct AdapterReport {
    #[serde(flatten)]
    adapter: Adapter,
    max_storage_buffer_binding_bytes: u64,
    max_buffer_bytes: u64,
    min_storage_buffer_offset_alignment_bytes: u32,
    max_compute_workgroups_per_dimension: u32,
    max_storage_buffers_per_shader_stage: u32,
    /// Optional features that the kernels use, and this adapter has.
    features_used: Vec<String>,
    scalars: &'static str,
    /// With `--plan`.
    plan: Option<PlanReport>,
}

/// A step over a model in an arena.
#[derive(Debug, Serialize)]
struct PlanReport {
    tensors: usize,
    numel: u64,
    /// Parameter buffers; there are as many gradient buffers.
    buffers: usize,
    pieces: usize,
    dispatches: usize,
    params_bytes: u64,
    grads_bytes: u64,
    velocity_bytes: u64,
}

impl PlanReport {
    fn new(shapes: &[(String, Vec<usize>)], limits: &wgpu::Limits) -> Result<Self, Failure> {
        let layout =
            ArenaLayout::new(shapes.iter().cloned(), limits).map_err(anyhow::Error::from)?;
        let plan = Plan::new(&layout.tensor_layouts(), &DeviceLimits::from(limits))
            .map_err(anyhow::Error::from)?;
        let buffer_bytes: u64 = layout.buffer_bytes.iter().sum();
        Ok(Self {
            tensors: layout.tensors.len(),
            numel: layout.tensors.iter().map(|tensor| tensor.numel).sum(),
            buffers: layout.buffer_bytes.len(),
            pieces: plan.pieces.len(),
            dispatches: plan.dispatches(|_| Some(())).len(),
            params_bytes: buffer_bytes,
            grads_bytes: buffer_bytes,
            velocity_bytes: plan.velocity_bytes(),
        })
    }
}

impl AdapterReport {
    fn new(adapter: &wgpu::Adapter, model: Option<&Model>) -> Result<Self, Failure> {
        let limits = adapter.limits();
        let used = adapter.features() & OPTIONAL_FEATURES;
        Ok(Self {
            plan: model
                .map(|shapes| PlanReport::new(shapes, &limits))
                .transpose()?,
            adapter: Adapter::of(adapter),
            max_storage_buffer_binding_bytes: limits.max_storage_buffer_binding_size,
            max_buffer_bytes: limits.max_buffer_size,
            min_storage_buffer_offset_alignment_bytes: limits.min_storage_buffer_offset_alignment,
            max_compute_workgroups_per_dimension: limits.max_compute_workgroups_per_dimension,
            max_storage_buffers_per_shader_stage: limits.max_storage_buffers_per_shader_stage,
            features_used: used.iter_names().map(|(name, _)| name.to_owned()).collect(),
            scalars: match ScalarPath::offered_by(used, &limits) {
                ScalarPath::Immediates => "immediates",
                ScalarPath::Uniforms => "uniform ring",
            },
        })
    }
}

/// Names and shapes.
type Model = [(String, Vec<usize>)];

pub fn run(common: &CommonArgs, args: &InfoArgs) -> Result<(), Failure> {
    let model = match &args.plan {
        Some(path) => Some(files::Model::open(path)?.f32_shapes()),
        None => None,
    };
    let backends = wgpu::Backends::from_env().unwrap_or(wgpu::Backends::all());
    let named = |report: &AdapterReport| {
        common.adapter.as_ref().is_none_or(|text| {
            report
                .adapter
                .name
                .to_lowercase()
                .contains(&text.to_lowercase())
        })
    };
    let found = pollster::block_on(adapters(backends));
    let adapters = found
        .iter()
        .map(|adapter| AdapterReport::new(adapter, model.as_deref()))
        .collect::<Result<Vec<_>, _>>()?;
    let report = Report {
        adapters: adapters.into_iter().filter(named).collect(),
        cpu_threads: rayon::current_num_threads(),
    };
    print(common, &report, report.to_text())
}

impl Report {
    fn to_text(&self) -> String {
        let mut text = String::new();
        if self.adapters.is_empty() {
            text += &format!("no adapter: {NO_ADAPTER_HINT}\n\n");
        }
        for adapter in &self.adapters {
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{} ({}, {})\n  driver            {}\n  storage binding   {} MiB at most, offsets in steps of {} bytes\n  \
                 buffer            {} MiB at most\n  workgroups        {} per dimension at most\n  \
                 storage buffers   {} per stage at most, the kernels bind 3\n  scalars           {}\n",
                adapter.adapter.name,
                adapter.adapter.backend,
                adapter.adapter.device_type,
                adapter.adapter.driver,
                adapter.max_storage_buffer_binding_bytes >> 20,
                adapter.min_storage_buffer_offset_alignment_bytes,
                adapter.max_buffer_bytes >> 20,
                adapter.max_compute_workgroups_per_dimension,
                adapter.max_storage_buffers_per_shader_stage,
                match adapter.features_used.is_empty() {
                    true => adapter.scalars.to_owned(),
                    false => format!("{} ({})", adapter.scalars, adapter.features_used.join(", ")),
                },
            );
            if let Some(plan) = &adapter.plan {
                let _ = writeln!(
                    text,
                    "  plan              {} tensors, {} parameters: {} dispatches over {} bindings in {} buffers\n  \
                     memory            {} MiB parameters, {} MiB gradients, {} MiB velocity\n",
                    plan.tensors,
                    plan.numel,
                    plan.dispatches,
                    plan.pieces,
                    plan.buffers,
                    plan.params_bytes >> 20,
                    plan.grads_bytes >> 20,
                    plan.velocity_bytes >> 20,
                );
            }
        }
        text + &format!("CPU twin: {} threads\n", self.cpu_threads)
    }
}
