//! What is stored in sixteen bits: the conversions against the `half` crate, rounding by random bits, rests.

use wgpu_optim::half;
use wgpu_optim::storage::{Key, bf16, f16, rest};

/// Bits of f32 of every sign and exponent, with mantissas at and around every tie and carry, and all others by steps.
pub fn patterns() -> impl Iterator<Item = u32> {
    let mantissas = || {
        let near_ties = [12, 13, 15, 16].into_iter().flat_map(|bit| {
            let ties = (0..1_u32 << 7).map(move |upper| (upper << 16 | upper << 13) ^ 1 << bit);
            ties.flat_map(|tie| [tie.wrapping_sub(1), tie, tie + 1])
        });
        let ends = [0, 1, 0x007f_fffe, 0x007f_ffff];
        let steps = (0..0x0080_0000).step_by(9973);
        near_ties.chain(ends).chain(steps).map(|m| m & 0x007f_ffff)
    };
    (0..512_u32).flat_map(move |upper| mantissas().map(move |mantissa| upper << 23 | mantissa))
}

#[test]
fn all_of_sixteen_bits_are_unpacked_and_rounded_as_they_were() {
    for half in 0..=u16::MAX {
        let expected = half::bf16::from_bits(half);
        let bits = bf16::unpack(half);
        assert_eq!(bits, u32::from(half) << 16);
        assert_eq!(f32::from_bits(bits).is_nan(), expected.is_nan());
        let again = bf16::nearest(bits);
        let quiet = if expected.is_nan() { 0x0040 } else { 0 };
        assert_eq!(again, half | quiet);
        for random in [0, u32::MAX] {
            assert_eq!(bf16::stochastic(bits, random), half | quiet);
        }

        let expected = half::f16::from_bits(half);
        let bits = f16::unpack(half);
        assert_eq!(bits, expected.to_f32().to_bits(), "{half:#06x}");
        let quiet = if expected.is_nan() { 0x0200 } else { 0 };
        assert_eq!(f16::nearest(bits), half | quiet, "{half:#06x}");
        for random in [0, u32::MAX] {
            assert_eq!(f16::stochastic(bits, random), half | quiet, "{half:#06x}");
        }
    }
}

#[test]
fn the_nearest_is_that_of_the_half_crate() {
    for bits in patterns() {
        let value = f32::from_bits(bits);
        let expected = half::bf16::from_f32(value).to_bits();
        assert_eq!(bf16::nearest(bits), expected, "{bits:#010x}");
        let expected = half::f16::from_f32(value).to_bits();
        assert_eq!(f16::nearest(bits), expected, "{bits:#010x}");
    }
}

/// How often the upper neighbour comes is how far the lower one is, over every value of the random bits that count.
#[test]
fn rounding_by_random_bits_is_right_in_the_mean() {
    let mut rng = fastrand::Rng::with_seed(7);
    for _ in 0..300 {
        // Normal and subnormal as bf16, and up to the largest.
        let value = f32::from_bits(rng.u32(0..0x7f7f_8000));
        let counts = (0..=0xffff_u32)
            .map(|random| bf16::stochastic(value.to_bits(), random << 16 | random))
            .filter(|half| f32::from_bits(bf16::unpack(*half)) > value)
            .count();
        let expected = if value.to_bits() >= 0x7f7f_0000 {
            0
        } else {
            value.to_bits() & 0xffff
        };
        assert_eq!(counts as u32, expected, "{value:e}");

        let value = f32::from_bits(rng.u32(0x3880_0000..0x477f_e000));
        let counts = (0..=0x1fff_u32)
            .map(|random| f16::stochastic(value.to_bits(), random))
            .filter(|half| f32::from_bits(f16::unpack(*half)) > value)
            .count();
        assert_eq!(counts as u32, value.to_bits() & 0x1fff, "{value:e}");
    }
    // Subnormal f16 of up to four bits: multiples of 2^-24 and what is between.
    for value in (1..16_u32).map(|quarter| quarter as f32 * (-26_f32).exp2()) {
        let counts = (0..1 << 16)
            .map(|high| f16::stochastic(value.to_bits(), (high << 16 | 0x5555) >> 2))
            .filter(|half| f32::from_bits(f16::unpack(*half)) > value)
            .count();
        let quarters = (value * 26_f32.exp2()) as u32 % 4;
        // The mantissas here have as many bits below a unit as the highest random ones tell apart, within two.
        let expected = f64::from(quarters) / 4.0;
        let actual = counts as f64 / f64::from(1 << 16);
        assert!((actual - expected).abs() < 1e-3, "{value:e}: {actual}");
    }
}

#[test]
fn nothing_is_carried_into_infinity() {
    for (half, bits) in [
        (bf16::stochastic as fn(u32, u32) -> u16, 0x7f7f_7fff_u32),
        (f16::stochastic, 65_519.996_f32.to_bits()),
    ] {
        for random in [0, 0x1234_5678, u32::MAX] {
            let [up, down] = [bits, bits | 1 << 31].map(|bits| half(bits, random));
            let largest = if bits == 0x7f7f_7fff { 0x7f7f } else { 0x7bff };
            assert_eq!((up, down), (largest, largest | 0x8000));
        }
        let infinite = half(f32::INFINITY.to_bits(), 12_345);
        assert_eq!(infinite, half(f32::MAX.to_bits(), u32::MAX));
        let nan = half(f32::NAN.to_bits(), u32::MAX);
        assert!(nan & 0x7fff > infinite);
    }
}

#[test]
fn random_bits_are_even_and_of_their_own() {
    let key = Key::new(3, "weight", 17);
    assert_eq!(key, Key::new(3, "weight", 17));
    for other in [
        Key::new(4, "weight", 17),
        Key::new(3, "weights", 17),
        Key::new(3, "weight", 18),
    ] {
        assert_ne!(key, other);
    }
    const N: u32 = 1 << 16;
    for number in 0..3 {
        for bit in 0..32 {
            let set = (0..N).filter(|element| key.random(*element, number) >> bit & 1 == 1);
            // Five standard deviations of a fair coin.
            let off = set.count() as f64 - f64::from(N / 2);
            assert!(
                off.abs() < 5.0 * f64::from(N).sqrt() / 2.0,
                "bit {bit}: {off}"
            );
        }
    }
}

/// Of all 2^32 pairs those that make a difference: every bf16, with rests at the ends of each half.
#[test]
fn no_bf16_and_no_rest_make_a_nan_of_numbers() {
    let rests = [0, 1, 0x1234, 0x7fff, 0x8000, 0x8001, 0xabcd, 0xffff];
    for half in 0..=u16::MAX {
        let value = f32::from_bits(bf16::unpack(half));
        for rest in rests {
            let joined = f32::from_bits(rest::join(half, rest));
            assert_eq!(joined.is_nan(), value.is_nan(), "{half:#06x} {rest:#06x}");
            // Less than a bf16 away, and on the same side of zero.
            let is_near = |bits: u16| (rest::join(half, rest) >> 16) as u16 == bits;
            let magnitude = half & 0x7fff;
            assert!(
                value.is_nan() || is_near(half) || (magnitude > 0 && is_near(half - 1)),
                "{half:#06x} {rest:#06x}: {joined:e}"
            );
        }
    }
}

#[test]
fn a_bf16_and_its_rest_are_the_f32() {
    for bits in patterns() {
        let (half, rest) = rest::split(bits);
        let joined = rest::join(half, rest);
        let value = f32::from_bits(bits);
        if value.is_nan() {
            assert!(f32::from_bits(joined).is_nan(), "{bits:#010x}");
        } else {
            assert_eq!(joined, bits, "{bits:#010x}");
        }
        // The nearest, but for ties.
        let is_tie = bits & 0xffff == 0x8000;
        let nearest = bf16::nearest(bits);
        if is_tie && !value.is_nan() {
            assert_eq!(half, (bits >> 16) as u16 + 1);
        } else {
            assert_eq!(half, nearest, "{bits:#010x}");
        }
    }
}
