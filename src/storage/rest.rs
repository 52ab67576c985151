//! A bf16 and what it leaves of an f32: sixteen bits that make up the f32 again, exactly. Twin of
//! `shaders/storage/rest.wgsl`, same names, same statement order.
//!
//! An even bf16 is the nearest of 65,537 numbers, ties to even, and sixteen bits tell 65,536 of them apart. So of two
//! that are as near this takes the larger in magnitude.

use super::bf16;

/// The bf16 and the rest of an f32 by its bits. NaN stays NaN, and becomes quiet.
#[must_use]
#[inline(always)]
pub const fn split(bits: u32) -> (u16, u16) {
    let rest = bits as u16;
    let half = if bits & 0x7fff_ffff > 0x7f80_0000 {
        (bits >> 16 | 0x0040) as u16
    } else {
        ((bits >> 16) + (bits >> 15 & 1)) as u16
    };
    (half, rest)
}

/// The bits of the f32 that was split; NaN has other bits perhaps. A half that somebody else has written since may not go
/// with its rest: what they make ends at zero and at infinity, so that no NaN comes of two numbers.
#[must_use]
#[inline(always)]
pub const fn join(half: u16, rest: u16) -> u32 {
    let value = (half as u32) << 16;
    let magnitude = (value & 0x7fff_ffff) as i32;
    // Rests from 0x8000 on are what the next half is too large by.
    let joined = magnitude + rest as i16 as i32;
    let most = if magnitude > INFINITY {
        magnitude
    } else {
        INFINITY
    };
    let joined = if joined < 0 { 0 } else { joined };
    let joined = if joined > most { most } else { joined };
    value & 0x8000_0000 | joined as u32
}

const INFINITY: i32 = 0x7f80_0000;

/// The low bits that a bf16 leaves of a master which was rounded to it to the nearest, ties to even. A master that was a tie
/// has none where its bf16 is the smaller of both in magnitude: it becomes the `f32` before it.
pub(crate) const fn of_master(master: f32) -> u16 {
    let (half, rest) = split(master.to_bits());
    if half == bf16::nearest(master.to_bits()) {
        rest
    } else {
        0x7fff
    }
}
