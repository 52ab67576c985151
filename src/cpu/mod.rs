//! The optimizer on the CPU: [`CpuOptimizer`] steps slices on all cores, and [`CpuControl`] decides about its steps.

mod control;
mod error;
mod queue;
mod slices;
mod stored;
mod values;

use crate::control::Factors;
use crate::optimizer::Optimizer;
use crate::rules::sgd::SgdConfig;
use crate::rules::{Groups, ParamGroups, Twin};
use crate::state::{
    Checkpoint, CheckpointMismatch, Counts, OptimizerState, Section, StateError, Tensor,
    TensorSpec, Tensors, UnknownTensor,
};
use crate::storage::StorageType;
pub use control::CpuControl;
pub use error::{CheckpointError, SliceError, TensorError};
use queue::Batch;
use slices::{Grads, Params};
pub use slices::{TensorSlice, TensorSliceMut, TensorValues};
use values::Values;

/// The update of a [`Twin`] over slices in memory, on the calling thread and, where there is enough to do, on those of
/// rayon's current pool. [`Optimizer`] has what is set and read between steps.
///
/// Bit for bit the same results as the rule's twin on one thread ([`reference`](mod@crate::rules::sgd::reference) for
/// the momentum family): each element is computed by the same statements in the same order, whatever the number of
/// threads.
///
/// ```
/// use wgpu_optim::{CpuOptimizer, SgdConfig};
///
/// let config = SgdConfig::builder(0.5).momentum(0.9).build()?;
/// let mut optimizer = CpuOptimizer::new(config, [("weight", [3])])?;
/// let mut weight = [1.0, 2.0, 3.0];
/// optimizer.step(&mut [&mut weight], &[&[1.0, 0.0, -1.0]])?;
/// assert_eq!(weight, [0.5, 2.0, 3.5]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct CpuOptimizer<R: Twin = SgdConfig> {
    groups: Groups<R>,
    tensors: Tensors,
    counts: Counts,
    /// The sections of each tensor.
    state: Vec<Vec<Values>>,
}

impl<R: Twin> CpuOptimizer<R> {
    /// An optimizer for tensors of these names and shapes, with their slots as they start.
    ///
    /// # Errors
    /// [`TensorError`] if two tensors have the same name, or one is too large for memory.
    pub fn new(
        config: R,
        tensors: impl IntoIterator<Item: Into<TensorSpec>>,
    ) -> Result<Self, TensorError> {
        Self::with_groups(&ParamGroups::new(config), tensors)
    }

    /// Makes an optimizer with parameter groups.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_groups(
        groups: &ParamGroups<R>,
        tensors: impl IntoIterator<Item: Into<TensorSpec>>,
    ) -> Result<Self, TensorError> {
        groups.check_slots()?;
        let tensors = Tensors::new(groups, tensors)?;
        let state_of = |tensor: &Tensor| {
            let numel = numel_in_memory(tensor)?;
            let slots = groups.config(tensor.group).slots();
            let values = |(index, section): (usize, Section)| {
                Values::new(numel, section.codec, section.start.value(), index)
            };
            let sections = Section::all(&slots, &tensor.storage).enumerate();
            let state = sections.map(values).collect::<Result<Vec<_>, _>>();
            state.map_err(|_| TensorError::OutOfMemory {
                tensor: tensor.name.clone(),
                numel: tensor.numel,
            })
        };
        let state = tensors.as_slice().iter().map(state_of);
        Ok(Self {
            state: state.collect::<Result<_, _>>()?,
            groups: groups.groups(),
            counts: Counts::new(tensors.as_slice().len()),
            tensors,
        })
    }

    /// Applies one step: `params[i]` moves by `grads[i]`, in the order in which the tensors were given.
    ///
    /// # Errors
    /// [`SliceError`] if the number of slices or the length of one is not the optimizer's, or a tensor is not of `f32`;
    /// then nothing has been written.
    pub fn step(&mut self, params: &mut [&mut [f32]], grads: &[&[f32]]) -> Result<(), SliceError> {
        self.step_slices(params, grads)
    }

    /// Makes a step over tensors of any types.
    ///
    /// ```
    /// use wgpu_optim::half::bf16;
    /// use wgpu_optim::{CpuOptimizer, SgdConfig, StorageType, TensorSlice, TensorSliceMut, TensorSpec};
    ///
    /// let config = SgdConfig::builder(1e-3).build()?;
    /// let weight = TensorSpec::new("weight", [2]).params_type(StorageType::Bf16);
    /// let mut optimizer = CpuOptimizer::new(config, [weight])?;
    /// let mut weight = [bf16::ONE; 2];
    /// for _ in 0..4 {
    ///     // A tenth of what a bf16 can tell from 1: it adds up in the masters.
    ///     optimizer.step_mixed(&mut [TensorSliceMut::Bf16(&mut weight)], &[TensorSlice::F32(&[0.0, -0.8])])?;
    /// }
    /// assert_eq!(weight.map(f32::from), [1.0, 1.0]);
    /// optimizer.step_mixed(&mut [TensorSliceMut::Bf16(&mut weight)], &[TensorSlice::F32(&[0.0, -0.8])])?;
    /// assert_eq!(weight.map(f32::from), [1.0, 1.0078125]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`SliceError`] if the number of slices, or the length or type of one, is not the optimizer's; then nothing has
    /// been written.
    pub fn step_mixed(
        &mut self,
        params: &mut [TensorSliceMut<'_>],
        grads: &[TensorSlice<'_>],
    ) -> Result<(), SliceError> {
        self.step_slices(params, grads)
    }

    fn step_slices<P: Params + Send, G: Grads + Sync>(
        &mut self,
        params: &mut [P],
        grads: &[G],
    ) -> Result<(), SliceError> {
        self.check_slices(params, grads)?;
        self.step_checked(params, grads, &[]);
        Ok(())
    }

    /// One step; the gradients of each tensor go through its factors, if there are any.
    fn step_checked<P: Params + Send, G: Grads + Sync>(
        &mut self,
        params: &mut [P],
        grads: &[G],
        factors: &[Factors],
    ) {
        queue::step(
            &self.groups,
            Batch {
                tensors: self.tensors.as_slice(),
                applied: &self.counts.applied,
                factors,
                decided: &[],
                params,
                state: &mut self.state,
                grads,
            },
        );
        self.counts.count_step(&self.tensors);
    }

    fn check_slices<P: Params, G: Grads>(
        &self,
        params: &[P],
        grads: &[G],
    ) -> Result<(), SliceError> {
        let params_are = params.iter().map(|slice| (slice.storage(), slice.len()));
        self.check("params", params_are, |tensor| tensor.storage.params)?;
        self.check_grads(grads)
    }

    fn check_grads<G: Grads>(&self, grads: &[G]) -> Result<(), SliceError> {
        let grads_are = grads
            .iter()
            .map(|slice| (slice.storage(), slice.words().len()));
        self.check("grads", grads_are, |tensor| tensor.storage.grads)
    }

    /// Says that somebody else has written a tensor's parameters: at the next step what is remembered of them is made of
    /// them again. Masters and rests of 16-bit parameters are then what the parameters are, and slots that start as the
    /// parameters (the `z` of schedule-free rules) start again. Momenta, averages of gradients and step counts stay as they
    /// are; see [`GpuOptimizer::params_changed`](crate::GpuOptimizer::params_changed).
    ///
    /// # Errors
    /// [`UnknownTensor`] if no tensor has this name.
    pub fn params_changed(&mut self, tensor: &str) -> Result<(), UnknownTensor> {
        let index = self.tensors.index_of(tensor).ok_or_else(|| UnknownTensor {
            tensor: tensor.to_owned(),
        })?;
        let tensor = &self.tensors.as_slice()[index];
        let slots = self.groups.config(tensor.group).slots();
        let sections = Section::all(&slots, &tensor.storage);
        for (section, values) in sections.zip(&mut self.state[index]) {
            if section.is_of_params() {
                values.fill(section.start.value());
            }
        }
        Ok(())
    }

    /// A copy of what the optimizer remembers.
    #[must_use]
    pub fn state(&self) -> OptimizerState<R> {
        let values_of = |tensor: usize, section: usize| self.state[tensor][section].get();
        self.tensors.state(&self.groups, &self.counts, values_of)
    }

    /// Takes over a saved state of the same tensors. A slot that it comes without starts fresh.
    ///
    /// # Errors
    /// [`StateError`] if the state belongs to another form or to other tensors, by name or shape; then nothing has
    /// changed.
    pub fn load_state(&mut self, state: &OptimizerState<R>) -> Result<(), StateError> {
        let matched = self.tensors.match_state(state, &self.groups)?;
        let tensors = self.tensors.as_slice().iter().zip(&mut self.state);
        for ((tensor, state), entry) in tensors.zip(&matched) {
            let slots = self.groups.config(tensor.group).slots();
            for (section, values) in Section::all(&slots, &tensor.storage).zip(state) {
                match entry.section(&section) {
                    Some(saved) => values.set(&saved),
                    None => values.fill(section.start.value()),
                }
            }
        }
        self.counts = self.tensors.counts_of(state.steps, &matched);
        Ok(())
    }

    /// Takes over a state of fewer tensors, or of tensors with fewer rows (elements of the first dimension), of which these
    /// are the first: an optimizer whose tensors have grown goes on. What there is keeps its momenta and step counts; new rows
    /// start as their slots do, and masters and the `z` of schedule-free rules as the parameters. New tensors start fresh. A new
    /// row has the step count of its tensor.
    ///
    /// # Errors
    /// As [`load_state`](Self::load_state): [`StateError`] if a tensor has gone, has fewer rows, or rows of another shape.
    pub fn load_grown_state(&mut self, state: &OptimizerState<R>) -> Result<(), StateError> {
        let grown = self.tensors.grown(state, &self.groups);
        self.load_state(&grown)
    }

    /// A copy of the parameters, of what the optimizer remembers of them, and of what the control of its steps does; see
    /// [`Checkpoint`].
    ///
    /// # Errors
    /// [`SliceError`] if the number of slices, or the length or type of one, is not the optimizer's.
    pub fn checkpoint(
        &self,
        params: &[TensorSlice<'_>],
        control: Option<&CpuControl>,
    ) -> Result<Checkpoint<R>, SliceError> {
        let params_are = params
            .iter()
            .map(|slice| (slice.storage_type(), slice.len()));
        self.check("params", params_are, |tensor| tensor.storage.params)?;
        Ok(Checkpoint {
            params: self.tensors.params(params.iter().map(TensorSlice::stored)),
            state: OptimizerState {
                control: control.map(CpuControl::state),
                ..self.state()
            },
        })
    }

    /// Takes over a checkpoint of the same tensors: parameters, state, step counts, and the memory of the control, which is
    /// given if the checkpoint was made with one.
    ///
    /// # Errors
    /// [`CheckpointError`] if slices are not the optimizer's, or the checkpoint is of other tensors, by name, shape or type, of
    /// another rule, or made with a control where none is given or the other way round; then nothing has changed.
    pub fn load_checkpoint(
        &mut self,
        checkpoint: &Checkpoint<R>,
        params: &mut [TensorSliceMut<'_>],
        control: Option<&mut CpuControl>,
    ) -> Result<(), CheckpointError> {
        let params_are = params
            .iter()
            .map(|slice| (slice.storage_type(), slice.len()));
        self.check("params", params_are, |tensor| tensor.storage.params)?;
        let saved = checkpoint.params_of(&self.tensors, control.is_some())?;
        self.load_state(&checkpoint.state)
            .map_err(CheckpointMismatch::from)?;
        for (params, saved) in params.iter_mut().zip(saved) {
            params.bytes_mut().copy_from_slice(saved.values.bytes());
        }
        if let Some((control, state)) = control.zip(checkpoint.state.control) {
            control.load_state(&state);
        }
        Ok(())
    }

    fn check(
        &self,
        role: &'static str,
        slices: impl ExactSizeIterator<Item = (StorageType, usize)>,
        expected: impl Fn(&Tensor) -> StorageType,
    ) -> Result<(), SliceError> {
        let tensors = self.tensors.as_slice().iter();
        let expected = tensors.map(|tensor| (&*tensor.name, expected(tensor), tensor.numel));
        SliceError::check(role, expected, slices)
    }
}

impl<R: Twin> Optimizer for CpuOptimizer<R> {
    type Rule = R;

    fn groups(&self) -> &Groups<R> {
        &self.groups
    }

    fn groups_mut(&mut self) -> &mut Groups<R> {
        &mut self.groups
    }

    fn steps(&self) -> u64 {
        self.counts.steps
    }

    fn set_steps(&mut self, steps: u64) {
        self.counts.steps = steps;
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.names()
    }

    fn applied_steps(&self, tensor: &str) -> Option<u64> {
        let index = self.tensors.index_of(tensor)?;
        Some(self.counts.applied[index])
    }

    fn set_frozen(&mut self, tensor: &str, frozen: bool) -> Result<(), UnknownTensor> {
        self.tensors.set_frozen(tensor, frozen).map(drop)
    }
}

/// Elements of a tensor whose parameters a slice can hold.
fn numel_in_memory(tensor: &Tensor) -> Result<usize, TensorError> {
    let most = isize::MAX as u64 / tensor.storage.params.bytes();
    let numel = usize::try_from(tensor.numel).ok();
    let numel = numel.filter(|_| tensor.numel <= most);
    numel.ok_or_else(|| TensorError::TooLarge {
        tensor: tensor.name.clone(),
        shape: tensor.shape.clone(),
    })
}
