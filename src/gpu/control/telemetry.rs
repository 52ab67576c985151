//! What controlled steps came to, on its way to the host: copied behind each step, mapped by its submission, and looked at
//! when somebody asks.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::control::ControlRecord;

/// Records that the device keeps, and words of each; `Record` in `shaders/control/finish.wgsl`.
pub(super) const HISTORY: usize = 64;
pub(super) const RECORD_WORDS: usize = 8;
const RECORD_BYTES: usize = 4 * RECORD_WORDS;

/// Copies that may be on their way before another buffer is made for one, and at most. Where all are, a step is left out:
/// the next one tells of it.
const SLOTS: usize = 3;
const MAX_SLOTS: usize = HISTORY;

/// An optimizer's counts on the device, as they go with a step.
pub struct Counted {
    /// A `u32` per tensor.
    pub(crate) applied: wgpu::Buffer,
    pub(crate) tensors: usize,
    /// [`Tensors::recorded`](crate::state::Tensors::recorded).
    pub(crate) recorded: Vec<u64>,
    pub(crate) mailbox: Arc<Mutex<Mailbox>>,
    /// The mailbox's, when this was recorded.
    pub(crate) epoch: u64,
}

/// Where an optimizer finds what the device has counted.
#[derive(Debug, Default)]
pub struct Mailbox {
    /// What was recorded before counts were said anew is of no use any more.
    pub(crate) epoch: u64,
    pub(crate) latest: Option<Letter>,
}

/// What the device had counted when so many steps were recorded.
#[derive(Debug)]
pub(crate) struct Letter {
    pub(crate) recorded: Vec<u64>,
    pub(crate) applied: Vec<u32>,
    /// How many steps of the control had been skipped.
    pub(crate) skipped: u64,
}

#[derive(Default)]
pub(super) struct Telemetry {
    slots: Vec<Slot>,
    /// Steps that are known to have been skipped.
    skipped: u64,
    /// The last step whose record has been returned.
    read: u64,
}

struct Slot {
    buffer: wgpu::Buffer,
    arrival: Arc<AtomicU8>,
    step: u64,
    counted: Vec<Counted>,
}

const FREE: u8 = 0;
const ON_ITS_WAY: u8 = 1;
const MAPPED: u8 = 2;

/// Goes with a copy; one that is never submitted is dropped with its encoder.
struct Arrival(Arc<AtomicU8>);

impl Arrival {
    fn set_mapped(self, mapped: bool) {
        let to = if mapped { MAPPED } else { FREE };
        self.0.store(to, Ordering::Release);
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        let (from, to) = (ON_ITS_WAY, FREE);
        let _ = self
            .0
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed);
    }
}

impl Telemetry {
    /// How many steps are known to have been skipped.
    pub(super) const fn skipped(&self) -> u64 {
        self.skipped
    }

    /// The last step whose record has been returned.
    pub(super) const fn last_read(&self) -> u64 {
        self.read
    }

    /// Records the copies behind a step.
    pub(super) fn record(
        &mut self,
        device: &wgpu::Device,
        encoder: &mut wgpu::CommandEncoder,
        step: u64,
        history: &wgpu::Buffer,
        counted: Vec<Counted>,
    ) {
        let words: usize = counted.iter().map(|counted| counted.tensors).sum();
        let size = history.size() + 4 * words as u64;
        let Some(slot) = self.slot(device, size) else {
            return;
        };
        encoder.copy_buffer_to_buffer(history, 0, &slot.buffer, 0, history.size());
        let mut offset = history.size();
        for counted in &counted {
            let size = 4 * counted.tensors as u64;
            encoder.copy_buffer_to_buffer(&counted.applied, 0, &slot.buffer, offset, size);
            offset += size;
        }
        (slot.step, slot.counted) = (step, counted);
        slot.arrival = Arc::new(AtomicU8::new(ON_ITS_WAY));
        let arrival = Arrival(slot.arrival.clone());
        encoder.map_buffer_on_submit(&slot.buffer, wgpu::MapMode::Read, .., move |mapped| {
            arrival.set_mapped(mapped.is_ok());
        });
    }

    /// One that is free, or else the oldest that has arrived and nobody has looked at.
    fn slot(&mut self, device: &wgpu::Device, size: u64) -> Option<&mut Slot> {
        let mut best: Option<usize> = None;
        for (index, slot) in self.slots.iter().enumerate() {
            let rank = |index: usize| {
                let slot: &Slot = &self.slots[index];
                match slot.arrival.load(Ordering::Acquire) {
                    FREE => 0,
                    _ => slot.step,
                }
            };
            let is_usable = slot.arrival.load(Ordering::Acquire) != ON_ITS_WAY;
            if is_usable && best.is_none_or(|best| rank(index) < rank(best)) {
                best = Some(index);
            }
        }
        let new = || Slot {
            buffer: device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("wgpu_optim.telemetry"),
                size,
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            }),
            arrival: Arc::new(AtomicU8::new(FREE)),
            step: 0,
            counted: Vec::new(),
        };
        // Some at once, so that later steps allocate nothing.
        while self.slots.len() < SLOTS || (best.is_none() && self.slots.len() < MAX_SLOTS) {
            self.slots.push(new());
            best = best.or(Some(self.slots.len() - 1));
        }
        let slot = &mut self.slots[best?];
        if slot.arrival.load(Ordering::Acquire) == MAPPED {
            slot.buffer.unmap();
        }
        if slot.buffer.size() < size {
            *slot = new();
        }
        Some(slot)
    }

    /// The records that have arrived since the last call, oldest first; the newest counts go to the optimizers.
    pub(super) fn read(&mut self) -> Vec<ControlRecord> {
        let mut records = Vec::new();
        let mut slots: Vec<_> = self.slots.iter_mut().collect();
        slots.sort_by_key(|slot| slot.step);
        for slot in slots {
            if slot.arrival.load(Ordering::Acquire) != MAPPED {
                continue;
            }
            // A device that was lost meanwhile has nothing to say.
            if let Ok(bytes) = slot.buffer.get_mapped_range(..) {
                let words: Vec<u32> = bytes
                    .chunks_exact(4)
                    .map(bytemuck::pod_read_unaligned)
                    .collect();
                let (history, counts) = words.split_at(HISTORY * RECORD_WORDS);
                let first = (self.read + 1).max((slot.step + 1).saturating_sub(HISTORY as u64));
                for step in first..=slot.step {
                    let at = RECORD_WORDS * (step as usize % HISTORY);
                    let words = &history[at..at + RECORD_BYTES / 4];
                    // One that was never submitted left what was there before.
                    if words[0] == step as u32 {
                        let news = words[5].wrapping_sub(self.skipped as u32);
                        self.skipped += u64::from(news);
                        records.push(record(step, self.skipped, words));
                    }
                }
                self.read = self.read.max(slot.step);
                let mut counts = counts;
                for counted in slot.counted.drain(..) {
                    let (applied, others) = counts.split_at(counted.tensors);
                    counts = others;
                    let mut mailbox = counted
                        .mailbox
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner);
                    if mailbox.epoch == counted.epoch {
                        mailbox.latest = Some(Letter {
                            recorded: counted.recorded,
                            applied: applied.to_vec(),
                            skipped: self.skipped,
                        });
                    }
                }
            }
            slot.buffer.unmap();
            slot.arrival.store(FREE, Ordering::Release);
        }
        records
    }
}

fn record(step: u64, skipped: u64, words: &[u32]) -> ControlRecord {
    ControlRecord {
        step,
        norm: f32::from_bits(words[1]),
        clip_factor: f32::from_bits(words[2]),
        found_nonfinite: words[3] & 1 != 0,
        is_skipped: words[3] & 2 != 0,
        scale: f32::from_bits(words[4]),
        skipped,
    }
}
