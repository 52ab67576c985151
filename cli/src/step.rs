//! `step`: the update applied to a model held in safetensors files.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Serialize;
use wgpu_optim::{
    Arena, CpuOptimizer, GpuOptimizer, Kernels, OptimizerState, SgdConfig, TensorState, Terms,
    readback,
};

use crate::args::{CommonArgs, StepArgs};
use crate::backend::{Backend, Choice, OpenGpu, cpu_name};
use crate::files::{MappedFile, Metadata, StagedFile, f32_values, replace_both};
use crate::progress::Progress;
use crate::{Failure, print};

/// What was done, as printed.
#[derive(Debug, Serialize)]
struct Report {
    backend: &'static str,
    adapter: String,
    reason: String,
    tensors_updated: usize,
    tensors_frozen: usize,
    numel: u64,
    dispatches: usize,
    repeat: u32,
    update_ms: f64,
    total_ms: f64,
    gb_per_s: f64,
}

pub fn run(common: &CommonArgs, args: &StepArgs) -> Result<(), Failure> {
    let config = args.hyper.config().map_err(anyhow::Error::from)?;
    let out_params = StagedFile::create(&args.out_params)?;
    let out_state = StagedFile::create(&args.out_state)?;
    if out_params.target() == out_state.target() {
        return Err(anyhow::anyhow!(
            "--out-params and --out-state are the same file, {}",
            out_params.target().display()
        )
        .into());
    }
    // The files are no longer mapped when they are replaced.
    let report = update(common, args, config, &out_params, &out_state)?;
    replace_both(out_params, out_state)?;
    print(common, &report, report.to_text())
}

/// Reads the model, applies the steps and writes the staged files.
fn update(
    common: &CommonArgs,
    args: &StepArgs,
    config: SgdConfig,
    out_params: &StagedFile,
    out_state: &StagedFile,
) -> Result<Report, Failure> {
    let params_file = MappedFile::open(&args.params)?;
    let grads_file = MappedFile::open(&args.grads)?;
    let state_file = args.state.as_deref().map(MappedFile::open).transpose()?;
    let (params, metadata) = params_file.parse()?;
    let (grads, _) = grads_file.parse()?;
    let mut model = Model::pair(&params, &grads)?;
    let (state, frozen) = read_state(state_file.as_ref(), &params, config)
        .and_then(|mut saved| Ok((split_off_updated(&mut saved, &model, config)?, saved)))
        .with_context(|| match &args.state {
            Some(path) => format!("state {}", path.display()),
            None => "state".to_owned(),
        })?;

    let Choice { backend, reason } = Choice::for_updates(common)?;
    let done = match &backend {
        Backend::Gpu(gpu) => step_on_gpu(gpu, config, &mut model, &state, args.repeat)?,
        Backend::Cpu => step_on_cpu(config, &mut model, &state, args.repeat)?,
    };

    write_params(out_params, &params, metadata, &model)?;
    write_state(out_state, done.state, frozen, &model)?;

    let numel = model.numel();
    let bytes = numel * Terms::of(&config).bytes_per_elem() * u64::from(args.repeat);
    let (backend, adapter) = match &backend {
        Backend::Gpu(gpu) => ("gpu", gpu.name()),
        Backend::Cpu => ("cpu", cpu_name()),
    };
    Ok(Report {
        backend,
        adapter,
        reason,
        tensors_updated: model.updated.len(),
        tensors_frozen: model.frozen,
        numel,
        dispatches: done.dispatches,
        repeat: args.repeat,
        update_ms: millis(done.update),
        total_ms: millis(done.total),
        gb_per_s: bytes as f64 / done.update.as_secs_f64().max(1e-9) / 1e9,
    })
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
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
        line(
            "tensors",
            format!(
                "{} updated, {} frozen",
                self.tensors_updated, self.tensors_frozen
            ),
        );
        line("parameters", self.numel.to_string());
        if self.backend == "gpu" {
            line("dispatches", self.dispatches.to_string());
        }
        line("steps", self.repeat.to_string());
        line(
            "update",
            format!("{:.3} ms, {:.1} GB/s", self.update_ms, self.gb_per_s),
        );
        line("total", format!("{:.3} ms with transfers", self.total_ms));
        text
    }
}

/// A tensor that has a gradient.
struct Updated<'data> {
    name: String,
    shape: Vec<usize>,
    grads: TensorView<'data>,
    values: Vec<f32>,
}

/// The parameters and gradients of a model, paired by name.
struct Model<'data> {
    updated: Vec<Updated<'data>>,
    frozen: usize,
}

impl<'data> Model<'data> {
    fn pair(params: &SafeTensors<'data>, grads: &SafeTensors<'data>) -> Result<Self> {
        let mut updated = Vec::new();
        let mut names = grads.names();
        names.sort_unstable();
        for name in names {
            let grad = grads.tensor(name)?;
            let param = params
                .tensor(name)
                .ok()
                .with_context(|| format!("gradient {name:?} has no parameter of that name"))?;
            for (role, view) in [("parameter", &param), ("gradient", &grad)] {
                ensure!(
                    view.dtype() == Dtype::F32,
                    "tensor {name:?}: the {role} is {:?}, expected F32",
                    view.dtype()
                );
            }
            ensure!(
                grad.shape() == param.shape(),
                "tensor {name:?}: the gradient has shape {:?}, expected {:?}",
                grad.shape(),
                param.shape()
            );
            updated.push(Updated {
                name: name.to_owned(),
                shape: param.shape().to_vec(),
                grads: grad,
                values: f32_values(&param),
            });
        }
        let frozen = params.len() - updated.len();
        Ok(Self { updated, frozen })
    }

    fn numel(&self) -> u64 {
        self.updated.iter().map(|t| t.values.len() as u64).sum()
    }
}

/// What an earlier step left of this model, or nothing yet.
fn read_state(
    file: Option<&MappedFile>,
    params: &SafeTensors<'_>,
    config: SgdConfig,
) -> Result<OptimizerState> {
    let Some(file) = file else {
        return Ok(OptimizerState {
            config,
            steps: 0,
            tensors: Vec::new(),
        });
    };
    let state = OptimizerState::from_safetensors(file.bytes())?;
    ensure!(
        state.config.form() == config.form(),
        "it was made by the {} form, expected {}",
        state.config.form(),
        config.form()
    );
    for tensor in &state.tensors {
        let param = params
            .tensor(&tensor.name)
            .ok()
            .with_context(|| format!("tensor {:?} has no parameter of that name", tensor.name))?;
        ensure!(
            tensor.velocity.is_none() || tensor.shape == param.shape(),
            "tensor {:?}: the velocity has shape {:?}, expected {:?}",
            tensor.name,
            tensor.shape,
            param.shape()
        );
    }
    Ok(state)
}

/// Takes the entries of the updated tensors out of `saved`; the rest belongs to frozen ones.
fn split_off_updated(
    saved: &mut OptimizerState,
    model: &Model<'_>,
    config: SgdConfig,
) -> Result<OptimizerState> {
    let mut entries: HashMap<_, _> = saved
        .tensors
        .drain(..)
        .map(|tensor| (tensor.name.clone(), tensor))
        .collect();
    let tensors: Vec<_> = model
        .updated
        .iter()
        .map(|tensor| {
            entries.remove(&tensor.name).unwrap_or_else(|| TensorState {
                name: tensor.name.clone(),
                shape: tensor.shape.clone(),
                applied_steps: 0,
                velocity: None,
            })
        })
        .collect();
    saved.tensors.extend(entries.into_values());
    let with_velocity = tensors.iter().find(|tensor| tensor.velocity.is_some());
    if let (false, Some(tensor)) = (config.has_velocity(), with_velocity) {
        bail!(
            "the state holds a velocity for tensor {:?}, but the momentum is zero",
            tensor.name
        );
    }
    Ok(OptimizerState {
        config,
        steps: saved.steps,
        tensors,
    })
}

fn f32_view<'data>(shape: &[usize], values: &'data [f32]) -> Result<TensorView<'data>> {
    Ok(TensorView::new(
        Dtype::F32,
        shape.to_vec(),
        bytemuck::cast_slice(values),
    )?)
}

/// Writes every tensor of the parameter file: updated ones with their new values, frozen ones byte for byte.
fn write_params(
    file: &StagedFile,
    params: &SafeTensors<'_>,
    metadata: Metadata,
    model: &Model<'_>,
) -> Result<()> {
    let mut tensors: HashMap<_, _> = params.tensors().into_iter().collect();
    for tensor in &model.updated {
        tensors.insert(
            tensor.name.clone(),
            f32_view(&tensor.shape, &tensor.values)?,
        );
    }
    file.write(tensors, metadata)
}

/// Writes the new state of the updated tensors beside the old one of the frozen.
fn write_state(
    file: &StagedFile,
    mut updated: OptimizerState,
    frozen: OptimizerState,
    model: &Model<'_>,
) -> Result<()> {
    for (state, tensor) in updated.tensors.iter_mut().zip(&model.updated) {
        state.shape.clone_from(&tensor.shape);
    }
    updated.tensors.extend(frozen.tensors);
    file.write_bytes(&updated.to_safetensors()?)
}

/// What a device did.
struct Done {
    state: OptimizerState,
    dispatches: usize,
    /// The steps alone.
    update: Duration,
    /// With transfers.
    total: Duration,
}

fn step_on_cpu(
    config: SgdConfig,
    model: &mut Model<'_>,
    state: &OptimizerState,
    repeat: u32,
) -> Result<Done, Failure> {
    let started = Instant::now();
    let numel = model.numel();
    let mut progress = Progress::new(numel * (1 + u64::from(repeat)));
    let names = model
        .updated
        .iter()
        .map(|t| (t.name.as_str(), t.values.len()));
    let mut optimizer = CpuOptimizer::new(config, names).map_err(anyhow::Error::from)?;
    optimizer.load_state(state).map_err(anyhow::Error::from)?;
    let grads: Vec<_> = model.updated.iter().map(|t| f32_values(&t.grads)).collect();
    let grads: Vec<_> = grads.iter().map(Vec::as_slice).collect();
    let mut params: Vec<_> = model
        .updated
        .iter_mut()
        .map(|t| t.values.as_mut_slice())
        .collect();
    progress.advance("read", numel);

    let stepping = Instant::now();
    for _ in 0..repeat {
        optimizer
            .step(&mut params, &grads)
            .map_err(Failure::failed)?;
        progress.advance("step", numel);
    }
    let update = stepping.elapsed();
    Ok(Done {
        state: optimizer.state(),
        dispatches: 0,
        update,
        total: started.elapsed(),
    })
}

fn step_on_gpu(
    open: &OpenGpu,
    config: SgdConfig,
    model: &mut Model<'_>,
    state: &OptimizerState,
    repeat: u32,
) -> Result<Done, Failure> {
    let (device, queue) = (&open.gpu.device, &open.gpu.queue);
    let kernels = Kernels::new(device, queue).map_err(Failure::failed)?;
    let started = Instant::now();
    let mut progress = Progress::new(model.numel() * (2 + u64::from(repeat)));

    let layout = model
        .updated
        .iter()
        .map(|t| (t.name.as_str(), t.shape.clone()));
    let arena = Arena::new(device, queue, layout).map_err(Failure::failed)?;
    let params: Vec<_> = model.updated.iter().map(|t| t.values.as_slice()).collect();
    arena.upload_all_params(&params).map_err(Failure::failed)?;
    let grads: Vec<_> = model.updated.iter().map(|t| f32_values(&t.grads)).collect();
    arena.upload_all_grads(&grads).map_err(Failure::failed)?;
    drop(grads);
    let mut optimizer =
        GpuOptimizer::new(&kernels, config, &arena.bindings()).map_err(Failure::failed)?;
    optimizer.load_state(state).map_err(Failure::failed)?;
    queue.submit([]);
    open.finish()?;
    progress.advance("upload", model.numel());

    let stepping = Instant::now();
    for _ in 0..repeat {
        let mut encoder = device.create_command_encoder(&Default::default());
        optimizer.step(&mut encoder).map_err(Failure::failed)?;
        queue.submit([encoder.finish()]);
        open.finish()?;
        progress.advance("step", model.numel());
    }
    let update = stepping.elapsed();

    let params =
        readback::block_on(device, arena.download_all_params()).map_err(Failure::failed)?;
    for (tensor, values) in model.updated.iter_mut().zip(params) {
        tensor.values = values;
    }
    progress.advance("download", model.numel());
    let state = readback::block_on(device, optimizer.state()).map_err(Failure::failed)?;
    open.finish()?;
    Ok(Done {
        state,
        dispatches: optimizer.dispatches(),
        update,
        total: started.elapsed(),
    })
}
