//! How the scalars of a step reach the kernels, in encoder order: two steps with different learning rates
//! recorded into one encoder each see their own.

use std::mem::size_of;

use super::error::StepError;
use super::error_scope::checked;
use crate::plan::{Dispatch, Target};
use crate::rules::sgd::Coefficients;

/// The road that the scalars of a step take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScalarPath {
    /// `var<immediate>`, set in the compute pass: costs nothing, needs `Features::IMMEDIATES`.
    Immediates,
    /// A uniform buffer, filled by a copy from a ring of staging buffers that is recorded into the encoder
    /// before the pass.
    Uniforms,
}

impl ScalarPath {
    /// The best road that a device offers.
    #[must_use]
    pub fn of(device: &wgpu::Device) -> Self {
        Self::offered_by(device.features(), &device.limits())
    }

    /// The best road with these features and limits.
    #[must_use]
    pub fn offered_by(features: wgpu::Features, limits: &wgpu::Limits) -> Self {
        if features.contains(wgpu::Features::IMMEDIATES)
            && limits.max_immediate_size >= SgdUniforms::BYTES
        {
            Self::Immediates
        } else {
            Self::Uniforms
        }
    }
}

/// Twin of the WGSL struct of the same name.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct SgdUniforms {
    pub(crate) lambda: f32,
    pub(crate) alpha: f32,
    pub(crate) c: f32,
    pub(crate) a: f32,
    pub(crate) b: f32,
    pub(crate) rho: f32,
    pub(crate) first: u32,
    pub(crate) grads_shift: u32,
    pub(crate) count: u32,
    pub(crate) row: u32,
    pub(crate) head: u32,
    pub(crate) gap: u32,
    pub(crate) tensor_mask: u32,
}

impl SgdUniforms {
    pub(crate) const BYTES: u32 = size_of::<Self>() as u32;

    pub(crate) fn new(k: &Coefficients<f32>, dispatch: &Dispatch) -> Self {
        Self {
            lambda: k.lambda,
            alpha: k.alpha,
            c: k.c,
            a: k.a,
            b: k.b,
            rho: k.rho,
            first: dispatch.first,
            grads_shift: dispatch.grads_shift,
            count: dispatch.count,
            row: dispatch.row(),
            head: dispatch.head,
            gap: dispatch.gap,
            tensor_mask: match dispatch.target {
                Target::Piece(_) => 0,
                Target::Batch { mask, .. } => mask,
            },
        }
    }
}

/// One slot of a uniform buffer per dispatch, refilled at every step by a recorded copy.
///
/// `Queue::write_buffer` would not do: it takes effect before all the commands of the next submission, so two
/// steps recorded into one encoder would both see the scalars of the second.
pub(crate) struct UniformRing {
    staging: wgpu::util::StagingBelt,
    uniforms: wgpu::Buffer,
    bind_group: wgpu::BindGroup,
    pub(crate) slot_bytes: u32,
    /// Reused from step to step.
    scratch: Vec<u8>,
}

impl UniformRing {
    pub(crate) fn new(
        device: &wgpu::Device,
        layout: &wgpu::BindGroupLayout,
        dispatches: usize,
    ) -> Self {
        let slot_bytes = SgdUniforms::BYTES
            .next_multiple_of(device.limits().min_uniform_buffer_offset_alignment);
        let size = u64::from(slot_bytes) * dispatches.max(1) as u64;
        let uniforms = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("wgpu_optim.uniforms"),
            size,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let bind_group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("wgpu_optim.uniforms"),
            layout,
            entries: &[wgpu::BindGroupEntry {
                binding: 0,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: &uniforms,
                    offset: 0,
                    size: wgpu::BufferSize::new(SgdUniforms::BYTES.into()),
                }),
            }],
        });
        Self {
            staging: wgpu::util::StagingBelt::new(device.clone(), size),
            uniforms,
            bind_group,
            slot_bytes,
            scratch: vec![0; size as usize],
        }
    }

    /// Sets the scalars of one dispatch; they take effect with [`record`](Self::record).
    pub(crate) fn set(&mut self, dispatch: usize, scalars: &SgdUniforms) {
        let start = dispatch * self.slot_bytes as usize;
        self.scratch[start..start + size_of::<SgdUniforms>()]
            .copy_from_slice(bytemuck::bytes_of(scalars));
    }

    /// Records the copy that fills the uniform buffer.
    pub(crate) fn record(
        &mut self,
        device: &wgpu::Device,
        encoder: &mut wgpu::CommandEncoder,
    ) -> Result<(), StepError> {
        let Some(size) = wgpu::BufferSize::new(self.scratch.len() as u64) else {
            return Ok(());
        };
        self.stage(device, encoder, size).map_err(|message| {
            // The belt keeps a chunk that could not be allocated, and would stumble over it at the next step.
            self.staging = wgpu::util::StagingBelt::new(device.clone(), size.get());
            StepError::Scalars { message }
        })?;
        self.staging.finish_and_recall_on_submit(encoder);
        Ok(())
    }

    fn stage(
        &mut self,
        device: &wgpu::Device,
        encoder: &mut wgpu::CommandEncoder,
        size: wgpu::BufferSize,
    ) -> Result<(), String> {
        let slice = checked(device, || {
            self.staging.allocate(size, wgpu::BufferSize::MIN)
        })
        .map_err(|error| error.to_string())?;
        slice
            .get_mapped_range_mut()
            .map_err(|error| error.to_string())?
            .copy_from_slice(&self.scratch);
        encoder.copy_buffer_to_buffer(
            slice.buffer(),
            slice.offset(),
            &self.uniforms,
            0,
            size.get(),
        );
        Ok(())
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
