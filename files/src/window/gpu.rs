//! Windows on the GPU: uploaded, stepped and downloaded in one submission.

use std::ops::Range;
use std::sync::mpsc;

use wgpu_optim::{AnyRule, Arena, GpuOptimizer, Kernels, Rule as _, Slot, wgpu};

use super::{ELEM_BYTES, Engine, Values};
use crate::error::EngineError;

/// Name of the one tensor that an optimizer of windows has.
const WINDOW: &str = "window";

/// Buffers for one window, used again for the next. While one engine's window is computed, those of others are read
/// and written.
pub struct OnGpu {
    kernels: Kernels,
    arena: Arena,
    optimizer: GpuOptimizer<AnyRule>,
    /// What the rule keeps.
    slots: Vec<Slot>,
    /// Parameters, gradients and slots, as they go to the device.
    upload: wgpu::Buffer,
    /// Parameters and slots, as they come back.
    download: wgpu::Buffer,
}

impl OnGpu {
    /// An engine for windows of at most `max_elems` elements.
    ///
    /// # Errors
    /// [`EngineError`] if the device has no memory for them, or is lost.
    pub fn new(kernels: &Kernels, config: AnyRule, max_elems: u64) -> Result<Self, EngineError> {
        let (device, queue) = (kernels.device(), kernels.queue());
        let max_elems = max_elems.next_multiple_of(4).max(4);
        let layout = [(WINDOW, vec![max_elems as usize])];
        let arena = Arena::new(device, queue, layout)?;
        let slots: Vec<_> = config.slots().kept().copied().collect();
        let optimizer = GpuOptimizer::new(kernels, config, &arena.bindings())?;
        let array_bytes = arena.params()[0].size();
        let staging = |label, arrays, usage, mapped_at_creation| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size: arrays * array_bytes,
                usage,
                mapped_at_creation,
            })
        };
        use wgpu::BufferUsages as Usage;
        Ok(Self {
            upload: staging(
                "wgpu_optim.upload",
                2 + slots.len() as u64,
                Usage::MAP_WRITE | Usage::COPY_SRC,
                true,
            ),
            download: staging(
                "wgpu_optim.download",
                1 + slots.len() as u64,
                Usage::MAP_READ | Usage::COPY_DST,
                false,
            ),
            kernels: kernels.clone(),
            arena,
            optimizer,
            slots,
        })
    }
}

impl Engine for OnGpu {
    fn step(&mut self, values: &mut Values, phase: u64, times: u32) -> Result<(), EngineError> {
        let numel = values.params.len();
        let bytes = (numel * size_of::<f32>()) as u64;
        let array_bytes = self.arena.params()[0].size();
        {
            let mapped = self.upload.get_mapped_range_mut(..);
            let mut mapped = mapped?;
            let arrays = [&values.params, &values.grads]
                .into_iter()
                .chain(&values.slots);
            for (array, start) in arrays.zip((0..).step_by(array_bytes as usize)) {
                let end = start + array.len() * size_of::<f32>();
                mapped
                    .slice(start..end)
                    .copy_from_slice(bytemuck::cast_slice(array));
            }
        }
        self.upload.unmap();

        let device = self.kernels.device();
        let (params, grads) = (&self.arena.params()[0], &self.arena.grads()[0]);
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor {
            label: Some("wgpu_optim.window"),
        });
        encoder.copy_buffer_to_buffer(&self.upload, 0, params, 0, bytes);
        encoder.copy_buffer_to_buffer(&self.upload, array_bytes, grads, 0, bytes);
        for (slot, array) in self.slots.iter().zip(2..) {
            for slice in self.optimizer.state_slices(WINDOW, slot.name) {
                let (start, len) = within(&slice.elems, numel);
                let from = array * array_bytes + start;
                encoder.copy_buffer_to_buffer(
                    &self.upload,
                    from,
                    slice.buffer,
                    slice.offset_bytes,
                    len,
                );
            }
        }
        // The smallest number of steps with its scalars.
        self.optimizer.set_applied_steps(WINDOW, phase)?;
        for _ in 0..times {
            self.optimizer.step(&mut encoder)?;
        }
        encoder.copy_buffer_to_buffer(params, 0, &self.download, 0, bytes);
        for (slot, array) in self.slots.iter().zip(1..) {
            for slice in self.optimizer.state_slices(WINDOW, slot.name) {
                let (start, len) = within(&slice.elems, numel);
                let to = array * array_bytes + start;
                encoder.copy_buffer_to_buffer(
                    slice.buffer,
                    slice.offset_bytes,
                    &self.download,
                    to,
                    len,
                );
            }
        }
        let submission = self.kernels.queue().submit([encoder.finish()]);
        let mapped = self.map();
        device.poll(wgpu::PollType::Wait {
            submission_index: Some(submission),
            timeout: None,
        })?;
        for mapped in mapped {
            mapped.recv().map_err(|_| EngineError::Lost)??;
        }
        {
            let mapped = self.download.get_mapped_range(..)?;
            let arrays = [&mut values.params].into_iter().chain(&mut values.slots);
            for (array, start) in arrays.zip((0..).step_by(array_bytes as usize)) {
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(array);
                bytes.copy_from_slice(&mapped[start..start + bytes.len()]);
            }
        }
        self.download.unmap();
        Ok(())
    }
}

impl OnGpu {
    /// Asks for the downloaded values, and for the place of the next ones to upload.
    fn map(&self) -> [mpsc::Receiver<Result<(), wgpu::BufferAsyncError>>; 2] {
        let buffers = [
            (&self.download, wgpu::MapMode::Read),
            (&self.upload, wgpu::MapMode::Write),
        ];
        buffers.map(|(buffer, mode)| {
            let (sender, receiver) = mpsc::channel();
            buffer.map_async(mode, .., move |result| {
                // Nobody waits any more after another failure.
                let _ = sender.send(result);
            });
            receiver
        })
    }
}

/// Byte offset and length of those of `elems` that a window of `numel` elements has.
fn within(elems: &Range<u64>, numel: usize) -> (u64, u64) {
    let end = elems.end.min(numel as u64);
    let start = elems.start.min(end);
    (start * ELEM_BYTES, (end - start) * ELEM_BYTES)
}
