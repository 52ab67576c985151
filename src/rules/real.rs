//! The precisions in which coefficients and updates are computed.

use std::ops::{Add, Mul, Sub};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// `f32`, in which the kernels compute, or `f64`, which shows how much of that is rounding.
pub trait Real:
    Copy
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + sealed::Sealed
    + 'static
{
    /// Rounds to nearest, and to zero what would be subnormal: a GPU may do so too, and computes the same this way.
    fn from_f64(value: f64) -> Self;
}

impl Real for f32 {
    fn from_f64(value: f64) -> Self {
        let nearest = value as Self;
        if nearest.is_subnormal() { 0.0 } else { nearest }
    }
}

impl Real for f64 {
    fn from_f64(value: f64) -> Self {
        value
    }
}
