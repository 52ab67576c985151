//! burn's own training loop scores red wines, once with burn's AdamW and once with this crate's, from the same start on the
//! same batches: `cargo run --release -p wgpu-optim-burn --example wine`. Draws the losses on wines that were held out into
//! the folder that is named behind `--`, or else into this one.
//!
//! The wines come with linfa-datasets: what a laboratory measured of them, and the score that tasters gave (Cortez et al.,
//! *Modeling wine preferences by data mining from physicochemical properties*, 2009).

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderBuilder};
use burn::data::dataset::InMemDataset;
use burn::grad_clipping::GradientClippingConfig;
use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig, Relu};
use burn::optim::AdamWConfig;
use burn::tensor::{Device, Tensor, TensorData};
use burn::train::logger::InMemoryMetricLogger;
use burn::train::metric::LossMetric;
use burn::train::{
    InferenceStep, Learner, LearnerModel, RegressionOutput, SupervisedTraining, TrainOutput,
    TrainStep,
};
use plotters::prelude::*;
use wgpu_optim_burn::wgpu_optim::{AdamConfig, StepControl};
use wgpu_optim_burn::{Control, Init as _, SharedDevice};

const MEASURES: usize = 11;
const HIDDEN: usize = 32;
const BATCH: usize = 64;
const EPOCHS: usize = 30;
const LR: f64 = 5e-3;
const MAX_NORM: f32 = 0.5;
/// One in so many wines is held out.
const HELD_OUT: usize = 5;

/// Measures and score, each with mean 0 and variance 1 over the wines to train on.
type Wine = [f32; MEASURES + 1];

/// The wines to train on, and those that are held out.
fn wines() -> [Vec<Wine>; 2] {
    let set = linfa_datasets::winequality();
    let rows = set.records().rows().into_iter().zip(set.targets().iter());
    let mut wines: Vec<Wine> = rows
        .map(|(measures, score)| {
            let mut wine = [*score as f32; MEASURES + 1];
            for (value, measure) in wine.iter_mut().zip(measures) {
                *value = *measure as f32;
            }
            wine
        })
        .collect();
    fastrand::Rng::with_seed(2009).shuffle(&mut wines);
    let held_out = wines.len() / HELD_OUT;
    let train = wines.len() - held_out;
    for column in 0..=MEASURES {
        let of_training = wines[..train].iter().map(|wine| wine[column]);
        let mean = of_training.clone().sum::<f32>() / train as f32;
        let variance = of_training.map(|x| (x - mean).powi(2)).sum::<f32>() / train as f32;
        for wine in &mut wines {
            wine[column] = (wine[column] - mean) / variance.sqrt();
        }
    }
    let held_out = wines.split_off(train);
    [wines, held_out]
}

#[derive(Clone, Debug)]
struct Batch {
    measures: Tensor<2>,
    scores: Tensor<2>,
}

#[derive(Clone)]
struct Wines;

impl Batcher<Wine, Batch> for Wines {
    fn batch(&self, wines: Vec<Wine>, device: &Device) -> Batch {
        let rows = wines.len();
        let values = TensorData::new(wines.concat(), [rows, MEASURES + 1]);
        let values = Tensor::<2>::from_data(values, device);
        Batch {
            measures: values.clone().narrow(1, 0, MEASURES),
            scores: values.narrow(1, MEASURES, 1),
        }
    }
}

#[derive(Module, Debug)]
struct Network {
    hidden: Linear,
    second: Linear,
    head: Linear,
    relu: Relu,
    /// The held-out loss after each epoch.
    #[module(skip)]
    curve: Arc<Mutex<Vec<f64>>>,
}

impl Network {
    fn new(device: &Device) -> Self {
        Self {
            hidden: LinearConfig::new(MEASURES, HIDDEN).init(device),
            second: LinearConfig::new(HIDDEN, HIDDEN).init(device),
            head: LinearConfig::new(HIDDEN, 1).init(device),
            relu: Relu::new(),
            curve: Arc::default(),
        }
    }

    fn forward(&self, batch: Batch) -> RegressionOutput {
        let x = self.relu.forward(self.hidden.forward(batch.measures));
        let x = self.relu.forward(self.second.forward(x));
        let scores = self.head.forward(x);
        let loss = (scores.clone() - batch.scores.clone()).powf_scalar(2.0);
        RegressionOutput::new(loss.mean(), scores, batch.scores)
    }
}

impl TrainStep for Network {
    type Input = Batch;
    type Output = RegressionOutput;

    fn step(&self, batch: Batch) -> TrainOutput<RegressionOutput> {
        let output = self.forward(batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for Network {
    type Input = Batch;
    type Output = RegressionOutput;

    fn step(&self, batch: Batch) -> RegressionOutput {
        let output = self.forward(batch);
        let loss = output.loss.clone().into_scalar::<f32>();
        let mut curve = self.curve.lock().unwrap_or_else(PoisonError::into_inner);
        curve.push(loss.into());
        output
    }
}

fn loader(wines: &[Wine], batch: usize, shuffle: bool) -> Arc<dyn DataLoader<Batch>> {
    let builder = DataLoaderBuilder::new(Wines).batch_size(batch);
    let builder = if shuffle { builder.shuffle(1) } else { builder };
    builder.build(InMemDataset::new(wines.to_vec()))
}

fn training<M>([train, held_out]: &[Vec<Wine>; 2], folder: &Path) -> SupervisedTraining<M>
where
    M: LearnerModel
        + TrainStep<Input = Batch, Output = RegressionOutput>
        + InferenceStep<Input = Batch, Output = RegressionOutput>,
{
    let held_out = loader(held_out, held_out.len(), false);
    SupervisedTraining::new(folder, loader(train, BATCH, true), held_out)
        .num_epochs(EPOCHS)
        .with_application_logger(None)
        .with_metric_logger(InMemoryMetricLogger::new())
        .metric_train_numeric(LossMetric::new())
}

fn schedule(wines: usize) -> Result<ModuleLrScheduler, String> {
    let steps = EPOCHS * wines.div_ceil(BATCH);
    CosineAnnealingLrSchedulerConfig::new(LR, steps).init()
}

/// A curve: its label, its colour and the loss after each epoch.
type Curve<'c> = (&'c str, RGBColor, &'c [f64]);

fn draw(path: &Path, curves: &[Curve<'_>]) -> Result<(), Box<dyn Error>> {
    let area = SVGBackend::new(path, (720, 400)).into_drawing_area();
    area.fill(&WHITE)?;
    let losses = || {
        curves
            .iter()
            .flat_map(|(_, _, losses)| losses.iter().copied())
    };
    let (least, most) = (losses().fold(1.0, f64::min), losses().fold(0.0, f64::max));
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(1..EPOCHS, 0.95 * least..1.02 * most)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("epoch")
        .y_desc("held-out loss (1: the mean score)")
        .draw()?;
    for (label, color, losses) in curves {
        let points = (1..).zip(losses.iter().copied());
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)))?
            .label(*label)
            .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE)
        .draw()?;
    area.present()?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let (device, setup) = Device::wgpu_options().init_with_setup()?;
    let shared = SharedDevice::new(&device, &setup)?;
    let device = device.autodiff();
    device.seed(7);
    let wines = wines();
    let start = Network::new(&device);
    let folder = tempfile::tempdir()?;
    let fresh = || Network {
        curve: Arc::default(),
        ..start.clone()
    };

    let clipping = GradientClippingConfig::Norm(MAX_NORM);
    let theirs = AdamWConfig::new()
        .with_weight_decay(0.01)
        .with_grad_clipping(Some(clipping))
        .init();
    let of_burn = fresh();
    let curve_of_burn = of_burn.curve.clone();
    let schedule_of_burn = schedule(wines[0].len())?;
    let result =
        training(&wines, folder.path()).launch(Learner::new(of_burn, theirs, schedule_of_burn));
    if let Some(error) = result.error {
        return Err(error.to_string().into());
    }

    let mut curves = Vec::new();
    let by_tensor = StepControl::builder().tensor_max_norm(MAX_NORM.into());
    let by_norm = StepControl::builder().max_norm(MAX_NORM.into());
    for control in [by_tensor, by_norm] {
        let control = Control::new(&shared, control.build()?)?;
        let rule = AdamConfig::adamw(LR).eps(1e-5).build()?;
        let optimizer = rule.init(&shared).with_control(&control);
        let model = fresh();
        curves.push(model.curve.clone());
        let training = training(&wines, folder.path());
        let learner = optimizer.learner(model, schedule(wines[0].len())?, &training.interrupter());
        let result = training.launch(learner);
        if let Some(error) = result.error {
            return Err(error.to_string().into());
        }
        println!(
            "copied before the last step: {:?}",
            result.model.optimizer().copied()
        );
    }

    let losses =
        |curve: &Arc<Mutex<Vec<f64>>>| curve.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let (theirs, by_tensor, by_norm) = (
        losses(&curve_of_burn),
        losses(&curves[0]),
        losses(&curves[1]),
    );
    println!("epoch  burn, clipped by tensor  ours, by tensor  ours, by the norm of all");
    for (epoch, ((theirs, by_tensor), by_norm)) in
        theirs.iter().zip(&by_tensor).zip(&by_norm).enumerate()
    {
        println!(
            "{:>5}  {theirs:>23.4}  {by_tensor:>15.4}  {by_norm:>23.4}",
            epoch + 1
        );
    }
    let out = std::env::args_os()
        .nth(1)
        .map_or_else(PathBuf::new, PathBuf::from);
    draw(
        &out.join("wine.svg"),
        &[
            (
                "burn's AdamW, clipped tensor by tensor",
                RGBColor(150, 150, 150),
                &theirs,
            ),
            ("ours, the same", RGBColor(0, 114, 178), &by_tensor),
            (
                "ours, clipped by the norm of all",
                RGBColor(213, 94, 0),
                &by_norm,
            ),
        ],
    )
}
