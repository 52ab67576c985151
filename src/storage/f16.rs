//! f16, IEEE's binary16. Twin of `shaders/storage/f16.wgsl`, same names, same statement order.
//!
//! In integers: WGSL's `pack2x16float` may round either way, and devices may flush what is subnormal.

/// From the exponent of an f16 to that of an f32, in the bits of the latter.
const REBIAS: u32 = 112 << 23;

/// The bits of the f32 of the same value.
#[must_use]
#[inline(always)]
pub const fn unpack(half: u16) -> u32 {
    let half = half as u32;
    let sign = (half & 0x8000) << 16;
    let magnitude = (half & 0x7fff) << 13;
    let exponent = magnitude & 0x0f80_0000;
    let bits = if exponent == 0x0f80_0000 {
        // Infinities, and NaN, which becomes quiet.
        let quiet = if magnitude > 0x0f80_0000 {
            0x0040_0000
        } else {
            0
        };
        (magnitude + 2 * REBIAS) | quiet
    } else if exponent == 0 {
        // So many 2^-24, exactly.
        ((half & 0x03ff) as f32 * f32::from_bits(0x3380_0000)).to_bits()
    } else {
        magnitude + REBIAS
    };
    sign | bits
}

/// The bits by which to shift the mantissa of an f32, with its leading one, to make it that of a subnormal f16. From 25 on
/// nothing is left of it, and 31 is the most that may be shifted.
#[inline(always)]
const fn subnormal_shift(magnitude: u32) -> u32 {
    let exponent = magnitude >> 23;
    let shift = 126 - if exponent < 125 { exponent } else { 125 };
    if shift < 31 { shift } else { 31 }
}

/// The nearest f16 of an f32 by its bits; of two that are as near, the even one. NaN stays NaN, and becomes quiet.
#[must_use]
#[inline(always)]
pub const fn nearest(bits: u32) -> u16 {
    let sign = bits >> 16 & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    let mantissa = (magnitude & 0x007f_ffff) | 0x0080_0000;
    let shift = subnormal_shift(magnitude);
    let subnormal = (mantissa + (1 << (shift - 1)) - 1 + (mantissa >> shift & 1)) >> shift;
    let normal = magnitude
        .wrapping_sub(REBIAS)
        .wrapping_add(0x0fff)
        .wrapping_add(magnitude >> 13 & 1)
        >> 13;
    let rounded = if magnitude > 0x7f80_0000 {
        0x7e00 | (magnitude >> 13 & 0x03ff)
    } else if magnitude >= 0x4780_0000 {
        0x7c00
    } else if magnitude < 0x3880_0000 {
        subnormal
    } else {
        normal
    };
    (sign | rounded) as u16
}

/// One of the two neighbours of an f32, each as often as the other is far, by as many random bits as it is longer: 13,
/// and 31 at most where it is subnormal; below 2^-32 it is zero. Nothing is carried into infinity; what [`nearest`] makes infinite is infinite,
/// and what is not finite is as it makes it.
#[must_use]
#[inline(always)]
pub const fn stochastic(bits: u32, random: u32) -> u16 {
    let near = nearest(bits);
    let sign = bits >> 16 & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    // Below 2^-32 random bits do not reach far enough.
    let mantissa = if magnitude < 0x2f80_0000 {
        0
    } else {
        (magnitude & 0x007f_ffff) | 0x0080_0000
    };
    let shift = subnormal_shift(magnitude);
    let subnormal = (mantissa + (random & ((1 << shift) - 1))) >> shift;
    let normal = magnitude.wrapping_sub(REBIAS).wrapping_add(random & 0x1fff) >> 13;
    let rounded = if magnitude < 0x3880_0000 {
        subnormal
    } else {
        normal
    };
    if near & 0x7fff >= 0x7c00 {
        near
    } else if rounded >= 0x7c00 {
        (sign | 0x7bff) as u16
    } else {
        (sign | rounded) as u16
    }
}
