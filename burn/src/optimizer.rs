//! The optimizer that a user has in place of burn's `ModuleOptimizer`.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::grad_clipping::GradientClipping;
use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::Module;
use burn::optim::GradientsParams;
use wgpu_optim::{OptimizerState, ParamGroups, Rule, TransferError};

use crate::control::Control;
use crate::device::SharedDevice;
use crate::engine::{Engine, SharedEngine};
use crate::error::StepError;
use crate::module;
use crate::primitive::Pending;
use crate::stepped::Copied;

/// Steps the parameters of a burn module by a rule of [`wgpu_optim`].
///
/// It is used as burn's own of the same name, and keeps its state on the device. Optimizers are made of configurations
/// by [`Init::init`], or of parameter groups by [`with_groups`](Self::with_groups).
pub struct ModuleOptimizer<R: Rule> {
    shared: SharedDevice,
    engine: SharedEngine<R>,
    clipping: Option<GradientClipping>,
}

/// Makes optimizers of the configurations of [`wgpu_optim`], which are its rules.
pub trait Init: Rule {
    /// An optimizer with this configuration. It gets to know its parameters as they come with gradients, and allocates
    /// their state then.
    fn init(self, shared: &SharedDevice) -> ModuleOptimizer<Self> {
        ModuleOptimizer::with_groups(shared, ParamGroups::new(self))
    }
}

impl<R: Rule> Init for R {}

impl<R: Rule> ModuleOptimizer<R> {
    /// An optimizer with parameter groups, chosen by the paths of parameters.
    #[must_use]
    pub fn with_groups(shared: &SharedDevice, groups: ParamGroups<R>) -> Self {
        Self {
            shared: shared.clone(),
            engine: Arc::new(Mutex::new(Engine::new(&shared.kernels, groups))),
            clipping: None,
        }
    }

    /// Clips each gradient before the step, as burn's optimizers do, by operations of burn's. A [`Control`] does it in the
    /// pass of the step, by the norm of all gradients or of each.
    #[must_use]
    pub fn with_grad_clipping(mut self, clipping: GradientClipping) -> Self {
        self.clipping = Some(clipping);
        self
    }

    /// Puts the steps under a control: gradients are unscaled and clipped, and steps skipped, on the device and in the pass
    /// of the step. Parameters without a gradient are in no norm. Records hold the control's loss scale, too.
    #[must_use]
    pub fn with_control(self, control: &Control) -> Self {
        self.engine().set_control(control);
        self
    }

    /// Updates the parameters that have gradients, by a learning rate or by burn's [`ModuleLearningRate`], which has several.
    /// Learning rates of parameter groups keep their ratios to the default group's: a group's is the one that its
    /// parameters have in `lr`, times that ratio.
    ///
    /// Submits what burn has queued, and then the step. Does not wait for the GPU, but for burn's threads to have
    /// recorded what was queued.
    ///
    /// # Errors
    /// [`StepError`]; then nothing has been stepped. Pass a clone of the module where you mean to go on with it after an
    /// error; its parameters are then copied, because a clone keeps its values.
    pub fn step<M: Module>(
        &mut self,
        lr: impl Into<ModuleLearningRate>,
        module: M,
        grads: GradientsParams,
    ) -> Result<M, StepError> {
        let (module, stepped) = self.try_step(&lr.into(), module, grads);
        stepped.map(|()| module)
    }

    /// [`StepError`] as of [`step`](Self::step); then nothing has been stepped, and the module is as it was.
    pub(crate) fn try_step<M: Module>(
        &self,
        lr: &ModuleLearningRate,
        module: M,
        mut grads: GradientsParams,
    ) -> (M, Result<(), StepError>) {
        // Before the module is taken apart and what is shared is copied.
        let checked = module::check(&module, &grads, &self.shared.device).and_then(|expected| {
            let rates = self.engine().check_rates(lr, &expected)?;
            Ok((expected, rates))
        });
        let (expected, rates) = match checked {
            Ok(checked) => checked,
            Err(error) => return (module, Err(error)),
        };
        let pending = Pending::new(&expected, &self.shared.cube_device);
        let clipping = self.clipping.as_ref();
        let (module, pending) = module::take(module, &mut grads, clipping, pending);
        (module, pending.step(&self.engine, rates))
    }

    /// The state of the optimizer, each parameter's by its path; none before the first step. Waits for the GPU.
    ///
    /// # Errors
    /// [`TransferError`] if the device is lost or out of memory.
    pub fn to_record(&self) -> Result<Option<OptimizerState<R>>, TransferError> {
        self.engine().record()
    }

    /// Goes on from a record at the next step, in place of what it remembers now. That step is an error if the record
    /// does not fit.
    #[must_use]
    pub fn load_record(self, record: OptimizerState<R>) -> Self {
        self.engine().load(record);
        self
    }

    /// How many tensors the last step had to copy first.
    #[must_use]
    pub fn copied(&self) -> Copied {
        self.engine().copied
    }

    /// How many dispatches the last step took.
    #[must_use]
    pub fn dispatches(&self) -> usize {
        self.engine().optimizer().map_or(0, |o| o.dispatches())
    }

    /// Another handle to this optimizer, whose state both share.
    #[cfg(feature = "train")]
    pub(crate) fn handle(&self) -> Self {
        Self {
            shared: self.shared.clone(),
            engine: self.engine.clone(),
            clipping: self.clipping.clone(),
        }
    }

    #[cfg(feature = "train")]
    pub(crate) const fn shared(&self) -> &SharedDevice {
        &self.shared
    }

    pub(crate) fn engine(&self) -> MutexGuard<'_, Engine<R>> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<R: Rule> fmt::Debug for ModuleOptimizer<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModuleOptimizer")
            .field("optimizer", &self.engine().optimizer())
            .finish_non_exhaustive()
    }
}
