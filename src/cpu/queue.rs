//! One parallel region over a list of tensors: the threads take tasks of about equal size from one queue.

use std::hint;
use std::iter::repeat;
use std::mem;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::slices::{Grads, Params, Words, WordsMut};
use super::stored::{self, Stored};
use super::values::Values;
use crate::control::Factors;
use crate::rules::{Groups, MAX_SUMS, Scalars, Twin};
use crate::state::Tensor;
use crate::storage::MAX_SECTIONS;

/// Elements per task: three slices of this length stay in a core's second-level cache, and a task outweighs
/// taking it by far.
const TASK_ELEMS: usize = 32 * 1024;

/// Elements from which other threads are asked for help. One core needs some 20 microseconds for as many, and waking
/// a thread takes up to twice that where it sleeps.
const PARALLEL_ELEMS: usize = 4 * TASK_ELEMS;

/// The number of times to look whether the others are done before going to sleep: they are at most a task behind, and being
/// woken takes longer than that.
const SPINS: u32 = 4096;

/// Tensors with the slices of each.
pub(super) struct Batch<'a, P, G> {
    pub(super) tensors: &'a [Tensor],
    /// Steps applied to each.
    pub(super) applied: &'a [u64],
    /// The factors of each tensor's gradients; none where they come as they are.
    pub(super) factors: &'a [Factors],
    /// The scalars that the rule of each tensor has decided on; none before, and where no rule takes sums.
    pub(super) decided: &'a [Option<Scalars>],
    pub(super) params: &'a mut [P],
    /// The sections of each.
    pub(super) state: &'a mut [Vec<Values>],
    pub(super) grads: &'a [G],
}

/// One tensor, or a part of it.
struct Part<'a> {
    tensor: &'a Tensor,
    applied_steps: u64,
    factors: Option<Factors>,
    decided: Option<Scalars>,
    /// The index of the first element.
    start: usize,
    params: WordsMut<'a>,
    /// The sections that there are, then empty ones.
    state: [WordsMut<'a>; MAX_SECTIONS],
    grads: Words<'a>,
}

enum Task<'a, P, G> {
    Batch(Batch<'a, P, G>),
    Part(Part<'a>),
}

/// Applies one step to every tensor that is not frozen.
pub(super) fn step<R: Twin, P: Params + Send, G: Grads + Sync>(
    groups: &Groups<R>,
    mut batch: Batch<'_, P, G>,
) {
    let has_sums = |tensor: &Tensor| !groups.config(tensor.group).sums().is_empty();
    if batch.tensors.iter().any(has_sums) {
        let decided: Vec<_> = batch
            .reborrowed()
            .parts()
            .map(|part| {
                let takes_part = !part.tensor.frozen && has_sums(part.tensor);
                takes_part.then(|| part.decide(groups))
            })
            .collect();
        let mut batch = batch.reborrowed();
        batch.decided = &decided;
        return step_decided(groups, batch);
    }
    step_decided(groups, batch);
}

/// Applies the step whose scalars are known.
fn step_decided<R: Twin, P: Params + Send, G: Grads + Sync>(
    groups: &Groups<R>,
    batch: Batch<'_, P, G>,
) {
    let numel: usize = batch.tensors.iter().map(work_of).sum();
    let tasks = numel.div_ceil(TASK_ELEMS);
    let helpers = rayon::current_num_threads().min(tasks).saturating_sub(1);
    if numel < PARALLEL_ELEMS || helpers == 0 {
        return batch.step(groups);
    }
    let queue = Mutex::new(Queue { batch, part: None });
    let work = || {
        let take = || queue.lock().unwrap_or_else(PoisonError::into_inner).take();
        while let Some(task) = take() {
            match task {
                Task::Batch(batch) => batch.step(groups),
                Task::Part(part) => part.step(groups),
            }
        }
    };
    let working = AtomicUsize::new(helpers);
    rayon::in_place_scope(|scope| {
        for _ in 0..helpers {
            scope.spawn(|_| {
                work();
                working.fetch_sub(1, Ordering::Release);
            });
        }
        work();
        for _ in 0..SPINS {
            if working.load(Ordering::Acquire) == 0 {
                break;
            }
            hint::spin_loop();
        }
    });
}

/// Elements of a tensor that a step touches.
fn work_of(tensor: &Tensor) -> usize {
    if tensor.frozen {
        0
    } else {
        tensor.numel as usize
    }
}

struct Queue<'a, P, G> {
    batch: Batch<'a, P, G>,
    /// The rest of a tensor that is handed out in parts.
    part: Option<Part<'a>>,
}

impl<'a, P: Params, G: Grads> Queue<'a, P, G> {
    /// The next part of a large tensor, or as many small ones as make a task.
    fn take(&mut self) -> Option<Task<'a, P, G>> {
        if let Some(part) = self.part.take() {
            let (first, rest) = part.split(TASK_ELEMS);
            self.part = rest;
            return Some(Task::Part(first));
        }
        let mut elems = 0;
        let fits = |tensor: &&Tensor| {
            elems += work_of(tensor);
            elems <= TASK_ELEMS
        };
        let count = self.batch.tensors.iter().take_while(fits).count();
        if count > 0 {
            return Some(Task::Batch(self.batch.split_off(count)));
        }
        self.part = self.batch.split_off(1).parts().next();
        self.part.is_some().then(|| self.take()).flatten()
    }
}

impl<'a, P: Params, G: Grads> Batch<'a, P, G> {
    /// The batch for a pass that comes before another.
    fn reborrowed(&mut self) -> Batch<'_, P, G> {
        Batch {
            params: &mut *self.params,
            state: &mut *self.state,
            ..*self
        }
    }

    /// Takes the first `count` tensors out.
    fn split_off(&mut self, count: usize) -> Self {
        let count = count.min(self.tensors.len());
        let (tensors, later_tensors) = self.tensors.split_at(count);
        let (applied, later_applied) = self.applied.split_at(count);
        let (factors, later_factors) = self.factors.split_at(count.min(self.factors.len()));
        let (decided, later_decided) = self.decided.split_at(count.min(self.decided.len()));
        let (params, later_params) = mem::take(&mut self.params).split_at_mut(count);
        let (state, later_state) = mem::take(&mut self.state).split_at_mut(count);
        let (grads, later_grads) = self.grads.split_at(count);
        *self = Self {
            tensors: later_tensors,
            applied: later_applied,
            factors: later_factors,
            decided: later_decided,
            params: later_params,
            state: later_state,
            grads: later_grads,
        };
        Self {
            tensors,
            applied,
            factors,
            decided,
            params,
            state,
            grads,
        }
    }

    fn parts(self) -> impl Iterator<Item = Part<'a>> {
        let slices = self.params.iter_mut().zip(self.state).zip(self.grads);
        let factors = self.factors.iter().copied().map(Some).chain(repeat(None));
        let decided = self.decided.iter().copied().chain(repeat(None));
        let tensors = self.tensors.iter().zip(self.applied).zip(factors);
        let tensors = tensors.zip(decided).zip(slices);
        tensors.map(
            |((((tensor, applied_steps), factors), decided), ((params, state), grads))| {
                let mut sections = state.iter_mut();
                Part {
                    tensor,
                    applied_steps: *applied_steps,
                    factors,
                    decided,
                    start: 0,
                    params: params.words(),
                    state: std::array::from_fn(|_| match sections.next() {
                        Some(values) => values.words(),
                        None => WordsMut::F32(&mut []),
                    }),
                    grads: grads.words(),
                }
            },
        )
    }

    fn step<R: Twin>(self, groups: &Groups<R>) {
        self.parts()
            .filter(|part| !part.tensor.frozen)
            .for_each(|part| part.step(groups));
    }
}

impl Part<'_> {
    fn step<R: Twin>(mut self, groups: &Groups<R>) {
        let config = groups.config(self.tensor.group);
        let scalars = self.decided.unwrap_or_else(|| self.scalars(config));
        let stored = self.stored(groups);
        let state = &mut self.state[..self.tensor.storage.state.len()];
        stored::step(config, &scalars, stored, self.params, state, self.grads);
    }

    /// The scalars of a step over the whole tensor that this is, by the sums of its rule. Their order does not depend on the
    /// number of threads.
    fn decide<R: Twin>(self, groups: &Groups<R>) -> Scalars {
        let config = groups.config(self.tensor.group);
        let (scalars, count) = (self.scalars(config), config.sums().len());
        let (numel, mut rest) = (self.tensor.numel as f32, Some(self));
        let tasks = std::iter::from_fn(|| {
            let (task, later) = rest.take()?.split(TASK_ELEMS);
            rest = later;
            Some(task)
        });
        let measured = |mut task: Self| {
            let mut sums = [0.0; MAX_SUMS];
            let stored = task.stored(groups);
            let state = &mut task.state[..task.tensor.storage.state.len()];
            let (params, grads) = (task.params, task.grads);
            let into = &mut sums[..count];
            stored::measure(config, &scalars, stored, params, state, grads, into);
            sums
        };
        let tasks: Vec<_> = tasks.collect();
        let of_tasks: Vec<_> = match tasks.len() {
            1 => tasks.into_iter().map(measured).collect(),
            _ => tasks.into_par_iter().map(measured).collect(),
        };
        let mut sums = [0.0; MAX_SUMS];
        for of_task in of_tasks {
            for (sum, of_task) in sums.iter_mut().zip(of_task) {
                *sum += of_task;
            }
        }
        let sums = sums.map(|sum| sum as f32);
        config.decide(&scalars, &sums[..count], numel)
    }

    fn scalars<R: Twin>(&self, config: &R) -> Scalars {
        config.scalars(config.phase(self.applied_steps))
    }

    fn stored<R: Twin>(&self, groups: &Groups<R>) -> Stored {
        let rounding = groups.rounding(self.tensor.group);
        Stored {
            storage: self.tensor.storage,
            key: self.tensor.key(rounding, self.applied_steps),
            start: self.start,
            factors: self.factors.filter(|factors| !factors.change_nothing()),
        }
    }

    /// The first `elems` elements, and the rest if there is one.
    fn split(self, elems: usize) -> (Self, Option<Self>) {
        let elems = elems.min(self.params.len());
        let (params, later_params) = self.params.split_at(elems);
        let (grads, later_grads) = self.grads.split_at(elems);
        let (mut state, mut later_state) = (self.state.map(Some), [const { None }; MAX_SECTIONS]);
        for (first, later) in state.iter_mut().zip(&mut later_state) {
            if let Some(section) = first.take() {
                let mid = elems.min(section.len());
                let (now, rest) = section.split_at(mid);
                (*first, *later) = (Some(now), Some(rest));
            }
        }
        let nothing = || WordsMut::F32(&mut []);
        let (tensor, applied_steps, start) = (self.tensor, self.applied_steps, self.start);
        let (factors, decided) = (self.factors, self.decided);
        let first = Self {
            tensor,
            applied_steps,
            factors,
            decided,
            start,
            params,
            state: state.map(|section| section.unwrap_or_else(nothing)),
            grads,
        };
        let rest = Self {
            tensor,
            applied_steps,
            factors,
            decided,
            start: start + elems,
            params: later_params,
            state: later_state.map(|section| section.unwrap_or_else(nothing)),
            grads: later_grads,
        };
        (first, (rest.params.len() > 0).then_some(rest))
    }
}
