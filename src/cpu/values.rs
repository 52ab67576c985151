//! Where a slot of a tensor's state lies in memory.

use std::ops::{Deref, DerefMut};

/// A quarter of a page. Large allocations all start alike in their pages, and arrays that are walked side by side then
/// meet in the same sets of the caches and the same banks of the memory; a slot stays out of step with what is before it.
const STAGGER_ELEMS: usize = 256;

/// From how many elements on that matters.
const LARGE_ELEMS: usize = 64 * 1024;

/// The values of one slot of one tensor.
#[derive(Clone, Debug)]
pub(super) struct Values {
    storage: Vec<f32>,
    start: usize,
}

impl Values {
    /// For the slot of this index, all of one value.
    pub(super) fn new(numel: usize, value: f32, slot: usize) -> Self {
        let start = if numel < LARGE_ELEMS {
            0
        } else {
            (slot + 1) * STAGGER_ELEMS
        };
        Self {
            storage: vec![value; start + numel],
            start,
        }
    }
}

impl Deref for Values {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.storage[self.start..]
    }
}

impl DerefMut for Values {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.storage[self.start..]
    }
}
