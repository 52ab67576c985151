//! The oracle: every rule as its textbook writes it, in `f64` and not through the coefficients, with a bound beside each
//! value on how far an `f32` computation of it may be off.
//!
//! The bound is a running error analysis (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed.,
//! sections 3.1 and 3.3). A term that passes through `n` roundings has a relative error of at most
//! `gamma(n) = n*u / (1 - n*u)`: one rounding for the coefficient, one for the product, and one for each sum
//! on the way. Sums are bounded by the sum of their terms' magnitudes, so that the bound holds in whatever
//! order a compiler adds, and fusing a product into a sum only removes a rounding. Errors of earlier steps are
//! carried along. It holds while no intermediate leaves the range of `f32`.

mod adabelief;
mod adadelta;
mod adagrad;
mod adam;
mod adamax;
mod arithmetic;
mod control;
mod decay;
mod lamb;
mod lion;
mod nadam;
mod radam;
mod rmsprop;
mod rprop;
mod schedule_free;
mod sgd;
mod signum;
mod yogi;

use std::marker::PhantomData;

use approx::AbsDiffEq;

pub use arithmetic::{Arithmetic, Bounded};
pub use control::{ControlOracle, Decision, GradFactors};

use crate::rules::sgd::SgdConfig;
use crate::rules::{AnyRule, MAX_SLOTS, MAX_SUMS, Rule, Slots, Start, every_rule};
use crate::state::TensorState;
use crate::storage::{MASTER_PARAMS, Masters, Storage, StorageType, rest};

/// The rounding of the arithmetic under test.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roundoff {
    /// Largest relative error of a sum, a difference or a product.
    unit: f64,
    /// The number of roundings that a quotient is worth.
    division: u32,
    /// The number of roundings that a square root is worth.
    root: u32,
}

impl Roundoff {
    /// To nearest, as Rust computes on a CPU: half an ULP, `2^-24`.
    pub const NEAREST: Self = Self {
        unit: 1.0 / (1u32 << 24) as f64,
        division: 1,
        root: 1,
    };

    /// To either neighbour, all that WGSL promises for `+`, `-` and `*`: one ULP, `2^-23`. A quotient may be off by 2.5
    /// ULP, and a root by as much as `1/inverseSqrt(x)`, where `inverseSqrt` may be off by 2.
    pub const WGSL: Self = Self {
        unit: 1.0 / (1u32 << 23) as f64,
        division: 3,
        root: 5,
    };

    fn gamma(self, roundings: u32) -> f64 {
        let nu = f64::from(roundings) * self.unit;
        nu / (1.0 - nu)
    }
}

/// A rule in words of its own, not through the kernel's scalars, and the error analysis of its kernel.
///
/// The rules of this crate have it. A [`Rule`] of the user's own gets an [`Oracle`] by it, too.
pub trait Textbook: Rule {
    /// One step of one element in `f64`, as the library or paper writes it. `step` counts the applied ones, this one
    /// among them.
    fn follow(&self, step: u64, element: &mut Element<f64>, grad: f64);

    /// Makes the same step by the statements of the kernel, over values with bounds.
    fn bound(&self, step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded);

    /// What an element adds to each of the rule's [`sums`](Rule::sums) before it is updated, in `f64`. By default nothing.
    fn follow_sums(&self, step: u64, element: &Element<f64>, grad: f64) -> [f64; MAX_SUMS] {
        let _ = (step, element, grad);
        [0.0; MAX_SUMS]
    }

    /// What it adds by the statements of the kernel. By default nothing.
    fn bound_sums(
        &self,
        step: u64,
        at: Arithmetic,
        element: &Element<Bounded>,
        grad: Bounded,
    ) -> [Bounded; MAX_SUMS] {
        let _ = (step, at, element, grad);
        [Bounded::default(); MAX_SUMS]
    }
}

/// A parameter and its slots: one value for each of [`Rule::slots`], kept or not, and behind them zeros.
#[derive(Clone, Copy, Debug)]
pub struct Element<T> {
    /// The parameter.
    pub theta: T,
    /// The slots, in their order.
    pub slots: [T; MAX_SLOTS],
    /// The sums over the tensor that the step takes first, in the order of [`Rule::sums`].
    pub sums: [T; MAX_SUMS],
    /// The number of elements of the tensor.
    pub numel: usize,
}

impl<T: Copy + Default> Element<T> {
    /// The element of a tensor over which no sums have been taken.
    #[must_use]
    pub fn new(theta: T, slots: [T; MAX_SLOTS]) -> Self {
        Self {
            theta,
            slots,
            sums: [T::default(); MAX_SUMS],
            numel: 1,
        }
    }
}

impl<T> Element<T> {
    /// The parameter and the slots, each to be changed beside the others.
    pub const fn split(&mut self) -> (&mut T, &mut [T; MAX_SLOTS]) {
        (&mut self.theta, &mut self.slots)
    }
}

impl Element<Bounded> {
    /// Rounds what is stored in 16 bits. Masters are not.
    fn store(&mut self, storage: &Storage, slots: &[StorageType; MAX_SLOTS]) {
        let stored = |value: Bounded, of: StorageType| match of {
            StorageType::F32 => value,
            of if storage.is_stochastic => {
                value.between(|low| of.next(low, false), |high| of.next(high, true))
            }
            of => value.through(|value| of.rounded(value)),
        };
        if storage.masters == Masters::None {
            self.theta = stored(self.theta, storage.params);
        }
        for (slot, of) in self.slots.iter_mut().zip(slots) {
            *slot = stored(*slot, *of);
        }
    }

    /// The parameter, where the element is its master.
    fn params(&self, storage: &Storage) -> Bounded {
        match storage.masters {
            Masters::None => self.theta,
            Masters::F32 => self.theta.through(|value| storage.params.rounded(value)),
            Masters::LowBits => self.theta.through(|value| {
                let (half, _) = rest::split(value.to_bits());
                half::bf16::from_bits(half).into()
            }),
        }
    }

    fn exact(&self) -> Element<f64> {
        Element {
            theta: self.theta.exact,
            slots: self.slots.map(|slot| slot.exact),
            sums: self.sums.map(|sum| sum.exact),
            numel: self.numel,
        }
    }

    fn step(&mut self, rule: &impl Textbook, step: u64, rounding: Roundoff, grad: Bounded) {
        let mut exact = self.exact();
        rule.follow(step, &mut exact, grad.exact);
        rule.bound(step, Arithmetic(rounding), self, grad);
        self.theta.exact = exact.theta;
        for (slot, exact) in self.slots.iter_mut().zip(exact.slots) {
            slot.exact = exact;
        }
    }
}

/// The exact trajectory of one tensor.
///
/// ```
/// use wgpu_optim::oracle::{Oracle, Roundoff};
/// use wgpu_optim::{AdamConfig, CpuOptimizer};
///
/// let config = AdamConfig::adamw(0.1).build()?;
/// let mut params = [0.3, -0.7];
/// let grads = [0.2, 0.1];
///
/// let mut oracle = Oracle::new(&params, Roundoff::NEAREST);
/// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
/// for _ in 0..10 {
///     optimizer.step(&mut [&mut params], &[&grads])?;
///     oracle.step(&config, &grads);
/// }
/// let agreement = oracle.check_params(&params)?;
/// assert!(agreement.worst_ulp < 20.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Oracle<R = SgdConfig> {
    elements: Vec<Element<Bounded>>,
    rounding: Roundoff,
    applied_steps: u64,
    /// The bounds of the last step; their order is that of the slots' values.
    slots: Option<Slots>,
    storage: Storage,
    rule: PhantomData<R>,
}

impl<R: Textbook> Oracle<R> {
    /// Starts from these parameters, with the slots as they start.
    #[must_use]
    pub fn new(params: &[f32], rounding: Roundoff) -> Self {
        let slots = [Bounded::default(); MAX_SLOTS];
        let at = |theta: &f32| Element {
            numel: params.len(),
            ..Element::new(Bounded::exactly(*theta), slots)
        };
        Self {
            elements: params.iter().map(at).collect(),
            rounding,
            applied_steps: 0,
            slots: None,
            storage: Storage::default(),
            rule: PhantomData,
        }
    }

    /// Makes an oracle of values that are stored like this: each is rounded when it is stored, in the exact trajectory as in its
    /// twin's range. Roundoff to the nearest never falls where its argument rises, so a range goes to the range between
    /// its rounded ends; random bits reach the next value on either side. The parameters are those of 16 bits as `f32`.
    #[must_use]
    pub fn stored(mut self, storage: Storage) -> Self {
        self.storage = storage;
        self
    }

    /// Starts from these parameters and the state that a rule of this configuration left of them.
    #[must_use]
    pub fn resume(config: &R, params: &[f32], state: &TensorState, rounding: Roundoff) -> Self {
        let mut oracle = Self::new(params, rounding);
        oracle.start(config);
        oracle.applied_steps = state.applied_steps;
        for (index, slot) in config.slots().iter().enumerate() {
            let values = state.slot(slot.name).unwrap_or_default();
            for (element, value) in oracle.elements.iter_mut().zip(values) {
                element.slots[index] = Bounded::exactly(value);
            }
        }
        oracle
    }

    /// Gives every slot what it starts as.
    fn start(&mut self, config: &R) {
        let slots = config.slots();
        self.slots = Some(slots);
        let types = self.slot_types();
        for element in &mut self.elements {
            for ((value, slot), of) in element.slots.iter_mut().zip(&*slots).zip(types) {
                // What the first step makes, the textbook makes, too.
                let start = match slot.start {
                    Start::Value(start) => start,
                    Start::Params | Start::FirstStep => 0.0,
                };
                *value = Bounded::exactly(of.rounded(start));
            }
        }
    }

    /// The types that slots are stored as; those that are not kept have none.
    fn slot_types(&self) -> [StorageType; MAX_SLOTS] {
        let mut types = [StorageType::F32; MAX_SLOTS];
        let slots = self.slots.as_deref().unwrap_or_default();
        let kept = types.iter_mut().zip(slots).filter(|(_, slot)| slot.is_kept);
        for ((of, _), codec) in kept.zip(self.storage.slots()) {
            *of = codec.float().unwrap_or_default();
        }
        types
    }

    /// Applies one step; `grads` holds one gradient per parameter.
    pub fn step(&mut self, config: &R, grads: &[f32]) {
        self.step_over(config, grads.iter().copied().map(Bounded::exactly));
    }

    /// Applies one step under a control; a skipped one is none.
    pub fn step_by(&mut self, config: &R, grads: &[f32], factors: &GradFactors) {
        self.step_over(config, grads.iter().map(|grad| factors.apply(*grad)));
    }

    fn step_over(&mut self, config: &R, grads: impl Iterator<Item = Bounded> + Clone) {
        if self.slots.is_none() {
            self.start(config);
        }
        self.applied_steps += 1;
        if !config.sums().is_empty() {
            self.add_up(config, grads.clone());
        }
        let types = self.slot_types();
        for (element, grad) in self.elements.iter_mut().zip(grads) {
            element.step(config, self.applied_steps, self.rounding, grad);
            element.store(&self.storage, &types);
        }
    }

    /// Gives every element the sums over all of them.
    fn add_up(&mut self, config: &R, grads: impl Iterator<Item = Bounded>) {
        let (step, at) = (self.applied_steps, Arithmetic(self.rounding));
        let mut sums = [Bounded::default(); MAX_SUMS];
        for (element, grad) in self.elements.iter().zip(grads) {
            let exact = config.follow_sums(step, &element.exact(), grad.exact);
            let bounded = config.bound_sums(step, at, element, grad);
            for ((sum, exact), bounded) in sums.iter_mut().zip(exact).zip(bounded) {
                sum.exact += exact;
                sum.low += bounded.low;
                sum.high += bounded.high;
            }
        }
        let roundings = sum_roundings(self.elements.len());
        let sums = sums.map(|sum| at.rounded(sum, roundings));
        for element in &mut self.elements {
            element.sums = sums;
        }
    }

    /// The exact parameters.
    pub fn params(&self) -> impl ExactSizeIterator<Item = f64> {
        self.elements.iter().map(|element| element.theta.exact)
    }

    /// The exact values of a slot; those of one that the rule does not have are zero, as before the first step.
    pub fn slot(&self, slot: &str) -> impl ExactSizeIterator<Item = f64> {
        self.bounded(slot).map(|value| value.exact)
    }

    fn bounded(&self, slot: &str) -> impl ExactSizeIterator<Item = Bounded> {
        let slots = self.slots.as_deref().unwrap_or_default();
        let index = slots.iter().position(|other| other.name == slot);
        let value = move |element: &Element<Bounded>| index.map(|index| element.slots[index]);
        self.elements
            .iter()
            .map(move |element| value(element).unwrap_or_default())
    }

    /// Compares every parameter.
    ///
    /// # Errors
    /// [`Disagreement`] naming the element that exceeds its bound the most.
    pub fn check_params(&self, actual: &[f32]) -> Result<Agreement, Disagreement> {
        let params = |element: &Element<Bounded>| element.params(&self.storage);
        check("params", self.elements.iter().map(params), actual)
    }

    /// Compares every master, as a state of [`Masters::F32`] has them.
    ///
    /// # Errors
    /// [`Disagreement`] naming the element that exceeds its bound the most.
    pub fn check_masters(&self, actual: &[f32]) -> Result<Agreement, Disagreement> {
        let masters = self.elements.iter().map(|element| element.theta);
        check(MASTER_PARAMS, masters, actual)
    }

    /// Compares every value of a slot.
    ///
    /// # Errors
    /// [`Disagreement`] naming the element that exceeds its bound the most.
    pub fn check_slot(&self, slot: &str, actual: &[f32]) -> Result<Agreement, Disagreement> {
        check(slot, self.bounded(slot), actual)
    }
}

impl Oracle {
    /// The exact velocity.
    pub fn velocity(&self) -> impl ExactSizeIterator<Item = f64> {
        self.slot(VELOCITY)
    }

    /// Compares every velocity.
    ///
    /// # Errors
    /// [`Disagreement`] naming the element that exceeds its bound the most.
    pub fn check_velocity(&self, actual: &[f32]) -> Result<Agreement, Disagreement> {
        self.check_slot(VELOCITY, actual)
    }
}

/// The most roundings of a term of a sum over so many elements. On a GPU the four of a vector meet, then 32 of those in an
/// invocation or across a workgroup; then every 64th of the parts of chunks, eight for each 256 elements at least, and those
/// again. On a CPU 32 meet in a lane, and the rest in `f64`.
fn sum_roundings(numel: usize) -> u32 {
    let parts = 8 * (numel / 256 + 3);
    (2 + 32 + parts.div_ceil(64) + 6 + 2) as u32
}

/// The momentum family's one slot.
const VELOCITY: &str = "momentum_buffer";

/// Every element lies within its bound.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Agreement {
    /// Largest error in units in the last place of the exact value. Where terms cancel, the exact value is
    /// small and so is its ULP: many ULPs may then be a small share of the bound.
    pub worst_ulp: f64,
    /// Element with the largest error in ULPs.
    pub worst_index: usize,
    /// Largest error as a share of that element's bound, at most 1.
    pub worst_share_of_bound: f64,
}

impl Agreement {
    /// The worse of both; `other` starts at element `offset`.
    #[must_use]
    pub fn worst(self, other: Self, offset: usize) -> Self {
        let (worst_ulp, worst_index) = if other.worst_ulp > self.worst_ulp {
            (other.worst_ulp, other.worst_index + offset)
        } else {
            (self.worst_ulp, self.worst_index)
        };
        Self {
            worst_ulp,
            worst_index,
            worst_share_of_bound: self.worst_share_of_bound.max(other.worst_share_of_bound),
        }
    }
}

/// An element lies outside its bound.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Disagreement {
    /// Not one value per element.
    #[error("{what}: expected {expected} values, got {actual}")]
    Length {
        /// `params` or a slot.
        what: String,
        /// Number of elements.
        expected: usize,
        /// Number of values.
        actual: usize,
    },
    /// The worst of the wrong elements.
    #[error(
        "{what}[{index}]: expected {expected:e}, got {actual:e}: off by {error_ulp:.2} ULP, \
         allowed are {bound_ulp:.2} ({wrong} elements are wrong)"
    )]
    Value {
        /// `params` or a slot.
        what: String,
        /// The element.
        index: usize,
        /// The exact value.
        expected: f64,
        /// The computed value.
        actual: f32,
        /// The error.
        error_ulp: f64,
        /// The bound.
        bound_ulp: f64,
        /// The number of elements that lie outside their bound.
        wrong: usize,
    },
}

fn check(
    what: &str,
    expected: impl ExactSizeIterator<Item = Bounded>,
    actual: &[f32],
) -> Result<Agreement, Disagreement> {
    if expected.len() != actual.len() {
        return Err(Disagreement::Length {
            what: what.to_owned(),
            expected: expected.len(),
            actual: actual.len(),
        });
    }
    let mut agreement = Agreement::default();
    let mut wrong = 0;
    let mut worst_excess = 0.0;
    let mut worst_wrong = None;
    for (index, (expected, actual)) in expected.zip(actual).enumerate() {
        let value = f64::from(*actual);
        let bound = expected.bound(value);
        let expected = expected.exact;
        // What is not finite has no distance: it is the same or it is wrong.
        let same = value == expected || (value.is_nan() && expected.is_nan());
        let error = if same { 0.0 } else { (value - expected).abs() };
        if same || value.abs_diff_eq(&expected, bound) {
            let error_ulp = error / ulp(expected);
            if error_ulp > agreement.worst_ulp {
                agreement.worst_ulp = error_ulp;
                agreement.worst_index = index;
            }
            if error > 0.0 {
                agreement.worst_share_of_bound = agreement.worst_share_of_bound.max(error / bound);
            }
            continue;
        }
        wrong += 1;
        let excess = error / bound.max(f64::MIN_POSITIVE);
        if worst_wrong.is_none() || excess.is_nan() || excess > worst_excess {
            worst_excess = excess;
            worst_wrong = Some((
                index,
                expected,
                *actual,
                error / ulp(expected),
                bound / ulp(expected),
            ));
        }
    }
    match worst_wrong {
        None => Ok(agreement),
        Some((index, expected, actual, error_ulp, bound_ulp)) => Err(Disagreement::Value {
            what: what.to_owned(),
            index,
            expected,
            actual,
            error_ulp,
            bound_ulp,
            wrong,
        }),
    }
}

/// The distance from the `f32` nearest to `value` to the next larger one in magnitude.
fn ulp(value: f64) -> f64 {
    let nearest = (value as f32).abs();
    f64::from(nearest.next_up()) - f64::from(nearest)
}

macro_rules! any_textbook {
    ($( $Variant:ident($Config:ident), )*) => {
        impl Textbook for AnyRule {
            fn follow(&self, step: u64, element: &mut Element<f64>, grad: f64) {
                match self { $( Self::$Variant(rule) => rule.follow(step, element, grad), )* }
            }

            fn bound(&self, step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
                match self { $( Self::$Variant(rule) => rule.bound(step, at, element, grad), )* }
            }

            fn follow_sums(&self, step: u64, element: &Element<f64>, grad: f64) -> [f64; MAX_SUMS] {
                match self { $( Self::$Variant(rule) => rule.follow_sums(step, element, grad), )* }
            }

            fn bound_sums(&self, step: u64, at: Arithmetic, element: &Element<Bounded>, grad: Bounded) -> [Bounded; MAX_SUMS] {
                match self { $( Self::$Variant(rule) => rule.bound_sums(step, at, element, grad), )* }
            }
        }
    };
}

every_rule!(any_textbook);

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    /// Written twice, in the library's words and in the kernel's: both are the same function.
    #[test]
    fn the_textbook_and_the_kernels_statements_are_one_function() {
        for preset in AnyRule::presets() {
            let rule = preset.config(0.05).unwrap();
            let mut oracle = Oracle::new(&[0.7, -1.3, 0.02], Roundoff::NEAREST);
            oracle.start(&rule);
            for step in 1..=12 {
                for (index, element) in oracle.elements.iter_mut().enumerate() {
                    let mut bounded = *element;
                    let grad = (0.3 * step as f32 + index as f32).sin();
                    let (at, of_grad) = (Arithmetic(Roundoff::NEAREST), Bounded::exactly(grad));
                    rule.bound(step, at, &mut bounded, of_grad);
                    element.step(&rule, step, Roundoff::NEAREST, of_grad);
                    let pairs = [(element.theta, bounded.theta)].into_iter();
                    for (exact, statements) in
                        pairs.chain(element.slots.into_iter().zip(bounded.slots))
                    {
                        approx::assert_relative_eq!(
                            exact.exact,
                            statements.exact,
                            max_relative = 1e-9,
                            epsilon = 1e-12
                        );
                        assert!(
                            exact.low <= exact.exact && exact.exact <= exact.high,
                            "{rule:?}"
                        );
                    }
                }
            }
        }
    }
}
