//! Window by window: read, computed and written by several threads, so that memory does not grow with the model and
//! none of the three waits for another.

use std::collections::BTreeMap;
use std::slice::from_ref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::anyhow;
use serde::Serialize;
use wgpu_optim::control::{GradNorms, Verdict};
use wgpu_optim::storage::{self, Key, PARAMS_REST, Random, Rounding, rest};
use wgpu_optim::{Rule as _, StorageType};
use wgpu_optim_files::round::{RoundError, WeightedSum, first_not_finite, pseudo_gradients};
use wgpu_optim_files::window::{Engine, NotRounded, Reader, Run, Slice, Values, Writer, runs};
use wgpu_optim_files::{Outputs, Part};

use super::inputs::Inputs;
use super::plan::{Copy, Plan, Window};
use super::threads::in_turn;
use crate::Failure;
use crate::args::NonFinite;
use crate::interrupt::Interrupt;
use crate::progress::Progress;

/// The one group that a control knows.
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

/// The outcome of a stream.
#[derive(Debug)]
pub struct Streamed {
    /// Dispatches of a step, on a GPU.
    pub dispatches: usize,
    pub bytes_read: u64,
    pub bytes_written: u64,
    /// The gradients that are not finite, in the order of the tensors' parameters.
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
    /// The weights of local models whose mean parameters move by; none where there are gradients.
    pub mean: Option<&'s WeightedSum>,
    /// The treatment of gradients before they are applied.
    pub verdict: &'s Verdict,
    /// The norms of the plan's updates, where gradients are clipped by one.
    pub norms: Option<&'s GradNorms>,
    pub repeat: u32,
    /// The rounding of parameters that have no masters.
    pub rounding: Rounding,
    pub nonfinite: NonFinite,
    pub interrupt: &'s Interrupt,
}

/// The state that the threads share.
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
    /// Runs through all windows, on as many threads as there are lists of engines, one for each group.
    pub fn run(&self, engines: Vec<Vec<Box<dyn Engine + '_>>>) -> Result<Streamed, Failure> {
        let shared = Shared::default();
        let files = self.inputs.files();
        let progress = Progress::of_bytes(self.bytes());
        let count = |bytes: u64, all: &AtomicU64| {
            all.fetch_add(bytes, Ordering::Relaxed);
            progress.advance("step", bytes);
        };
        let read = |bytes| count(bytes, &shared.bytes_read);
        let written = |bytes| count(bytes, &shared.bytes_written);
        let worker = |engines| Worker {
            stream: self,
            shared: &shared,
            reader: Reader::new(&files, &read),
            writer: Writer::new(self.outputs, &written),
            rounded: Vec::new(),
            rests: Vec::new(),
            engines,
            bytes: Vec::new(),
            means: Vec::new(),
        };
        let work = |(worker, values, bytes): &mut (Worker<'_>, Values, Vec<u8>), window| match &self
            .windows[window]
        {
            Window::Update {
                slices,
                elems,
                group,
                phase,
            } => worker.update(slices, *elems as usize, (*group, *phase), values),
            Window::Copy(copy) => worker.copy(copy, bytes),
        };
        let workers = engines.into_iter().map(|engines| {
            let values = Values::default();
            (worker(engines), values, Vec::new())
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
                    Checked::Slot(slot) => {
                        let slots = &self.plan.groups.get(tensor.group).slots;
                        Some(slots[slot].name.to_owned())
                    }
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
            dispatches: 0,
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
            let grads = tensor.grads.len() as u64 * tensor.storage.grads.bytes();
            let values = 2 * tensor.storage.params.bytes() + grads;
            let saved = &tensor.saved;
            let masters = [&saved.masters, &saved.rests].into_iter().flatten();
            let read = saved.slots.iter().chain(masters).flatten();
            let state = read.chain(&update.out_state).map(Part::bytes);
            tensor.numel * values + state.sum::<u64>()
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
    writer: Writer<'w>,
    /// Parameters without masters, as they are stored.
    rounded: Vec<u16>,
    /// The rests that parameters leave of masters.
    rests: Vec<f32>,
    /// One for each group.
    engines: Vec<Box<dyn Engine + 'w>>,
    /// Values of a local model, as they are stored.
    bytes: Vec<u8>,
    /// The mean of all local models.
    means: Vec<f64>,
}

impl Worker<'_> {
    fn update(
        &mut self,
        slices: &[Slice],
        elems: usize,
        (group, phase): (usize, u64),
        values: &mut Values,
    ) -> Result<(), Failure> {
        let updates = &self.stream.plan.updates;
        values.params.resize(elems, 0.0);
        let params = runs(slices, |update| from_ref(&updates[update].tensor.params));
        self.reader.read(&params, &mut values.params)?;
        match self.stream.mean {
            Some(mean) => self.make_grads(slices, mean, values)?,
            None => self.read_grads(slices, values)?,
        }
        self.look_at_grads(slices, &values.grads);
        let Stream { verdict, norms, .. } = self.stream;
        for (slice, elems) in Slice::in_window(slices) {
            let norm = norms.and_then(|norms| norms.tensors[slice.tensor].as_ref());
            verdict.apply_to(GROUP, norm, &mut values.grads[elems]);
        }
        // Even where a gradient forbids the step, so that what is said does not depend on which is found first.
        self.read_masters(slices, values)?;
        if self.shared.forbidden.load(Ordering::Relaxed) {
            return Ok(());
        }
        let saved = |update: usize| &updates[update].tensor.saved;
        let slots = &self.stream.plan.groups.get(group).slots;
        values.slots.resize_with(slots.len(), Vec::new);
        self.reader.read_slots(slices, saved, slots, values)?;
        self.step(slices, (group, phase), values)?;
        self.look_at_results(slices, values);
        let params = |update: usize| from_ref(&updates[update].out_params);
        self.writer.write(&runs(slices, params), &values.params)?;
        let state = |update: usize| &*updates[update].out_state;
        Ok(self.writer.write_state(slices, state, values)?)
    }

    fn read_grads(&mut self, slices: &[Slice], values: &mut Values) -> Result<(), Failure> {
        let updates = &self.stream.plan.updates;
        values.grads.resize(values.params.len(), 0.0);
        let grads = |update: usize| &updates[update].tensor.grads[..1];
        Ok(self.reader.read(&runs(slices, grads), &mut values.grads)?)
    }

    /// Makes pseudo-gradients of the global model's parameters and the mean of the local ones'.
    fn make_grads(
        &mut self,
        slices: &[Slice],
        mean: &WeightedSum,
        values: &mut Values,
    ) -> Result<(), Failure> {
        let not_finite = |update: usize, model, elem| RoundError::NotFinite {
            tensor: self.stream.plan.updates[update].tensor.name.clone(),
            model,
            elem,
        };
        if let Some(elem) = values.params.iter().position(|param| !param.is_finite()) {
            let (update, elem) = Slice::find(slices, elem).unwrap_or_default();
            return Err(refused(not_finite(update, "global", elem)));
        }
        self.means.clear();
        self.means.resize(values.params.len(), 0.0);
        for (slice, elems) in Slice::in_window(slices) {
            let tensor = self.stream.plan.updates[slice.tensor].tensor;
            let (of, means) = (tensor.storage.grads, &mut self.means[elems]);
            for (model, local) in tensor.grads.iter().enumerate() {
                let bytes = (slice.numel() * of.bytes()) as usize;
                self.bytes.resize(bytes, 0);
                let place = local.place(slice.elems.start);
                self.reader.read_bytes(place, &mut self.bytes)?;
                if let Some(elem) = first_not_finite(of, &self.bytes) {
                    let elem = slice.elems.start + elem as u64;
                    let path = self.stream.inputs.grads[model].path().display();
                    let error = anyhow::Error::from(not_finite(slice.tensor, "local", elem));
                    return Err(error.context(format!("local model {path}")).into());
                }
                mean.add(model, of, &self.bytes, means);
            }
            mean.divide(means);
        }
        pseudo_gradients(&values.params, &self.means, &mut values.grads);
        Ok(())
    }

    /// Puts masters in place of the parameters that have some.
    fn read_masters(&mut self, slices: &[Slice], values: &mut Values) -> Result<(), Failure> {
        let updates = &self.stream.plan.updates;
        let tensor_of = |update: usize| updates[update].tensor;
        let of = |update| tensor_of(update).storage.params;
        let saved = |update| &tensor_of(update).saved;
        if let Some(NotRounded {
            tensor,
            elem,
            actual,
            expected,
        }) = self
            .reader
            .read_masters(slices, saved, of, &mut values.params)?
        {
            let tensor = &tensor_of(tensor).name;
            return Err(anyhow!(
                "tensor {tensor:?}: the parameter at index {elem} is {actual:?}, expected {expected:?}, which is its \
                 master in the state, rounded to the nearest; parameters and state are not of the same step"
            )
            .into());
        }
        let rests = |update| saved(update).rests.as_deref().unwrap_or_default();
        let rests = runs(slices, rests);
        self.join_rests(slices, &rests, &mut values.params)
    }

    /// Makes masters of parameters and what those leave of them, and makes sure that it is masters that left them.
    fn join_rests(
        &mut self,
        slices: &[Slice],
        runs: &[Run],
        params: &mut [f32],
    ) -> Result<(), Failure> {
        let mut rests = std::mem::take(&mut self.rests);
        for Run { at, elems, codec } in runs {
            let first = elems.start;
            let params = &mut params[elems.clone()];
            rests.resize(params.len(), 0.0);
            let (at, codec, elems) = (*at, *codec, 0..params.len());
            self.reader.read(&[Run { at, elems, codec }], &mut rests)?;
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
                let (tensor, index) = self.name(slices, first + index);
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
    fn name(&self, slices: &[Slice], elem: usize) -> (&str, u64) {
        let (update, index) = Slice::find(slices, elem).unwrap_or_default();
        (&self.stream.plan.updates[update].tensor.name, index)
    }

    /// Makes all steps of a window; where nothing is rounded between them the engine makes many at once.
    fn step(
        &mut self,
        slices: &[Slice],
        (group, mut phase): (usize, u64),
        values: &mut Values,
    ) -> Result<(), Failure> {
        let Stream { plan, repeat, .. } = *self.stream;
        let config = &plan.groups.get(group).config;
        let is_rounded = |slice: &Slice| plan.updates[slice.tensor].tensor.is_rounded();
        let is_rounded = slices.iter().any(is_rounded);
        let at_once = if is_rounded { 1 } else { STEPS_AT_ONCE };
        let mut done = 0;
        loop {
            let times = at_once.min(repeat - done);
            self.engines[group].step(values, phase, times)?;
            if is_rounded {
                self.round(slices, done.into(), &mut values.params);
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
    fn round(&mut self, slices: &[Slice], done: u64, params: &mut [f32]) {
        for (slice, elems) in Slice::in_window(slices) {
            let tensor = self.stream.plan.updates[slice.tensor].tensor;
            if !tensor.is_rounded() {
                continue;
            }
            let step = tensor.saved.applied_steps.saturating_add(done);
            let random = match self.stream.rounding {
                Rounding::Nearest => None,
                Rounding::Stochastic { seed } => Some(Random {
                    key: Key::new(seed, &tensor.name, step),
                    first: slice.elems.start as u32,
                    number: 0,
                }),
            };
            let (params, of) = (&mut params[elems], tensor.storage.params);
            self.rounded.resize(params.len(), 0);
            storage::round(of, params, random, &mut self.rounded);
            storage::unpack(of, &self.rounded, params);
        }
    }

    fn copy(&self, copy: &Copy, bytes: &mut Vec<u8>) -> Result<(), Failure> {
        if self.shared.forbidden.load(Ordering::Relaxed) {
            return Ok(());
        }
        bytes.resize(copy.bytes as usize, 0);
        self.reader.read_bytes(copy.from, bytes)?;
        Ok(self.writer.write_bytes(copy.to, bytes)?)
    }

    /// Looks for gradients that are not finite, or not any more when they have been divided by their scale.
    fn look_at_grads(&self, slices: &[Slice], grads: &[f32]) {
        let unscale = f64::from(self.stream.verdict.record().scale).recip() as f32;
        let found = self.look_for(slices, Checked::Gradient, grads, |_, grad| {
            is_nonfinite(grad * unscale, StorageType::F32)
        });
        if found {
            self.shared.forbidden.store(true, Ordering::Relaxed);
        }
    }

    /// Looks for what the step has made that is not finite, or will not be when it is stored.
    fn look_at_results(&self, slices: &[Slice], values: &Values) {
        self.look_for(slices, Checked::Params, &values.params, |of, value| {
            is_nonfinite(value, of)
        });
        for (slot, values) in values.slots.iter().enumerate() {
            self.look_for(slices, Checked::Slot(slot), values, |_, value| {
                is_nonfinite(value, StorageType::F32)
            });
        }
    }

    /// Counts values of a window by tensor; `is_nonfinite` is told what the tensor's parameters are stored as, too. Returns
    /// whether there are any.
    fn look_for(
        &self,
        slices: &[Slice],
        checked: Checked,
        values: &[f32],
        is_nonfinite: impl Fn(StorageType, f32) -> bool,
    ) -> bool {
        let mut is_found = false;
        if self.stream.nonfinite == NonFinite::Apply {
            return is_found;
        }
        for (slice, elems) in Slice::in_window(slices) {
            let tensor = self.stream.plan.updates[slice.tensor].tensor;
            let of = tensor.storage.params;
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
            let first = slice.elems.start + first.unwrap_or(0) as u64;
            let mut found = self
                .shared
                .nonfinite
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let key = (slice.tensor, checked);
            let (all, earliest) = found.entry(key).or_insert((0, first));
            *all += count;
            *earliest = first.min(*earliest);
        }
        is_found
    }
}

fn refused(error: RoundError) -> Failure {
    Failure::Refused(error.into())
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
