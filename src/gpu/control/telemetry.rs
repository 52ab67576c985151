//! The outcomes of controlled steps, on their way to the host: copied behind each step, mapped by its submission, and looked at
//! when somebody asks.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::super::mapped::MappedOnSubmit;
use super::super::submission::Submission;
use crate::control::ControlRecord;

/// Records that the device keeps, and words of each; `Record` in `shaders/control/finish.wgsl`.
pub(super) const HISTORY: usize = 64;
pub(super) const RECORD_WORDS: usize = 8;
const RECORD_BYTES: usize = 4 * RECORD_WORDS;

/// Copies that may be on their way before another buffer is made for one, and at most. Where all are, or there is no memory
/// for another, a step is left out: a later one tells of it.
const SLOTS: usize = 3;
const MAX_SLOTS: usize = HISTORY;

/// An optimizer's counts on the device, as they go with a step.
pub struct Counted {
    /// A `u32` per tensor.
    pub(crate) counted: wgpu::Buffer,
    pub(crate) tensors: usize,
    /// The number of the optimizer's step.
    pub(crate) step: u64,
    pub(crate) mailbox: Arc<Mutex<Mailbox>>,
}

/// The reports in which an optimizer finds what the device has counted.
pub(crate) type Mailbox = Vec<Report>;

/// The device's counts behind a step.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) of: ReportOf,
    pub(crate) counted: Vec<u32>,
}

/// The steps of an optimizer that are part of a report's counts.
#[derive(Debug)]
pub(crate) enum ReportOf {
    /// The step of this number, whose report it is, and those before it that were done by then.
    Step(u64),
    /// The steps of these numbers.
    Steps(Vec<u64>),
}

#[derive(Default)]
pub(super) struct Telemetry {
    slots: Vec<Slot>,
    /// Records that have arrived, and that nobody has asked for.
    records: VecDeque<ControlRecord>,
    /// Steps that are known to have been skipped.
    skipped: u64,
    /// The last step whose record has arrived.
    arrived: u64,
    /// The last step that was skipped because there were no scalars for it, until somebody is told.
    too_far_ahead: Option<u64>,
}

struct Slot {
    mapped: MappedOnSubmit,
    step: u64,
    counted: Vec<Counted>,
}

impl Telemetry {
    /// The last step whose record has arrived.
    pub(super) const fn last_arrived(&self) -> u64 {
        self.arrived
    }

    /// Steps that are known to have been skipped.
    pub(super) const fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Goes on from other numbers, where no step is on its way. Records that have arrived are still returned.
    pub(super) fn restart(&mut self, steps: u64, skipped: u64) {
        // A loaded state may say any number.
        const MOST: u64 = u64::MAX / 2;
        (self.arrived, self.skipped) = (steps.min(MOST), skipped.min(MOST));
    }

    /// The last step that was skipped because there were no scalars for it, once.
    pub(super) fn take_too_far_ahead(&mut self) -> Option<u64> {
        self.too_far_ahead.take()
    }

    /// The records that have arrived, oldest first, once.
    pub(super) fn take_records(&mut self) -> Vec<ControlRecord> {
        self.records.drain(..).collect()
    }

    /// Records the copies behind a step. Steps of one submission share a slot: the last one tells of all.
    pub(super) fn record(
        &mut self,
        device: &wgpu::Device,
        encoder: &mut wgpu::CommandEncoder,
        (step, submission): &(u64, Submission),
        history: &wgpu::Buffer,
        counted: Vec<Counted>,
    ) {
        let words: usize = counted.iter().map(|counted| counted.tensors).sum();
        let size = history.size() + 4 * words as u64;
        let is_shared = |slot: &&mut Slot| {
            slot.mapped.is_sent_with(submission) && slot.mapped.buffer().size() >= size
        };
        let shared = self.slots.iter_mut().find(is_shared);
        let is_new = shared.is_none();
        let slot = match shared {
            Some(shared) => Some(shared),
            None => self.slot(device, size),
        };
        let Some(slot) = slot else {
            return;
        };
        let buffer = slot.mapped.buffer();
        encoder.copy_buffer_to_buffer(history, 0, buffer, 0, history.size());
        let mut offset = history.size();
        for counted in &counted {
            let size = 4 * counted.tensors as u64;
            encoder.copy_buffer_to_buffer(&counted.counted, 0, buffer, offset, size);
            offset += size;
        }
        (slot.step, slot.counted) = (*step, counted);
        if is_new {
            slot.mapped.send(encoder, submission);
        }
    }

    /// One that is free, or else the oldest that has arrived and nobody has looked at.
    fn slot(&mut self, device: &wgpu::Device, size: u64) -> Option<&mut Slot> {
        let mut best: Option<usize> = None;
        for (index, slot) in self.slots.iter().enumerate() {
            let rank = |index: usize| {
                let slot: &Slot = &self.slots[index];
                match slot.mapped.is_mapped() {
                    true => slot.step,
                    false => 0,
                }
            };
            let is_usable = !slot.mapped.is_on_its_way();
            if is_usable && best.is_none_or(|best| rank(index) < rank(best)) {
                best = Some(index);
            }
        }
        let new = || {
            let mapped = MappedOnSubmit::new(device, "wgpu_optim.telemetry", size);
            Some(Slot {
                mapped: mapped.ok()?,
                step: 0,
                counted: Vec::new(),
            })
        };
        // Some at once, so that later steps allocate nothing.
        while self.slots.len() < SLOTS || (best.is_none() && self.slots.len() < MAX_SLOTS) {
            let Some(slot) = new() else {
                break;
            };
            self.slots.push(slot);
            best = best.or(Some(self.slots.len() - 1));
        }
        let slot = &mut self.slots[best?];
        slot.mapped.free();
        if slot.mapped.buffer().size() < size {
            *slot = new()?;
        }
        Some(slot)
    }

    /// Takes in what has arrived since the last call; what the device has counted goes to the optimizers.
    pub(super) fn collect(&mut self) {
        let slots = self
            .slots
            .iter_mut()
            .filter(|slot| slot.mapped.has_arrived());
        let mut slots: Vec<_> = slots.collect();
        slots.sort_by_key(|slot| slot.step);
        for slot in slots {
            // A device that was lost meanwhile has nothing to say.
            if let Some(words) = slot.mapped.take_words() {
                let (history, counts) = words.split_at(HISTORY * RECORD_WORDS);
                let of_step = |step: u64| {
                    let at = RECORD_WORDS * (step as usize % HISTORY);
                    let words = &history[at..at + RECORD_BYTES / 4];
                    // One that was not done has left what was there before.
                    (words[0] == step as u32).then_some(words)
                };
                let first = (self.arrived + 1).max((slot.step + 1).saturating_sub(HISTORY as u64));
                for step in first..=slot.step {
                    if let Some(words) = of_step(step) {
                        let news = words[5].wrapping_sub(self.skipped as u32);
                        self.skipped += u64::from(news);
                        self.records.push_back(record(step, self.skipped, words));
                        if words[3] & 4 != 0 {
                            self.too_far_ahead = Some(step);
                        }
                    }
                }
                while self.records.len() > HISTORY {
                    self.records.pop_front();
                }
                // The copies of a submission that failed have not been made either.
                let is_done = of_step(slot.step).is_some();
                if is_done {
                    self.arrived = self.arrived.max(slot.step);
                }
                let mut counts = counts;
                for counted in slot.counted.drain(..) {
                    let (of_tensors, others) = counts.split_at(counted.tensors);
                    counts = others;
                    if is_done {
                        let mailbox = counted.mailbox.lock();
                        let mut mailbox = mailbox.unwrap_or_else(PoisonError::into_inner);
                        mailbox.push(Report {
                            of: ReportOf::Step(counted.step),
                            counted: of_tensors.to_vec(),
                        });
                    }
                }
            }
        }
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
