//! Window by window: read, computed and written by several threads, so that memory does not grow with the model and
//! none of the three waits for another.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::anyhow;
use serde::Serialize;
use wgpu_optim::storage::{self, Key, PARAMS_REST, Random, Rounding, rest};
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

/// Elements of one tensor's values that are infinite or no number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NonFiniteElems {
    pub tensor: String,
    /// The kind of its values: `F32 parameters`, or a slot's name; none for a gradient.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub values: Option<String>,
    pub numel: u64,
    pub count: u64,
    pub first_index: u64,
}

/// Values of a tensor that have to be finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Checked {
    Gradient,
    /// The parameters that the step leaves, as they are stored.
    Params,
    /// The slot at this place in the plan, as the step leaves it.
    Slot(usize),
}

/// Steps of `--repeat` that are made before a signal is heard.
const STEPS_AT_ONCE: u32 = 128;

/// What a stream did.
#[derive(Debug)]
pub struct Streamed {
    pub bytes_read: u64,
    pub bytes_written: u64,
    /// In the order of the tensors' parameters.
    pub gradients: Vec<NonFiniteElems>,
    /// Parameters and slots that the step would leave, likewise; none where a gradient forbids it, because not all is
    /// computed then.
    pub results: Vec<NonFiniteElems>,
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
    /// Count and first index of what is not finite, by update and what it is.
    nonfinite: Mutex<BTreeMap<(usize, Checked), (u64, u64)>>,
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
        let (mut gradients, mut results) = (Vec::new(), Vec::new());
        for ((update, checked), (count, first_index)) in nonfinite {
            let tensor = self.plan.updates[update].tensor;
            let found = NonFiniteElems {
                tensor: tensor.name.clone(),
                values: match checked {
                    Checked::Gradient => None,
                    Checked::Params => {
                        let of = tensor.storage.params.name().to_uppercase();
                        Some(format!("{of} parameters"))
                    }
                    Checked::Slot(slot) => Some(self.plan.slots[slot].name.to_owned()),
                },
                numel: tensor.numel,
                count,
                first_index,
            };
            match checked {
                Checked::Gradient => gradients.push(found),
                _ => results.push(found),
            }
        }
        if !gradients.is_empty() {
            results.clear();
        }
        Ok(Streamed {
            bytes_read: shared.bytes_read.into_inner(),
            bytes_written: shared.bytes_written.into_inner(),
            gradients,
            results,
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
        self.look_at_grads(segments, &values.grads);
        self.stream.verdict.apply_to(GROUP, &mut values.grads);
        values.params.resize(elems, 0.0);
        let masters = |segment: &Segment| tensor_of(segment).masters.map(as_f32);
        self.reader
            .read(runs(segments, masters), &mut values.params)?;
        // Even where a gradient forbids the step, so that what is said does not depend on which is found first.
        self.check_masters(segments, &values.params)?;
        let fresh = |segment: &Segment| {
            let Update { tensor, params, .. } = update_of(segment);
            let params = (*params, tensor.storage.params);
            tensor.masters.is_none().then_some(params)
        };
        self.reader
            .read(runs(segments, fresh), &mut values.params)?;
        let rests = |segment: &Segment| tensor_of(segment).rests.map(as_f32);
        self.join_rests(segments, runs(segments, rests), &mut values.params)?;
        if self.shared.forbidden.load(Ordering::Relaxed) {
            return Ok(());
        }
        for (index, (slot, values)) in plan.slots.iter().zip(&mut values.slots).enumerate() {
            // Where it is not there yet.
            values.clear();
            values.resize(elems, slot.start.value());
            let saved = |segment: &Segment| {
                let slots = &tensor_of(segment).slots;
                slots.get(index).copied().map(as_f32)
            };
            self.reader.read(runs(segments, saved), values)?;
        }
        self.step(segments, phase, values)?;
        self.look_at_results(segments, values);
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

    /// Makes masters of parameters and what those leave of them, and makes sure that it is masters that left them.
    fn join_rests(
        &mut self,
        segments: &[Segment],
        runs: Vec<Run>,
        params: &mut [f32],
    ) -> Result<(), Failure> {
        let mut rests = std::mem::take(&mut self.rests);
        for Run { at, elems, .. } in runs {
            let first = elems.start;
            let params = &mut params[elems];
            rests.resize(params.len(), 0.0);
            self.reader
                .read_bytes(at, bytemuck::cast_slice_mut(&mut rests))?;
            let mut other = None;
            for (index, (param, saved)) in params.iter_mut().zip(&rests).enumerate() {
                let (half, rest) = ((param.to_bits() >> 16) as u16, *saved as u16);
                let master = rest::join(half, rest);
                let is_left = rest::split(master) == (half, rest) || param.is_nan();
                if !is_left || f32::from(rest) != *saved {
                    other = other.or(Some((index, *param, *saved)));
                }
                *param = f32::from_bits(master);
            }
            if let Some((index, param, rest)) = other {
                let (tensor, index) = self.name(segments, first + index);
                return Err(anyhow!(
                    "tensor {tensor:?}: the parameter at index {index} is {param:?}, and its {PARAMS_REST} in the state \
                     {rest}, which no master leaves; parameters and state are not of the same step"
                )
                .into());
            }
        }
        self.rests = rests;
        Ok(())
    }

    /// The tensor of an element of the window, and the element's index in it.
    fn name(&self, segments: &[Segment], elem: usize) -> (&str, u64) {
        let mut segments = in_window(segments);
        let found = segments.find(|(_, elems)| elems.contains(&elem));
        found.map_or(("", 0), |(segment, elems)| {
            let tensor = self.stream.plan.updates[segment.update].tensor;
            (
                &tensor.name,
                segment.elems.start + (elem - elems.start) as u64,
            )
        })
    }

    /// Makes all steps of a window; where nothing is rounded between them the engine makes many at once.
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
        let is_rounded = segments.iter().any(is_rounded);
        let at_once = if is_rounded { 1 } else { STEPS_AT_ONCE };
        let mut done = 0;
        loop {
            let times = at_once.min(repeat - done);
            self.engine.step(values, phase, times)?;
            if is_rounded {
                self.round(segments, done.into(), &mut values.params);
            }
            done += times;
            if done == repeat {
                return Ok(());
            }
            self.stream.interrupt.check()?;
            for _ in 0..times {
                phase = config.phase(phase.saturating_add(1));
            }
        }
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
            let (tensor, index) = self.name(segments, elem);
            return Err(anyhow!(
                "tensor {tensor:?}: the parameter at index {index} is {actual:?}, expected {expected:?}, which is its \
                 master in the state, rounded to the nearest; parameters and state are not of the same step"
            )
            .into());
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

    /// Looks for gradients that are not finite, or not any more when they have been divided by their scale.
    fn look_at_grads(&self, segments: &[Segment], grads: &[f32]) {
        let unscale = f64::from(self.stream.verdict.record().scale).recip() as f32;
        let found = self.look_for(segments, Checked::Gradient, grads, |_, grad| {
            is_nonfinite(grad * unscale, StorageType::F32)
        });
        if found {
            self.shared.forbidden.store(true, Ordering::Relaxed);
        }
    }

    /// Looks for what the step has made that is not finite, or will not be when it is stored.
    fn look_at_results(&self, segments: &[Segment], values: &Values) {
        self.look_for(segments, Checked::Params, &values.params, |of, value| {
            is_nonfinite(value, of)
        });
        for (slot, values) in values.slots.iter().enumerate() {
            self.look_for(segments, Checked::Slot(slot), values, |_, value| {
                is_nonfinite(value, StorageType::F32)
            });
        }
    }

    /// Counts values of a window by tensor; `is_nonfinite` is told what the tensor's parameters are stored as, too. Returns
    /// whether there are any.
    fn look_for(
        &self,
        segments: &[Segment],
        checked: Checked,
        values: &[f32],
        is_nonfinite: impl Fn(StorageType, f32) -> bool,
    ) -> bool {
        let mut is_found = false;
        if self.stream.nonfinite == NonFinite::Apply {
            return is_found;
        }
        for (segment, elems) in in_window(segments) {
            let of = self.stream.plan.updates[segment.update]
                .tensor
                .storage
                .params;
            let values = &values[elems];
            // Nearly always there are none, and so it is found at the speed of the caches.
            if !values
                .iter()
                .fold(false, |any, value| any | is_nonfinite(of, *value))
            {
                continue;
            }
            is_found = true;
            let is_nonfinite = |value: &&f32| is_nonfinite(of, **value);
            let count = values.iter().filter(is_nonfinite).count() as u64;
            let first = values.iter().position(|value| is_nonfinite(&value));
            let first = segment.elems.start + first.unwrap_or(0) as u64;
            let mut found = self
                .shared
                .nonfinite
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let key = (segment.update, checked);
            let (all, earliest) = found.entry(key).or_insert((0, first));
            *all += count;
            *earliest = first.min(*earliest);
        }
        is_found
    }
}

/// Whether a value is infinite or NaN, or becomes so when it is stored. By its bits, as the kernels have to.
fn is_nonfinite(value: f32, stored_as: StorageType) -> bool {
    const SIGN: u32 = 1 << 31;
    // The least magnitude that is rounded to infinity: of 16 bits half-way from the largest number to what would follow.
    let least = match stored_as {
        StorageType::F32 => 0x7f80_0000,
        StorageType::Bf16 => 0x7f7f_8000,
        StorageType::F16 => 0x477f_f000,
    };
    // Signed, because that is what the least of vector units compare.
    (value.to_bits() & !SIGN) as i32 >= least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_as_infinity_is_not_finite() {
        for of in [StorageType::Bf16, StorageType::F16] {
            // Every number of 16 bits, what lies half-way to the next, and its neighbours.
            for half in 0..=u16::MAX {
                let mut exact = [0.0];
                storage::unpack(of, &[half], &mut exact);
                let bits = exact[0].to_bits();
                let half_way = if of == StorageType::Bf16 {
                    1 << 15
                } else {
                    1 << 12
                };
                for near in [
                    bits,
                    bits + half_way - 1,
                    bits + half_way,
                    bits + half_way + 1,
                ] {
                    let value = f32::from_bits(near);
                    let (mut stored, mut back) = ([0], [0.0]);
                    storage::round(of, &[value], None, &mut stored);
                    storage::unpack(of, &stored, &mut back);
                    assert_eq!(
                        is_nonfinite(value, of),
                        !back[0].is_finite(),
                        "{of:?} {value:?}"
                    );
                }
            }
        }
    }
}
