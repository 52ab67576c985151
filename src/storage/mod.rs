//! Values in memory: storage types, rounding to them, masters.
//!
//! Kernels and twins compute in `f32`, whatever is stored. A value of sixteen bits is unpacked exactly when it is loaded,
//! and rounded once when it is stored, in integers, so that every adapter and the CPU give the same bits for the same
//! `f32`. No device feature is needed: two values lie in a word, the first in its lower half.
//!
//! | [`Precision`] of 16-bit parameters | bytes per element beside gradients and slots | what is lost |
//! |---|---|---|
//! | [`Masters::F32`] | 10, at a tensor's first step 8 | nothing: the parameters are the masters, rounded |
//! | [`Masters::LowBits`], bf16 only | 8 | nothing |
//! | [`Masters::None`], [`Rounding::Nearest`] | 4 | updates below half a unit in the last place |
//! | [`Masters::None`], [`Rounding::Stochastic`] | 4 | nothing in the mean |

pub mod bf16;
mod codec;
pub mod f16;
mod random;
pub mod rest;
mod slices;

use std::ops::Deref;

pub use codec::{Codec, SectionValues};
pub use random::Key;
pub use slices::{Random, round, unpack};

/// Most slots that a rule keeps.
pub const MAX_SLOTS: usize = 4;

/// Most sections of a tensor's state: the slots, and the masters.
pub const MAX_SECTIONS: usize = MAX_SLOTS + 1;

/// The type of a stored value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StorageType {
    /// IEEE's binary32.
    #[default]
    F32,
    /// The upper half of an `f32`: its range, and 8 bits of precision.
    Bf16,
    /// IEEE's binary16: 11 bits of precision, 65,504 at most.
    F16,
}

impl StorageType {
    /// Every type.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::F16];

    /// Bytes of a value.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The type's name: `f32`, `bf16`, `f16`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// Values as they lie in memory, rounded to the nearest.
    pub(crate) fn encode(self, values: impl Iterator<Item = f32>) -> Vec<u8> {
        let bits = values.map(f32::to_bits);
        match self {
            Self::F32 => bits.flat_map(u32::to_ne_bytes).collect(),
            Self::Bf16 => bits.map(bf16::nearest).flat_map(u16::to_ne_bytes).collect(),
            Self::F16 => bits.map(f16::nearest).flat_map(u16::to_ne_bytes).collect(),
        }
    }

    /// Values that lie in memory.
    pub(crate) fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let halves = || bytemuck::pod_collect_to_vec::<u8, u16>(bytes).into_iter();
        match self {
            Self::F32 => bytemuck::pod_collect_to_vec(bytes),
            Self::Bf16 => halves().map(bf16::unpack).map(f32::from_bits).collect(),
            Self::F16 => halves().map(f16::unpack).map(f32::from_bits).collect(),
        }
    }

    /// The stored value next to a value that is not below it, or not above it.
    pub(crate) fn next(self, value: f32, upwards: bool) -> f32 {
        let near = self.rounded(value);
        let is_beyond = if upwards {
            near >= value
        } else {
            near <= value
        };
        let nearest = match self {
            _ if is_beyond || value.is_nan() => return near,
            Self::F32 => return value,
            Self::Bf16 => bf16::nearest,
            Self::F16 => f16::nearest,
        };
        let half = nearest(value.to_bits());
        let magnitude = i32::from(half & 0x7fff);
        let number = if half & 0x8000 == 0 {
            magnitude
        } else {
            -magnitude
        };
        let number = if upwards { number + 1 } else { number - 1 };
        let sign = if number < 0 { 0x8000 } else { 0 };
        let half = sign | number.unsigned_abs() as u16;
        f32::from_bits(match self {
            Self::F16 => f16::unpack(half),
            _ => bf16::unpack(half),
        })
    }

    /// The value that is loaded after this one has been stored, rounded to the nearest.
    #[must_use]
    pub const fn rounded(self, value: f32) -> f32 {
        let bits = value.to_bits();
        f32::from_bits(match self {
            Self::F32 => bits,
            Self::Bf16 => bf16::unpack(bf16::nearest(bits)),
            Self::F16 => f16::unpack(f16::nearest(bits)),
        })
    }
}

/// The memory of 16-bit parameters beside themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Masters {
    /// Nothing beyond the parameters themselves.
    None,
    /// An `f32` each, in a slot named [`MASTER_PARAMS`] that starts as the parameters at the tensor's first step. What is
    /// in the parameters afterwards is only written, but for those whose master is zero: a program that writes them says
    /// so by `params_changed` of its optimizer, or the next step undoes it.
    #[default]
    F32,
    /// The low sixteen bits that a bf16 leaves of the `f32`: the pair is the master. Where the `f32` is as near to
    /// another bf16, the parameter is the larger of both in magnitude. f16, which leaves more than sixteen bits, has
    /// masters in `f32`. Parameters that a program writes are what the next step starts from, give or take less than half
    /// a unit in the last place, or exactly after `params_changed`.
    LowBits,
}

/// The slot of a state that holds [`Masters::F32`].
pub const MASTER_PARAMS: &str = "master_params";

/// The slot of a state that holds [`Masters::LowBits`]: whole numbers below 2^16, the lower halves of the masters' bits.
/// With a parameter each makes up a master by [`rest::join`].
pub const PARAMS_REST: &str = "params_rest";

impl Masters {
    /// The slot of a state that holds them; of none it has no name.
    #[must_use]
    pub const fn slot(self) -> &'static str {
        match self {
            Self::None => "",
            Self::F32 => MASTER_PARAMS,
            Self::LowBits => PARAMS_REST,
        }
    }

    /// The codec of their section of the state, if there is one.
    #[must_use]
    pub const fn codec(self) -> Option<Codec> {
        match self {
            Self::None => None,
            Self::F32 => Some(Codec::F32),
            Self::LowBits => Some(Codec::LowBits),
        }
    }
}

/// The rounding of a value to sixteen bits when it is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// To the nearest, to the even one of two that are as near.
    #[default]
    Nearest,
    /// To either neighbour, as often as the other is far: right in the mean, where the nearest would stand still. The
    /// random bits are those of the seed, the tensor's name, the number of steps applied to it and the element's index
    /// in it modulo 2^32, so a run repeated is the same run on any device that computes the same `f32`.
    ///
    /// Parameters that have masters are rounded to the nearest. A tensor takes a dispatch of its own.
    Stochastic {
        /// The seed of the whole run.
        seed: u64,
    },
}

/// The types in which the tensors of a parameter group are remembered, and their rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Precision {
    /// The storage type of the rule's slots.
    pub state: StorageType,
    /// The storage types of slots that have others, by name. An optimizer that has no rule with such a slot is not built.
    ///
    /// ```
    /// use wgpu_optim::{Precision, StorageType};
    ///
    /// // Adam's second moments change by a thousandth a step, which a bf16 does not hold.
    /// let precision =
    ///     Precision { state: StorageType::Bf16, slots: &[("exp_avg_sq", StorageType::F32)], ..Precision::default() };
    /// assert_eq!(precision.of_slot("exp_avg"), StorageType::Bf16);
    /// assert_eq!(precision.of_slot("exp_avg_sq"), StorageType::F32);
    /// ```
    pub slots: &'static [(&'static str, StorageType)],
    /// The memory of 16-bit parameters beyond their own bits; those of 32 bits have none.
    pub masters: Masters,
    /// The rounding of values that are stored in 16 bits.
    pub rounding: Rounding,
}

impl Precision {
    /// The storage type of a slot.
    #[must_use]
    pub fn of_slot(&self, name: &str) -> StorageType {
        let own = self.slots.iter().find(|(slot, _)| *slot == name);
        own.map_or(self.state, |(_, of)| *of)
    }
}

/// The codecs of the sections of a tensor's state: of the slots that its rule keeps, in their order, and behind them of the
/// masters, if there are any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Codecs {
    len: u8,
    codecs: [Codec; MAX_SECTIONS],
}

impl FromIterator<Codec> for Codecs {
    /// The first of them, as many as there may be sections.
    fn from_iter<I: IntoIterator<Item = Codec>>(codecs: I) -> Self {
        let mut all = Self::default();
        for (to, codec) in all.codecs.iter_mut().zip(codecs) {
            *to = codec;
            all.len += 1;
        }
        all
    }
}

impl Deref for Codecs {
    type Target = [Codec];

    fn deref(&self) -> &[Codec] {
        &self.codecs[..self.len.into()]
    }
}

/// The types in which one tensor and its state are stored; by default `f32`, without a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Storage {
    /// The parameters.
    pub params: StorageType,
    /// The gradients.
    pub grads: StorageType,
    /// The sections of the state.
    pub state: Codecs,
    /// The memory of the parameters beside themselves.
    pub masters: Masters,
    /// Whether anything is rounded by random bits.
    pub is_stochastic: bool,
}

impl Default for Storage {
    fn default() -> Self {
        Self {
            params: StorageType::F32,
            grads: StorageType::F32,
            state: Codecs::default(),
            masters: Masters::None,
            is_stochastic: false,
        }
    }
}

impl Storage {
    /// The storage of a tensor whose rule keeps these slots, in a group of some precision.
    #[must_use]
    pub fn new<'s>(
        params: StorageType,
        grads: StorageType,
        slots: impl IntoIterator<Item = &'s str>,
        precision: &Precision,
    ) -> Self {
        let masters = match (params, precision.masters) {
            (StorageType::F32, _) => Masters::None,
            (StorageType::F16, Masters::LowBits) => Masters::F32,
            (_, masters) => masters,
        };
        let slots = slots.into_iter().take(MAX_SLOTS);
        let slots: Codecs = slots.map(|slot| precision.of_slot(slot).into()).collect();
        let rounds_params = params != StorageType::F32 && masters == Masters::None;
        let rounds = rounds_params || slots.iter().any(|codec| *codec != Codec::F32);
        Self {
            params,
            grads,
            state: slots.iter().copied().chain(masters.codec()).collect(),
            masters,
            is_stochastic: rounds && precision.rounding != Rounding::Nearest,
        }
    }

    /// The codecs of the rule's slots.
    #[must_use]
    pub fn slots(&self) -> &[Codec] {
        let masters = usize::from(self.masters != Masters::None);
        &self.state[..self.state.len().saturating_sub(masters)]
    }

    /// Whether everything is `f32`.
    #[must_use]
    pub fn is_f32(&self) -> bool {
        self.unit_elems() == 4
    }

    /// Elements that one invocation updates: as many as 16 bytes of the smallest hold.
    #[must_use]
    pub fn unit_elems(&self) -> u32 {
        let types = [self.params, self.grads].map(Codec::from);
        let mut all = types.iter().chain(&*self.state);
        if all.all(|codec| *codec == Codec::F32) {
            4
        } else {
            8
        }
    }

    /// Bytes of one element in all sections of the state together.
    #[must_use]
    pub fn state_bytes(&self) -> u64 {
        self.state.iter().map(|codec| codec.elem_bytes()).sum()
    }

    /// Bytes that one step moves per element: the parameters and every section of the state read and written, the gradient
    /// read. Parameters that have `f32` masters are only written.
    #[must_use]
    pub fn bytes_per_elem(&self) -> u64 {
        let accesses = match self.masters {
            Masters::F32 => 1,
            Masters::None | Masters::LowBits => 2,
        };
        accesses * self.params.bytes() + self.grads.bytes() + 2 * self.state_bytes()
    }
}
