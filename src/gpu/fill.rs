//! Elements of the state that are made again of the parameters: until then they are zero, or NaN.

use std::ops::Range;

use super::bound::create_bind_group;
use super::kernels::{BindingKind, Kernels};
use crate::plan::WORKGROUP_SIZE;
use crate::wgsl::KernelError;
use crate::wgsl::scalars::TENSORS_GROUP;

/// The kernel that fills words, whole or by halves.
pub(super) struct Fill {
    kernels: Kernels,
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

impl Fill {
    pub(super) fn new(kernels: &Kernels) -> Result<Self, KernelError> {
        const FILL: [BindingKind; 2] = [BindingKind::ReadWrite, BindingKind::Uniform];
        let source = include_str!("../../shaders/frame/fill.wgsl").to_owned();
        let (pipeline, layout) = kernels.of_control("fill_words", source, &FILL, 0)?;
        Ok(Self {
            kernels: kernels.clone(),
            pipeline,
            layout,
        })
    }

    /// Records that these bytes of a buffer, on halves of words, become the bits of `value`.
    pub(super) fn record(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        buffer: &wgpu::Buffer,
        bytes: Range<u64>,
        value: u32,
    ) {
        let (first, last) = (bytes.start / 4, bytes.end.div_ceil(4));
        let count = last.saturating_sub(first) as u32;
        if bytes.is_empty() {
            return;
        }
        let workgroups = count.div_ceil(WORKGROUP_SIZE);
        let rows = workgroups.div_ceil(self.kernels.device_limits().max_workgroups_per_dimension);
        let columns = workgroups.div_ceil(rows);
        let is_half = |byte: u64| !byte.is_multiple_of(4);
        let words = [
            first as u32,
            count,
            columns * WORKGROUP_SIZE,
            value,
            if is_half(bytes.start) { 0x0000_ffff } else { 0 },
            if is_half(bytes.end) { 0xffff_0000 } else { 0 },
        ];
        let (device, queue) = (self.kernels.device(), self.kernels.queue());
        let uniforms = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("wgpu_optim.fill"),
            size: size_of_val(&words) as u64,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        queue.write_buffer(&uniforms, 0, bytemuck::bytes_of(&words));
        let windows = [buffer, &uniforms].map(|buffer| (buffer.clone(), 0, buffer.size()));
        let bind_group = create_bind_group(device, &(self.layout.clone(), windows.into()));
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(TENSORS_GROUP, &bind_group, &[]);
        pass.dispatch_workgroups(columns, rows, 1);
    }
}
