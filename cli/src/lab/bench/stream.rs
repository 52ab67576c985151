//! The roof of the CPU: a copy with the access pattern of the step, by the twin's rules. It takes tasks from a queue
//! on all threads, loads a block of elements before it stores any, and keeps its arrays out of step in their pages.

use std::hint::black_box;
use std::sync::{Mutex, PoisonError};
use std::{array, mem};

use pulp::{Arch, Simd, WithSimd};
use wgpu_optim::rules::MAX_SLOTS;

const TASK_ELEMS: usize = 32 * 1024;
const BLOCK_ELEMS: usize = 32;
const STAGGER_ELEMS: usize = 256;

/// Arrays to copy around.
pub struct Stream {
    x: Vec<f32>,
    y: Vec<f32>,
    /// Each further in by one more [`STAGGER_ELEMS`].
    slots: Vec<Vec<f32>>,
}

impl Stream {
    /// Reads `y`, and reads and writes as many numbers as it has, and as many again for each slot.
    pub fn new(slots: usize, y: &[f32]) -> Self {
        let slot = |slot| vec![1.0; (slot + 1) * STAGGER_ELEMS + y.len()];
        Self {
            x: vec![1.0; y.len()],
            y: y.to_vec(),
            slots: (0..slots).map(slot).collect(),
        }
    }

    pub fn run(&mut self) {
        match self.slots.len() {
            0 => self.copy::<0>(),
            1 => self.copy::<1>(),
            2 => self.copy::<2>(),
            3 => self.copy::<3>(),
            _ => self.copy::<MAX_SLOTS>(),
        }
    }

    fn copy<const SLOTS: usize>(&mut self) {
        // No bits, but no compiler knows, so it cannot leave out the read.
        let mask = black_box(0);
        let slots = self.slots.iter_mut().enumerate();
        let mut slots: Vec<_> = slots
            .map(|(slot, values)| values[(slot + 1) * STAGGER_ELEMS..].chunks_mut(TASK_ELEMS))
            .collect();
        let mut chunk_of = |slot: usize| slots[slot].next().unwrap_or_default();
        let tasks = self.x.chunks_mut(TASK_ELEMS).zip(self.y.chunks(TASK_ELEMS));
        run_all(tasks.map(|(x, y)| Copy::<SLOTS> {
            mask,
            x,
            y,
            slots: array::from_fn(&mut chunk_of),
        }));
    }
}

/// All threads take tasks until there are none.
pub fn run_all<T: WithSimd<Output = ()>>(tasks: impl ExactSizeIterator<Item = T> + Send) {
    let helpers = tasks.len().min(rayon::current_num_threads());
    let tasks = Mutex::new(tasks);
    let work = || {
        let take = || tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
        while let Some(task) = take() {
            Arch::new().dispatch(task);
        }
    };
    rayon::in_place_scope(|scope| {
        for _ in 1..helpers {
            scope.spawn(|_| work());
        }
        work();
    });
}

struct Copy<'a, const SLOTS: usize> {
    mask: u32,
    x: &'a mut [f32],
    y: &'a [f32],
    slots: [&'a mut [f32]; SLOTS],
}

impl<const SLOTS: usize> WithSimd for Copy<'_, SLOTS> {
    type Output = ();

    /// Everything moves on by one array.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let mix = |x: f32, y: f32| f32::from_bits(x.to_bits() ^ (y.to_bits() & self.mask));
        let (x, x_end) = self.x.as_chunks_mut::<BLOCK_ELEMS>();
        let (y, y_end) = self.y.as_chunks::<BLOCK_ELEMS>();
        let mut slots = self.slots.map(|slot| slot.as_chunks_mut::<BLOCK_ELEMS>());
        for (block, (x, y)) in x.iter_mut().zip(y).enumerate() {
            let (mut last, from_y) = (*x, *y);
            let from_slots: [_; SLOTS] = array::from_fn(|slot| slots[slot].0[block]);
            for (slot, from_slot) in slots.iter_mut().zip(from_slots) {
                slot.0[block] = mem::replace(&mut last, from_slot);
            }
            for i in 0..BLOCK_ELEMS {
                x[i] = mix(last[i], from_y[i]);
            }
        }
        for (i, (x, y)) in x_end.iter_mut().zip(y_end).enumerate() {
            let mut last = *x;
            for slot in &mut slots {
                mem::swap(&mut slot.1[i], &mut last);
            }
            *x = mix(last, *y);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_moves_on_by_one_array() {
        // More than a task, and an end that fills no block.
        let numel = TASK_ELEMS + BLOCK_ELEMS + 3;
        for slots in 0..=MAX_SLOTS {
            let mut stream = Stream::new(slots, &vec![7.0; numel]);
            for (slot, values) in stream.slots.iter_mut().enumerate() {
                values.fill(slot as f32 + 2.0);
            }
            stream.run();
            assert_eq!(stream.x, vec![slots as f32 + 1.0; numel]);
            for (slot, values) in stream.slots.iter().enumerate() {
                let moved = &values[(slot + 1) * STAGGER_ELEMS..];
                assert_eq!(moved, vec![slot as f32 + 1.0; numel]);
            }
        }
    }
}
