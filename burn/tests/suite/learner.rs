//! burn's own training loop.

use std::path::Path;
use std::sync::Arc;

use burn::data::dataloader::{DataLoader, DataLoaderBuilder, batcher::Batcher};
use burn::data::dataset::InMemDataset;
use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig, Relu};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use burn::train::checkpoint::KeepLastNCheckpoints;
use burn::train::logger::InMemoryMetricLogger;
use burn::train::metric::LossMetric;
use burn::train::{
    InferenceStep, Learner, LearnerModel, LearningResult, RegressionOutput, SupervisedTraining,
    TrainOutput, TrainStep,
};
use wgpu_optim_burn::wgpu_optim::{AdamConfig, AnyRule, LossScale, ParamGroups, StepControl};
use wgpu_optim_burn::{Control, Copied, LearnerModule, ModuleOptimizer, StepError};

use crate::{gpu, host, tensor, values};

const ROWS: usize = 40;
const BATCH: usize = 8;
const EPOCHS: usize = 4;

#[derive(Module, Debug)]
struct Network {
    hidden: Linear,
    relu: Relu,
    head: Linear,
}

impl Network {
    fn new(device: &Device) -> Self {
        let network = Self {
            hidden: LinearConfig::new(5, 7).init(device),
            relu: Relu::new(),
            head: LinearConfig::new(7, 1).init(device),
        };
        // From one start.
        let mut fill = Fill(0);
        network.map(&mut fill)
    }

    fn forward(&self, batch: Batch) -> RegressionOutput {
        let hidden = self.relu.forward(self.hidden.forward(batch.inputs));
        let output = self.head.forward(hidden);
        let loss = (output.clone() - batch.targets.clone())
            .powf_scalar(2.0)
            .mean();
        RegressionOutput::new(loss, output, batch.targets)
    }

    fn host(&self) -> [Vec<f32>; 4] {
        let bias = |linear: &Linear| host(linear.bias.as_ref().unwrap().val());
        [
            host(self.hidden.weight.val()),
            bias(&self.hidden),
            host(self.head.weight.val()),
            bias(&self.head),
        ]
    }
}

struct Fill(u64);

impl burn::module::ModuleMapper for Fill {
    fn map_float<const D: usize>(
        &mut self,
        param: burn::module::Param<Tensor<D>>,
    ) -> burn::module::Param<Tensor<D>> {
        self.0 += 1;
        let seed = self.0;
        param.map(|param| {
            let shape = param.dims();
            let values = values(seed, shape.iter().product());
            tensor(&values, shape, &param.device())
                .mul_scalar(0.25)
                .detach()
                .require_grad()
        })
    }
}

#[derive(Clone, Debug)]
struct Batch {
    inputs: Tensor<2>,
    targets: Tensor<2>,
}

#[derive(Clone)]
struct Rows;

impl Batcher<usize, Batch> for Rows {
    fn batch(&self, rows: Vec<usize>, device: &Device) -> Batch {
        let inputs: Vec<_> = rows.iter().flat_map(|row| values(*row as u64, 5)).collect();
        let targets: Vec<_> = rows.iter().map(|row| values(*row as u64, 5)[2]).collect();
        Batch {
            inputs: tensor(&inputs, [rows.len(), 5], device),
            targets: tensor(&targets, [rows.len(), 1], device),
        }
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
        self.forward(batch)
    }
}

fn rows() -> Arc<dyn DataLoader<Batch>> {
    DataLoaderBuilder::new(Rows)
        .batch_size(BATCH)
        .build(InMemDataset::new((0..ROWS).collect()))
}

fn optimizer() -> ModuleOptimizer<AnyRule> {
    let adamw = AdamConfig::adamw(0.02).build().unwrap();
    let no_decay = AdamConfig::builder(0.02).build().unwrap();
    let groups = ParamGroups::new(AnyRule::from(adamw))
        .with("no_decay", no_decay, |path| path.ends_with("bias"))
        .unwrap();
    let control = StepControl::builder().max_norm(1.0).loss_scale(LossScale {
        // The loss is not scaled here: what is remembered is how far the count has come.
        initial: 1.0,
        growth_factor: 1.0,
        ..LossScale::default()
    });
    let control = Control::new(&gpu().1, control.build().unwrap()).unwrap();
    ModuleOptimizer::with_groups(&gpu().1, groups).with_control(&control)
}

fn schedule() -> CosineAnnealingLrSchedulerConfig {
    CosineAnnealingLrSchedulerConfig::new(0.02, EPOCHS * ROWS / BATCH).with_min_lr(1e-4)
}

type Trained = LearnerModule<Network, AnyRule>;

/// Trains in burn's loop, from a checkpoint if there is one to go on from.
fn train<M>(
    folder: &Path,
    epochs: usize,
    checkpoint: Option<usize>,
    learner: impl FnOnce(&burn::train::Interrupter) -> Learner<M>,
) -> LearningResult<M>
where
    M: LearnerModel
        + TrainStep<Input = Batch, Output = RegressionOutput>
        + InferenceStep<Input = Batch, Output = RegressionOutput>,
{
    let mut training = SupervisedTraining::new(folder, rows(), rows())
        .num_epochs(epochs)
        .with_default_checkpointers()
        .with_checkpointing_strategy(KeepLastNCheckpoints::new(EPOCHS))
        .with_metric_logger(InMemoryMetricLogger::new())
        .metric_train_numeric(LossMetric::new())
        .metric_valid_numeric(LossMetric::new())
        .with_application_logger(None);
    if let Some(checkpoint) = checkpoint {
        training = training.checkpoint(checkpoint);
    }
    let learner = learner(&training.interrupter());
    training.launch(learner)
}

fn ours(folder: &Path, epochs: usize, checkpoint: Option<usize>) -> LearningResult<Trained> {
    train(folder, epochs, checkpoint, |interrupter| {
        let schedule = schedule().init().unwrap();
        optimizer().learner(Network::new(&gpu().0), schedule, interrupter)
    })
}

/// Trains as the learner does, in a loop of one's own, and returns the parameters.
fn own_loop() -> [Vec<f32>; 4] {
    let mut network = Network::new(&gpu().0);
    let (mut optimizer, mut schedule) = (optimizer(), schedule().init().unwrap());
    for _ in 0..EPOCHS {
        for batch in rows().to_device(&gpu().0).iter() {
            let output = network.forward(batch.unwrap());
            let grads = GradientsParams::from_grads(output.loss.backward(), &network);
            network = optimizer.step(schedule.step(), network, grads).unwrap();
        }
    }
    network.host()
}

#[test]
fn burns_loop_makes_the_steps_of_a_loop_of_ones_own_and_resumes_from_its_checkpoints() {
    let expected = own_loop();
    let folder = tempfile::tempdir().unwrap();
    let result = ours(folder.path(), EPOCHS, None);
    assert!(result.error.is_none(), "{:?}", result.error);
    let optimizer = result.model.optimizer();
    assert_eq!(
        optimizer.copied(),
        Copied::default(),
        "nobody else has the parameters"
    );
    let record = optimizer.to_record().unwrap().unwrap();
    assert_eq!(record.steps as usize, EPOCHS * ROWS / BATCH);
    assert_eq!(
        record.control.unwrap().growth_tracker as usize,
        EPOCHS * ROWS / BATCH
    );
    assert_eq!(result.model.into_inner().host(), expected);

    // Another process stops after two epochs, and a third goes on.
    let folder = tempfile::tempdir().unwrap();
    let half = ours(folder.path(), EPOCHS / 2, None);
    assert_ne!(half.model.into_inner().host(), expected);
    let resumed = ours(folder.path(), EPOCHS, Some(EPOCHS / 2));
    assert!(resumed.error.is_none(), "{:?}", resumed.error);
    // Files have tensors in alphabetical order.
    let mut expected_record = record;
    expected_record.tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let record = resumed.model.optimizer().to_record().unwrap();
    assert!(record == Some(expected_record));
    assert_eq!(resumed.model.into_inner().host(), expected);
}

#[test]
fn what_stops_a_step_stops_the_training_and_leaves_the_module() {
    let (device, ..) = gpu();
    // A checkpoint of burn's own optimizer.
    let folder = tempfile::tempdir().unwrap();
    let theirs = train(folder.path(), 1, None, |_| {
        let optimizer = burn::optim::AdamWConfig::new().init();
        Learner::new(Network::new(device), optimizer, 0.02)
    });
    let before = theirs.model.host();
    let result = ours(folder.path(), EPOCHS, Some(1));
    assert_eq!(result.model.error(), Some(StepError::NoRecord));
    let error = result.error.unwrap().to_string();
    assert!(error.contains("no state of this optimizer"), "{error}");
    assert_eq!(result.model.into_inner().host(), before);

    // A learning rate that no rule takes.
    let folder = tempfile::tempdir().unwrap();
    let result = train(folder.path(), 1, None, |interrupter| {
        optimizer().learner(Network::new(device), f64::NAN, interrupter)
    });
    assert!(matches!(result.model.error(), Some(StepError::Config(_))));
    assert!(result.error.is_some());
    assert_eq!(
        result.model.into_inner().host(),
        Network::new(device).host()
    );
}
