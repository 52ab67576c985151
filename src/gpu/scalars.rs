//! The scalars of a step on their way to the kernels, in encoder order: two steps with different learning rates recorded
//! into one encoder each see their own.

use super::error::StepError;
use super::staged::Staged;
use crate::wgsl::ScalarPath;
use crate::wgsl::scalars::Uniforms;

impl ScalarPath {
    /// The best path that a device offers.
    #[must_use]
    pub fn of(device: &wgpu::Device) -> Self {
        Self::offered_by(device.features(), &device.limits())
    }

    /// The best path with these features and limits.
    #[must_use]
    pub fn offered_by(features: wgpu::Features, limits: &wgpu::Limits) -> Self {
        if features.contains(wgpu::Features::IMMEDIATES)
            && limits.max_immediate_size >= Uniforms::MAX_BYTES
        {
            Self::Immediates
        } else {
            Self::Uniforms
        }
    }
}

/// One slot of a uniform buffer per dispatch, refilled at every step by a recorded copy.
pub(crate) struct UniformRing {
    staged: Staged,
    bind_group: wgpu::BindGroup,
    slot_bytes: u32,
}

impl UniformRing {
    pub(crate) fn new(
        device: &wgpu::Device,
        layout: &wgpu::BindGroupLayout,
        dispatches: usize,
    ) -> Self {
        let slot_bytes = Uniforms::MAX_BYTES
            .next_multiple_of(device.limits().min_uniform_buffer_offset_alignment);
        let size = u64::from(slot_bytes) * dispatches.max(1) as u64;
        let usage = wgpu::BufferUsages::UNIFORM;
        let mut staged = Staged::new(device, "wgpu_optim.uniforms", size, usage);
        staged.bytes = vec![0; size as usize];
        let bind_group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("wgpu_optim.uniforms"),
            layout,
            entries: &[wgpu::BindGroupEntry {
                binding: 0,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: staged.buffer(),
                    offset: 0,
                    size: wgpu::BufferSize::new(Uniforms::MAX_BYTES.into()),
                }),
            }],
        });
        Self {
            staged,
            bind_group,
            slot_bytes,
        }
    }

    /// Sets the scalars of one dispatch; they take effect with [`record`](Self::record).
    pub(crate) fn set(&mut self, dispatch: usize, scalars: &[u8]) {
        let start = dispatch * self.slot_bytes as usize;
        self.staged.bytes[start..start + scalars.len()].copy_from_slice(scalars);
    }

    /// Records the copy that fills the uniform buffer.
    pub(crate) fn record(
        &mut self,
        device: &wgpu::Device,
        encoder: &mut wgpu::CommandEncoder,
    ) -> Result<(), StepError> {
        self.staged.record(device, encoder)
    }

    /// Binds the slot of one dispatch.
    pub(crate) fn bind(&self, pass: &mut wgpu::ComputePass<'_>, group: u32, dispatch: usize) {
        pass.set_bind_group(
            group,
            &self.bind_group,
            &[dispatch as u32 * self.slot_bytes],
        );
    }
}
