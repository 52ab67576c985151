//! `info`: the adapters of this machine and what the kernels would use on each.

use std::fmt::Write as _;

use serde::Serialize;
use wgpu_optim::plan::{DeviceLimits, Plan};
use wgpu_optim::rules::{Slot, Slots};
use wgpu_optim::wgsl::ScalarPath;
use wgpu_optim::{Arena, Masters, OPTIONAL_FEATURES, Precision, StorageType, TensorSpec, wgpu};
use wgpu_optim_files::{Model, Steppable};

use crate::args::{CommonArgs, InfoArgs};
use crate::backend::{Adapter, Adapters, NO_ADAPTER_HINT};
use crate::step::gpu_dispatches;
use crate::{Failure, print};

#[derive(Debug, Serialize)]
struct Report {
    adapters: Vec<AdapterReport>,
    cpu_threads: usize,
}

#[derive(Debug, Serialize)]
struct AdapterReport {
    #[serde(flatten)]
    adapter: Box<Adapter>,
    max_storage_buffer_binding_bytes: u64,
    max_buffer_bytes: u64,
    min_storage_buffer_offset_alignment_bytes: u32,
    max_compute_workgroups_per_dimension: u32,
    max_storage_buffers_per_shader_stage: u32,
    /// Optional features that the kernels use, and this adapter has.
    features_used: Vec<String>,
    scalars: &'static str,
    /// The plan of a step, with `--plan`.
    plan: Option<Planned>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Planned {
    Fits(PlanReport),
    Refused { error: String },
}

/// A step with momentum over a model, with gradients of the parameters' dtypes: in an arena for each dtype, and as the
/// command `step` streams it.
#[derive(Debug, Default, Serialize)]
struct PlanReport {
    tensors: usize,
    /// Tensors of other dtypes than F32, BF16 and F16.
    tensors_left_out: usize,
    numel: u64,
    /// Dispatches of the command `step`; the fields below are of the arenas.
    step_dispatches: u64,
    arenas: usize,
    /// Parameter buffers; there are as many gradient buffers.
    buffers: usize,
    pieces: usize,
    dispatches: usize,
    params_bytes: u64,
    grads_bytes: u64,
    velocity_bytes: u64,
    /// Bytes of the masters of 16-bit parameters.
    masters_bytes: u64,
}

impl PlanReport {
    fn new(model: &Steppable, adapter: &wgpu::Adapter) -> anyhow::Result<Self> {
        let mut report = Self {
            tensors_left_out: model.left_out,
            ..Self::default()
        };
        for (of, tensors) in &model.by_type {
            report.add_arena(*of, tensors, adapter)?;
        }
        report.step_dispatches = gpu_dispatches(report.numel);
        Ok(report)
    }

    fn add_arena(
        &mut self,
        of: StorageType,
        tensors: &[(String, Vec<usize>)],
        adapter: &wgpu::Adapter,
    ) -> anyhow::Result<()> {
        let limits = adapter.limits();
        let specs = tensors.iter().cloned();
        let specs =
            specs.map(|(name, shape)| TensorSpec::new(name, shape).params_type(of).grads_type(of));
        let layout = Arena::builder().layout(specs, &limits)?;
        let limits = DeviceLimits::of(&limits, adapter.get_info().device_type);
        let slots = Slots::from([Slot::new("momentum_buffer")]);
        let plan_with = |masters| {
            let precision = Precision {
                masters,
                ..Precision::default()
            };
            let plan = Plan::new(&layout.layouts(&slots, &precision), &limits);
            plan.map_err(|error| error.named(|tensor| tensors[tensor].0.clone()))
        };
        let plan = plan_with(Masters::F32)?;
        let velocity_bytes = plan_with(Masters::None)?.state_bytes();
        self.tensors += layout.tensors.len();
        self.numel += layout
            .tensors
            .iter()
            .map(|tensor| tensor.numel)
            .sum::<u64>();
        self.arenas += 1;
        self.buffers += layout.buffers.len();
        self.pieces += plan.pieces.len();
        self.dispatches += plan.dispatches(|_| Some(())).len();
        for buffer in &layout.buffers {
            self.params_bytes += buffer.params_bytes();
            self.grads_bytes += buffer.grads_bytes();
        }
        self.velocity_bytes += velocity_bytes;
        self.masters_bytes += plan.state_bytes() - velocity_bytes;
        Ok(())
    }
}

impl AdapterReport {
    fn new((adapter, about): (&wgpu::Adapter, Box<Adapter>), model: Option<&Steppable>) -> Self {
        let limits = adapter.limits();
        let used = adapter.features() & OPTIONAL_FEATURES;
        Self {
            plan: model.map(|model| match PlanReport::new(model, adapter) {
                Ok(plan) => Planned::Fits(plan),
                Err(error) => Planned::Refused {
                    error: format!("{error:#}"),
                },
            }),
            adapter: about,
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
        }
    }
}

pub fn run(common: &CommonArgs, args: &InfoArgs) -> Result<(), Failure> {
    let model = match &args.plan {
        Some(path) => Some(Model::open(path)?.steppable()),
        None => None,
    };
    let adapters = Adapters::of_this_machine()?;
    let numbers = adapters.wanted(common);
    if numbers.is_empty() && common.adapter.is_some() {
        return Err(adapters.none_fits(common, true).into());
    }
    let report_on = |number| AdapterReport::new(adapters.tried(number), model.as_ref());
    let report = Report {
        adapters: numbers.into_iter().map(report_on).collect(),
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
            let about = &adapter.adapter;
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{}: {} ({}, {})\n  ids               {}\n  driver            {}\n  storage binding   {} MiB at most, offsets in steps of {} bytes\n  \
                 buffer            {} MiB at most\n  workgroups        {} per dimension at most\n  \
                 storage buffers   {} per stage at most, the kernels bind 3\n  scalars           {}",
                about.number,
                about.name,
                about.backend,
                about.device_type,
                about.ids(),
                about.driver,
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
            let _ = match &adapter.plan {
                Some(Planned::Fits(plan)) => writeln!(
                    text,
                    "  plan              {} tensors, {} parameters{}\n  \
                     as step streams   {} dispatches\n  \
                     {:<18}{} dispatches over {} bindings in {} buffers\n  \
                     memory            {} MiB parameters, {} MiB gradients, {} MiB velocity, {} MiB masters",
                    plan.tensors,
                    plan.numel,
                    match plan.tensors_left_out {
                        0 => String::new(),
                        left_out => format!("; {left_out} left out, not F32, BF16 or F16"),
                    },
                    plan.step_dispatches,
                    match plan.arenas {
                        0 | 1 => "in an arena".to_owned(),
                        arenas => format!("in {arenas} arenas"),
                    },
                    plan.dispatches,
                    plan.pieces,
                    plan.buffers,
                    plan.params_bytes >> 20,
                    plan.grads_bytes >> 20,
                    plan.velocity_bytes >> 20,
                    plan.masters_bytes >> 20,
                ),
                Some(Planned::Refused { error }) => writeln!(text, "  no plan           {error}"),
                None => Ok(()),
            };
            if let Some(error) = &about.error {
                let _ = writeln!(text, "  not usable        {error}");
            }
            text.push('\n');
        }
        text + &format!("CPU twin: {} threads\n", self.cpu_threads)
    }
}
