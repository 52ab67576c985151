//! Codecs: how the values of a section of a state lie in memory.
//!
//! A codec is a Rust file here and a WGSL file in `shaders/storage/`, with a line in [`Codec`] and one in the table of
//! `src/wgsl/mod.rs`. Plans, optimizers, states and files go by what it says of itself.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use super::{PARAMS_REST, StorageType, rest};

/// The layout in memory of the values of a section of a state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Codec {
    /// IEEE's binary32.
    #[default]
    F32,
    /// The upper half of an `f32`.
    Bf16,
    /// IEEE's binary16.
    F16,
    /// The sixteen bits that a bf16 leaves of an `f32`: see [`rest`]. Without the bf16 they say nothing.
    LowBits,
}

impl From<StorageType> for Codec {
    fn from(of: StorageType) -> Self {
        match of {
            StorageType::F32 => Self::F32,
            StorageType::Bf16 => Self::Bf16,
            StorageType::F16 => Self::F16,
        }
    }
}

impl Codec {
    /// The type of number that it stores, which the low bits of one are not.
    #[must_use]
    pub const fn float(self) -> Option<StorageType> {
        match self {
            Self::F32 => Some(StorageType::F32),
            Self::Bf16 => Some(StorageType::Bf16),
            Self::F16 => Some(StorageType::F16),
            Self::LowBits => None,
        }
    }

    /// The codec's name: `f32`, `bf16`, `f16`, `low_bits`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self.float() {
            Some(of) => of.name(),
            None => "low_bits",
        }
    }

    /// Bytes of a value.
    #[must_use]
    pub const fn elem_bytes(self) -> u64 {
        match self.float() {
            Some(of) => of.bytes(),
            None => 2,
        }
    }

    /// Values as they lie in memory, rounded to the nearest; low bits are those of masters.
    fn encode(self, values: impl Iterator<Item = f32>) -> Vec<u8> {
        match self.float() {
            Some(of) => of.encode(values),
            None => values
                .map(rest::of_master)
                .flat_map(u16::to_ne_bytes)
                .collect(),
        }
    }

    /// Values that lie in memory; low bits are whole numbers.
    fn decode(self, bytes: &[u8]) -> Vec<f32> {
        match self.float() {
            Some(of) => of.decode(bytes),
            None => {
                let low_bits = bytemuck::pod_collect_to_vec::<u8, u16>(bytes);
                low_bits.into_iter().map(f32::from).collect()
            }
        }
    }
}

/// Values of a section of a state, as they lie in the optimizer's memory.
#[derive(Clone, PartialEq, Eq)]
pub struct SectionValues {
    codec: Codec,
    bytes: Vec<u8>,
}

impl SectionValues {
    /// Values rounded to the nearest that a codec has. Its low bits are those that a bf16 leaves of the values.
    #[must_use]
    pub fn new(codec: Codec, values: &[f32]) -> Self {
        Self {
            codec,
            bytes: codec.encode(values.iter().copied()),
        }
    }

    /// Makes values that are all the same.
    pub(crate) fn filled(codec: Codec, value: f32, numel: usize) -> Self {
        Self {
            codec,
            bytes: codec.encode([value].into_iter()).repeat(numel),
        }
    }

    /// Appends as many of one value.
    pub(crate) fn extend(&mut self, value: f32, numel: usize) {
        self.bytes
            .extend(Self::filled(self.codec, value, numel).bytes);
    }

    /// Returns the values of a slot of this name in a file: low bits of masters ([`PARAMS_REST`]) are whole numbers in
    /// `f32` in older ones.
    #[must_use]
    pub fn of_slot(self, name: &str) -> Self {
        if name != PARAMS_REST || self.codec != Codec::F32 {
            return self;
        }
        let values = self.to_f32().into_iter().map(|value| value as u16);
        Self {
            codec: Codec::LowBits,
            bytes: values.flat_map(u16::to_ne_bytes).collect(),
        }
    }

    /// Values that lie in memory like this, in the byte order of the host; what is no whole value is left out.
    #[must_use]
    pub fn from_bytes(codec: Codec, mut bytes: Vec<u8>) -> Self {
        bytes.truncate(bytes.len() - bytes.len() % codec.elem_bytes() as usize);
        Self { codec, bytes }
    }

    /// Some of the values.
    pub(crate) fn slice(&self, elems: Range<usize>) -> &[u8] {
        let elem_bytes = self.codec.elem_bytes() as usize;
        &self.bytes[elems.start * elem_bytes..elems.end * elem_bytes]
    }

    /// The codec.
    #[must_use]
    pub const fn codec(&self) -> Codec {
        self.codec
    }

    /// The number of values.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.bytes.len() / self.codec.elem_bytes() as usize
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The values as they lie in memory, in the byte order of the host.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The values as they lie in memory, in the byte order of the host.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// The values as `f32`, exactly; low bits are whole numbers below 2^16.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        self.codec.decode(&self.bytes)
    }

    /// The values by another codec, rounded to the nearest: `f32` to low bits are masters to what a bf16 leaves of them.
    pub(crate) fn by(&self, codec: Codec) -> Cow<'_, Self> {
        match self.codec == codec {
            true => Cow::Borrowed(self),
            false => Cow::Owned(Self::new(codec, &self.to_f32())),
        }
    }
}

impl From<Vec<f32>> for SectionValues {
    fn from(values: Vec<f32>) -> Self {
        Self::new(Codec::F32, &values)
    }
}

impl fmt::Debug for SectionValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple(self.codec.name())
            .field(&self.to_f32())
            .finish()
    }
}
