//! Running error analysis: values with a bound on how far their `f32` twins may be off, and the operations on them.

use super::Rounding;

/// What is below the normal range may be flushed to zero.
const TINY: f64 = f32::MIN_POSITIVE as f64;

/// A value and a bound on how far its `f32` twin may be off.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bounded {
    /// The value.
    pub exact: f64,
    /// The bound.
    pub bound: f64,
}

impl Bounded {
    /// A value that `f32` holds as it is.
    #[must_use]
    pub fn exactly(value: f32) -> Self {
        Self {
            exact: value.into(),
            bound: if value.is_subnormal() { TINY } else { 0.0 },
        }
    }

    /// The most that the twin can be in magnitude.
    fn reach(self) -> f64 {
        self.exact.abs() + self.bound
    }

    /// The negative, which rounds nothing.
    #[must_use]
    pub fn negative(self) -> Self {
        Self {
            exact: -self.exact,
            ..self
        }
    }

    /// The magnitude, which rounds nothing.
    #[must_use]
    pub fn magnitude(self) -> Self {
        Self {
            exact: self.exact.abs(),
            ..self
        }
    }

    /// The larger of two, no farther off than the one that is farther off.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            exact: self.exact.max(other.exact),
            bound: self.bound.max(other.bound),
        }
    }

    /// -1, 0 or 1: exact, unless the twin may be on the other side of zero.
    #[must_use]
    pub fn sign(self) -> Self {
        let exact = match self.exact {
            0.0 => 0.0,
            x => x.signum(),
        };
        let is_sure = self.bound == 0.0 || self.exact.abs() > self.bound;
        Self {
            exact,
            bound: if is_sure { 0.0 } else { 1.0 + exact.abs() },
        }
    }
}

/// Arithmetic in `f32` with one way of rounding.
///
/// Sums are bounded by the sum of their terms' magnitudes, so that the bound holds in whatever order a compiler adds,
/// and fusing a product into a sum only removes a rounding.
#[derive(Clone, Copy, Debug)]
pub struct Arithmetic(pub(super) Rounding);

impl Arithmetic {
    /// A scalar of the step: computed in `f64` and rounded once, to nearest, whatever computes with it.
    #[must_use]
    pub fn scalar(self, value: f64) -> Bounded {
        Bounded {
            exact: value,
            bound: match value {
                0.0 | 1.0 => 0.0,
                value => Rounding::NEAREST.gamma(1) * value.abs() + TINY,
            },
        }
    }

    /// The sum of terms.
    #[must_use]
    pub fn sum<const N: usize>(self, terms: [Bounded; N]) -> Bounded {
        let exact = terms.iter().map(|term| term.exact).sum();
        let bound: f64 = terms.iter().map(|term| term.bound).sum();
        let reach: f64 = terms.iter().map(|term| term.reach()).sum();
        // A sum with what is exactly zero rounds nothing.
        let others = terms.iter().filter(|term| term.reach() != 0.0).count();
        self.rounded(exact, bound, reach, (others as u32).saturating_sub(1))
    }

    /// The difference of two values.
    #[must_use]
    pub fn difference(self, x: Bounded, y: Bounded) -> Bounded {
        self.sum([x, y.negative()])
    }

    /// The product of two values.
    #[must_use]
    pub fn product(self, x: Bounded, y: Bounded) -> Bounded {
        let exact = x.exact * y.exact;
        let bound = x.bound * y.reach() + x.exact.abs() * y.bound;
        let is_one = |x: Bounded| x.exact.abs() == 1.0 && x.bound == 0.0;
        let roundings = u32::from(!is_one(x) && !is_one(y));
        self.rounded(exact, bound, x.reach() * y.reach(), roundings)
    }

    /// The quotient of two values. The bound is infinite where the divisor may be zero.
    #[must_use]
    pub fn quotient(self, x: Bounded, y: Bounded) -> Bounded {
        let exact = x.exact / y.exact;
        let least = y.exact.abs() - y.bound;
        let bound = match x.reach() {
            0.0 => 0.0,
            _ if least <= 0.0 => f64::INFINITY,
            _ => (x.bound + exact.abs() * y.bound) / least,
        };
        self.rounded(exact, bound, exact.abs() + bound, self.0.division)
    }

    /// The square root of a value that is not negative.
    #[must_use]
    pub fn root(self, x: Bounded) -> Bounded {
        let exact = x.exact.sqrt();
        let most = (x.exact + x.bound).sqrt();
        let least = (x.exact - x.bound).max(0.0).sqrt();
        let bound = (most - exact).max(exact - least);
        self.rounded(exact, bound, exact + bound, self.0.root)
    }

    fn rounded(self, exact: f64, bound: f64, reach: f64, roundings: u32) -> Bounded {
        let flushed = if reach == 0.0 { 0.0 } else { TINY };
        Bounded {
            exact,
            bound: bound + self.0.gamma(roundings) * reach + flushed,
        }
    }
}
