//! The part of a model that a rank steps, by the CPU twin or on a device.

use std::ops::Range;
use std::sync::Arc;

use wgpu_optim::control::GradNorm;
use wgpu_optim::cpu::SliceError;
use wgpu_optim::rules::Twin;
use wgpu_optim::{
    Arena, CpuOptimizer, GpuOptimizer, Kernels, Optimizer, OptimizerState, ParamGroups, Rule,
    StepControl, StorageType, TensorBinding, TensorSlice, TransferError, readback, wgpu,
};

use crate::error::ShardError;
use crate::memory::Device;

/// An optimizer of a rank's share: a [`CpuOptimizer`] or a [`GpuShare`].
pub trait Share: sealed::Share {}

impl<S: sealed::Share> Share for S {}

pub(crate) mod sealed {
    use super::*;

    /// The functions that both kinds of shares have.
    pub trait Share {
        type Rule: Rule;
        type Optimizer: Optimizer<Rule = Self::Rule>;

        fn optimizer(&self) -> &Self::Optimizer;
        fn optimizer_mut(&mut self) -> &mut Self::Optimizer;
        fn state(&self) -> Result<OptimizerState<Self::Rule>, ShardError>;
        fn load_state(&mut self, state: &OptimizerState<Self::Rule>) -> Result<(), ShardError>;

        /// The norms that a control tells apart. `groups` has the parameter group of each tensor that is not frozen.
        fn grad_norms(
            &self,
            grads: &[Vec<f32>],
            groups: &[Option<&str>],
            control: &StepControl,
        ) -> Result<Vec<GradNorm>, SliceError>;
    }
}

/// A rank's share on the CPU.
pub struct CpuShare<R: Twin>(pub(crate) CpuOptimizer<R>);

impl<R: Twin> sealed::Share for CpuShare<R> {
    type Rule = R;
    type Optimizer = CpuOptimizer<R>;

    fn optimizer(&self) -> &CpuOptimizer<R> {
        &self.0
    }

    fn optimizer_mut(&mut self) -> &mut CpuOptimizer<R> {
        &mut self.0
    }

    fn state(&self) -> Result<OptimizerState<R>, ShardError> {
        Ok(self.0.state())
    }

    fn load_state(&mut self, state: &OptimizerState<R>) -> Result<(), ShardError> {
        Ok(self.0.load_state(state)?)
    }

    fn grad_norms(
        &self,
        grads: &[Vec<f32>],
        _: &[Option<&str>],
        control: &StepControl,
    ) -> Result<Vec<GradNorm>, SliceError> {
        let grads: Vec<_> = grads.iter().map(|grads| TensorSlice::F32(grads)).collect();
        Ok(self.0.grad_norms(&grads, control)?.shared)
    }
}

/// A rank's share on its device: its part of the parameters in an [`Arena`] that has all of them, and its part of the
/// state.
pub struct GpuShare<R: Rule> {
    pub(crate) whole: Device,
    optimizer: GpuOptimizer<R>,
    /// For each buffer of the arena, the gradients of the share.
    grads: Vec<wgpu::Buffer>,
    /// For each tensor, which of them and the byte of its first gradient.
    places: Vec<(usize, u64)>,
}

/// Elements between offsets that any device can bind at, whatever they are stored as.
const BINDING_ELEMS: u64 = 128;

impl<R: Rule> GpuShare<R> {
    /// `elems` are those of each tensor that are the share's.
    pub(crate) fn new(
        kernels: &Kernels,
        groups: &ParamGroups<R>,
        arena: &Arena,
        elems: &[Range<u64>],
    ) -> Result<Self, ShardError> {
        /// A slice of a tensor, in elements from the start of its buffer.
        struct Own<'b> {
            binding: TensorBinding<'b>,
            buffer: usize,
            elems: Range<u64>,
            padding_elems: u64,
        }
        let tensors = arena.tensors().iter().zip(arena.bindings()).zip(elems);
        let own = tensors.map(|((tensor, binding), elems)| {
            let first = binding.params_offset_bytes / binding.params_type.bytes();
            let is_last = elems.end == tensor.numel && !elems.is_empty();
            Own {
                buffer: tensor.buffer,
                elems: first + elems.start..first + elems.end,
                padding_elems: if is_last { tensor.padding_elems } else { 0 },
                binding,
            }
        });
        let own: Vec<_> = own.collect();
        // Gradients lie as parameters do, so that what is side by side there is so here, and one dispatch has both.
        let span_of = |buffer: usize| {
            let of_buffer = own
                .iter()
                .filter(|own| own.buffer == buffer && !own.elems.is_empty());
            let start = of_buffer
                .clone()
                .map(|own| own.elems.start)
                .min()
                .unwrap_or(0);
            let ends = of_buffer.map(|own| own.elems.end + own.padding_elems);
            let start = start / BINDING_ELEMS * BINDING_ELEMS;
            start..ends.max().unwrap_or(start).max(start + BINDING_ELEMS)
        };
        let spans: Vec<_> = (0..arena.params().len()).map(span_of).collect();
        let allocate = |span: &Range<u64>| {
            let zeros = vec![0.0; (span.end - span.start) as usize];
            let (device, queue) = (kernels.device(), kernels.queue());
            readback::storage_buffer(device, queue, "wgpu_optim.shard.grads", &zeros)
        };
        let grads: Vec<_> = spans.iter().map(allocate).collect::<Result<_, _>>()?;
        let place = |own: &Own<'_>| match own.elems.is_empty() {
            true => 0,
            false => (own.elems.start - spans[own.buffer].start) * StorageType::F32.bytes(),
        };
        let bound: Vec<_> = own
            .iter()
            .map(|own| TensorBinding {
                params_offset_bytes: own.elems.start * own.binding.params_type.bytes(),
                grads: &grads[own.buffer],
                grads_type: StorageType::F32,
                grads_offset_bytes: place(own),
                shape: vec![(own.elems.end - own.elems.start) as usize],
                padding_elems: own.padding_elems,
                ..own.binding.clone()
            })
            .collect();
        let optimizer = GpuOptimizer::with_groups(kernels, groups, &bound)?;
        let places = own.iter().map(|own| (own.buffer, place(own))).collect();
        Ok(Self {
            whole: Device {
                kernels: kernels.clone(),
                arena: Arc::new(arena.clone()),
            },
            optimizer,
            grads,
            places,
        })
    }

    pub(crate) fn dispatches(&self) -> usize {
        self.optimizer.dispatches()
    }

    /// Applies one step by these gradients of the share, tensor by tensor.
    pub(crate) fn step(&mut self, grads: &[Vec<f32>]) -> Result<(), ShardError> {
        let Device { kernels, .. } = &self.whole;
        let (device, queue) = (kernels.device(), kernels.queue());
        let regions = self
            .places
            .iter()
            .zip(grads)
            .map(|((buffer, start), grads)| {
                let bytes = size_of_val(&**grads) as u64;
                (&self.grads[*buffer], *start..start + bytes)
            });
        let regions: Vec<_> = regions.collect();
        let bytes: Vec<u8> = grads
            .iter()
            .flat_map(|grads| bytemuck::cast_slice(grads))
            .copied()
            .collect();
        readback::upload_regions(device, queue, &regions, &bytes)?;
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor {
            label: Some("wgpu_optim.shard"),
        });
        self.optimizer.step(&mut encoder)?;
        // A buffer of the arena that somebody has destroyed is noticed here, and would else be a panic.
        let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
        queue.submit([encoder.finish()]);
        match readback::block_on(device, scope.pop()) {
            None => Ok(()),
            Some(error) => Err(TransferError::Device {
                message: error.to_string(),
            }
            .into()),
        }
    }
}

impl<R: Rule> sealed::Share for GpuShare<R> {
    type Rule = R;
    type Optimizer = GpuOptimizer<R>;

    fn optimizer(&self) -> &GpuOptimizer<R> {
        &self.optimizer
    }

    fn optimizer_mut(&mut self) -> &mut GpuOptimizer<R> {
        &mut self.optimizer
    }

    fn state(&self) -> Result<OptimizerState<R>, ShardError> {
        let state = self.optimizer.state();
        Ok(readback::block_on(self.whole.kernels.device(), state)?)
    }

    fn load_state(&mut self, state: &OptimizerState<R>) -> Result<(), ShardError> {
        Ok(self.optimizer.load_state(state)?)
    }

    fn grad_norms(
        &self,
        grads: &[Vec<f32>],
        groups: &[Option<&str>],
        control: &StepControl,
    ) -> Result<Vec<GradNorm>, SliceError> {
        let mut norms = vec![GradNorm::default(); control.norms()];
        for (grads, group) in grads.iter().zip(groups) {
            if let Some(group) = group {
                norms[control.norm_of(group)].add(grads);
            }
        }
        Ok(norms)
    }
}
