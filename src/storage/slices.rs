//! Conversions of whole slices, in the widest vectors that the machine has.

use pulp::{Arch, Simd, WithSimd};

use super::{Key, StorageType, bf16, f16};

/// Unpacks values of 16 bits, as many as there is room for.
pub fn unpack(of: StorageType, halves: &[u16], to: &mut [f32]) {
    Arch::new().dispatch(Unpack { of, halves, to });
}

struct Unpack<'a> {
    of: StorageType,
    halves: &'a [u16],
    to: &'a mut [f32],
}

impl WithSimd for Unpack<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let pairs = self.to.iter_mut().zip(self.halves);
        match self.of {
            StorageType::F16 => {
                pairs.for_each(|(to, half)| *to = f32::from_bits(f16::unpack(*half)))
            }
            _ => pairs.for_each(|(to, half)| *to = f32::from_bits(bf16::unpack(*half))),
        }
    }
}

/// Random bits for values that follow each other.
#[derive(Clone, Copy, Debug)]
pub struct Random {
    /// The stream of the tensor and the step.
    pub key: Key,
    /// The tensor's element that comes first, modulo 2^32.
    pub first: u32,
    /// The number of the value among those of its element, as [`Key::random`] counts them.
    pub number: u32,
}

/// Rounds values to 16 bits, to the nearest if there are no random bits.
pub fn round(of: StorageType, values: &[f32], random: Option<Random>, halves: &mut [u16]) {
    Arch::new().dispatch(Round {
        of,
        values,
        random,
        halves,
    });
}

struct Round<'a> {
    of: StorageType,
    values: &'a [f32],
    random: Option<Random>,
    halves: &'a mut [u16],
}

impl WithSimd for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self {
            of,
            values,
            random,
            halves: to,
        } = self;
        let bits = to.iter_mut().zip(values);
        let bits = bits.map(|(to, value)| (to, value.to_bits()));
        match (of, random) {
            (StorageType::F16, None) => bits.for_each(|(to, bits)| *to = f16::nearest(bits)),
            (_, None) => bits.for_each(|(to, bits)| *to = bf16::nearest(bits)),
            (of, Some(Random { key, first, number })) => {
                let bits = (0_u32..).zip(bits).map(|(index, (to, bits))| {
                    let random = key.random(first.wrapping_add(index), number);
                    (to, bits, random)
                });
                match of {
                    StorageType::F16 => {
                        bits.for_each(|(to, bits, random)| *to = f16::stochastic(bits, random));
                    }
                    _ => bits.for_each(|(to, bits, random)| *to = bf16::stochastic(bits, random)),
                }
            }
        }
    }
}
