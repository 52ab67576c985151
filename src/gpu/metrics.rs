//! Values of a step that lie on the device, such as its loss, on their way to the host without anybody waiting.

use std::collections::VecDeque;
use std::fmt;

use super::error::TransferError;
use super::error_scope::checked;
use super::mapped::MappedOnSubmit;
use super::readback::{self, refused};
use super::submission::Submissions;
use crate::plan::ELEM_BYTES;

/// Steps whose values share a staging buffer, if one encoder has several.
const STEPS: usize = 8;

/// Staging buffers that are made at once, so that later steps allocate nothing, and at most.
const SLOTS: usize = 3;
const MAX_SLOTS: usize = 1024;

/// Values that are kept until somebody reads them.
const MAX_UNREAD: usize = 4096;

/// A few values of each step that lie on the device (a loss, an accuracy, a count) on their way to the host: copied in the
/// step's own encoder, mapped by its submission, and read whenever it suits, as
/// [`GpuControl::read`](crate::GpuControl::read) has the records of a control. Nothing is submitted, polled or waited for, and
/// nothing is allocated but one small buffer whenever more encoders are on their way than ever before.
///
/// ```
/// use wgpu_optim::{AdapterRequest, Gpu, Metrics, readback};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default())?;
/// # let losses = readback::storage_buffer(&device, &queue, "losses", &[0.5, 0.25])?;
/// let mut metrics = Metrics::new(&device, &queue, 1)?;
///
/// let mut encoder = device.create_command_encoder(&Default::default());
/// // .. the forward pass, which leaves its loss at byte 4 of a buffer with the usage `COPY_SRC`, and a step. Then:
/// metrics.record(&mut encoder, 17, &[(&losses, 4)])?;
/// queue.submit([encoder.finish()]);
///
/// // Whenever it suits you, and for whatever has arrived by then:
/// # device.poll(wgpu_optim::wgpu::PollType::wait_indefinitely())?;
/// for metric in metrics.read() {
///     assert_eq!((metric.step, metric.values), (17, vec![0.25]));
/// }
/// # Ok(())
/// # }
/// ```
///
/// Submission is the truth: where an encoder is dropped, finished and dropped, or refused when it is submitted, its steps have
/// no values.
pub struct Metrics {
    device: wgpu::Device,
    values: usize,
    /// Two words, 0 and 1.
    stamps: wgpu::Buffer,
    slots: Vec<Slot>,
    submissions: Submissions,
    /// How many steps have been recorded.
    recorded: u64,
    arrived: VecDeque<StepMetrics>,
}

/// The values of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepMetrics {
    /// The number that the step was recorded with.
    pub step: u64,
    /// The values, in the order in which they were recorded. Whoever copies a `u32` has it by [`f32::to_bits`].
    pub values: Vec<f32>,
}

/// A staging buffer: a stamp, and the values of some steps of one encoder.
struct Slot {
    mapped: MappedOnSubmit,
    /// The last stamp that is known to have been copied: a submission that was refused leaves it as it is.
    stamp: u32,
    steps: Vec<u64>,
    /// The number of the first of them, as they were recorded.
    first: u64,
}

impl Metrics {
    /// Makes what so many values a step need. Submits nothing.
    ///
    /// # Errors
    /// [`TransferError`] if the device is lost or out of memory.
    pub fn new(
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        values: usize,
    ) -> Result<Self, TransferError> {
        let stamps = || {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("wgpu_optim.metrics"),
                size: 2 * ELEM_BYTES,
                usage: wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        };
        let stamps = checked(device, stamps).map_err(|error| refused(device, &error))?;
        readback::upload_bytes(device, queue, &stamps, 0, bytemuck::bytes_of(&[0_u32, 1]))?;
        Ok(Self {
            device: device.clone(),
            values,
            stamps,
            slots: Vec::new(),
            submissions: Submissions::default(),
            recorded: 0,
            arrived: VecDeque::new(),
        })
    }

    /// Records copies of the values that four bytes of these buffers have at this place in `encoder`: of each its buffer,
    /// which has the usage `COPY_SRC`, and a byte offset. `step` is any number that they are to come back with, such as
    /// [`Optimizer::steps`](crate::Optimizer::steps).
    ///
    /// Where the values of 1024 encoders are on their way these are left out.
    ///
    /// # Errors
    /// [`TransferError`] if there are more or fewer values than [`new`](Self::new) was told, a buffer lacks the usage or does not
    /// reach that far, an offset is not a multiple of 4, or the device is out of memory; then nothing has been recorded.
    pub fn record(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        step: u64,
        values: &[(&wgpu::Buffer, u64)],
    ) -> Result<(), TransferError> {
        if values.len() != self.values {
            return Err(TransferError::Length {
                expected: ELEM_BYTES * self.values as u64,
                actual: ELEM_BYTES * values.len() as u64,
            });
        }
        for (buffer, offset_bytes) in values {
            readback::check(buffer, *offset_bytes, 1, wgpu::BufferUsages::COPY_SRC)?;
        }
        self.collect();
        let submission = self.submissions.of_encoder(encoder);
        let has_room =
            |slot: &Slot| slot.mapped.is_sent_with(&submission) && slot.steps.len() < STEPS;
        let shared = self.slots.iter().position(has_room);
        let index = match shared {
            Some(shared) => shared,
            None => match self.free_slot()? {
                Some(free) => free,
                None => return Ok(()),
            },
        };
        let slot = &mut self.slots[index];
        if shared.is_none() {
            slot.mapped.free();
            slot.steps.clear();
            slot.first = self.recorded;
            let next = ELEM_BYTES * u64::from(1 - slot.stamp);
            encoder.copy_buffer_to_buffer(&self.stamps, next, slot.mapped.buffer(), 0, ELEM_BYTES);
            slot.mapped.send(encoder, &submission);
        }
        let mut to = ELEM_BYTES * (1 + slot.steps.len() * self.values) as u64;
        for (buffer, from) in values {
            encoder.copy_buffer_to_buffer(buffer, *from, slot.mapped.buffer(), to, ELEM_BYTES);
            to += ELEM_BYTES;
        }
        slot.steps.push(step);
        self.recorded += 1;
        Ok(())
    }

    /// One that is not on its way; all that has arrived has been taken in.
    fn free_slot(&mut self) -> Result<Option<usize>, TransferError> {
        let is_free = |slot: &Slot| !slot.mapped.is_on_its_way() && !slot.mapped.is_mapped();
        let mut free = self.slots.iter().position(is_free);
        let size = ELEM_BYTES * (1 + STEPS * self.values) as u64;
        while self.slots.len() < SLOTS || (free.is_none() && self.slots.len() < MAX_SLOTS) {
            let mapped = MappedOnSubmit::new(&self.device, "wgpu_optim.metrics", size);
            self.slots.push(Slot {
                mapped: mapped.map_err(|error| refused(&self.device, &error))?,
                stamp: 0,
                steps: Vec::new(),
                first: 0,
            });
            free = free.or(Some(self.slots.len() - 1));
        }
        Ok(free)
    }

    /// Takes in what has arrived since the last call.
    fn collect(&mut self) {
        let arrived = self
            .slots
            .iter_mut()
            .filter(|slot| slot.mapped.has_arrived());
        let mut arrived: Vec<_> = arrived.collect();
        arrived.sort_unstable_by_key(|slot| slot.first);
        for slot in arrived {
            let Some((stamp, words)) = slot.mapped.take_words().and_then(|words| {
                let (stamp, words) = words.split_first()?;
                Some((*stamp, words.to_vec()))
            }) else {
                continue;
            };
            // The copies of a submission that was refused have not been made.
            if stamp == slot.stamp {
                continue;
            }
            slot.stamp = stamp;
            for (index, step) in slot.steps.iter().enumerate() {
                let values = words[index * self.values..].iter().take(self.values);
                self.arrived.push_back(StepMetrics {
                    step: *step,
                    values: values.copied().map(f32::from_bits).collect(),
                });
            }
        }
        let surplus = self.arrived.len().saturating_sub(MAX_UNREAD);
        self.arrived.drain(..surplus);
    }

    /// The values that have arrived and were not returned before, oldest first. Does not wait: those of a step arrive when it
    /// has been submitted and is done, and the host has had its turn (a submission, a poll, or this). Of more than 4096 steps
    /// since the last call the oldest are missing.
    pub fn read(&mut self) -> Vec<StepMetrics> {
        // Whatever is wrong with the device shows elsewhere.
        let _ = self.device.poll(wgpu::PollType::Poll);
        self.collect();
        self.arrived.drain(..).collect()
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics")
            .field("values", &self.values)
            .field("recorded", &self.recorded)
            .finish_non_exhaustive()
    }
}
