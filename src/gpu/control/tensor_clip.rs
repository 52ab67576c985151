//! Tensors that are clipped one by one, each by its own norm.

use super::{ControlContext, StagedStep, bind_whole, storage_buffer};
use crate::gpu::error::{BuildError, StepError};
use crate::gpu::error_scope::checked;
use crate::gpu::kernels::{BindingKind, Kernels};
use crate::gpu::staged::Staged;
use crate::wgsl::scalars::TENSORS_GROUP;

/// Words before the ranges of partial sums in `inputs` of `shaders/control/tensors.wgsl`.
const HEADER_WORDS: usize = 6;

/// The kernel that makes of each tensor's partial sums the factors of its gradients, and what it binds.
pub(crate) struct TensorClip {
    pipeline: wgpu::ComputePipeline,
    bindings: wgpu::BindGroup,
    inputs: Staged,
    /// The factors of each tensor, for `select.wgsl`.
    pub(crate) factors: wgpu::Buffer,
    workgroups: [u32; 2],
}

impl TensorClip {
    /// For an optimizer of so many tensors.
    pub(crate) fn new(
        kernels: &Kernels,
        context: &ControlContext,
        tensors: usize,
    ) -> Result<Self, BuildError> {
        use BindingKind::{Read, ReadWrite};
        const KINDS: [BindingKind; 6] = [Read, Read, Read, ReadWrite, ReadWrite, ReadWrite];
        let device = kernels.device();
        kernels.check_storage_buffers(KINDS.len())?;
        let source = concat!(
            include_str!("../../../shaders/control/factors.wgsl"),
            include_str!("../../../shaders/control/tensors.wgsl"),
        );
        let kernel = kernels.of_control("clip_tensors", source.to_owned(), &KINDS, 0)?;
        let (pipeline, layout) = kernel;
        let count = tensors.max(1) as u64;
        let (inputs, factors, bindings) = checked(device, || {
            let bytes = 4 * (HEADER_WORDS as u64 + 2 * count);
            let usage = wgpu::BufferUsages::STORAGE;
            let inputs = Staged::new(device, "wgpu_optim.tensor_sums", bytes, usage);
            let factors = storage_buffer(device, "wgpu_optim.tensor_factors", 8 * count);
            let [latest, history] = &context.records;
            let bound = [
                inputs.buffer(),
                &context.partials,
                &context.verdict,
                &factors,
                latest,
                history,
            ];
            let bindings = bind_whole(device, &layout, &bound);
            (inputs, factors, bindings)
        })?;
        let max_workgroups = kernels.device_limits().max_workgroups_per_dimension;
        let rows = (count as u32).div_ceil(max_workgroups);
        Ok(Self {
            pipeline,
            bindings,
            inputs,
            factors,
            workgroups: [(count as u32).div_ceil(rows), rows],
        })
    }

    /// Records what the kernel needs: of each tensor its partial sums, the first and how many, counted from the
    /// optimizer's first. One without any is not clipped.
    pub(crate) fn prepare(
        &mut self,
        device: &wgpu::Device,
        encoder: &mut wgpu::CommandEncoder,
        context: &ControlContext,
        staged: &StagedStep,
        ranges: impl ExactSizeIterator<Item = [u32; 2]>,
    ) -> Result<(), StepError> {
        let max_norm = context.control.tensor_max_norm().unwrap_or(f64::MAX) as f32;
        let header: [u32; HEADER_WORDS] = [
            ranges.len() as u32,
            self.workgroups[0],
            staged.number as u32,
            max_norm.to_bits(),
            staged.partial,
            0,
        ];
        let bytes = &mut self.inputs.bytes;
        bytes.clear();
        bytes.extend_from_slice(bytemuck::bytes_of(&header));
        for range in ranges {
            bytes.extend_from_slice(bytemuck::bytes_of(&range));
        }
        self.inputs.record(device, encoder)
    }

    /// Records the kernel behind the decision.
    pub(crate) fn record(&self, pass: &mut wgpu::ComputePass<'_>) {
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(TENSORS_GROUP, &self.bindings, &[]);
        let [x, y] = self.workgroups;
        pass.dispatch_workgroups(x, y, 1);
    }
}
