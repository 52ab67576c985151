//! The values of a tensor in memory, by what they are stored as.

use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};

use super::error::SliceError;
use crate::storage::{SectionValues, StorageType};

/// The values of a tensor.
#[derive(Clone, Copy, Debug)]
pub enum TensorSlice<'a> {
    /// As [`StorageType::F32`].
    F32(&'a [f32]),
    /// As [`StorageType::Bf16`].
    Bf16(&'a [bf16]),
    /// As [`StorageType::F16`].
    F16(&'a [f16]),
}

/// The values of a tensor, to be written.
#[derive(Debug)]
pub enum TensorSliceMut<'a> {
    /// As [`StorageType::F32`].
    F32(&'a mut [f32]),
    /// As [`StorageType::Bf16`].
    Bf16(&'a mut [bf16]),
    /// As [`StorageType::F16`].
    F16(&'a mut [f16]),
}

/// The values of a tensor whose type is known when a program runs.
#[derive(Clone, Debug, PartialEq)]
pub enum TensorValues {
    /// As [`StorageType::F32`].
    F32(Vec<f32>),
    /// As [`StorageType::Bf16`].
    Bf16(Vec<bf16>),
    /// As [`StorageType::F16`].
    F16(Vec<f16>),
}

impl TensorValues {
    /// Values as a type has them, rounded to the nearest.
    #[must_use]
    pub fn new(of: StorageType, values: &[f32]) -> Self {
        match of {
            StorageType::F32 => Self::F32(values.to_vec()),
            StorageType::Bf16 => Self::Bf16(values.iter().map(|x| bf16::from_f32(*x)).collect()),
            StorageType::F16 => Self::F16(values.iter().map(|x| f16::from_f32(*x)).collect()),
        }
    }

    /// All of them, as gradients of a step.
    #[must_use]
    pub fn slice(&self) -> TensorSlice<'_> {
        match self {
            Self::F32(values) => TensorSlice::F32(values),
            Self::Bf16(values) => TensorSlice::Bf16(values),
            Self::F16(values) => TensorSlice::F16(values),
        }
    }

    /// All of them, as parameters of a step.
    #[must_use]
    pub fn slice_mut(&mut self) -> TensorSliceMut<'_> {
        match self {
            Self::F32(values) => TensorSliceMut::F32(values),
            Self::Bf16(values) => TensorSliceMut::Bf16(values),
            Self::F16(values) => TensorSliceMut::F16(values),
        }
    }

    /// A copy as `f32`, which holds each of them exactly.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::F32(values) => values.clone(),
            Self::Bf16(values) => values.iter().map(|x| x.to_f32()).collect(),
            Self::F16(values) => values.iter().map(|x| x.to_f32()).collect(),
        }
    }
}

impl<'a> From<&'a [f32]> for TensorSlice<'a> {
    fn from(slice: &'a [f32]) -> Self {
        Self::F32(slice)
    }
}

impl<'a> From<&'a mut [f32]> for TensorSliceMut<'a> {
    fn from(slice: &'a mut [f32]) -> Self {
        Self::F32(slice)
    }
}

macro_rules! what_a_slice_is {
    ($slice:ident) => {
        impl $slice<'_> {
            /// The storage type of the values.
            #[must_use]
            pub fn storage_type(&self) -> StorageType {
                match self {
                    Self::F32(_) => StorageType::F32,
                    Self::Bf16(_) => StorageType::Bf16,
                    Self::F16(_) => StorageType::F16,
                }
            }

            /// The number of values.
            #[must_use]
            pub fn len(&self) -> usize {
                match self {
                    Self::F32(values) => values.len(),
                    Self::Bf16(values) => values.len(),
                    Self::F16(values) => values.len(),
                }
            }

            /// Whether there are none.
            #[must_use]
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }
        }
    };
}

what_a_slice_is!(TensorSlice);
what_a_slice_is!(TensorSliceMut);

impl TensorSlice<'_> {
    /// A copy of the values.
    pub(super) fn stored(&self) -> SectionValues {
        let bytes = match self.words() {
            Words::F32(slice) => bytemuck::cast_slice(slice),
            Words::Half(slice) => bytemuck::cast_slice(slice),
        };
        SectionValues::from_bytes(self.storage_type().into(), bytes.to_vec())
    }
}

impl TensorSliceMut<'_> {
    /// The values as they lie in memory.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        match self.words() {
            WordsMut::F32(slice) => bytemuck::cast_slice_mut(slice),
            WordsMut::Half(slice) => bytemuck::cast_slice_mut(slice),
        }
    }
}

impl SliceError {
    /// Makes sure that slices are those of the tensors: `expected` has each one's name, type and number of elements, and
    /// `actual` a slice's type and length.
    ///
    /// # Errors
    /// [`SliceError`] that names the first tensor whose slice does not fit.
    pub fn check<'t>(
        role: &'static str,
        expected: impl ExactSizeIterator<Item = (&'t str, StorageType, u64)>,
        actual: impl ExactSizeIterator<Item = (StorageType, usize)>,
    ) -> Result<(), Self> {
        if actual.len() != expected.len() {
            return Err(Self::TensorCount {
                role,
                expected: expected.len(),
                actual: actual.len(),
            });
        }
        for ((tensor, of, numel), (actual, len)) in expected.zip(actual) {
            if actual != of {
                return Err(Self::Stored {
                    tensor: tensor.to_owned(),
                    role,
                    expected: of.name(),
                    actual: actual.name(),
                });
            }
            if len as u64 != numel {
                return Err(Self::Length {
                    tensor: tensor.to_owned(),
                    role,
                    expected: numel as usize,
                    actual: len,
                });
            }
        }
        Ok(())
    }
}

/// Slices of gradients, whatever the caller has them in.
pub(super) trait Grads {
    fn storage(&self) -> StorageType;
    fn words(&self) -> Words<'_>;
}

/// Slices of parameters.
pub(super) trait Params {
    fn storage(&self) -> StorageType;
    fn len(&self) -> usize;
    fn words(&mut self) -> WordsMut<'_>;
}

/// Values by their bits.
#[derive(Clone, Copy)]
pub(super) enum Words<'a> {
    F32(&'a [f32]),
    Half(&'a [u16]),
}

/// Values by their bits, to be written.
pub(super) enum WordsMut<'a> {
    F32(&'a mut [f32]),
    Half(&'a mut [u16]),
}

impl Grads for &[f32] {
    fn storage(&self) -> StorageType {
        StorageType::F32
    }

    fn words(&self) -> Words<'_> {
        Words::F32(self)
    }
}

impl Grads for TensorSlice<'_> {
    fn storage(&self) -> StorageType {
        self.storage_type()
    }

    fn words(&self) -> Words<'_> {
        match self {
            Self::F32(slice) => Words::F32(slice),
            Self::Bf16(slice) => Words::Half(slice.reinterpret_cast()),
            Self::F16(slice) => Words::Half(slice.reinterpret_cast()),
        }
    }
}

impl Params for &mut [f32] {
    fn storage(&self) -> StorageType {
        StorageType::F32
    }

    fn len(&self) -> usize {
        <[f32]>::len(self)
    }

    fn words(&mut self) -> WordsMut<'_> {
        WordsMut::F32(self)
    }
}

impl Params for TensorSliceMut<'_> {
    fn storage(&self) -> StorageType {
        self.storage_type()
    }

    fn len(&self) -> usize {
        TensorSliceMut::len(self)
    }

    fn words(&mut self) -> WordsMut<'_> {
        match self {
            Self::F32(slice) => WordsMut::F32(slice),
            Self::Bf16(slice) => WordsMut::Half(slice.reinterpret_cast_mut()),
            Self::F16(slice) => WordsMut::Half(slice.reinterpret_cast_mut()),
        }
    }
}

impl<'a> Words<'a> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::F32(slice) => slice.len(),
            Self::Half(slice) => slice.len(),
        }
    }

    /// So many at a time.
    pub(super) fn chunks(self, len: usize) -> impl Iterator<Item = Self> {
        let mut left = self;
        std::iter::from_fn(move || {
            let (first, rest) = left.split_at(left.len().min(len));
            left = rest;
            (first.len() > 0).then_some(first)
        })
    }

    pub(super) fn split_at(self, mid: usize) -> (Self, Self) {
        match self {
            Self::F32(slice) => {
                let (first, rest) = slice.split_at(mid);
                (Self::F32(first), Self::F32(rest))
            }
            Self::Half(slice) => {
                let (first, rest) = slice.split_at(mid);
                (Self::Half(first), Self::Half(rest))
            }
        }
    }
}

impl<'a> WordsMut<'a> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::F32(slice) => slice.len(),
            Self::Half(slice) => slice.len(),
        }
    }

    pub(super) fn split_at(self, mid: usize) -> (Self, Self) {
        match self {
            Self::F32(slice) => {
                let (first, rest) = slice.split_at_mut(mid);
                (Self::F32(first), Self::F32(rest))
            }
            Self::Half(slice) => {
                let (first, rest) = slice.split_at_mut(mid);
                (Self::Half(first), Self::Half(rest))
            }
        }
    }
}
