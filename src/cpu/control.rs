//! Steps under a control, in memory.

use rayon::prelude::*;

use super::slices::{Grads, Params, Words};
use super::{CpuOptimizer, SliceError, TensorSlice, TensorSliceMut};
use crate::control::{ControlRecord, ControlState, GradNorm, GradNorms, StepControl, Verdict};
use crate::rules::Twin;
use crate::state::Tensor;
use crate::storage::{StorageType, unpack};

/// Gradients that one task adds up. Their number is part of the result, and the number of threads is not.
const TASK_ELEMS: usize = 32 * 1024;

/// Gradients of 16 bits that are unpacked at a time.
const BLOCK_ELEMS: usize = 256;

/// The control of steps in memory: the twin of [`GpuControl`](crate::GpuControl). Norms are taken in `f64`.
///
/// [`StepControl`] has an example. Optimizers whose gradients have one norm are stepped together by what
/// [`CpuOptimizer::step_with`] is made of:
///
/// ```
/// use wgpu_optim::{CpuControl, CpuOptimizer, SgdConfig, StepControl, TensorSlice};
///
/// let config = SgdConfig::builder(1.0).build()?;
/// let (mut a, mut b) = (CpuOptimizer::new(config, [("a", [1])])?, CpuOptimizer::new(config, [("b", [1])])?);
/// let mut control = CpuControl::new(StepControl::builder().max_norm(1.0).build()?);
/// let (mut x, mut y) = ([0.0], [0.0]);
///
/// let grads = [[TensorSlice::F32(&[3.0])], [TensorSlice::F32(&[4.0])]];
/// let norms = [a.grad_norms(&grads[0], control.control())?, b.grad_norms(&grads[1], control.control())?];
/// let verdict = control.decide(&norms);
/// assert_eq!(verdict.record().norm, 5.0);
/// a.step_by(&mut [(&mut x[..]).into()], &grads[0], &norms[0], &verdict)?;
/// b.step_by(&mut [(&mut y[..]).into()], &grads[1], &norms[1], &verdict)?;
/// assert!((x[0] + 0.6).abs() < 1e-6 && (y[0] + 0.8).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct CpuControl {
    control: StepControl,
    state: ControlState,
}

impl CpuControl {
    /// One before its first step.
    #[must_use]
    pub fn new(control: StepControl) -> Self {
        Self {
            state: control.initial_state(),
            control,
        }
    }

    /// The settings.
    #[must_use]
    pub const fn control(&self) -> &StepControl {
        &self.control
    }

    /// Does something else from the next step on. A dynamic loss scale that was there goes on, whatever the new one would
    /// start as.
    pub fn set_control(&mut self, control: StepControl) {
        self.state = control.resumed(&self.state);
        self.control = control;
    }

    /// The loss scale of the next step.
    #[must_use]
    pub const fn loss_scale(&self) -> f32 {
        self.state.scale
    }

    /// The control's memory: the loss scale, how long it has been good, and the number of the last step.
    #[must_use]
    pub const fn state(&self) -> ControlState {
        self.state
    }

    /// Takes over what a control remembered: its numbers of steps, and its loss scale, if that is dynamic here and was there.
    pub fn load_state(&mut self, state: &ControlState) {
        self.state = self.control.resumed(state);
    }

    /// Decides about a step whose gradients have these norms, as [`CpuOptimizer::grad_norms`] gives them for each
    /// optimizer that takes part; the loss scale follows.
    pub fn decide(&mut self, norms: &[GradNorms]) -> Verdict {
        let mut all = vec![GradNorm::default(); self.control.norms()];
        for norms in norms {
            for (all, norm) in all.iter_mut().zip(&norms.shared) {
                *all = all.and(*norm);
            }
        }
        let tensors = norms.iter().flat_map(|norms| &norms.tensors);
        let tensors = tensors.copied().flatten();
        Verdict::of(&self.control, &all, tensors, &mut self.state)
    }
}

impl<R: Twin> CpuOptimizer<R> {
    /// One step under a control: as [`step`](Self::step), unless a gradient is not finite, and with what the control does
    /// to gradients before. A step that is skipped writes nothing and counts only in [`steps`](crate::Optimizer::steps).
    ///
    /// # Errors
    /// As [`step`](Self::step), and [`SliceError::UnknownGroup`] if the control clips a group that the optimizer does not
    /// have; the control is then as it was, too.
    pub fn step_with(
        &mut self,
        params: &mut [&mut [f32]],
        grads: &[&[f32]],
        control: &mut CpuControl,
    ) -> Result<ControlRecord, SliceError> {
        self.step_controlled(params, grads, control)
    }

    /// Makes a step under the control over tensors of any types.
    ///
    /// # Errors
    /// As [`step_with`](Self::step_with).
    pub fn step_mixed_with(
        &mut self,
        params: &mut [TensorSliceMut<'_>],
        grads: &[TensorSlice<'_>],
        control: &mut CpuControl,
    ) -> Result<ControlRecord, SliceError> {
        self.step_controlled(params, grads, control)
    }

    /// The norms that a control tells apart, of the gradients of all tensors that are not frozen. A group that this optimizer does not have may be another one's: see
    /// [`StepControl::groups`].
    ///
    /// # Errors
    /// [`SliceError`] if the number of slices, or the length or type of one, is not the optimizer's.
    pub fn grad_norms(
        &self,
        grads: &[TensorSlice<'_>],
        control: &StepControl,
    ) -> Result<GradNorms, SliceError> {
        self.check_grads(grads)?;
        Ok(self.norms(grads, control))
    }

    /// Applies a step, or leaves it, as a control [has decided](CpuControl::decide) about gradients of which this
    /// optimizer's have these [norms](Self::grad_norms).
    ///
    /// # Errors
    /// As [`step_mixed`](Self::step_mixed).
    pub fn step_by(
        &mut self,
        params: &mut [TensorSliceMut<'_>],
        grads: &[TensorSlice<'_>],
        norms: &GradNorms,
        verdict: &Verdict,
    ) -> Result<(), SliceError> {
        self.check_slices(params, grads)?;
        self.apply(params, grads, norms, verdict);
        Ok(())
    }

    fn step_controlled<P: Params + Send, G: Grads + Sync>(
        &mut self,
        params: &mut [P],
        grads: &[G],
        control: &mut CpuControl,
    ) -> Result<ControlRecord, SliceError> {
        self.check_slices(params, grads)?;
        self.check_groups(control.control())?;
        let norms = self.norms(grads, control.control());
        let norms = [norms];
        let verdict = control.decide(&norms);
        self.apply(params, grads, &norms[0], &verdict);
        Ok(*verdict.record())
    }

    fn check_groups(&self, control: &StepControl) -> Result<(), SliceError> {
        let unknown = control
            .groups()
            .find(|group| self.groups.by_name(group).is_none());
        let error = |group: &str| SliceError::UnknownGroup {
            group: group.to_owned(),
        };
        unknown.map_or(Ok(()), |group| Err(error(group)))
    }

    fn apply<P: Params + Send, G: Grads + Sync>(
        &mut self,
        params: &mut [P],
        grads: &[G],
        norms: &GradNorms,
        verdict: &Verdict,
    ) {
        if verdict.record().is_skipped {
            self.counts.count_skipped_step();
            return;
        }
        let of_tensor = |(index, tensor): (usize, &Tensor)| {
            let group = self.groups.name(tensor.group);
            let norm = norms.tensors.get(index).and_then(Option::as_ref);
            verdict.factors(group, norm)
        };
        let tensors = self.tensors.as_slice().iter().enumerate();
        let factors: Vec<_> = tensors.map(of_tensor).collect();
        self.step_checked(params, grads, &factors);
    }

    fn norms<G: Grads + Sync>(&self, grads: &[G], control: &StepControl) -> GradNorms {
        let tensors = self.tensors.as_slice().iter().zip(grads).enumerate();
        let tasks: Vec<_> = tensors
            .filter(|(_, (tensor, _))| !tensor.frozen)
            .flat_map(|(index, (tensor, grads))| {
                let norm = (control.norm_of(self.groups.name(tensor.group)), index);
                let (words, storage) = (grads.words(), tensor.storage.grads);
                words
                    .chunks(TASK_ELEMS)
                    .map(move |words| (norm, storage, words))
            })
            .collect();
        let sum = |(norm, storage, words): &((usize, usize), StorageType, Words<'_>)| {
            (*norm, norm_of_words(*storage, *words))
        };
        let sums: Vec<_> = match tasks.len() {
            0..4 => tasks.iter().map(sum).collect(),
            _ => tasks.par_iter().map(sum).collect(),
        };
        let of_tensors = match control.tensor_max_norm() {
            Some(_) => self.tensors.as_slice().len(),
            None => 0,
        };
        let mut norms = GradNorms {
            shared: vec![GradNorm::default(); control.norms()],
            tensors: vec![None; of_tensors],
        };
        for ((norm, tensor), sum) in sums {
            norms.shared[norm] = norms.shared[norm].and(sum);
            let group = self.groups.name(self.tensors.as_slice()[tensor].group);
            if control.tensor_max_norm_of(group).is_some() {
                let norm = &mut norms.tensors[tensor];
                *norm = Some(norm.unwrap_or_default().and(sum));
            }
        }
        norms
    }
}

fn norm_of_words(storage: StorageType, words: Words<'_>) -> GradNorm {
    let mut norm = GradNorm::default();
    match words {
        Words::F32(grads) => norm.add(grads),
        Words::Half(halves) => {
            let mut block = [0.0; BLOCK_ELEMS];
            for halves in halves.chunks(BLOCK_ELEMS) {
                let block = &mut block[..halves.len()];
                unpack(storage, halves, block);
                norm.add(block);
            }
        }
    }
    norm
}
