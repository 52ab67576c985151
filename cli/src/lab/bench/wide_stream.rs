//! The roof of the CPU where something is stored in 16 bits: all threads move the bytes of the step, a block of every
//! array loaded before any is stored.

use std::hint::black_box;

use pulp::{Simd, WithSimd};
use wgpu_optim::Masters;
use wgpu_optim::rules::MAX_SLOTS;
use wgpu_optim::storage::Storage;

use super::stream::run_all;

const TASK_ELEMS: usize = 32 * 1024;
const BLOCK_ELEMS: usize = 32;
const STAGGER_WORDS: usize = 256;

/// Parameters, gradients, slots and masters.
const MAX_ARRAYS: usize = MAX_SLOTS + 3;

/// Arrays to copy around.
pub struct WideStream {
    arrays: Vec<Array>,
    numel: usize,
}

struct Array {
    /// Each further in by one more [`STAGGER_WORDS`].
    values: Vec<u32>,
    /// Words of a block.
    words: usize,
    reads: bool,
    writes: bool,
}

impl WideStream {
    /// Makes a stream over so many elements, each array with its step's accesses.
    pub fn new(storage: &Storage, numel: usize) -> Self {
        let params = (
            storage.params.bytes(),
            storage.masters != Masters::F32,
            true,
        );
        let grads = (storage.grads.bytes(), true, false);
        let state = storage.state.iter();
        let state = state.map(|codec| (codec.elem_bytes(), true, true));
        let arrays = [grads, params].into_iter().chain(state);
        let numel = numel.next_multiple_of(BLOCK_ELEMS);
        let array = |(index, (bytes, reads, writes)): (usize, (u64, bool, bool))| {
            let words = BLOCK_ELEMS * bytes as usize / 4;
            Array {
                values: vec![1; index * STAGGER_WORDS + numel / BLOCK_ELEMS * words],
                words,
                reads,
                writes,
            }
        };
        Self {
            arrays: arrays.enumerate().map(array).collect(),
            numel,
        }
    }

    pub fn run(&mut self) {
        // No bits, but no compiler knows, so it cannot leave out a read.
        let mask = black_box(0);
        let blocks_per_task = TASK_ELEMS / BLOCK_ELEMS;
        let arrays = self.arrays.iter_mut().enumerate();
        let mut chunks: Vec<_> = arrays
            .map(|(index, array)| {
                let chunk = blocks_per_task * array.words;
                let values = &mut array.values[index * STAGGER_WORDS..];
                (
                    array.words,
                    array.reads,
                    array.writes,
                    values.chunks_mut(chunk),
                )
            })
            .collect();
        let tasks = (0..self.numel.div_ceil(TASK_ELEMS)).map(|_| Copy {
            mask,
            arrays: chunks
                .iter_mut()
                .map(|(words, reads, writes, chunks)| Part {
                    values: chunks.next().unwrap_or_default(),
                    words: *words,
                    reads: *reads,
                    writes: *writes,
                })
                .collect(),
        });
        run_all(tasks);
    }
}

struct Part<'a> {
    values: &'a mut [u32],
    words: usize,
    reads: bool,
    writes: bool,
}

struct Copy<'a> {
    mask: u32,
    /// The gradients first.
    arrays: Vec<Part<'a>>,
}

impl WithSimd for Copy<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) {
        const HALF: usize = BLOCK_ELEMS / 2;
        let mut loaded = [[0_u32; BLOCK_ELEMS]; MAX_ARRAYS];
        let blocks = self.arrays[0].values.len() / self.arrays[0].words;
        for block in 0..blocks {
            for (array, loaded) in self.arrays.iter().zip(&mut loaded) {
                let values = &array.values[block * array.words..][..array.words];
                match values {
                    _ if !array.reads => {}
                    values if values.len() == HALF => loaded[..HALF].copy_from_slice(values),
                    values => loaded.copy_from_slice(values),
                }
            }
            let grads = loaded[0];
            for (array, loaded) in self
                .arrays
                .iter_mut()
                .zip(&loaded)
                .filter(|(a, _)| a.writes)
            {
                let values = &mut array.values[block * array.words..][..array.words];
                for ((value, loaded), grad) in values.iter_mut().zip(loaded).zip(&grads) {
                    *value = loaded ^ (grad & self.mask);
                }
            }
        }
    }
}
