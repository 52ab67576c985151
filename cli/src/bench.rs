//! `bench`: one momentum step on the GPU, on the parallel CPU twin and on the one-thread reference.
//!
//! Every path is checked against the oracle before it is timed. The paths are timed in turn, round by round,
//! because the memory bandwidth of a shared machine drifts: only what was measured side by side compares.

use std::time::Instant;

use anyhow::anyhow;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;
use statrs::statistics::{Data, Max, Min, OrderStatistics};
use wgpu_optim::oracle::Rounding;
use wgpu_optim::{SgdConfig, Terms};

use crate::args::{BenchArgs, CommonArgs};
use crate::backend::{Backend, Choice, OpenGpu, cpu_name};
use crate::copy_kernel::CopyKernel;
use crate::files::{MappedFile, f32_shapes};
use crate::problem::{OnCpu, OnGpu, OnReference, Problem, Stepper, submit_and_wait};
use crate::progress::Progress;
use crate::{Failure, print};

/// Learning rate of the timed steps.
const LR: f64 = 0.1;

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
    let cases = cases(args)?;
    let numel: usize = cases.iter().flatten().sum();
    let mut progress = Progress::new(numel as u64 * (rounds + 1));
    let mut rows = Vec::new();
    for sizes in cases {
        rows.extend(measure(gpu, sizes, args.steps, &mut progress)?);
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
    print(common, &report, report.to_text())
}

/// Elements of each tensor, for every case to measure: one tensor for each `--numel`, many of one size, or those
/// of a model.
fn cases(args: &BenchArgs) -> Result<Vec<Vec<usize>>, Failure> {
    if let Some(path) = &args.model {
        let file = MappedFile::open(path)?;
        let (tensors, _) = file.parse()?;
        let shapes = f32_shapes(&tensors);
        let sizes: Vec<usize> = shapes
            .iter()
            .map(|(_, shape)| shape.iter().product())
            .collect();
        if sizes.iter().sum::<usize>() == 0 {
            return Err(anyhow!("{} has no F32 tensors to step", path.display()).into());
        }
        return Ok(vec![sizes]);
    }
    Ok(match (args.tensors, args.numel_each) {
        (Some(tensors), Some(numel)) => vec![vec![numel; tensors]],
        _ => args.numel.iter().map(|numel| vec![*numel]).collect(),
    })
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
        let worst_ulp = problem.check(stepper.as_mut(), rounding)?.worst_ulp;
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
    sizes: Vec<usize>,
    steps: u32,
    progress: &mut Progress,
) -> Result<Vec<Row>, Failure> {
    let config = SgdConfig::builder(LR)
        .momentum(0.9)
        .build()
        .map_err(Failure::failed)?;
    let problem = Problem::new(config, sizes);
    let numel = problem.numel();
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
        let data = &problem.grads()[..numel - numel % 4];
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
            let elapsed = millis_of_second(|| path.stepper.step(LR))?;
            path.millis.extend(timed.then_some(elapsed));
        }
        progress.advance("time", numel as u64);
    }

    let median_of = |backend: &str| {
        let path = paths.iter().find(|path| path.backend == backend);
        path.map_or(f64::NAN, |path| median(&path.millis))
    };
    let bytes = numel as u64 * Terms::of(problem.config()).bytes_per_elem();
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
            tensors: problem.tensors(),
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

impl Report {
    fn to_text(&self) -> String {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::UTF8_FULL_CONDENSED);
        table.set_header([
            "device",
            "tensors",
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
                row.tensors.to_string(),
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
