//! Norms of gradients in memory.

use pulp::{Arch, Simd, WithSimd};

/// Sums of squares that are added beside each other, so that they can be added in vectors. Their number is part of the
/// result.
const LANES: usize = 16;

/// The squares of gradients, summed in `f64`, in which no square of an `f32` overflows or vanishes, and whether all of
/// them are finite.
///
/// ```
/// use wgpu_optim::control::GradNorm;
///
/// let mut norm = GradNorm::default();
/// norm.add(&[3e30, 0.0]);
/// norm.add(&[-4e30]);
/// assert!(norm.is_finite());
/// assert!((norm.value() / 5e30 - 1.0).abs() < 1e-6);
/// assert_eq!(GradNorm::from_bytes(norm.to_bytes()), norm);
/// norm.add(&[f32::NAN]);
/// assert!(norm.value().is_nan());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GradNorm {
    sum: f64,
    /// The largest magnitude, as its bits, which those of infinities and NaN exceed.
    top: u32,
}

/// The norms of an optimizer's gradients that a control tells apart.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GradNorms {
    /// The norms of parameter groups together, by [`StepControl::norm_of`](super::StepControl::norm_of).
    pub shared: Vec<GradNorm>,
    /// The norm of each tensor that a control [clips](super::StepControlBuilder::tensor_max_norm) by it; none of a tensor that
    /// is frozen, or in a group that is clipped by a norm of its own.
    pub tensors: Vec<Option<GradNorm>>,
}

/// The bits of infinity: those of NaN are larger.
const INFINITY: u32 = f32::INFINITY.to_bits();

impl GradNorm {
    /// Adds the squares of some gradients. The order in which slices are added is part of the result.
    pub fn add(&mut self, grads: &[f32]) {
        let (sum, top) = Arch::new().dispatch(Squares(grads));
        *self = self.and(Self { sum, top });
    }

    /// The norm of both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            sum: self.sum + other.sum,
            top: self.top.max(other.top),
        }
    }

    /// The bytes of the sums, for a process that takes the norm over several.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&self.sum.to_le_bytes());
        bytes[8..].copy_from_slice(&self.top.to_le_bytes());
        bytes
    }

    /// Reads a norm that [`to_bytes`](Self::to_bytes) has written.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 12]) -> Self {
        let [s0, s1, s2, s3, s4, s5, s6, s7, top @ ..] = bytes;
        Self {
            sum: f64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            top: u32::from_le_bytes(top),
        }
    }

    /// Whether no gradient was infinite or NaN.
    #[must_use]
    pub const fn is_finite(&self) -> bool {
        self.top < INFINITY
    }

    /// The norm; infinite or NaN where a gradient was.
    #[must_use]
    pub fn value(&self) -> f64 {
        match self.top {
            INFINITY => f64::INFINITY,
            top if top > INFINITY => f64::NAN,
            _ => self.sum.sqrt(),
        }
    }
}

struct Squares<'a>(&'a [f32]);

impl WithSimd for Squares<'_> {
    type Output = (f64, u32);

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Self::Output {
        let (mut sums, mut tops) = ([0.0; LANES], [0; LANES]);
        // Four streams: one alone is read from memory at a fraction of the rate.
        let quarter = self.0.len() / 4 / LANES * LANES;
        let (first, others) = self.0.split_at(quarter);
        let (second, others) = others.split_at(quarter);
        let (third, others) = others.split_at(quarter);
        let (fourth, rest) = others.split_at(quarter);
        let [first, second, third, fourth] =
            [first, second, third, fourth].map(|stream| stream.as_chunks::<LANES>().0);
        for (((a, b), c), d) in first.iter().zip(second).zip(third).zip(fourth) {
            for lane in 0..LANES {
                let [a, b, c, d] = [a, b, c, d].map(|block| block[lane]);
                sums[lane] += (square(a) + square(b)) + (square(c) + square(d));
                let top = magnitude(a).max(magnitude(b));
                tops[lane] = tops[lane].max(top.max(magnitude(c).max(magnitude(d))));
            }
        }
        for (index, grad) in rest.iter().enumerate() {
            let lane = index % LANES;
            sums[lane] += square(*grad);
            tops[lane] = tops[lane].max(magnitude(*grad));
        }
        (
            sums.into_iter().sum(),
            tops.into_iter().max().unwrap_or_default(),
        )
    }
}

#[inline(always)]
fn square(grad: f32) -> f64 {
    f64::from(grad) * f64::from(grad)
}

/// The bits of a magnitude, which are in the order of what they stand for.
#[inline(always)]
const fn magnitude(grad: f32) -> u32 {
    grad.to_bits() & !SIGN
}

const SIGN: u32 = 1 << 31;
