//! Where a section of a tensor's state lies in memory: a slot, or the masters.

use std::collections::TryReserveError;
use std::hint::black_box;

use super::slices::WordsMut;
use crate::storage::{Masters, StorageType, bf16, f16};

/// A quarter of a page. Large allocations all start alike in their pages, and arrays that are walked side by side then
/// meet in the same sets of the caches and the same banks of the memory; a slot stays out of step with what is before it.
const STAGGER_BYTES: usize = 1024;

/// From how many elements on that matters.
const LARGE_ELEMS: usize = 64 * 1024;

/// The values of one slot of one tensor, or its masters.
#[derive(Clone, Debug)]
pub(super) struct Values {
    storage: Storage,
    start: usize,
}

#[derive(Clone, Debug)]
enum Storage {
    F32(Vec<f32>),
    Half(Vec<u16>),
}

impl Values {
    /// Values for the section of this index, all alike, if there is memory for them.
    pub(super) fn new(
        numel: usize,
        of: StorageType,
        value: f32,
        index: usize,
    ) -> Result<Self, TryReserveError> {
        let elem_bytes = of.bytes() as usize;
        let start = if numel < LARGE_ELEMS {
            0
        } else {
            (index + 1) * STAGGER_BYTES / elem_bytes
        };
        let len = start + numel;
        let bits = value.to_bits();
        let storage = match of {
            StorageType::F32 => Storage::F32(filled(value, len)?),
            StorageType::Bf16 => Storage::Half(filled(bf16::nearest(bits), len)?),
            StorageType::F16 => Storage::Half(filled(f16::nearest(bits), len)?),
        };
        Ok(Self { storage, start })
    }

    /// Masters, of which a zero is what the parameter is.
    pub(super) fn masters(
        numel: usize,
        masters: Masters,
        index: usize,
    ) -> Option<Result<Self, TryReserveError>> {
        match masters {
            Masters::None => None,
            Masters::F32 => Some(Self::new(numel, StorageType::F32, 0.0, index)),
            // Nothing is left of what is a bf16.
            Masters::LowBits => Some(Self::new(numel, StorageType::Bf16, 0.0, index)),
        }
    }

    pub(super) fn words(&mut self) -> WordsMut<'_> {
        match &mut self.storage {
            Storage::F32(values) => WordsMut::F32(&mut values[self.start..]),
            Storage::Half(values) => WordsMut::Half(&mut values[self.start..]),
        }
    }

    /// A copy of rests, as a state has them.
    pub(super) fn rests(&self) -> Vec<f32> {
        match &self.storage {
            Storage::F32(_) => Vec::new(),
            Storage::Half(values) => values[self.start..]
                .iter()
                .copied()
                .map(f32::from)
                .collect(),
        }
    }

    /// A copy as `f32`.
    pub(super) fn to_vec(&self, of: StorageType) -> Vec<f32> {
        match &self.storage {
            Storage::F32(values) => values[self.start..].to_vec(),
            Storage::Half(values) => {
                let unpack = match of {
                    StorageType::F16 => f16::unpack,
                    _ => bf16::unpack,
                };
                let values = values[self.start..].iter();
                values.map(|half| f32::from_bits(unpack(*half))).collect()
            }
        }
    }

    /// Makes them zeros.
    pub(super) fn clear(&mut self) {
        match self.words() {
            WordsMut::F32(slice) => slice.fill(0.0),
            WordsMut::Half(slice) => slice.fill(0),
        }
    }

    /// Takes over values, rounded to the nearest.
    pub(super) fn set(&mut self, of: StorageType, values: impl Iterator<Item = f32>) {
        let nearest = match of {
            StorageType::F16 => f16::nearest,
            _ => bf16::nearest,
        };
        match self.words() {
            WordsMut::F32(slice) => slice
                .iter_mut()
                .zip(values)
                .for_each(|(to, value)| *to = value),
            WordsMut::Half(slice) => {
                for (to, value) in slice.iter_mut().zip(values) {
                    *to = nearest(value.to_bits());
                }
            }
        }
    }

    /// Takes over rests.
    pub(super) fn set_rests(&mut self, rests: impl Iterator<Item = u16>) {
        if let WordsMut::Half(slice) = self.words() {
            slice
                .iter_mut()
                .zip(rests)
                .for_each(|(to, rest)| *to = rest);
        }
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
