//! Where a tensor's velocity lies in memory.

use std::ops::{Deref, DerefMut};

/// A quarter of a page. Large allocations all start alike in their pages, and three arrays that are walked side by side
/// then meet in the same sets of the caches and the same banks of the memory; this one stays out of step.
const STAGGER_ELEMS: usize = 256;

/// From how many elements on that matters.
const LARGE_ELEMS: usize = 64 * 1024;

/// The velocity of one tensor; empty without momentum.
#[derive(Clone, Debug)]
pub(super) struct Velocity {
    storage: Vec<f32>,
    start: usize,
}

impl Velocity {
    pub(super) fn zeros(numel: usize) -> Self {
        let start = if numel < LARGE_ELEMS {
            0
        } else {
            STAGGER_ELEMS
        };
        Self {
            storage: vec![0.0; start + numel],
            start,
        }
    }
}

impl Deref for Velocity {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.storage[self.start..]
    }
}

impl DerefMut for Velocity {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.storage[self.start..]
    }
}
