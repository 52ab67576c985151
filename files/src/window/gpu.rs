//! Windows on the GPU: uploaded, stepped and downloaded in one submission.

use std::ops::Range;
use std::sync::mpsc;

use wgpu_optim::rules::Slot;
use wgpu_optim::{AnyRule, Arena, GpuOptimizer, Kernels, Rule as _, wgpu};

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
    /// The slots that the rule keeps.
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
        self.fill_upload(values)?;
        let numel = values.params.len();
        let mut encoder =
            self.kernels
                .device()
                .create_command_encoder(&wgpu::CommandEncoderDescriptor {
                    label: Some("wgpu_optim.window"),
                });
        let (bytes, array_bytes) = (numel as u64 * ELEM_BYTES, self.array_bytes());
        let (params, grads) = (&self.arena.params()[0], &self.arena.grads()[0]);
        encoder.copy_buffer_to_buffer(&self.upload, 0, params, 0, bytes);
        encoder.copy_buffer_to_buffer(&self.upload, array_bytes, grads, 0, bytes);
        for (slot, array) in self.slots.iter().zip(2..) {
            for (start, buffer, offset, len) in self.places(slot, numel) {
                let from = array * array_bytes + start;
                encoder.copy_buffer_to_buffer(&self.upload, from, buffer, offset, len);
            }
        }
        // The smallest number of steps with its scalars.
        self.optimizer.set_applied_steps(WINDOW, phase)?;
        for _ in 0..times {
            self.optimizer.step(&mut encoder)?;
        }
        let params = &self.arena.params()[0];
        encoder.copy_buffer_to_buffer(params, 0, &self.download, 0, bytes);
        for (slot, array) in self.slots.iter().zip(1..) {
            for (start, buffer, offset, len) in self.places(slot, numel) {
                let to = array * array_bytes + start;
                encoder.copy_buffer_to_buffer(buffer, offset, &self.download, to, len);
            }
        }
        let submission = self.kernels.queue().submit([encoder.finish()]);
        self.wait_for(submission)?;
        self.take_download(values)
    }
}

impl OnGpu {
    /// Bytes of the arrays that a window's values lie in, one after the other.
    fn array_bytes(&self) -> u64 {
        self.arena.params()[0].size()
    }

    /// The place of a slot of a window of so many elements: its bytes from the start of the array on, a buffer, the offset in
    /// that, and how many there are.
    fn places(
        &self,
        slot: &Slot,
        numel: usize,
    ) -> impl Iterator<Item = (u64, &wgpu::Buffer, u64, u64)> {
        let slices = self.optimizer.state_slices(WINDOW, slot.name);
        slices.map(move |slice| {
            let (start, len) = within(&slice.elems, numel);
            (start, slice.buffer, slice.offset_bytes, len)
        })
    }

    fn fill_upload(&self, values: &Values) -> Result<(), EngineError> {
        let mut mapped = self.upload.get_mapped_range_mut(..)?;
        let arrays = [&values.params, &values.grads].into_iter();
        let starts = (0..).step_by(self.array_bytes() as usize);
        for (array, start) in arrays.chain(&values.slots).zip(starts) {
            let bytes: &[u8] = bytemuck::cast_slice(array);
            mapped
                .slice(start..start + bytes.len())
                .copy_from_slice(bytes);
        }
        drop(mapped);
        self.upload.unmap();
        Ok(())
    }

    /// Waits for a submission, for the downloaded values, and for the place of the next ones to upload.
    fn wait_for(&self, submission: wgpu::SubmissionIndex) -> Result<(), EngineError> {
        let buffers = [
            (&self.download, wgpu::MapMode::Read),
            (&self.upload, wgpu::MapMode::Write),
        ];
        let mapped = buffers.map(|(buffer, mode)| {
            let (sender, receiver) = mpsc::channel();
            buffer.map_async(mode, .., move |result| {
                // Nobody waits any more after another failure.
                let _ = sender.send(result);
            });
            receiver
        });
        self.kernels.device().poll(wgpu::PollType::Wait {
            submission_index: Some(submission),
            timeout: None,
        })?;
        for mapped in mapped {
            mapped.recv().map_err(|_| EngineError::Lost)??;
        }
        Ok(())
    }

    fn take_download(&self, values: &mut Values) -> Result<(), EngineError> {
        let mapped = self.download.get_mapped_range(..)?;
        let arrays = [&mut values.params].into_iter().chain(&mut values.slots);
        let starts = (0..).step_by(self.array_bytes() as usize);
        for (array, start) in arrays.zip(starts) {
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(array);
            bytes.copy_from_slice(&mapped[start..start + bytes.len()]);
        }
        drop(mapped);
        self.download.unmap();
        Ok(())
    }
}

/// Byte offset and length of those of `elems` that a window of `numel` elements has.
fn within(elems: &Range<u64>, numel: usize) -> (u64, u64) {
    let end = elems.end.min(numel as u64);
    let start = elems.start.min(end);
    (start * ELEM_BYTES, (end - start) * ELEM_BYTES)
}
