//! The memory of a section of a tensor's state.

use std::collections::TryReserveError;
use std::hint::black_box;

use super::slices::WordsMut;
use crate::storage::{Codec, SectionValues};

/// A quarter of a page. Large allocations all start alike in their pages, and arrays that are walked side by side then
/// meet in the same sets of the caches and the same banks of the memory; a slot stays out of step with what is before it.
const STAGGER_BYTES: usize = 1024;

/// The number of elements from which on that matters.
const LARGE_ELEMS: usize = 64 * 1024;

/// The values of one section.
#[derive(Clone, Debug)]
pub(super) struct Values {
    codec: Codec,
    memory: Memory,
    start: usize,
}

#[derive(Clone, Debug)]
enum Memory {
    F32(Vec<f32>),
    Half(Vec<u16>),
}

impl Values {
    /// Values for the section of this index, all alike, if there is memory for them.
    pub(super) fn new(
        numel: usize,
        codec: Codec,
        value: f32,
        index: usize,
    ) -> Result<Self, TryReserveError> {
        let elem_bytes = codec.elem_bytes() as usize;
        let start = if numel < LARGE_ELEMS {
            0
        } else {
            (index + 1) * STAGGER_BYTES / elem_bytes
        };
        let len = start + numel;
        let memory = match codec {
            Codec::F32 => Memory::F32(filled(value, len)?),
            _ => {
                let half = SectionValues::filled(codec, value, 1);
                Memory::Half(filled(bytemuck::pod_read_unaligned(half.bytes()), len)?)
            }
        };
        Ok(Self {
            codec,
            memory,
            start,
        })
    }

    pub(super) fn words(&mut self) -> WordsMut<'_> {
        match &mut self.memory {
            Memory::F32(values) => WordsMut::F32(&mut values[self.start..]),
            Memory::Half(values) => WordsMut::Half(&mut values[self.start..]),
        }
    }

    /// A copy.
    pub(super) fn get(&self) -> SectionValues {
        let bytes: &[u8] = match &self.memory {
            Memory::F32(values) => bytemuck::cast_slice(&values[self.start..]),
            Memory::Half(values) => bytemuck::cast_slice(&values[self.start..]),
        };
        SectionValues::from_bytes(self.codec, bytes.to_vec())
    }

    /// Takes over as many values of the same codec.
    pub(super) fn set(&mut self, values: &SectionValues) {
        let bytes: &mut [u8] = match self.words() {
            WordsMut::F32(values) => bytemuck::cast_slice_mut(values),
            WordsMut::Half(values) => bytemuck::cast_slice_mut(values),
        };
        bytes.copy_from_slice(values.bytes());
    }

    /// Makes all of them one value.
    pub(super) fn fill(&mut self, value: f32) {
        let numel = self.words().len();
        self.set(&SectionValues::filled(self.codec, value, numel));
    }
}

/// So many of one value. Memory is asked for before, because `vec!`, which gets zeros from the system as they are, ends the
/// process where there is none.
fn filled<T: Clone>(value: T, len: usize) -> Result<Vec<T>, TryReserveError> {
    let mut asked = Vec::<T>::new();
    asked.try_reserve_exact(len)?;
    drop(black_box(asked));
    Ok(vec![value; len])
}
