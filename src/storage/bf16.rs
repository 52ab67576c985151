//! bf16: the upper half of an f32. Twin of `shaders/storage/bf16.wgsl`, same names, same statement order.

/// The bits of the f32 of the same value.
#[must_use]
#[inline(always)]
pub const fn unpack(half: u16) -> u32 {
    (half as u32) << 16
}

/// The nearest bf16 of an f32 by its bits; of two that are as near, the even one. NaN stays NaN, and becomes quiet.
#[must_use]
#[inline(always)]
pub const fn nearest(bits: u32) -> u16 {
    let rounded = bits.wrapping_add(0x7fff).wrapping_add(bits >> 16 & 1) >> 16;
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        (bits >> 16 | 0x0040) as u16
    } else {
        rounded as u16
    }
}

/// One of the two neighbours of an f32, each as often as the other is far, by sixteen random bits. Nothing is carried
/// into infinity; what [`nearest`] makes infinite is infinite, and what is not finite is as it makes it.
#[must_use]
#[inline(always)]
pub const fn stochastic(bits: u32, random: u32) -> u16 {
    let near = nearest(bits);
    let rounded = (bits.wrapping_add(random & 0xffff) >> 16) as u16;
    if near & 0x7fff >= 0x7f80 {
        near
    } else if rounded & 0x7fff >= 0x7f80 {
        // One of the largest finite ones, which are odd: their upper neighbours are the infinities.
        rounded - 1
    } else {
        rounded
    }
}
