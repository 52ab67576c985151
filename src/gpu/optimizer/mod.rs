//! The GPU optimizer: tensors, state, `step(encoder)`.

mod checkpoint;
mod classes;
mod controlled;
mod rebind;
mod recorder;
mod transfer;

use std::fmt;

use crate::gpu::binding::TensorBinding;
use crate::gpu::error::{BuildError, StepError};
use crate::gpu::kernels::Kernels;
use crate::optimizer::Optimizer;
use crate::plan::Plan;
use crate::rules::sgd::SgdConfig;
use crate::rules::{Groups, ParamGroups, Rule};
use crate::state::{TensorSpec, Tensors, UnknownTensor};
use crate::wgsl::check_scalars;
use crate::wgsl::signature::check_signature;
use recorder::Prepared;
pub use recorder::Recorder;
pub use transfer::StateSlice;

/// The update of a [`Rule`] over tensors on the GPU, recorded into the caller's encoder.
///
/// Holds the state (a velocity, say) and the applied-step counts; [`Optimizer`] has what is set and read between steps.
/// [`step`](Self::step) records; it never submits, polls,
/// maps, compiles, or allocates GPU memory after the first step.
///
/// A step whose encoder is dropped, or finished and its command buffer dropped, has never happened: parameters, state,
/// counts and random bits go on as if it had not been recorded. Steps that were recorded after it and before it was
/// dropped keep the scalars that they were recorded with: a bias correction may be one step ahead there.
///
/// ```
/// use wgpu_optim::{AdapterRequest, Gpu, GpuOptimizer, Kernels, SgdConfig, TensorBinding, readback};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default())?;
/// // Your own buffers, or:
/// let params = readback::storage_buffer(&device, &queue, "params", &[1.0, 2.0, 3.0])?;
/// let grads = readback::storage_buffer(&device, &queue, "grads", &[1.0, 0.0, -1.0])?;
///
/// let kernels = Kernels::new(&device, &queue)?; // once per device
/// let config = SgdConfig::builder(0.5).momentum(0.9).build()?;
/// let weight = TensorBinding::new("weight", &params, &grads, [3]);
/// let mut optimizer = GpuOptimizer::new(&kernels, config, &[weight])?;
///
/// let mut encoder = device.create_command_encoder(&Default::default());
/// optimizer.step(&mut encoder)?;
/// queue.submit([encoder.finish()]);
///
/// let weight = readback::download_blocking(&device, &queue, &params, 0, 3)?;
/// assert_eq!(weight, [0.5, 2.0, 3.5]);
/// # Ok(())
/// # }
/// ```
pub struct GpuOptimizer<R: Rule = SgdConfig> {
    groups: Groups<R>,
    recorder: Recorder,
}

impl<R: Rule> GpuOptimizer<R> {
    /// Checks every tensor, plans the dispatches, allocates the state as its slots start and builds bind groups and
    /// pipelines. Submits nothing.
    ///
    /// # Errors
    /// [`BuildError`] naming the tensor, what was expected and what was given; nothing is left behind.
    pub fn new(
        kernels: &Kernels,
        config: R,
        tensors: &[TensorBinding<'_>],
    ) -> Result<Self, BuildError> {
        Self::with_groups(kernels, &ParamGroups::new(config), tensors)
    }

    /// Makes an optimizer with parameter groups. Neighbours in memory share a dispatch if they share a group.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_groups(
        kernels: &Kernels,
        groups: &ParamGroups<R>,
        tensors: &[TensorBinding<'_>],
    ) -> Result<Self, BuildError> {
        groups.check_slots()?;
        let specs = tensors.iter().map(TensorBinding::spec);
        let host_tensors = Tensors::new(groups, specs)?;
        Self::bind(kernels, groups, host_tensors, tensors)
    }

    /// An optimizer of tensors, by name and shape, that lie nowhere yet: [`rebind`](Self::rebind) says where they are.
    /// Until then steps do nothing, and a state can be loaded.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn unbound(
        kernels: &Kernels,
        groups: &ParamGroups<R>,
        tensors: impl IntoIterator<Item: Into<TensorSpec>>,
    ) -> Result<Self, BuildError> {
        groups.check_slots()?;
        Self::bind(kernels, groups, Tensors::new(groups, tensors)?, &[])
    }

    /// An optimizer of some tensors, of which these have a place, whose names are known.
    fn bind(
        kernels: &Kernels,
        groups: &ParamGroups<R>,
        host_tensors: Tensors,
        tensors: &[TensorBinding<'_>],
    ) -> Result<Self, BuildError> {
        let groups = groups.groups();
        groups.configs().try_for_each(check_scalars)?;
        groups.configs().try_for_each(check_signature)?;
        Ok(Self {
            recorder: Recorder::new(kernels, &groups, host_tensors, tensors)?,
            groups,
        })
    }

    /// The plan of the tensors, by which they are cut into pieces.
    #[must_use]
    pub const fn plan(&self) -> &Plan {
        &self.recorder.plan
    }

    /// The number of dispatches that the last recorded step took.
    #[must_use]
    pub fn dispatches(&self) -> usize {
        self.recorder.recorded
    }

    /// Records one step into `encoder`: one compute pass (and, where the device has no immediates, one copy of
    /// the scalars before it). The caller submits.
    ///
    /// Steps recorded one after the other apply one after the other, each with the learning rate that was set
    /// when it was recorded, in one encoder or in several submitted in that order.
    ///
    /// # Errors
    /// [`StepError::Scalars`] on a device that is lost or out of memory, where it has no immediates or many tensors are
    /// frozen; then nothing has been recorded. Otherwise a step cannot fail.
    pub fn step(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<(), StepError> {
        self.recorder.step(&self.groups, encoder)
    }

    /// Records what the next [`record`](Self::record) needs before its pass begins: on a device without immediates
    /// the copy of the scalars, and where many tensors are frozen that of a table; else nothing.
    ///
    /// # Errors
    /// [`StepError::Scalars`] as [`step`](Self::step); then nothing has been recorded.
    pub fn prepare(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<(), StepError> {
        self.recorder.prepare(&self.groups, encoder)
    }

    /// Records one step into a compute pass that the caller has open. Leaves its own pipeline and bind groups set.
    ///
    /// With immediates any number of steps may go into one pass, and [`prepare`](Self::prepare) is not needed.
    /// Without, each step needs a `prepare` before the pass begins, after the last change of learning rate,
    /// momentum or frozen tensors.
    ///
    /// # Errors
    /// [`StepError::NotPrepared`] on a device without immediates if that `prepare` is missing, its encoder was dropped, or
    /// a step under a control has been prepared since; then nothing has been recorded.
    pub fn record(&mut self, pass: &mut wgpu::ComputePass<'_>) -> Result<(), StepError> {
        self.recorder.record(&self.groups, pass)
    }
}

impl<R: Rule> Optimizer for GpuOptimizer<R> {
    type Rule = R;

    fn groups(&self) -> &Groups<R> {
        &self.groups
    }

    fn groups_mut(&mut self) -> &mut Groups<R> {
        self.recorder.prepared = Prepared::Nothing;
        &mut self.groups
    }

    fn steps(&self) -> u64 {
        self.recorder.ledger.steps()
    }

    /// Takes effect as [`set_applied_steps`](GpuOptimizer::set_applied_steps) does: steps that are submitted later count on.
    fn set_steps(&mut self, steps: u64) {
        let unchanged = vec![None; self.recorder.tensors.as_slice().len()];
        self.set_counts(&unchanged, Some(steps));
    }

    fn names(&self) -> Vec<&str> {
        self.recorder.tensors.names()
    }

    fn applied_steps(&self, tensor: &str) -> Option<u64> {
        let recorder = &self.recorder;
        let index = recorder.tensors.index_of(tensor)?;
        let report = recorder.device_counts.report_of(index);
        Some(recorder.ledger.known_by(index, report))
    }

    /// Freezes a tensor, or lets it go on, from the next recorded step on.
    ///
    /// Where neighbours in memory share a dispatch, as in an [`Arena`](crate::Arena), frozen ones among them do not split it
    /// into more than a few: the first call compiles, once per device, a kernel that looks up which elements take part, and
    /// allocates its table. Steps that are recorded into a pass without [`prepare`](Self::prepare) do split it.
    fn set_frozen(&mut self, tensor: &str, frozen: bool) -> Result<(), UnknownTensor> {
        if self.recorder.tensors.set_frozen(tensor, frozen)? {
            self.recorder.build_chunks(&self.groups);
            self.recorder.set_stale();
        }
        Ok(())
    }
}

impl<R: Rule> fmt::Debug for GpuOptimizer<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GpuOptimizer")
            .field("groups", &self.groups)
            .field("tensors", &self.recorder.tensors.as_slice().len())
            .field("pieces", &self.recorder.plan.pieces.len())
            .finish_non_exhaustive()
    }
}
