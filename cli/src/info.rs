//! `info`: the adapters of this machine and what the kernels would use on each.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::ensure;
use serde::Serialize;
use wgpu_optim::plan::{DeviceLimits, Plan};
use wgpu_optim::storage::Storage;
use wgpu_optim::wgsl::ScalarPath;
use wgpu_optim::{
    AnyRule, Arena, Masters, OPTIONAL_FEATURES, Precision, Rule as _, SgdConfig, StorageType,
    TensorSpec, wgpu,
};
use wgpu_optim_files::{Model, Steppable};

use crate::args::{CommonArgs, InfoArgs};
use crate::backend::{Adapter, Adapters, Choice};
use crate::step::{cpu_windows, gpu_dispatches};
use crate::{Failure, print};

#[derive(Debug, Serialize)]
struct Report {
    /// One sentence on where updates are computed on this machine, and why there.
    summary: String,
    adapters: Vec<AdapterReport>,
    cpu_threads: usize,
    /// With `--plan`, what the CPU twin would do.
    cpu_plan: Option<CpuPlanReport>,
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

/// A step that is to be planned: tensors by what their parameters are stored as, gradients as those, and a rule.
struct Job {
    model: Steppable,
    rule: AnyRule,
    /// The rule, as it is typed.
    name: String,
}

/// What a step is over, and what it takes.
#[derive(Debug, Default, Serialize)]
struct Sizes {
    rule: String,
    tensors: usize,
    /// Tensors of other dtypes than F32, BF16 and F16.
    tensors_left_out: usize,
    numel: u64,
    params_bytes: u64,
    grads_bytes: u64,
    /// Bytes of the rule's slots.
    state_bytes: u64,
    /// Bytes of the masters of 16-bit parameters.
    masters_bytes: u64,
    /// Bytes that a step reads and writes of all these.
    traffic_bytes: u64,
}

/// A step over a model, in an arena for each dtype, and as the command `step` streams it.
#[derive(Debug, Default, Serialize)]
struct PlanReport {
    #[serde(flatten)]
    sizes: Sizes,
    /// Dispatches of the command `step`; the fields below are of the arenas.
    step_dispatches: u64,
    arenas: usize,
    /// Parameter buffers; there are as many gradient buffers.
    buffers: usize,
    pieces: usize,
    /// Small pieces that share a dispatch.
    batches: usize,
    dispatches: usize,
}

/// A step of the CPU twin over the same.
#[derive(Debug, Default, Serialize)]
struct CpuPlanReport {
    #[serde(flatten)]
    sizes: Sizes,
    /// Windows of the command `step`.
    step_windows: u64,
}

impl Job {
    fn new(args: &InfoArgs) -> anyhow::Result<Option<Self>> {
        let Some(path) = &args.plan else {
            ensure!(
                args.rule.is_default() && args.numel.is_empty(),
                "--numel, --rule and hyper-parameters go with --plan"
            );
            return Ok(None);
        };
        let model = match path {
            Some(path) => {
                ensure!(
                    args.numel.is_empty(),
                    "--plan {} and --numel are two models",
                    path.display()
                );
                Model::open(path)?.steppable()
            }
            None => {
                ensure!(
                    !args.numel.is_empty(),
                    "--plan: expected the file of a model, or --numel"
                );
                let tensor =
                    |(index, numel): (usize, &usize)| (format!("tensor {index}"), vec![*numel]);
                let tensors = args.numel.iter().enumerate().map(tensor);
                Steppable {
                    by_type: BTreeMap::from([(StorageType::F32, tensors.collect())]),
                    left_out: 0,
                }
            }
        };
        let (rule, name) = match args.rule.is_default() {
            // What is asked of most.
            true => {
                let momentum = SgdConfig::builder(0.0).momentum(0.9);
                (momentum.build()?.into(), "sgd --momentum 0.9".to_owned())
            }
            false => (args.rule.config()?, args.rule.name()),
        };
        Ok(Some(Self { model, rule, name }))
    }

    /// What a step moves of tensors of a type per element.
    fn storage(&self, of: StorageType) -> Storage {
        Storage::new(
            of,
            of,
            self.rule.slots().kept_names(),
            &Precision::default(),
        )
    }

    /// Sizes of no tensor yet.
    fn no_sizes(&self) -> Sizes {
        Sizes {
            rule: self.name.clone(),
            tensors_left_out: self.model.left_out,
            ..Sizes::default()
        }
    }

    fn on_cpu(&self) -> CpuPlanReport {
        let mut sizes = self.no_sizes();
        for (of, tensors) in &self.model.by_type {
            let storage = self.storage(*of);
            let numel = |(_, shape): &(String, Vec<usize>)| {
                let sizes = shape.iter().map(|size| *size as u64);
                sizes.fold(1, u64::saturating_mul)
            };
            let numel = tensors.iter().map(numel).fold(0, u64::saturating_add);
            let slots = storage
                .slots()
                .iter()
                .map(|codec| codec.elem_bytes())
                .sum::<u64>();
            let bytes = |per_elem: u64| numel.saturating_mul(per_elem);
            sizes.tensors += tensors.len();
            sizes.numel += numel;
            sizes.params_bytes += bytes(of.bytes());
            sizes.grads_bytes += bytes(of.bytes());
            sizes.state_bytes += bytes(slots);
            sizes.masters_bytes += bytes(storage.state_bytes() - slots);
            sizes.traffic_bytes += bytes(storage.bytes_per_elem());
        }
        CpuPlanReport {
            step_windows: cpu_windows(sizes.numel),
            sizes,
        }
    }
}

impl PlanReport {
    fn new(job: &Job, adapter: &wgpu::Adapter) -> anyhow::Result<Self> {
        let mut report = Self {
            sizes: job.no_sizes(),
            ..Self::default()
        };
        for (of, tensors) in &job.model.by_type {
            report.add_arena(job, (*of, tensors), adapter)?;
        }
        report.step_dispatches = gpu_dispatches(report.sizes.numel);
        Ok(report)
    }

    fn add_arena(
        &mut self,
        job: &Job,
        (of, tensors): (StorageType, &[(String, Vec<usize>)]),
        adapter: &wgpu::Adapter,
    ) -> anyhow::Result<()> {
        let limits = adapter.limits();
        let specs = tensors.iter().cloned();
        let specs =
            specs.map(|(name, shape)| TensorSpec::new(name, shape).params_type(of).grads_type(of));
        let layout = Arena::builder().layout(specs, &limits)?;
        let limits = DeviceLimits::of(&limits, adapter.get_info().device_type);
        let slots = job.rule.slots();
        let plan_with = |masters| {
            let precision = Precision {
                masters,
                ..Precision::default()
            };
            let plan = Plan::new(&layout.layouts(&slots, &precision), &limits);
            plan.map_err(|error| error.named(|tensor| tensors[tensor].0.clone()))
        };
        let plan = plan_with(Masters::F32)?;
        let slots_bytes = plan_with(Masters::None)?.state_bytes();
        self.sizes.tensors += layout.tensors.len();
        let numel: u64 = layout.tensors.iter().map(|tensor| tensor.numel).sum();
        self.sizes.numel += numel;
        self.sizes.traffic_bytes += numel * job.storage(of).bytes_per_elem();
        self.arenas += 1;
        self.buffers += layout.buffers.len();
        self.pieces += plan.pieces.len();
        self.batches += plan.batches.len();
        self.dispatches += plan.dispatches(|_| Some(())).len();
        for buffer in &layout.buffers {
            self.sizes.params_bytes += buffer.params_bytes();
            self.sizes.grads_bytes += buffer.grads_bytes();
        }
        self.sizes.state_bytes += slots_bytes;
        self.sizes.masters_bytes += plan.state_bytes() - slots_bytes;
        Ok(())
    }
}

impl AdapterReport {
    fn new((adapter, about): (&wgpu::Adapter, Box<Adapter>), job: Option<&Job>) -> Self {
        let limits = adapter.limits();
        let used = adapter.features() & OPTIONAL_FEATURES;
        Self {
            plan: job.map(|job| match PlanReport::new(job, adapter) {
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
    let job = Job::new(args)?;
    let adapters = Adapters::of_this_machine()?;
    let numbers = adapters.wanted(common);
    if numbers.is_empty() && common.adapter.is_some() {
        return Err(adapters.none_fits(common, true).into());
    }
    let report_on = |number| AdapterReport::new(adapters.tried(number), job.as_ref());
    let report = Report {
        summary: Choice::in_a_sentence(common),
        adapters: numbers.into_iter().map(report_on).collect(),
        cpu_threads: rayon::current_num_threads(),
        cpu_plan: job.as_ref().map(Job::on_cpu),
    };
    print(common, &report, report.to_text())
}

impl Report {
    fn to_text(&self) -> String {
        let mut text = format!("{}\n\n", self.summary);
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
                    "  plan              {}\n  \
                     as step streams   {} dispatches\n  \
                     {:<18}{} dispatches over {} bindings, {} batches of them, in {} buffers\n{}",
                    plan.sizes.over(),
                    plan.step_dispatches,
                    match plan.arenas {
                        0 | 1 => "in an arena".to_owned(),
                        arenas => format!("in {arenas} arenas"),
                    },
                    plan.dispatches,
                    plan.pieces,
                    plan.batches,
                    plan.buffers,
                    plan.sizes.memory(),
                ),
                Some(Planned::Refused { error }) => writeln!(text, "  no plan           {error}"),
                None => Ok(()),
            };
            if let Some(error) = &about.error {
                let _ = writeln!(text, "  not usable        {error}");
            }
            text.push('\n');
        }
        text += &format!("CPU twin: {} threads\n", self.cpu_threads);
        if let Some(plan) = &self.cpu_plan {
            let _ = writeln!(
                text,
                "  plan              {}\n  as step streams   {} windows\n{}",
                plan.sizes.over(),
                plan.step_windows,
                plan.sizes.memory(),
            );
        }
        text
    }
}

impl Sizes {
    fn over(&self) -> String {
        let left_out = match self.tensors_left_out {
            0 => String::new(),
            left_out => format!("; {left_out} left out, not F32, BF16 or F16"),
        };
        let (rule, tensors, numel) = (&self.rule, self.tensors, self.numel);
        format!("{rule}, {tensors} tensors, {numel} parameters{left_out}")
    }

    /// Two lines on what is in memory and how much of it a step moves.
    fn memory(&self) -> String {
        let bytes = [
            self.params_bytes,
            self.grads_bytes,
            self.state_bytes,
            self.masters_bytes,
        ];
        let mib = |bytes: u64| bytes >> 20;
        let all = bytes
            .iter()
            .fold(0, |sum: u64, bytes| sum.saturating_add(*bytes));
        let [params, grads, state, masters] = bytes.map(mib);
        format!(
            "  memory            {} MiB: {params} MiB parameters, {grads} MiB gradients, {state} MiB state, {masters} MiB masters\n  \
             traffic           {} MiB read and written by a step",
            mib(all),
            mib(self.traffic_bytes),
        )
    }
}
