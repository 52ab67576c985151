//! Running error analysis: values with the ranges of their `f32` twins, and the operations on them.

use super::Roundoff;

/// The smallest normal number: smaller ones may be flushed to zero.
const TINY: f64 = f32::MIN_POSITIVE as f64;

/// A value and the range in which its `f32` twin lies.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bounded {
    /// The value.
    pub exact: f64,
    /// The least that the twin may be.
    pub low: f64,
    /// The most that the twin may be.
    pub high: f64,
}

impl Bounded {
    /// A value that `f32` holds as it is.
    #[must_use]
    pub fn exactly(value: f32) -> Self {
        let exact = f64::from(value);
        // It may be flushed when it is read.
        let (low, high) = match value.is_subnormal() {
            true => (exact.min(0.0), exact.max(0.0)),
            false => (exact, exact),
        };
        Self { exact, low, high }
    }

    /// The range that a function of `f32` makes of it that never falls, as a rounding is.
    #[must_use]
    pub(super) fn through(self, rising: impl Fn(f32) -> f32) -> Self {
        self.between(&rising, &rising)
            .with_exact(rising(self.exact as f32))
    }

    /// The range that it becomes where it goes down by one function at most and up by another.
    pub(super) fn between(self, down: impl Fn(f32) -> f32, up: impl Fn(f32) -> f32) -> Self {
        // The twin is an f32 in the range, whose ends are none.
        let below = |value: f64| match value as f32 {
            near if f64::from(near) > value => near.next_down(),
            near => near,
        };
        let above = |value: f64| match value as f32 {
            near if f64::from(near) < value => near.next_up(),
            near => near,
        };
        Self {
            low: down(below(self.low)).into(),
            high: up(above(self.high)).into(),
            ..self
        }
    }

    fn with_exact(self, exact: f32) -> Self {
        Self {
            exact: exact.into(),
            ..self
        }
    }

    /// The most that a twin of this value may be off on its side.
    pub(super) fn bound(self, twin: f64) -> f64 {
        if twin < self.exact {
            self.exact - self.low
        } else {
            self.high - self.exact
        }
    }

    /// The most that the twin can be in magnitude.
    fn reach(self) -> f64 {
        self.low.abs().max(self.high.abs())
    }

    /// Whether the twin is the value.
    fn is_sure(self) -> bool {
        self.low == self.high
    }

    /// The negative, which rounds nothing.
    #[must_use]
    pub fn negative(self) -> Self {
        Self {
            exact: -self.exact,
            low: -self.high,
            high: -self.low,
        }
    }

    /// The magnitude, which rounds nothing.
    #[must_use]
    pub fn magnitude(self) -> Self {
        let least = match self.low <= 0.0 && self.high >= 0.0 {
            true => 0.0,
            false => self.low.abs().min(self.high.abs()),
        };
        Self {
            exact: self.exact.abs(),
            low: least,
            high: self.reach(),
        }
    }

    /// The larger of two, which rounds nothing.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            exact: self.exact.max(other.exact),
            low: self.low.max(other.low),
            high: self.high.max(other.high),
        }
    }

    /// -1, 0 or 1: exact, unless the twin may be on the other side of zero.
    #[must_use]
    pub fn sign(self) -> Self {
        Self {
            exact: sign(self.exact),
            low: sign(self.low),
            high: sign(self.high),
        }
    }
}

/// Arithmetic in `f32` with one way of rounding, over ranges of what goes in.
///
/// Sums of terms of either sign are bounded by the sum of their magnitudes, so that the bound holds in whatever order a
/// compiler adds, and fusing a product into a sum only removes a rounding.
#[derive(Clone, Copy, Debug)]
pub struct Arithmetic(pub(super) Roundoff);

impl Arithmetic {
    /// The arithmetic that rounds so.
    #[must_use]
    pub const fn new(rounding: Roundoff) -> Self {
        Self(rounding)
    }

    /// A scalar of the step: computed in `f64` and rounded once, to nearest, whatever computes with it.
    #[must_use]
    pub fn scalar(self, value: f64) -> Bounded {
        let sure = Bounded {
            exact: value,
            low: value,
            high: value,
        };
        match value {
            0.0 => sure,
            _ if value.abs() == 1.0 => sure,
            _ => widened(sure, Roundoff::NEAREST.gamma(1)),
        }
    }

    /// The sum of terms.
    #[must_use]
    pub fn sum(self, terms: impl AsRef<[Bounded]>) -> Bounded {
        let terms = terms.as_ref();
        let sum = Bounded {
            exact: terms.iter().map(|term| term.exact).sum(),
            low: terms.iter().map(|term| term.low).sum(),
            high: terms.iter().map(|term| term.high).sum(),
        };
        // A sum with what is exactly zero rounds nothing.
        let others = terms.iter().filter(|term| term.reach() != 0.0).count();
        let gamma = self.0.gamma((others as u32).saturating_sub(1));
        if terms.iter().all(|term| term.low >= 0.0) || gamma == 0.0 {
            return widened(sum, gamma);
        }
        let off = gamma * terms.iter().map(|term| term.reach()).sum::<f64>() + TINY;
        Bounded {
            low: sum.low - off,
            high: sum.high + off,
            ..sum
        }
    }

    /// A sum of terms of one sign, each of which has been rounded so often.
    #[must_use]
    pub(super) fn rounded(self, sum: Bounded, roundings: u32) -> Bounded {
        widened(sum, self.0.gamma(roundings))
    }

    /// The difference of two values.
    #[must_use]
    pub fn difference(self, x: Bounded, y: Bounded) -> Bounded {
        self.sum([x, y.negative()])
    }

    /// The product of two values.
    #[must_use]
    pub fn product(self, x: Bounded, y: Bounded) -> Bounded {
        let is_one = |x: Bounded| x.is_sure() && x.exact.abs() == 1.0;
        let roundings = u32::from(!is_one(x) && !is_one(y));
        let product = corners(x.exact * y.exact, x, y, |x, y| x * y);
        widened(product, self.0.gamma(roundings))
    }

    /// The square of a value, which is not negative.
    #[must_use]
    pub fn square(self, x: Bounded) -> Bounded {
        self.product(x.magnitude(), x.magnitude())
    }

    /// The product of a scalar of the step and a value.
    #[must_use]
    pub fn scaled(self, k: f64, x: Bounded) -> Bounded {
        self.product(self.scalar(k), x)
    }

    /// The moving average `beta*average + (1 - beta)*value`.
    #[must_use]
    pub fn average(self, beta: f64, average: Bounded, value: Bounded) -> Bounded {
        self.sum([self.scaled(beta, average), self.scaled(1.0 - beta, value)])
    }

    /// `x + c*(y - x)`, where `c` is a scalar between zero and one: what lies that far between two values.
    #[must_use]
    pub fn between(self, x: Bounded, y: Bounded, c: f64) -> Bounded {
        let of = |x: f64, y: f64| (1.0 - c) * x + c * y;
        // The scalar, the difference and the product round the one, the sum both.
        let moved = c * (x.reach() + y.reach());
        let scalar = Roundoff::NEAREST.gamma(1) * moved + TINY;
        let off = scalar + self.0.gamma(2) * moved + self.0.gamma(1) * (x.reach() + moved) + TINY;
        let is_zero = x.reach() == 0.0 && y.reach() == 0.0;
        let off = if is_zero { 0.0 } else { off };
        Bounded {
            exact: of(x.exact, y.exact),
            low: of(x.low, y.low) - off,
            high: of(x.high, y.high) + off,
        }
    }

    /// The quotient of two values; anything, where the divisor may be zero.
    #[must_use]
    pub fn quotient(self, x: Bounded, y: Bounded) -> Bounded {
        let exact = x.exact / y.exact;
        if y.low <= 0.0 && y.high >= 0.0 {
            let (low, high) = match x.reach() == 0.0 && y.exact != 0.0 {
                true => (0.0, 0.0),
                false => (f64::NEG_INFINITY, f64::INFINITY),
            };
            return Bounded { exact, low, high };
        }
        let quotient = corners(exact, x, y, |x, y| x / y);
        widened(quotient, self.0.gamma(self.0.division))
    }

    /// The square root of a value that is not negative.
    #[must_use]
    pub fn root(self, x: Bounded) -> Bounded {
        let root = Bounded {
            exact: x.exact.sqrt(),
            low: x.low.max(0.0).sqrt(),
            high: x.high.max(0.0).sqrt(),
        };
        widened(root, self.0.gamma(self.0.root))
    }
}

/// The range of an operation that is monotonic in both operands.
fn corners(exact: f64, x: Bounded, y: Bounded, of: impl Fn(f64, f64) -> f64) -> Bounded {
    let ends = [
        of(x.low, y.low),
        of(x.low, y.high),
        of(x.high, y.low),
        of(x.high, y.high),
    ];
    let (low, high) = match ends.iter().any(|end| end.is_nan()) {
        // Nothing times anything.
        true => (f64::NEG_INFINITY, f64::INFINITY),
        false => (
            ends.iter().copied().fold(f64::INFINITY, f64::min),
            ends.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        ),
    };
    Bounded { exact, low, high }
}

/// The range after a rounding of this relative error, which keeps signs but may flush to zero.
fn widened(value: Bounded, gamma: f64) -> Bounded {
    let Bounded { exact, low, high } = value;
    if low == 0.0 && high == 0.0 {
        return value;
    }
    // What is infinite stays.
    let off = |end: f64| match end.is_finite() {
        true => gamma * end.abs() + TINY,
        false => 0.0,
    };
    let (down, up) = (low - off(low), high + off(high));
    Bounded {
        exact,
        low: if low >= 0.0 { down.max(0.0) } else { down },
        high: if high <= 0.0 { up.min(0.0) } else { up },
    }
}

/// The divisor `1 - beta^t` of a moving average that started at zero.
pub(super) fn bias_correction(beta: f64, step: u64) -> f64 {
    1.0 - beta.powf(step as f64)
}

/// -1, 0 or 1.
pub(super) fn sign(value: f64) -> f64 {
    match value {
        0.0 => 0.0,
        value => value.signum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every operation on every pair of awkward numbers, in `f32` as it rounds here.
    #[test]
    fn what_f32_computes_lies_in_the_range() {
        let at = Arithmetic(Roundoff::NEAREST);
        let numbers = [
            0.0, 1.0, -1.0, 0.1, -0.3, 7.7, 1e-30, -2e-20, 3e17, 1e-40_f32,
        ];
        let holds = |range: Bounded, exact: f64, computed: f32| {
            let computed = f64::from(computed);
            let close = (range.exact - exact).abs() <= 1e-12 * exact.abs();
            assert!(close && range.low <= range.exact && range.exact <= range.high);
            assert!(
                range.low <= computed && computed <= range.high,
                "{range:?} {computed}"
            );
        };
        for x in numbers {
            let (range_x, wide_x) = (Bounded::exactly(x), f64::from(x));
            holds(range_x.magnitude(), wide_x.abs(), x.abs());
            holds(range_x.negative(), -wide_x, -x);
            if x >= 0.0 {
                holds(at.root(range_x), wide_x.sqrt(), x.sqrt());
            }
            for y in numbers {
                let (range_y, wide_y) = (Bounded::exactly(y), f64::from(y));
                holds(at.sum([range_x, range_y]), wide_x + wide_y, x + y);
                holds(at.difference(range_x, range_y), wide_x - wide_y, x - y);
                holds(at.product(range_x, range_y), wide_x * wide_y, x * y);
                holds(range_x.max(range_y), wide_x.max(wide_y), x.max(y));
                if y != 0.0 && !y.is_subnormal() && (wide_x / wide_y).abs() < 3e38 {
                    holds(at.quotient(range_x, range_y), wide_x / wide_y, x / y);
                }
                let c = 0.1;
                let exact = wide_x + c * (wide_y - wide_x);
                holds(
                    at.between(range_x, range_y, c),
                    exact,
                    x + c as f32 * (y - x),
                );
            }
        }
    }

    #[test]
    fn what_is_not_certain_is_in_the_range() {
        let at = Arithmetic(Roundoff::NEAREST);
        let about_zero = Bounded {
            exact: 1e-9,
            low: -1e-8,
            high: 1e-8,
        };
        let sign = about_zero.sign();
        assert_eq!((sign.exact, sign.low, sign.high), (1.0, -1.0, 1.0));
        assert_eq!(about_zero.magnitude().low, 0.0);
        let anything = at.quotient(Bounded::exactly(1.0), about_zero);
        assert_eq!(
            (anything.low, anything.high),
            (f64::NEG_INFINITY, f64::INFINITY)
        );
        // A root that may be zero is not negative, so that an epsilon beside it bounds the quotient.
        let divisor = at.sum([at.root(about_zero), at.scalar(1e-8)]);
        let quotient = at.quotient(Bounded::exactly(1.0), divisor);
        assert!(divisor.low > 0.99e-8 && quotient.high < 1.02e8);
        // Nothing times anything.
        assert!(at.product(Bounded::default(), anything).low == f64::NEG_INFINITY);
    }
}
