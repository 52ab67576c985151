//! The frame of rules by which each element moves on its own and that share `decay.wgsl`: what they are as [`Rule`] and
//! [`Twin`], and loops over slices in the widest vectors that the machine has.

use std::fmt::Debug;

use pulp::{Arch, Simd, WithSimd};

use super::config::changed_momentum;
use super::decay::{Decay, DecayTwin};
use super::error::unsupported;
use super::{ConfigError, Rule, Scalars, Slots, Twin};

/// Elements that are loaded before any is stored. A store that might be to the next load's address holds that load
/// up, and where arrays start alike in their pages it looks as if it were.
const BLOCK_ELEMS: usize = 32;

/// The hyper-parameters of a rule, as `config!` declares them.
pub(crate) trait Hyperparameters: Copy + Debug + PartialEq + Send + Sync + 'static {
    fn lr(&self) -> f64;

    /// Maximizing and the weight decays.
    fn decay(&self) -> Decay;

    /// Returns the hyper-parameters at another learning rate, not checked yet.
    fn at_lr(self, lr: f64) -> Self;

    /// Accepts the hyper-parameters that may stand together.
    fn checked(self) -> Result<Self, ConfigError>;
}

/// A rule's own scalars of a step by their names, as `scalars!` declares them.
pub(super) trait ScalarSet: Copy {
    /// The scalars before they are rounded.
    type Exact;

    /// The names of all scalars: `lambda` of `decay.wgsl`, the rule's own, `rho` of `decay.wgsl`.
    const NAMES: &'static [&'static str];

    /// All scalars, each rounded once.
    fn rounded(lambda: f64, own: Self::Exact, rho: f64) -> Scalars;

    /// All scalars, from what [`split`](Self::split) makes of them.
    fn joined(lambda: f32, own: Self, rho: f32) -> Scalars;

    /// `lambda`, the rule's own scalars and `rho`.
    fn split(scalars: &Scalars) -> (f32, Self, f32);
}

/// The field that a schedule of momentum sets.
pub(super) enum Momentum<'c> {
    None,
    /// `beta1`, as PyTorch's one-cycle schedule has it.
    Beta1(&'c mut f64),
    /// A momentum with a buffer of its own, which is kept unless it is zero.
    Buffered(&'c mut f64),
}

/// Declares the stem of a rule and its WGSL, the file of that name.
macro_rules! shader {
    ($stem:literal) => {
        const STEM: &'static str = $stem;
        const WGSL: &'static str = include_str!(concat!("../../shaders/rules/", $stem, ".wgsl"));
    };
}
pub(super) use shader;

/// A rule by element, from which all of [`Rule`] and [`Twin`] follows.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a rule",
    label = "expected a checked configuration, such as `AdamConfig`, or a type with a `Rule` of its own",
    note = "if this is a builder, call `.build()?` on it",
    note = "to mix rules in one optimizer, use `AnyRule`: `ParamGroups::<AnyRule>::new(config.into())`"
)]
pub(super) trait ElementRule: Hyperparameters {
    /// The rule's own scalars of a step, which [`coefficients`](Self::coefficients) computes.
    type K: ScalarSet;

    const STEM: &'static str;

    /// Whether all steps have the same scalars.
    const IS_STATIONARY: bool = false;

    /// The rule's WGSL, to which the frame adds `decay.wgsl`.
    const WGSL: &'static str;

    fn slots(&self) -> Slots;

    /// The scalars of the step after so many applied ones, not rounded yet.
    fn coefficients(&self, applied_steps: u64) -> <Self::K as ScalarSet>::Exact;

    /// One step on the CPU: [`Pass::over`] by the element of this configuration.
    fn step(&self, pass: Pass<'_, '_>);

    /// The sums over a tensor that a step takes first.
    const SUMS: &'static [&'static str] = &[];

    /// Adds up on the CPU: [`Measure::over`] by the element of this configuration.
    fn measure(&self, measure: Measure<'_, '_>) {
        let _ = measure;
    }

    /// Returns the rule's own scalars for a tensor of so many elements with these sums.
    fn decide(&self, k: Self::K, sums: &[f32], numel: f32) -> Self::K {
        let _ = (sums, numel);
        k
    }

    /// The terms beside those of `decay.wgsl`.
    fn terms(&self) -> Vec<(&'static str, bool)> {
        Vec::new()
    }

    fn phase(&self, applied_steps: u64) -> u64 {
        match Self::IS_STATIONARY {
            true => 0,
            false => applied_steps,
        }
    }

    /// The share of itself that a parameter keeps before the update.
    fn rho(&self) -> f64 {
        self.decay().rho()
    }

    fn stem(&self) -> &'static str {
        Self::STEM
    }

    fn state_kind(&self) -> &'static str {
        self.stem()
    }

    fn momentum(&mut self) -> Momentum<'_> {
        Momentum::None
    }
}

impl<R: ElementRule> Rule for R {
    fn stem(&self) -> &'static str {
        ElementRule::stem(self)
    }

    fn slots(&self) -> Slots {
        ElementRule::slots(self)
    }

    fn terms(&self) -> Vec<(&'static str, bool)> {
        let mut terms = self.decay().terms().to_vec();
        terms.extend(ElementRule::terms(self));
        terms
    }

    fn wgsl(&self) -> String {
        [R::WGSL, include_str!("../../shaders/rules/decay.wgsl")].concat()
    }

    fn scalar_names(&self) -> &'static [&'static str] {
        R::K::NAMES
    }

    fn sums(&self) -> &'static [&'static str] {
        R::SUMS
    }

    fn phase(&self, applied_steps: u64) -> u64 {
        ElementRule::phase(self, applied_steps)
    }

    fn scalars(&self, phase: u64) -> Scalars {
        R::K::rounded(self.decay().coupled, self.coefficients(phase), self.rho())
    }

    fn state_kind(&self) -> String {
        ElementRule::state_kind(self).to_owned()
    }

    fn lr(&self) -> f64 {
        Hyperparameters::lr(self)
    }

    fn with_lr(&self, lr: f64) -> Result<Self, ConfigError> {
        self.at_lr(lr).checked()
    }

    fn momentum(&self) -> Option<f64> {
        match ElementRule::momentum(&mut { *self }) {
            Momentum::None => None,
            Momentum::Beta1(beta1) => Some(*beta1),
            Momentum::Buffered(momentum) => (*momentum != 0.0).then_some(*momentum),
        }
    }

    fn with_momentum(&self, momentum: f64) -> Result<Self, ConfigError> {
        let mut config = *self;
        match ElementRule::momentum(&mut config) {
            Momentum::None => return unsupported("momentum", "the rule has none"),
            Momentum::Beta1(beta1) => *beta1 = momentum,
            Momentum::Buffered(before) => *before = changed_momentum(*before, momentum)?,
        }
        config.checked()
    }
}

impl<R: ElementRule> Twin for R {
    fn step(&self, scalars: &Scalars, params: &mut [f32], state: &mut [&mut [f32]], grads: &[f32]) {
        ElementRule::step(self, Pass::new(self, scalars, params, state, grads));
    }

    fn step_in_turn(
        &self,
        scalars: &Scalars,
        params: &mut [f32],
        state: &mut [&mut [f32]],
        grads: &[f32],
    ) {
        let pass = Pass::new(self, scalars, params, state, grads);
        ElementRule::step(
            self,
            Pass {
                in_turn: true,
                ..pass
            },
        );
    }

    fn measure(
        &self,
        scalars: &Scalars,
        params: &[f32],
        state: &[&[f32]],
        grads: &[f32],
        sums: &mut [f64],
    ) {
        let measure = Measure {
            decay: self.decay(),
            scalars,
            params,
            state,
            grads,
            sums,
        };
        ElementRule::measure(self, measure);
    }

    fn decide(&self, scalars: &Scalars, sums: &[f32], numel: f32) -> Scalars {
        let (lambda, k, rho) = R::K::split(scalars);
        R::K::joined(lambda, ElementRule::decide(self, k, sums, numel), rho)
    }
}

/// The update of one element, by scalars `K` and with so many slots of state.
pub(super) trait Element<K, const SLOTS: usize>: Copy {
    /// Returns the new parameter and the new slots, from the decayed parameter and the direction `h`: the gradient as
    /// `decay.wgsl` changes it. Has to be inlined, or it is not vectorised.
    fn update(self, k: K, theta: f32, h: f32, slots: [f32; SLOTS]) -> (f32, [f32; SLOTS]);
}

/// A step over slices of one length.
pub(super) struct Pass<'s, 'v> {
    decay: Decay,
    scalars: &'s Scalars,
    params: &'s mut [f32],
    state: &'s mut [&'v mut [f32]],
    grads: &'s [f32],
    /// One element after the other: what vectors are bit for bit the same as.
    in_turn: bool,
}

impl<'s, 'v> Pass<'s, 'v> {
    fn new(
        config: &impl Hyperparameters,
        scalars: &'s Scalars,
        params: &'s mut [f32],
        state: &'s mut [&'v mut [f32]],
        grads: &'s [f32],
    ) -> Self {
        Self {
            decay: config.decay(),
            scalars,
            params,
            state,
            grads,
            in_turn: false,
        }
    }

    /// Updates every element. The state has as many slots as a configuration keeps, and its element as many.
    pub(super) fn over<K: ScalarSet, const SLOTS: usize>(self, element: impl Element<K, SLOTS>) {
        match self.decay.has_lambda() {
            true => self.run::<K, SLOTS, true>(element),
            false => self.run::<K, SLOTS, false>(element),
        }
    }

    fn run<K: ScalarSet, const SLOTS: usize, const LAMBDA: bool>(
        self,
        element: impl Element<K, SLOTS>,
    ) {
        let Ok(state) = <&mut [&mut [f32]; SLOTS]>::try_from(self.state) else {
            return;
        };
        let (lambda, k, rho) = K::split(self.scalars);
        let decay = self.decay.twin::<LAMBDA>(lambda, rho);
        let blocks = Blocks {
            update: Update { element, k, decay },
            params: self.params,
            state: state.each_mut().map(|slot| &mut **slot),
            grads: self.grads,
        };
        match self.in_turn {
            true => blocks.in_turn(),
            false => Arch::new().dispatch(blocks),
        }
    }
}

/// The update of an element from its gradient as it comes: `decay.wgsl` and the rule.
#[derive(Clone, Copy)]
struct Update<E, K, const LAMBDA: bool> {
    element: E,
    k: K,
    decay: DecayTwin<LAMBDA>,
}

impl<E, K: Copy, const LAMBDA: bool> Update<E, K, LAMBDA> {
    #[inline(always)]
    fn at<const SLOTS: usize>(self, theta: f32, g: f32, slots: [f32; SLOTS]) -> (f32, [f32; SLOTS])
    where
        E: Element<K, SLOTS>,
    {
        let h = self.decay.direction(theta, g);
        let theta = self.decay.decayed(theta);
        self.element.update(self.k, theta, h, slots)
    }
}

struct Blocks<'a, E, K, const SLOTS: usize, const LAMBDA: bool> {
    update: Update<E, K, LAMBDA>,
    params: &'a mut [f32],
    state: [&'a mut [f32]; SLOTS],
    grads: &'a [f32],
}

impl<E, K: Copy, const SLOTS: usize, const LAMBDA: bool> Blocks<'_, E, K, SLOTS, LAMBDA>
where
    E: Element<K, SLOTS>,
{
    #[inline(always)]
    fn in_turn(self) {
        let (update, state) = (self.update, self.state);
        for (i, (theta, g)) in self.params.iter_mut().zip(self.grads).enumerate() {
            let slots = std::array::from_fn(|slot| state[slot][i]);
            let (next, slots) = update.at(*theta, *g, slots);
            *theta = next;
            for (slot, value) in slots.into_iter().enumerate() {
                state[slot][i] = value;
            }
        }
    }
}

impl<E, K: Copy, const SLOTS: usize, const LAMBDA: bool> WithSimd
    for Blocks<'_, E, K, SLOTS, LAMBDA>
where
    E: Element<K, SLOTS>,
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let update = self.update;
        let (params, params_end) = self.params.as_chunks_mut::<BLOCK_ELEMS>();
        let (grads, grads_end) = self.grads.as_chunks::<BLOCK_ELEMS>();
        let blocks = self.state.map(|slot| slot.as_chunks_mut::<BLOCK_ELEMS>());
        for (block, (params, grads)) in params.iter_mut().zip(grads).enumerate() {
            let (mut theta, g) = (*params, *grads);
            let mut slots: [[f32; BLOCK_ELEMS]; SLOTS] =
                std::array::from_fn(|s| blocks[s].0[block]);
            for i in 0..BLOCK_ELEMS {
                let values = std::array::from_fn(|slot| slots[slot][i]);
                let (next, values) = update.at(theta[i], g[i], values);
                theta[i] = next;
                for slot in 0..SLOTS {
                    slots[slot][i] = values[slot];
                }
            }
            for slot in 0..SLOTS {
                blocks[slot].0[block] = slots[slot];
            }
            *params = theta;
        }
        let rest = Blocks {
            update,
            params: params_end,
            state: blocks.map(|(_, end)| end),
            grads: grads_end,
        };
        rest.in_turn();
    }
}

/// What an element adds to the sums over its tensor.
pub(super) trait Measured<K, const SLOTS: usize, const SUMS: usize>: Copy {
    /// Returns what is added, from the parameter as it is and the direction `h`. Has to be inlined, or it is not vectorised.
    fn summands(self, k: K, theta: f32, h: f32, slots: [f32; SLOTS]) -> [f32; SUMS];
}

/// The sums over slices of one length.
pub(super) struct Measure<'s, 'v> {
    decay: Decay,
    scalars: &'s Scalars,
    params: &'s [f32],
    state: &'s [&'v [f32]],
    grads: &'s [f32],
    sums: &'s mut [f64],
}

impl Measure<'_, '_> {
    /// Adds up every element.
    pub(super) fn over<K: ScalarSet, const SLOTS: usize, const SUMS: usize>(
        self,
        element: impl Measured<K, SLOTS, SUMS>,
    ) {
        match self.decay.has_lambda() {
            true => self.run::<K, SLOTS, SUMS, true>(element),
            false => self.run::<K, SLOTS, SUMS, false>(element),
        }
    }

    fn run<K: ScalarSet, const SLOTS: usize, const SUMS: usize, const LAMBDA: bool>(
        self,
        element: impl Measured<K, SLOTS, SUMS>,
    ) {
        let Ok(state) = <&[&[f32]; SLOTS]>::try_from(self.state) else {
            return;
        };
        let (lambda, k, rho) = K::split(self.scalars);
        let decay = self.decay.twin::<LAMBDA>(lambda, rho);
        for start in (0..self.params.len()).step_by(MEASURED_ELEMS) {
            let elems = start..self.params.len().min(start + MEASURED_ELEMS);
            let added = Arch::new().dispatch(Added {
                element,
                k,
                decay,
                params: &self.params[elems.clone()],
                state: state.map(|slot| &slot[elems.clone()]),
                grads: &self.grads[elems],
            });
            for (sum, added) in self.sums.iter_mut().zip(added) {
                *sum += added;
            }
        }
    }
}

/// Elements whose sums are taken in `f32`, in as many lanes as a block has elements.
const MEASURED_ELEMS: usize = 32 * BLOCK_ELEMS;

struct Added<'a, E, K, const SLOTS: usize, const SUMS: usize, const LAMBDA: bool> {
    element: E,
    k: K,
    decay: DecayTwin<LAMBDA>,
    params: &'a [f32],
    state: [&'a [f32]; SLOTS],
    grads: &'a [f32],
}

impl<E, K: Copy, const SLOTS: usize, const SUMS: usize, const LAMBDA: bool> WithSimd
    for Added<'_, E, K, SLOTS, SUMS, LAMBDA>
where
    E: Measured<K, SLOTS, SUMS>,
{
    type Output = [f64; SUMS];

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> [f64; SUMS] {
        let mut lanes = [[0.0_f32; BLOCK_ELEMS]; SUMS];
        for start in (0..self.params.len()).step_by(BLOCK_ELEMS) {
            let len = BLOCK_ELEMS.min(self.params.len() - start);
            let (params, grads) = (&self.params[start..][..len], &self.grads[start..][..len]);
            let state = self.state.map(|slot| &slot[start..][..len]);
            for i in 0..len {
                let slots = std::array::from_fn(|slot| state[slot][i]);
                let h = self.decay.direction(params[i], grads[i]);
                let summands = self.element.summands(self.k, params[i], h, slots);
                for (lanes, summand) in lanes.iter_mut().zip(summands) {
                    lanes[i] += summand;
                }
            }
        }
        lanes.map(|lanes| lanes.iter().map(|lane| f64::from(*lane)).sum())
    }
}

/// A slot that is made at its tensor's first step, which is NaN until then.
#[inline(always)]
pub(super) fn started(slot: f32, start: f32) -> f32 {
    if slot.is_nan() { start } else { slot }
}

/// WGSL's `sign`: zero of zero.
#[inline(always)]
pub(super) fn sign(x: f32) -> f32 {
    if x > 0.0 {
        1.0
    } else if x < 0.0 {
        -1.0
    } else {
        x
    }
}

/// WGSL's `max` where neither is NaN; `f32::max` is slower, as it has to look.
#[inline(always)]
pub(super) fn larger(x: f32, y: f32) -> f32 {
    if x < y { y } else { x }
}
