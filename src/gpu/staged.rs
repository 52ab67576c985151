//! A buffer that the host refills in encoder order.

use super::error::StepError;
use super::error_scope::checked;

/// A buffer, and a ring of staging buffers from which recorded copies fill it.
///
/// `Queue::write_buffer` would not do: it takes effect before all the commands of the next submission, so two
/// steps recorded into one encoder would both see what the second one wrote.
pub(crate) struct Staged {
    staging: wgpu::util::StagingBelt,
    buffer: wgpu::Buffer,
    /// The bytes that the next copy writes, from the start; reused from step to step.
    pub(crate) bytes: Vec<u8>,
}

impl Staged {
    /// Makes a buffer of so many bytes, with `COPY_DST` beside these usages.
    pub(crate) fn new(
        device: &wgpu::Device,
        label: &str,
        size: u64,
        usage: wgpu::BufferUsages,
    ) -> Self {
        let buffer = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size,
            usage: usage | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        Self {
            staging: wgpu::util::StagingBelt::new(device.clone(), size),
            buffer,
            bytes: Vec::new(),
        }
    }

    pub(crate) fn buffer(&self) -> &wgpu::Buffer {
        &self.buffer
    }

    /// Records the copy. There are no more bytes than the buffer has.
    pub(crate) fn record(
        &mut self,
        device: &wgpu::Device,
        encoder: &mut wgpu::CommandEncoder,
    ) -> Result<(), StepError> {
        let Some(size) = wgpu::BufferSize::new(self.bytes.len() as u64) else {
            return Ok(());
        };
        self.stage(device, encoder, size).map_err(|message| {
            // The belt keeps a chunk that could not be allocated, and would stumble over it at the next step.
            self.staging = wgpu::util::StagingBelt::new(device.clone(), self.buffer.size());
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
            .copy_from_slice(&self.bytes);
        encoder.copy_buffer_to_buffer(slice.buffer(), slice.offset(), &self.buffer, 0, size.get());
        Ok(())
    }
}
