//! `cargo run --release -p train`: see `--help`.

use std::fs;
use std::io::{self, Write as _};
use std::iter;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use train::comparison::compare;
use train::contender::{Contender, learning_rates, runs_of_sweep};
use train::cpu::Twin;
use train::data::Dataset;
use train::gpu::Engine;
use train::mixed;
use train::model::Model;
use train::picture;
use train::report;
use train::task::Task;
use train::training::{Device, Gradients};
use wgpu_optim::gpu::GpuError;
use wgpu_optim::wgpu::Backends;
use wgpu_optim::{AdapterRequest, Gpu};
use wgpu_optim_cli::picture::to_png;

/// Trains a small network to score red wines, by several rules from the same starts, on the GPU and on its CPU twin, and
/// says how many steps and seconds each takes to the loss that the first one ends with.
#[derive(Debug, Parser)]
#[command(name = "train")]
struct Args {
    /// Device to compute on: auto is any adapter, a software one included, or else the CPU twin alone
    #[arg(long, value_enum, default_value_t)]
    device: DeviceArg,
    /// Number of passes over the data
    #[arg(long, value_name = "N", default_value_t = 160, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    epochs: u16,
    /// Number of seeds: each decides the first parameters and the order in which the data come
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    seeds: u16,
    /// Rows in a batch
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Widths of the hidden layers
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', default_values = ["16", "16"], value_parser = clap::value_parser!(u16).range(1..=512))]
    hidden: Vec<u16>,
    /// Rules, as NAME[:LIBRARY][@LR]: `plain`, `momentum`, `nesterov`, or any rule of the library, as a library has it.
    /// Without @LR at the best of eleven learning rates, with @same at that of the first rule
    #[arg(long, value_name = "RULE,RULE,...", value_delimiter = ',', default_values = ["plain", "momentum@same", "nesterov", "AdamW"])]
    rules: Vec<Contender>,
    /// f16 trains every rule once more, by gradients of 16 bits under a dynamic loss scale and clipped by their norm, and
    /// says how many steps were skipped and how far the losses are from those of f32
    #[arg(long, value_enum, default_value_t)]
    gradients: GradientsArg,
    /// Directory for train.svg, train.png and train.csv
    #[arg(long, value_name = "DIR", default_value = "pictures")]
    out: PathBuf,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum DeviceArg {
    #[default]
    Auto,
    Gpu,
    Cpu,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum GradientsArg {
    #[default]
    F32,
    F16,
}

fn main() -> Result<()> {
    let args = Args::parse();
    fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot write into {}", args.out.display()))?;
    let data = Dataset::wines();
    let hidden: Vec<_> = args
        .hidden
        .iter()
        .map(|width| usize::from(*width))
        .collect();
    let task = Task {
        model: Model::new(data.features(), &hidden),
        data,
        batch_rows: args.batch.into(),
        epochs: args.epochs.into(),
    };
    let starts: Vec<_> = (0..args.seeds)
        .map(|seed| task.start(seed.into()))
        .collect();
    let engine = open(args.device, &task)?;
    let twin = Twin::new(&task);
    let devices = devices(engine.as_ref(), &twin);

    let lrs = {
        let progress = bar("learning rates", runs_of_sweep(&args.rules, starts.len()));
        learning_rates(&task, &args.rules, &starts, &progress)?
    };
    let contenders: Vec<_> = args.rules.iter().cloned().zip(lrs).collect();
    let comparison = {
        let runs = 2 * contenders.len() * starts.len() * devices.len();
        compare(&task, &contenders, &starts, &devices, &bar("runs", runs))?
    };

    let svg = picture::svg(&comparison)?;
    let files = [
        ("train.svg", svg.clone().into_bytes()),
        ("train.png", to_png(&svg)?),
        ("train.csv", report::csv(&comparison)?),
    ];
    let mut text = report::text(&task, &comparison);
    if args.gradients == GradientsArg::F16 {
        let gradients = [Gradients::f16()?, Gradients::f32_clipped()?];
        let twins = gradients.clone().map(|of| Twin::with_gradients(&task, of));
        let mut engines = Vec::new();
        for (engine, of) in iter::repeat_n(engine.as_ref(), 2).flatten().zip(gradients) {
            engines.push(Engine::with_gradients(engine.gpu().clone(), &task, of)?);
        }
        let [of_f16, of_f32] = &twins;
        let mut pairs = vec![[of_f16 as &dyn Device, of_f32]];
        if let [of_f16, of_f32] = engines.as_slice() {
            pairs.insert(0, [of_f16, of_f32]);
        }
        let runs = 2 * contenders.len() * starts.len() * pairs.len();
        let progress = bar("f16 gradients", runs);
        let mixed = mixed::again(&task, &contenders, &starts, &pairs, &progress)?;
        text += &report::mixed_text(&task, &mixed);
    }
    if engine.is_none() && args.device == DeviceArg::Auto {
        text += "there is no adapter: all of this is the CPU twin's\n";
    }
    for (name, content) in files {
        let file = args.out.join(name);
        fs::write(&file, content).with_context(|| format!("cannot write {}", file.display()))?;
        text += &format!("written: {}\n", file.display());
    }
    // A reader that closes the pipe early has read enough.
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn devices<'d>(engine: Option<&'d Engine<'_>>, twin: &'d Twin<'_>) -> Vec<&'d dyn Device> {
    let engine = engine.map(|engine| engine as &dyn Device);
    engine.into_iter().chain([twin as &dyn Device]).collect()
}

fn open(device: DeviceArg, task: &Task) -> Result<Option<Engine<'_>>> {
    if device == DeviceArg::Cpu {
        return Ok(None);
    }
    let request = AdapterRequest {
        backends: Backends::from_env().unwrap_or(Backends::PRIMARY),
        ..AdapterRequest::default()
    };
    match Gpu::open_blocking(&request) {
        Ok(gpu) => Ok(Some(Engine::new(gpu, task)?)),
        Err(GpuError::NoAdapter { .. }) if device == DeviceArg::Auto => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Hidden where stderr is not a terminal.
fn bar(what: &'static str, units: usize) -> ProgressBar {
    let bar = ProgressBar::new(units as u64).with_message(what);
    let style = ProgressStyle::with_template("{msg:>15} [{bar:40}] {pos} of {len}, {eta}");
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}
