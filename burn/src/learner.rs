//! burn's own training loop.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::lr_scheduler::module_lr_scheduler::{ModuleLearningRate, ModuleLrScheduler};
use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor, Param, ParamGroup};
use burn::optim::{
    DynOptimizer, DynState, GradientsParams, LearningRate, ModuleOptimizer as BurnOptimizer,
    MultiGradientsParams, SgdConfig, StateSink, StateSource,
};
use burn::tensor::kind::BridgeTensor;
use burn::tensor::{Device, Tensor, TensorData};
use burn::train::train::WorkerFailure;
use burn::train::{
    InferenceStep, Interrupter, Learner, LearnerModel, TrainOutput, TrainStep, TrainingError,
};
use wgpu_optim::OptimizerState;
use wgpu_optim::state::Recorded;

use crate::error::StepError;
use crate::optimizer::ModuleOptimizer;

/// The tensor of burn's optimizer record that holds a state file.
const STATE_FILE: &str = "wgpu_optim_state";

impl<R: Recorded> ModuleOptimizer<R> {
    /// A learner of burn's whose steps this optimizer makes, in place of `Learner::new(model, optimizer, schedule)`.
    ///
    /// Schedules, accumulation of gradients, metrics and checkpoints are burn's. A checkpoint's `optim` file holds the
    /// [`OptimizerState`] as a state file, so training goes on from it as it would have gone on without. Where a step
    /// cannot be made, training stops, the module keeps its values, and the error is in `LearningResult::error` and, as a
    /// [`StepError`], in [`LearnerModule::error`]; `interrupter` is the training's.
    ///
    /// burn hands a step a clone of the module, whose tensors an optimizer then may not write. [`LearnerModule`] has one
    /// module for all its clones, so that parameters are stepped where they lie.
    pub fn learner<M: LearnerModel>(
        self,
        model: M,
        schedule: impl Into<ModuleLrScheduler>,
        interrupter: &Interrupter,
    ) -> Learner<LearnerModule<M, R>> {
        let interrupter = interrupter.clone();
        let records = Records {
            optimizer: self.handle(),
            interrupter: interrupter.clone(),
        };
        let optimizer = records.into_optimizer();
        let model = LearnerModule {
            module: Arc::new(Mutex::new(Some(model))),
            stepping: Arc::new(Stepping {
                optimizer: self,
                interrupter,
                error: Mutex::new(None),
            }),
        };
        Learner::new(model, optimizer, schedule)
    }
}

/// A module in a [`Learner`] of burn's: [`ModuleOptimizer::learner`] makes it, and
/// [`into_inner`](Self::into_inner) gives back what has been trained.
///
/// It visits, maps and records as the module does. Steps of burn's loop are made to one module that all clones share;
/// whatever else makes a module of it (`map`, `fork`, `valid`, `load_record`) makes a separate one.
pub struct LearnerModule<M, R: Recorded> {
    /// None while it is stepped.
    module: Arc<Mutex<Option<M>>>,
    stepping: Arc<Stepping<R>>,
}

/// The rest of a learner's modules, which they have in common.
struct Stepping<R: Recorded> {
    optimizer: ModuleOptimizer<R>,
    interrupter: Interrupter,
    error: Mutex<Option<StepError>>,
}

impl<M: Module, R: Recorded> LearnerModule<M, R> {
    /// The module.
    #[must_use]
    pub fn into_inner(self) -> M {
        self.with(M::clone)
    }

    /// The optimizer: its records, and what its last step took.
    #[must_use]
    pub fn optimizer(&self) -> &ModuleOptimizer<R> {
        &self.stepping.optimizer
    }

    /// Why training stopped, if that was because a step could not be made.
    #[must_use]
    pub fn error(&self) -> Option<StepError> {
        lock(&self.stepping.error).clone()
    }

    fn with<T>(&self, look: impl FnOnce(&M) -> T) -> T {
        match &*lock(&self.module) {
            Some(module) => look(module),
            None => unreachable!("a step has panicked, and was caught"),
        }
    }

    /// Returns another module that this module's optimizer steps.
    fn of(&self, module: M) -> Self {
        Self {
            module: Arc::new(Mutex::new(Some(module))),
            stepping: self.stepping.clone(),
        }
    }

    /// Steps the module of all clones.
    fn step(self, lr: ModuleLearningRate, grads: GradientsParams) -> Self {
        let mut place = lock(&self.module);
        if let Some(module) = place.take() {
            let (module, stepped) = self.stepping.optimizer.try_step(&lr, module, grads);
            *place = Some(module);
            if let Err(error) = stepped {
                fail(&self.stepping.interrupter, &error);
                *lock(&self.stepping.error) = Some(error);
            }
        }
        drop(place);
        self
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unusable(error: impl fmt::Display) -> StepError {
    StepError::Checkpoint {
        message: error.to_string(),
    }
}

/// Stops burn's loop. Its error for what goes wrong in a step is that of its workers.
fn fail(interrupter: &Interrupter, error: &impl fmt::Display) {
    interrupter.fail(TrainingError::Workers(vec![WorkerFailure {
        device_id: 0,
        message: error.to_string(),
    }]));
}

impl<M: LearnerModel, R: Recorded> TrainStep for LearnerModule<M, R> {
    type Input = <M as TrainStep>::Input;
    type Output = <M as TrainStep>::Output;

    fn step(&self, item: Self::Input) -> TrainOutput<Self::Output> {
        self.with(|module| TrainStep::step(module, item))
    }

    fn optimize(
        self,
        _: &mut BurnOptimizer,
        lr: ModuleLearningRate,
        grads: GradientsParams,
    ) -> Self {
        self.step(lr, grads)
    }

    fn optimize_multi(
        self,
        _: &mut BurnOptimizer,
        lr: ModuleLearningRate,
        mut grads: MultiGradientsParams,
    ) -> Self {
        let mut sum = Sum {
            grads: &mut grads,
            sum: GradientsParams::new(),
        };
        self.visit(&mut sum);
        let sum = sum.sum;
        self.step(lr, sum)
    }
}

/// Adds up gradients of several devices.
struct Sum<'a> {
    grads: &'a mut MultiGradientsParams,
    sum: GradientsParams,
}

impl ModuleVisitor for Sum<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some((grads, _)) = self.grads.remove::<D>(param.id) {
            self.sum
                .register(param.id, grads.to_device(&param.device().inner()));
        }
    }
}

impl<M: LearnerModel, R: Recorded> InferenceStep for LearnerModule<M, R> {
    type Input = <M as InferenceStep>::Input;
    type Output = <M as InferenceStep>::Output;

    fn step(&self, item: Self::Input) -> Self::Output {
        self.with(|module| InferenceStep::step(module, item))
    }
}

impl<M: Module, R: Recorded> Module for LearnerModule<M, R> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.with(|module| module.collect_devices(devices))
    }

    fn fork(self, device: &Device) -> Self {
        self.of(self.with(M::clone).fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        self.of(self.with(M::clone).to_device(device))
    }

    fn train(self) -> Self {
        self.of(self.with(M::clone).train())
    }

    fn valid(&self) -> Self {
        self.of(self.with(M::valid))
    }

    fn materialize(self) -> Self {
        self.of(self.with(M::clone).materialize())
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        self.with(|module| module.visit(visitor));
    }

    fn map<P: ModuleMapper>(self, mapper: &mut P) -> Self {
        self.of(self.with(M::clone).map(mapper))
    }
}

impl<M, R: Recorded> Clone for LearnerModule<M, R> {
    fn clone(&self) -> Self {
        Self {
            module: self.module.clone(),
            stepping: self.stepping.clone(),
        }
    }
}

impl<M: fmt::Debug, R: Recorded> fmt::Debug for LearnerModule<M, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LearnerModule")
            .field("module", &*lock(&self.module))
            .field("optimizer", &self.stepping.optimizer)
            .finish_non_exhaustive()
    }
}

impl<M: Module + fmt::Display, R: Recorded> fmt::Display for LearnerModule<M, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with(|module| fmt::Display::fmt(module, f))
    }
}

/// The optimizer's state in burn's checkpoints: the one parameter of an optimizer of burn's, which steps nothing.
struct Records<R: Recorded> {
    optimizer: ModuleOptimizer<R>,
    interrupter: Interrupter,
}

/// The module of that parameter.
#[derive(Module, Debug)]
struct Place {
    state: Param<Tensor<1>>,
}

impl<R: Recorded> Records<R> {
    /// burn's optimizer has something to record of parameters that it has stepped.
    fn into_optimizer(self) -> BurnOptimizer {
        let device = self.optimizer.shared().device().clone().autodiff();
        let place = Place {
            state: Param::from_tensor(Tensor::zeros([1], &device)),
        };
        let mut grads = GradientsParams::new();
        grads.register(place.state.id, Tensor::<1>::zeros([1], &device.inner()));
        let mut optimizer = SgdConfig::new()
            .init()
            .with_group(ParamGroup::all(), self, None);
        optimizer.step(0.0, place, grads);
        optimizer
    }

    fn read(file: Option<TensorData>) -> Result<OptimizerState<R>, StepError> {
        let file = file.ok_or(StepError::NoRecord)?;
        OptimizerState::from_safetensors(file.as_bytes()).map_err(unusable)
    }
}

impl<R: Recorded> DynOptimizer for Records<R> {
    fn step_dyn(
        &self,
        rank: usize,
        _: LearningRate,
        tensor: BridgeTensor,
        _: BridgeTensor,
        _: Option<DynState>,
    ) -> (BridgeTensor, Option<DynState>) {
        (tensor, Some(DynState::create((), rank)))
    }

    fn to_device_dyn(&self, state: DynState, _: &Device) -> DynState {
        state
    }

    fn state_flatten(&self, prefix: &str, _: &DynState, out: &mut StateSink) {
        let file = self.optimizer.engine().record_or_start();
        match file.and_then(|record| record.to_safetensors().map_err(unusable)) {
            Ok(file) => {
                let shape = [file.len()];
                out.push_tensor(prefix, STATE_FILE, TensorData::new(file, shape));
            }
            Err(error) => fail(&self.interrupter, &error),
        }
    }

    fn state_unflatten(
        &self,
        rank: usize,
        prefix: &str,
        source: &mut StateSource,
        _: &Device,
    ) -> Option<DynState> {
        let record = Self::read(source.take_tensor(prefix, STATE_FILE));
        let mut engine = self.optimizer.engine();
        match record {
            Ok(record) => engine.load(record),
            // The next step says so.
            Err(error) => engine.fail(error),
        }
        Some(DynState::create((), rank))
    }
}
