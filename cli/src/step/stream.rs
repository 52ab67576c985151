//! Window by window: read, computed and written by several threads, so that memory does not grow with the model and
//! none of the three waits for another.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::anyhow;
use serde::Serialize;

use super::inputs::Inputs;
use super::plan::{At, Copy, ELEM_BYTES, Plan, Segment, Window};
use crate::Failure;
use crate::args::NonFinite;
use crate::files::{Outputs, SourceFile};
use crate::interrupt::Interrupt;
use crate::progress::Progress;

/// The values of a window, one tensor after the other.
pub struct Values {
    pub params: Vec<f32>,
    pub grads: Vec<f32>,
    /// One for each slot that the rule keeps.
    pub slots: Vec<Vec<f32>>,
}

/// Computes the steps of a window.
pub trait Engine: Send {
    /// All values are in one phase of the rule ([`Rule::phase`](wgpu_optim::Rule::phase)).
    fn step(&mut self, values: &mut Values, phase: u64) -> Result<(), Failure>;
}

/// Gradient elements of one tensor that are infinite or no number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NonFiniteGradient {
    pub tensor: String,
    pub numel: u64,
    pub count: u64,
    pub first_index: u64,
}

/// What a stream did.
#[derive(Debug)]
pub struct Streamed {
    pub bytes_read: u64,
    pub bytes_written: u64,
    /// In the order of the tensors' parameters.
    pub nonfinite: Vec<NonFiniteGradient>,
}

/// Work that several threads share.
pub struct Stream<'s> {
    pub inputs: &'s Inputs,
    pub plan: &'s Plan<'s>,
    pub windows: &'s [Window],
    pub outputs: &'s Outputs,
    pub nonfinite: NonFinite,
    pub interrupt: &'s Interrupt,
}

/// What the threads tell each other.
#[derive(Default)]
struct Shared {
    /// The window that is next.
    next: AtomicUsize,
    /// A thread has failed.
    stop: AtomicBool,
    /// A gradient was found that forbids the step: what is left is only looked through.
    forbidden: AtomicBool,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    /// Count and first index of what is not finite, by update.
    nonfinite: Mutex<BTreeMap<usize, (u64, u64)>>,
}

impl Stream<'_> {
    /// Runs through all windows, each engine on a thread of its own.
    pub fn run(&self, engines: Vec<Box<dyn Engine + '_>>) -> Result<Streamed, Failure> {
        let shared = Shared::default();
        let files = self.inputs.files();
        let progress = Progress::of_bytes(self.bytes());
        let done = std::thread::scope(|scope| {
            let work = |engine| {
                let worker = Worker {
                    stream: self,
                    shared: &shared,
                    files: &files,
                    progress: &progress,
                };
                move || worker.run(engine)
            };
            let threads: Vec<_> = engines
                .into_iter()
                .map(|engine| scope.spawn(work(engine)))
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
                let panicked = |_| Err(Failure::Failed(anyhow!("a thread of the step panicked")));
                thread.join().unwrap_or_else(panicked)
            };
            threads.into_iter().map(join).collect::<Vec<_>>()
        });
        done.into_iter().collect::<Result<(), _>>()?;
        self.inputs.check_unchanged()?;
        let nonfinite = shared
            .nonfinite
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let named = |(update, (count, first_index)): (usize, (u64, u64))| {
            let tensor = self.plan.updates[update].tensor;
            NonFiniteGradient {
                tensor: tensor.name.clone(),
                numel: tensor.numel,
                count,
                first_index,
            }
        };
        Ok(Streamed {
            bytes_read: shared.bytes_read.into_inner(),
            bytes_written: shared.bytes_written.into_inner(),
            nonfinite: nonfinite.into_iter().map(named).collect(),
        })
    }

    /// Bytes to read and to write.
    fn bytes(&self) -> u64 {
        let updates = self.plan.updates.iter().map(|update| {
            let arrays = 3 + update.tensor.slots.len() + update.out_slots.len();
            arrays as u64 * update.tensor.numel * ELEM_BYTES
        });
        let copies = self.plan.copies.iter().map(|copy| 2 * copy.bytes);
        updates.chain(copies).sum()
    }
}

/// One thread.
struct Worker<'w> {
    stream: &'w Stream<'w>,
    shared: &'w Shared,
    files: &'w [&'w SourceFile],
    progress: &'w Progress,
}

impl Worker<'_> {
    fn run(&self, mut engine: Box<dyn Engine + '_>) -> Result<(), Failure> {
        let mut values = Values {
            params: Vec::new(),
            grads: Vec::new(),
            slots: vec![Vec::new(); self.stream.plan.slots.len()],
        };
        let mut bytes = Vec::new();
        while !self.shared.stop.load(Ordering::Relaxed) {
            let next = self.shared.next.fetch_add(1, Ordering::Relaxed);
            let Some(window) = self.stream.windows.get(next) else {
                break;
            };
            let outcome = self.stream.interrupt.check().and_then(|()| match window {
                Window::Update {
                    segments,
                    elems,
                    phase,
                } => self.update(
                    segments,
                    *elems as usize,
                    *phase,
                    engine.as_mut(),
                    &mut values,
                ),
                Window::Copy(copy) => self.copy(copy, &mut bytes),
            });
            if let Err(failure) = outcome {
                self.shared.stop.store(true, Ordering::Relaxed);
                return Err(failure);
            }
        }
        Ok(())
    }

    fn update(
        &self,
        segments: &[Segment],
        elems: usize,
        phase: u64,
        engine: &mut dyn Engine,
        values: &mut Values,
    ) -> Result<(), Failure> {
        let update_of = |segment: &Segment| &self.stream.plan.updates[segment.update];
        values.grads.resize(elems, 0.0);
        self.read(
            runs(segments, |segment| Some(update_of(segment).tensor.grads)),
            &mut values.grads,
        )?;
        self.look_for_nonfinite(segments, &values.grads);
        if self.shared.forbidden.load(Ordering::Relaxed) {
            return Ok(());
        }
        values.params.resize(elems, 0.0);
        self.read(
            runs(segments, |segment| Some(update_of(segment).params)),
            &mut values.params,
        )?;
        let slots = &self.stream.plan.slots;
        for (index, (slot, values)) in slots.iter().zip(&mut values.slots).enumerate() {
            // Where it is not there yet.
            values.clear();
            values.resize(elems, slot.start);
            let saved = |segment: &Segment| update_of(segment).tensor.slots.get(index).copied();
            self.read(runs(segments, saved), values)?;
        }
        engine.step(values, phase)?;
        self.write(
            runs(segments, |segment| Some(update_of(segment).out_params)),
            &values.params,
        )?;
        for (index, values) in values.slots.iter().enumerate() {
            let out = |segment: &Segment| update_of(segment).out_slots.get(index).copied();
            self.write(runs(segments, out), values)?;
        }
        Ok(())
    }

    fn copy(&self, copy: &Copy, bytes: &mut Vec<u8>) -> Result<(), Failure> {
        if self.shared.forbidden.load(Ordering::Relaxed) {
            return Ok(());
        }
        bytes.resize(copy.bytes as usize, 0);
        self.read_bytes(copy.from, bytes)?;
        self.write_bytes(copy.to, bytes)
    }

    fn read(&self, runs: Vec<Run>, values: &mut [f32]) -> Result<(), Failure> {
        for Run { at, elems } in runs {
            self.read_bytes(at, bytemuck::cast_slice_mut(&mut values[elems]))?;
        }
        Ok(())
    }

    fn write(&self, runs: Vec<Run>, values: &[f32]) -> Result<(), Failure> {
        for Run { at, elems } in runs {
            self.write_bytes(at, bytemuck::cast_slice(&values[elems]))?;
        }
        Ok(())
    }

    fn read_bytes(&self, at: At, bytes: &mut [u8]) -> Result<(), Failure> {
        self.files[at.file].read_exact_at(bytes, at.offset)?;
        let read = bytes.len() as u64;
        self.shared.bytes_read.fetch_add(read, Ordering::Relaxed);
        self.progress.advance("step", read);
        Ok(())
    }

    fn write_bytes(&self, at: At, bytes: &[u8]) -> Result<(), Failure> {
        self.stream
            .outputs
            .get(at.file)
            .write_all_at(bytes, at.offset)?;
        let written = bytes.len() as u64;
        self.shared
            .bytes_written
            .fetch_add(written, Ordering::Relaxed);
        self.progress.advance("step", written);
        Ok(())
    }

    fn look_for_nonfinite(&self, segments: &[Segment], grads: &[f32]) {
        if self.stream.nonfinite == NonFinite::Apply {
            return;
        }
        let mut rest = grads;
        for segment in segments {
            let (grads, after) = rest.split_at((segment.elems.end - segment.elems.start) as usize);
            rest = after;
            let count = grads.iter().filter(|grad| is_nonfinite(**grad)).count() as u64;
            if count == 0 {
                continue;
            }
            let first = grads
                .iter()
                .position(|grad| is_nonfinite(*grad))
                .unwrap_or(0);
            let first = segment.elems.start + first as u64;
            self.shared.forbidden.store(true, Ordering::Relaxed);
            let mut found = self
                .shared
                .nonfinite
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let (all, earliest) = found.entry(segment.update).or_insert((0, first));
            *all += count;
            *earliest = first.min(*earliest);
        }
    }
}

/// By the exponent's bits, as the kernels have to.
fn is_nonfinite(value: f32) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    value.to_bits() & EXPONENT == EXPONENT
}

/// Elements of a window that lie side by side in a file, too.
#[derive(Debug, PartialEq, Eq)]
struct Run {
    at: At,
    elems: std::ops::Range<usize>,
}

/// Where the segments of a window lie in files, as few runs as they make; those without a place are left out.
fn runs(segments: &[Segment], place: impl Fn(&Segment) -> Option<At>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut start = 0;
    for segment in segments {
        let elems = start..start + (segment.elems.end - segment.elems.start) as usize;
        start = elems.end;
        let Some(at) = place(segment) else { continue };
        let at = at.plus(segment.elems.start * ELEM_BYTES);
        match runs.last_mut() {
            Some(last)
                if last.elems.end == elems.start
                    && last.at.plus(last.elems.len() as u64 * ELEM_BYTES) == at =>
            {
                last.elems.end = elems.end;
            }
            _ => runs.push(Run { at, elems }),
        }
    }
    runs
}
