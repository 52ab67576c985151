//! `bench`: one momentum step on the GPU, on the parallel CPU twin and on the one-thread reference.
//!
//! Every path is checked against the oracle before it is timed. The paths are timed in turn, round by round,
//! because the memory bandwidth of a shared machine drifts: only what was measured side by side compares.

use std::time::Instant;

use anyhow::{Context as _, anyhow};
use comfy_table::{CellAlignment, Table};
use rayon::prelude::*;
use serde::Serialize;
use statrs::statistics::{Data, Max, Min, OrderStatistics};
use wgpu_optim::oracle::{Agreement, Disagreement, Oracle, Rounding};
use wgpu_optim::{
    Coefficients, CpuOptimizer, GpuOptimizer, Kernels, OptimizerState, SgdConfig, TensorBinding,
    Terms, readback, reference, wgpu,
};

use crate::args::{BenchArgs, CommonArgs};
use crate::backend::{Backend, Choice, OpenGpu, cpu_name};
use crate::copy_kernel::CopyKernel;
use crate::progress::Progress;
use crate::{Failure, print};

/// Learning rates of the steps that are checked.
const CHECKED_LRS: [f64; 3] = [0.1, 0.03, 0.2];

/// Rounds before the timed ones, in which pages are touched and shaders compiled.
const WARM_UP: u32 = 3;

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    command: String,
    device: String,
    reason: String,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    backend: &'static str,
    adapter: String,
    tensors: usize,
    numel: usize,
    ms_median: f64,
    ms_min: f64,
    ms_max: f64,
    ns_per_elem: f64,
    gb_per_s: f64,
    share_of_copy: Option<f64>,
    /// Time of the parallel CPU twin over this one's.
    speedup_over_cpu: f64,
    /// Time of the one-thread reference over this one's.
    speedup_over_reference: f64,
    worst_ulp: f64,
}

pub fn run(common: &CommonArgs, args: &BenchArgs) -> Result<(), Failure> {
    let Choice { backend, reason } = Choice::for_measurements(common)?;
    let gpu = match &backend {
        Backend::Gpu(gpu) => Some(gpu),
        Backend::Cpu => None,
    };
    let rounds = u64::from(args.steps + WARM_UP);
    let mut progress = Progress::new(args.numel.iter().map(|n| *n as u64 * (rounds + 1)).sum());
    let mut rows = Vec::new();
    for numel in &args.numel {
        rows.extend(measure(gpu, *numel, args.steps, &mut progress)?);
    }
    drop(progress);
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        command: std::env::args()
            .skip(1)
            .fold("wgpu-optim".to_owned(), |line, arg| line + " " + &arg),
        device: gpu.map_or_else(cpu_name, OpenGpu::name),
        reason,
        rows,
    };
    if common.json {
        print(&serde_json::to_string_pretty(&report).map_err(Failure::failed)?)
    } else {
        print(&report.to_text())
    }
}

/// What every path computes, on values of its own.
struct Problem {
    config: SgdConfig,
    start: Vec<f32>,
    grads: Vec<f32>,
}

impl Problem {
    fn new(numel: usize) -> Result<Self, Failure> {
        let config = SgdConfig::builder(CHECKED_LRS[0])
            .momentum(0.9)
            .build()
            .context("the benchmark's own configuration")?;
        let mut rng = fastrand::Rng::with_seed(numel as u64);
        let mut values = |largest: f32| {
            let value = |_| {
                let magnitude = largest * (0.5 + 0.5 * rng.f32());
                if rng.bool() { magnitude } else { -magnitude }
            };
            (0..numel).map(value).collect()
        };
        // Gradients small enough that the checked steps never cancel a parameter, whose ULP would then say
        // nothing of the arithmetic.
        Ok(Self {
            config,
            start: values(1.0),
            grads: values(0.125),
        })
    }

    fn config_at(&self, lr: f64) -> Result<SgdConfig, Failure> {
        self.config.with_lr(lr).map_err(Failure::failed)
    }

    /// Compares every parameter and every velocity after [`CHECKED_LRS`]; a wrong one ends the benchmark.
    fn check(&self, params: &[f32], velocity: &[f32], rounding: Rounding) -> Result<f64, Failure> {
        const CHUNK: usize = 1 << 16;
        let configs = CHECKED_LRS
            .iter()
            .map(|lr| self.config_at(*lr))
            .collect::<Result<Vec<_>, _>>()?;
        let check_chunk = |index: usize| -> Result<f64, Disagreement> {
            let range = index * CHUNK..self.start.len().min((index + 1) * CHUNK);
            let mut oracle = Oracle::new(&self.start[range.clone()], rounding);
            for config in &configs {
                oracle.step(config, &self.grads[range.clone()]);
            }
            let params: Agreement = oracle.check_params(&params[range.clone()])?;
            let velocity = oracle.check_velocity(&velocity[range])?;
            Ok(params.worst_ulp.max(velocity.worst_ulp))
        };
        (0..self.start.len().div_ceil(CHUNK))
            .into_par_iter()
            .map(check_chunk)
            .try_reduce(|| 0.0, |x, y| Ok(x.max(y)))
            .map_err(|wrong| Failure::Failed(anyhow!("wrong results: {wrong}")))
    }
}

/// One way to make a step.
trait Stepper {
    fn step(&mut self, lr: f64) -> Result<(), Failure>;

    /// Parameters and velocity as they are now.
    fn results(&self) -> Result<(Vec<f32>, Vec<f32>), Failure>;
}

/// A stepper in the table.
struct Path<'a> {
    backend: &'static str,
    adapter: String,
    stepper: Box<dyn Stepper + 'a>,
    worst_ulp: f64,
    millis: Vec<f64>,
}

impl<'a> Path<'a> {
    /// Checks every element before anything is timed.
    fn checked(
        backend: &'static str,
        adapter: String,
        mut stepper: Box<dyn Stepper + 'a>,
        problem: &Problem,
        rounding: Rounding,
    ) -> Result<Self, Failure> {
        for lr in CHECKED_LRS {
            stepper.step(lr)?;
        }
        let (params, velocity) = stepper.results()?;
        let worst_ulp = problem.check(&params, &velocity, rounding)?;
        Ok(Self {
            backend,
            adapter,
            stepper,
            worst_ulp,
            millis: Vec::new(),
        })
    }
}

fn measure(
    gpu: Option<&OpenGpu>,
    numel: usize,
    steps: u32,
    progress: &mut Progress,
) -> Result<Vec<Row>, Failure> {
    let problem = Problem::new(numel)?;
    let mut paths = Vec::new();
    let mut copy = None;
    if let Some(open) = gpu {
        let stepper = Box::new(OnGpu::new(open, &problem)?);
        paths.push(Path::checked(
            "gpu",
            open.name(),
            stepper,
            &problem,
            Rounding::WGSL,
        )?);
        // Whole vec4s are all that the copy kernel moves.
        let data = &problem.grads[..numel - numel % 4];
        if !data.is_empty() {
            let kernel = CopyKernel::new(&open.gpu.device, &open.gpu.queue, data);
            copy = Some((open, kernel.map_err(Failure::failed)?));
        }
    }
    let stepper = Box::new(OnCpu::new(&problem)?);
    paths.push(Path::checked(
        "cpu",
        cpu_name(),
        stepper,
        &problem,
        Rounding::NEAREST,
    )?);
    let stepper = Box::new(OnReference::new(&problem));
    let name = "reference (1 thread)".to_owned();
    paths.push(Path::checked(
        "reference",
        name,
        stepper,
        &problem,
        Rounding::NEAREST,
    )?);
    progress.advance("check", numel as u64);

    let mut copy_millis = Vec::new();
    for round in 0..steps + WARM_UP {
        let timed = round >= WARM_UP;
        if let Some((open, kernel)) = &copy {
            let elapsed = millis_of_second(|| {
                submit_and_wait(open, |encoder| {
                    kernel.record(encoder);
                    Ok(())
                })
            })?;
            copy_millis.extend(timed.then_some(elapsed));
        }
        for path in &mut paths {
            let elapsed = millis_of_second(|| path.stepper.step(CHECKED_LRS[0]))?;
            path.millis.extend(timed.then_some(elapsed));
        }
        progress.advance("time", numel as u64);
    }

    let median_of = |backend: &str| {
        let path = paths.iter().find(|path| path.backend == backend);
        path.map_or(f64::NAN, |path| median(&path.millis))
    };
    let bytes = numel as u64 * Terms::of(&problem.config).bytes_per_elem();
    let row = |path: &Path<'_>| {
        let ms_median = median(&path.millis);
        // The share is taken round by round, so that a drift of the machine cancels.
        let shares: Vec<_> = copy_millis
            .iter()
            .zip(&path.millis)
            .map(|(c, m)| c / m)
            .collect();
        Row {
            backend: path.backend,
            adapter: path.adapter.clone(),
            tensors: 1,
            numel,
            ms_median,
            ms_min: Data::new(path.millis.clone()).min(),
            ms_max: Data::new(path.millis.clone()).max(),
            ns_per_elem: ms_median * 1e6 / numel as f64,
            gb_per_s: bytes as f64 / (ms_median * 1e6),
            share_of_copy: (path.backend == "gpu" && !shares.is_empty()).then(|| median(&shares)),
            speedup_over_cpu: median_of("cpu") / ms_median,
            speedup_over_reference: median_of("reference") / ms_median,
            worst_ulp: path.worst_ulp,
        }
    };
    Ok(paths.iter().map(row).collect())
}

fn median(values: &[f64]) -> f64 {
    Data::new(values.to_vec()).median()
}

/// Times the second of two runs, so that each path finds the caches as its own last run left them.
fn millis_of_second(mut step: impl FnMut() -> Result<(), Failure>) -> Result<f64, Failure> {
    step()?;
    let started = Instant::now();
    step()?;
    Ok(started.elapsed().as_secs_f64() * 1e3)
}

/// Records, submits and waits: what a step costs a program that needs its result.
fn submit_and_wait(
    open: &OpenGpu,
    record: impl FnOnce(&mut wgpu::CommandEncoder) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut encoder = open.gpu.device.create_command_encoder(&Default::default());
    record(&mut encoder)?;
    open.gpu.queue.submit([encoder.finish()]);
    open.finish()
}

struct OnGpu<'a> {
    open: &'a OpenGpu,
    params: wgpu::Buffer,
    optimizer: GpuOptimizer,
}

impl<'a> OnGpu<'a> {
    fn new(open: &'a OpenGpu, problem: &Problem) -> Result<Self, Failure> {
        let (device, queue) = (&open.gpu.device, &open.gpu.queue);
        let upload = |values: &[f32]| {
            readback::storage_buffer(device, queue, "wgpu_optim.bench", values)
                .map_err(Failure::failed)
        };
        let (params, grads) = (upload(&problem.start)?, upload(&problem.grads)?);
        let tensor = TensorBinding {
            name: "bench",
            params: &params,
            params_offset_bytes: 0,
            grads: &grads,
            grads_offset_bytes: 0,
            numel: problem.start.len() as u64,
        };
        let kernels = Kernels::new(device, queue).map_err(Failure::failed)?;
        let optimizer =
            GpuOptimizer::new(&kernels, problem.config, &[tensor]).map_err(Failure::failed)?;
        Ok(Self {
            open,
            params,
            optimizer,
        })
    }
}

impl Stepper for OnGpu<'_> {
    fn step(&mut self, lr: f64) -> Result<(), Failure> {
        self.optimizer.set_lr(lr).map_err(Failure::failed)?;
        let optimizer = &mut self.optimizer;
        submit_and_wait(self.open, |encoder| {
            optimizer.step(encoder).map_err(Failure::failed)
        })
    }

    fn results(&self) -> Result<(Vec<f32>, Vec<f32>), Failure> {
        let (device, queue) = (&self.open.gpu.device, &self.open.gpu.queue);
        let numel = self.params.size() / 4;
        let params = readback::download_blocking(device, queue, &self.params, 0, numel)
            .map_err(Failure::failed)?;
        let state = readback::block_on(device, self.optimizer.state()).map_err(Failure::failed)?;
        Ok((params, velocity_in(state)))
    }
}

/// The velocity of the only tensor.
fn velocity_in(state: OptimizerState) -> Vec<f32> {
    let tensor = state.tensors.into_iter().next();
    tensor
        .and_then(|tensor| tensor.velocity)
        .unwrap_or_default()
}

struct OnCpu<'a> {
    problem: &'a Problem,
    params: Vec<f32>,
    optimizer: CpuOptimizer,
}

impl<'a> OnCpu<'a> {
    fn new(problem: &'a Problem) -> Result<Self, Failure> {
        let params = problem.start.clone();
        let optimizer = CpuOptimizer::new(problem.config, [("bench", params.len())])
            .map_err(Failure::failed)?;
        Ok(Self {
            problem,
            params,
            optimizer,
        })
    }
}

impl Stepper for OnCpu<'_> {
    fn step(&mut self, lr: f64) -> Result<(), Failure> {
        self.optimizer.set_lr(lr).map_err(Failure::failed)?;
        self.optimizer
            .step(&mut [&mut self.params], &[&self.problem.grads])
            .map_err(Failure::failed)
    }

    fn results(&self) -> Result<(Vec<f32>, Vec<f32>), Failure> {
        Ok((self.params.clone(), velocity_in(self.optimizer.state())))
    }
}

struct OnReference<'a> {
    problem: &'a Problem,
    params: Vec<f32>,
    velocity: Vec<f32>,
    steps: u64,
}

impl<'a> OnReference<'a> {
    fn new(problem: &'a Problem) -> Self {
        Self {
            problem,
            params: problem.start.clone(),
            velocity: vec![0.0; problem.start.len()],
            steps: 0,
        }
    }
}

impl Stepper for OnReference<'_> {
    fn step(&mut self, lr: f64) -> Result<(), Failure> {
        let config = self.problem.config_at(lr)?;
        let k = Coefficients::new(&config, self.steps == 0).cast();
        let (params, velocity) = (&mut self.params, &mut self.velocity);
        reference::sgd(
            &k,
            Terms::of(&config),
            params,
            velocity,
            &self.problem.grads,
        );
        self.steps += 1;
        Ok(())
    }

    fn results(&self) -> Result<(Vec<f32>, Vec<f32>), Failure> {
        Ok((self.params.clone(), self.velocity.clone()))
    }
}

impl Report {
    fn to_text(&self) -> String {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::UTF8_FULL_CONDENSED);
        table.set_header([
            "device",
            "numel",
            "ms median",
            "min",
            "max",
            "ns/elem",
            "GB/s",
            "of copy",
            "x cpu",
            "x reference",
            "worst ULP",
        ]);
        for row in &self.rows {
            table.add_row([
                row.adapter.clone(),
                row.numel.to_string(),
                format!("{:.3}", row.ms_median),
                format!("{:.3}", row.ms_min),
                format!("{:.3}", row.ms_max),
                format!("{:.3}", row.ns_per_elem),
                format!("{:.1}", row.gb_per_s),
                row.share_of_copy
                    .map_or_else(String::new, |share| format!("{share:.2}")),
                format!("{:.2}", row.speedup_over_cpu),
                format!("{:.2}", row.speedup_over_reference),
                format!("{:.2}", row.worst_ulp),
            ]);
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        format!(
            "device  {} ({})\nstep    heavy ball with momentum, 20 bytes per element; every element checked against the \
             f64 oracle\n{table}",
            self.device, self.reason
        )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_element_ends_the_benchmark() {
        let problem = Problem::new(100_001).unwrap();
        let mut stepper = OnReference::new(&problem);
        for lr in CHECKED_LRS {
            stepper.step(lr).unwrap();
        }
        let (mut params, mut velocity) = stepper.results().unwrap();
        let worst_ulp = problem
            .check(&params, &velocity, Rounding::NEAREST)
            .unwrap();
        assert!(worst_ulp > 0.0 && worst_ulp < 10.0, "{worst_ulp}");

        let right = params[100_000];
        params[100_000] = f32::from_bits(right.to_bits() + 20);
        let wrong = problem.check(&params, &velocity, Rounding::NEAREST);
        assert!(
            matches!(wrong, Err(Failure::Failed(e)) if e.to_string().contains("wrong results"))
        );
        params[100_000] = right;
        velocity[70_000] = f32::NAN;
        assert!(
            problem
                .check(&params, &velocity, Rounding::NEAREST)
                .is_err()
        );
    }
}
