//! Window by window: read, computed and written by several threads, so that memory does not grow with the model and
//! none of the three waits for another.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::anyhow;
use serde::Serialize;
use wgpu_optim::storage::{self, Key, Random, Rounding, rest};
use wgpu_optim::{AnyRule, Rule as _, StorageType, Verdict};

use super::inputs::Inputs;
use super::plan::{At, Copy, Plan, Segment, Update, Window};
use super::reader::{Reader, Run, in_window, runs};
use super::threads::in_turn;
use crate::Failure;
use crate::args::NonFinite;
use crate::files::Outputs;
use crate::interrupt::Interrupt;
use crate::progress::Progress;
use crate::window::{ELEM_BYTES, Engine, Values};

/// The parameter group that all tensors are in.
const GROUP: &str = "default";

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
    pub config: &'s AnyRule,
    /// What becomes of gradients before they are applied.
    pub verdict: &'s Verdict,
    pub repeat: u32,
    /// Of parameters that have no masters.
    pub rounding: Rounding,
    pub nonfinite: NonFinite,
    pub interrupt: &'s Interrupt,
}

/// What the threads tell each other.
#[derive(Default)]
struct Shared {
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
        let worker = |engine| Worker {
            stream: self,
            shared: &shared,
            reader: Reader::new(&files, &progress, &shared.bytes_read, "step"),
            progress: &progress,
            rounded: Vec::new(),
            rests: Vec::new(),
            engine,
        };
        let work = |(worker, values, bytes): &mut (Worker<'_>, Values, Vec<u8>), window| match &self
            .windows[window]
        {
            Window::Update {
                segments,
                elems,
                phase,
            } => worker.update(segments, *elems as usize, *phase, values),
            Window::Copy(copy) => worker.copy(copy, bytes),
        };
        let workers = engines.into_iter().map(|engine| {
            let values = Values {
                params: Vec::new(),
                grads: Vec::new(),
                slots: vec![Vec::new(); self.plan.slots.len()],
            };
            (worker(engine), values, Vec::new())
        });
        in_turn(workers.collect(), self.windows.len(), self.interrupt, work)?;
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
            let tensor = update.tensor;
            let values = 2 * tensor.storage.params.bytes() + tensor.storage.grads.bytes();
            let slots = tensor.slots.iter().chain(&update.out_slots);
            let masters = tensor.masters.iter().chain(&tensor.rests);
            let kept = slots.chain(masters).chain(&update.out_masters);
            tensor.numel * (values + kept.count() as u64 * ELEM_BYTES)
        });
        let copies = self.plan.copies.iter().map(|copy| 2 * copy.bytes);
        updates.chain(copies).sum()
    }
}

/// One thread.
struct Worker<'w> {
    stream: &'w Stream<'w>,
    shared: &'w Shared,
    reader: Reader<'w>,
    progress: &'w Progress,
    /// What masters are as parameters.
    rounded: Vec<u16>,
    /// What parameters leave of masters.
    rests: Vec<f32>,
    engine: Box<dyn Engine + 'w>,
}

impl Worker<'_> {
    fn update(
        &mut self,
        segments: &[Segment],
        elems: usize,
        phase: u64,
        values: &mut Values,
    ) -> Result<(), Failure> {
        let plan = self.stream.plan;
        let update_of = |segment: &Segment| &plan.updates[segment.update];
        let tensor_of = |segment: &Segment| update_of(segment).tensor;
        let as_f32 = |at| (at, StorageType::F32);
        values.grads.resize(elems, 0.0);
        let grads = |segment: &Segment| {
            let tensor = tensor_of(segment);
            Some((tensor.grads, tensor.storage.grads))
        };
        self.reader.read(runs(segments, grads), &mut values.grads)?;
        self.look_for_nonfinite(segments, &values.grads);
        self.stream.verdict.apply_to(GROUP, &mut values.grads);
        values.params.resize(elems, 0.0);
        let masters = |segment: &Segment| tensor_of(segment).masters.map(as_f32);
        self.reader
            .read(runs(segments, masters), &mut values.params)?;
        // Even where a gradient forbids the step, so that what is said does not depend on which is found first.
        self.check_masters(segments, &values.params)?;
        if self.shared.forbidden.load(Ordering::Relaxed) {
            return Ok(());
        }
        let fresh = |segment: &Segment| {
            let Update { tensor, params, .. } = update_of(segment);
            let params = (*params, tensor.storage.params);
            tensor.masters.is_none().then_some(params)
        };
        self.reader
            .read(runs(segments, fresh), &mut values.params)?;
        let rests = |segment: &Segment| tensor_of(segment).rests.map(as_f32);
        self.join_rests(runs(segments, rests), &mut values.params)?;
        for (index, (slot, values)) in plan.slots.iter().zip(&mut values.slots).enumerate() {
            // Where it is not there yet.
            values.clear();
            values.resize(elems, slot.start);
            let saved = |segment: &Segment| {
                let slots = &tensor_of(segment).slots;
                slots.get(index).copied().map(as_f32)
            };
            self.reader.read(runs(segments, saved), values)?;
        }
        self.step(segments, phase, values)?;
        let out_params = |segment: &Segment| {
            let Update {
                tensor, out_params, ..
            } = update_of(segment);
            Some((*out_params, tensor.storage.params))
        };
        self.write(runs(segments, out_params), &values.params)?;
        let out_masters = |segment: &Segment| update_of(segment).out_masters.map(as_f32);
        self.write(runs(segments, out_masters), &values.params)?;
        for (index, values) in values.slots.iter().enumerate() {
            let out = |segment: &Segment| {
                let slots = &update_of(segment).out_slots;
                slots.get(index).copied().map(as_f32)
            };
            self.write(runs(segments, out), values)?;
        }
        Ok(())
    }

    /// Makes masters of parameters and what those leave of them.
    fn join_rests(&mut self, runs: Vec<Run>, params: &mut [f32]) -> Result<(), Failure> {
        let mut rests = std::mem::take(&mut self.rests);
        for Run { at, elems, .. } in runs {
            let params = &mut params[elems];
            rests.resize(params.len(), 0.0);
            self.reader
                .read_bytes(at, bytemuck::cast_slice_mut(&mut rests))?;
            for (param, rest) in params.iter_mut().zip(&rests) {
                let half = (param.to_bits() >> 16) as u16;
                *param = f32::from_bits(rest::join(half, *rest as u16));
            }
        }
        self.rests = rests;
        Ok(())
    }

    /// All steps; where nothing is rounded between them the engine makes them at once.
    fn step(
        &mut self,
        segments: &[Segment],
        mut phase: u64,
        values: &mut Values,
    ) -> Result<(), Failure> {
        let Stream {
            plan,
            config,
            repeat,
            ..
        } = *self.stream;
        let is_rounded = |segment: &Segment| plan.updates[segment.update].tensor.is_rounded();
        if !segments.iter().any(is_rounded) {
            return self.engine.step(values, phase, repeat);
        }
        for done in 0..repeat {
            self.engine.step(values, phase, 1)?;
            self.round(segments, done.into(), &mut values.params);
            phase = config.phase(phase.saturating_add(1));
        }
        Ok(())
    }

    /// Makes of parameters without masters what they are when they have been stored, after so many steps before this.
    fn round(&mut self, segments: &[Segment], done: u64, params: &mut [f32]) {
        for (segment, elems) in in_window(segments) {
            let tensor = self.stream.plan.updates[segment.update].tensor;
            if !tensor.is_rounded() {
                continue;
            }
            let random = match self.stream.rounding {
                Rounding::Nearest => None,
                Rounding::Stochastic { seed } => Some(Random {
                    key: Key::new(
                        seed,
                        &tensor.name,
                        tensor.applied_steps.saturating_add(done),
                    ),
                    first: segment.elems.start as u32,
                    number: 0,
                }),
            };
            let (params, of) = (&mut params[elems], tensor.storage.params);
            self.reader.halves.resize(params.len(), 0);
            storage::round(of, params, random, &mut self.reader.halves);
            storage::unpack(of, &self.reader.halves, params);
        }
    }

    /// Makes sure that the parameters are what their masters, if the state has them, round to.
    fn check_masters(&mut self, segments: &[Segment], masters: &[f32]) -> Result<(), Failure> {
        let plan = self.stream.plan;
        let params = |segment: &Segment| {
            let Update { tensor, params, .. } = &plan.updates[segment.update];
            tensor.masters.map(|_| (*params, tensor.storage.params))
        };
        for Run { at, elems, of } in runs(segments, params) {
            self.reader.read_halves(at, elems.len())?;
            self.rounded.resize(elems.len(), 0);
            storage::round(of, &masters[elems.clone()], None, &mut self.rounded);
            if self.reader.halves == self.rounded {
                continue;
            }
            let mut pairs = elems.zip(self.reader.halves.iter().zip(&self.rounded));
            let Some((elem, (actual, expected))) =
                pairs.find(|(_, (actual, expected))| actual != expected)
            else {
                continue;
            };
            let mut values = [0.0; 2];
            storage::unpack(of, &[*actual, *expected], &mut values);
            let [actual, expected] = values;
            let mut segments = in_window(segments);
            if let Some((segment, elems)) = segments.find(|(_, elems)| elems.contains(&elem)) {
                return Err(anyhow!(
                    "tensor {:?}: the parameter at index {} is {actual:?}, expected {expected:?}, which is its master \
                     in the state, rounded to the nearest; parameters and state are not of the same step",
                    plan.updates[segment.update].tensor.name,
                    segment.elems.start + (elem - elems.start) as u64
                )
                .into());
            }
        }
        Ok(())
    }

    fn copy(&self, copy: &Copy, bytes: &mut Vec<u8>) -> Result<(), Failure> {
        if self.shared.forbidden.load(Ordering::Relaxed) {
            return Ok(());
        }
        bytes.resize(copy.bytes as usize, 0);
        self.reader.read_bytes(copy.from, bytes)?;
        self.write_bytes(copy.to, bytes)
    }

    /// Values of 16 bits are rounded to the nearest, which leaves those as they are that have been rounded otherwise.
    fn write(&mut self, runs: Vec<Run>, values: &[f32]) -> Result<(), Failure> {
        for Run { at, elems, of } in runs {
            let values = &values[elems];
            match of {
                StorageType::F32 => self.write_bytes(at, bytemuck::cast_slice(values))?,
                StorageType::Bf16 | StorageType::F16 => {
                    self.reader.halves.resize(values.len(), 0);
                    storage::round(of, values, None, &mut self.reader.halves);
                    self.write_bytes(at, bytemuck::cast_slice(&self.reader.halves))?;
                }
            }
        }
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
        for (segment, elems) in in_window(segments) {
            let grads = &grads[elems];
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
