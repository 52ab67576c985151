//! The traits of rules, on the GPU and on the CPU.

use std::fmt::Debug;
use std::ops::Deref;

use super::ConfigError;
use super::error::unsupported;
pub use crate::storage::MAX_SLOTS;

/// Most scalars that a step of a rule may take.
pub const MAX_SCALARS: usize = 16;

/// Most sums that a rule may take over a tensor.
pub const MAX_SUMS: usize = 4;

/// The start of a slot: its values before a tensor's first step.
///
/// A start that is made at the first step is NaN until then, so that the device knows which step is the first, whichever
/// encoders are dropped. The rule puts the start in its place; its WGSL tells NaN by the bits, because compilers may
/// assume that there is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Start {
    /// A value.
    Value(f32),
    /// The tensor's parameters, at its first step and after
    /// [`params_changed`](crate::GpuOptimizer::params_changed).
    Params,
    /// Something else that the rule makes at the tensor's first step.
    FirstStep,
}

impl Start {
    /// The value that a slot holds before its tensor's first step.
    #[must_use]
    pub const fn value(self) -> f32 {
        match self {
            Self::Value(value) => value,
            Self::Params | Self::FirstStep => f32::NAN,
        }
    }
}

/// A value per element that a rule keeps from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slot {
    /// Its name, PyTorch's where that has one: `momentum_buffer`, say. The field of `State` in WGSL.
    pub name: &'static str,
    /// The values that it starts with.
    pub start: Start,
    /// Whether this configuration keeps it. One that is not kept takes no memory.
    pub is_kept: bool,
}

impl Slot {
    /// A slot that is kept and starts at zero.
    #[must_use]
    pub const fn new(name: &'static str) -> Self {
        Self {
            name,
            start: Start::Value(0.0),
            is_kept: true,
        }
    }

    /// This slot with another value to start as.
    #[must_use]
    pub const fn starting_at(self, start: f32) -> Self {
        self.starting(Start::Value(start))
    }

    /// This slot with another start, which may be no value.
    #[must_use]
    pub const fn starting(self, start: Start) -> Self {
        Self { start, ..self }
    }

    /// Returns the slot, kept only if a configuration needs it.
    #[must_use]
    pub const fn kept_if(self, is_kept: bool) -> Self {
        Self { is_kept, ..self }
    }
}

/// The slots of a rule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slots {
    slots: [Slot; MAX_SLOTS],
    len: usize,
}

impl Slots {
    /// The slots that are kept, in their order.
    pub fn kept(&self) -> impl Iterator<Item = &Slot> + Clone {
        self.iter().filter(|slot| slot.is_kept)
    }

    /// The names of the slots that are kept.
    pub fn kept_names(&self) -> impl Iterator<Item = &'static str> + Clone {
        self.kept().map(|slot| slot.name)
    }
}

impl<const N: usize> From<[Slot; N]> for Slots {
    /// At most [`MAX_SLOTS`]: more do not compile.
    fn from(slots: [Slot; N]) -> Self {
        const { assert!(N <= MAX_SLOTS, "more slots than a rule may keep") };
        let mut all = [Slot::new("").kept_if(false); MAX_SLOTS];
        all[..N].copy_from_slice(&slots);
        Self { slots: all, len: N }
    }
}

impl Deref for Slots {
    type Target = [Slot];

    fn deref(&self) -> &[Slot] {
        &self.slots[..self.len]
    }
}

/// The scalars of a step, in the order of their names.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scalars {
    values: [f32; MAX_SCALARS],
    len: usize,
}

impl Scalars {
    /// The scalars.
    #[must_use]
    pub fn as_slice(&self) -> &[f32] {
        &self.values[..self.len]
    }

    /// The scalars, and behind them zeros.
    pub(super) const fn values(&self) -> &[f32; MAX_SCALARS] {
        &self.values
    }
}

impl<const N: usize> From<[f32; N]> for Scalars {
    /// At most [`MAX_SCALARS`]: more do not compile.
    fn from(scalars: [f32; N]) -> Self {
        const { assert!(N <= MAX_SCALARS, "more scalars than a step may take") };
        let mut values = [0.0; MAX_SCALARS];
        values[..N].copy_from_slice(&scalars);
        Self { values, len: N }
    }
}

/// A rule by which elements move: checked hyper-parameters, and what becomes of them on GPU and CPU.
///
/// The frame around it (addresses, loads and stores, batches, groups, states) is the library's. A rule is a type with
/// its configuration, and its WGSL is a function over four elements:
///
/// ```wgsl
/// override HAS_X: bool = false;                            // one for each of `terms`
/// fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>,    // returns the new parameters
///           state: ptr<function, State>) -> vec4<f32> { .. }
/// ```
///
/// where `Scalars` has an `f32` for each of `scalar_names` and `State` a `vec4<f32>` for each of `slots`. A slot that is
/// not kept is zero, and lost. Names that begin with `wo_` are the frame's; all others are the rule's to declare. Errors
/// in it are a [`KernelError`](crate::wgsl::KernelError) when the optimizer is built, and count lines as it does.
/// [`Twin`] adds the CPU; `examples/custom_rule.rs` in the repository is a whole one.
///
/// A rule whose elements need something of their whole tensor, such as its norm, names [`sums`](Self::sums). A step then has
/// two passes: the first adds up in one order, so that the same step gives the same bits, and the second updates. Its WGSL has
/// two more functions:
///
/// ```wgsl
/// fn measure(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: State) -> Summands { .. }
/// fn decide(k: Scalars, sums: Sums, numel: f32) -> Scalars { .. }
/// ```
///
/// where `Summands` has a `vec4<f32>` and `Sums` an `f32` for each of the sums. `decide` returns the scalars that `update`
/// gets for the tensor of so many elements.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a rule",
    label = "expected a checked configuration, such as `AdamConfig`",
    note = "if this is a builder, call `.build()?` on it",
    note = "to mix rules in one optimizer, use `AnyRule`: `ParamGroups::<AnyRule>::new(config.into())`"
)]
pub trait Rule: Clone + Debug + PartialEq + Send + Sync + 'static {
    /// Names kernels and labels: `wgpu_optim.STEM`. An identifier of WGSL.
    fn stem(&self) -> &'static str;

    /// Every slot that the rule may keep, in a fixed order. By default there are none.
    fn slots(&self) -> Slots {
        [].into()
    }

    /// Which terms this configuration has, by the names of WGSL overrides. One that is absent is compiled out. They do
    /// not change with the learning rate or the momentum. By default there are none.
    fn terms(&self) -> Vec<(&'static str, bool)> {
        Vec::new()
    }

    /// The rule's WGSL.
    fn wgsl(&self) -> String;

    /// The names of the scalars, [`MAX_SCALARS`] at most: the fields of `Scalars` in WGSL.
    fn scalar_names(&self) -> &'static [&'static str];

    /// The names of the sums over a tensor's elements that a step takes before it updates any, [`MAX_SUMS`] at most. By
    /// default there are none, and a step is one pass.
    fn sums(&self) -> &'static [&'static str] {
        &[]
    }

    /// The key of the step after `applied_steps` applied ones: the smallest number of steps after which the
    /// scalars are the same. Tensors of one phase share a dispatch. By default every step has its own.
    fn phase(&self, applied_steps: u64) -> u64 {
        applied_steps
    }

    /// The scalars of the step of a [`phase`](Self::phase), computed in `f64` and rounded once.
    fn scalars(&self, phase: u64) -> Scalars;

    /// The kind of the state that the slots hold, by default the stem: what its values mean, and so who can go on with
    /// them. A state of another kind is refused.
    fn state_kind(&self) -> String {
        self.stem().to_owned()
    }

    /// Learning rate.
    fn lr(&self) -> f64;

    /// Returns the rule at another learning rate.
    ///
    /// # Errors
    /// [`ConfigError`] if `lr` cannot be used.
    fn with_lr(&self, lr: f64) -> Result<Self, ConfigError>;

    /// The momentum, if the rule keeps one; by default it has none.
    fn momentum(&self) -> Option<f64> {
        None
    }

    /// Returns the rule at another momentum.
    ///
    /// # Errors
    /// [`ConfigError`] if `momentum` cannot be used, or the rule has none.
    fn with_momentum(&self, momentum: f64) -> Result<Self, ConfigError> {
        let _ = momentum;
        unsupported("momentum", "the rule has none")
    }

    /// Bytes that one step moves per element: the parameters and each slot that is kept read and written, the gradient
    /// read; and all of them read once before, where there are sums.
    fn bytes_per_elem(&self) -> u64 {
        let kept = self.slots().kept().count() as u64;
        let measured = if self.sums().is_empty() { 0 } else { 2 + kept };
        4 * (3 + 2 * kept + measured)
    }
}

/// A configuration that becomes a rule of an optimizer of `R`: `R` itself, and any rule of this crate in an optimizer of
/// [`AnyRule`](crate::AnyRule).
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a rule of an optimizer of `{R}`",
    label = "expected `{R}`",
    note = "if this is a builder, call `.build()?` on it",
    note = "to mix rules in one optimizer, use `AnyRule`: `ParamGroups::<AnyRule>::new(config.into())`"
)]
pub trait IntoRule<R> {
    /// The rule.
    fn into_rule(self) -> R;
}

impl<R: Rule> IntoRule<R> for R {
    fn into_rule(self) -> R {
        self
    }
}

/// A rule that runs on the CPU, too.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a rule that runs on the CPU",
    label = "expected a checked configuration, such as `AdamConfig`, or another `Twin`",
    note = "if this is a builder, call `.build()?` on it",
    note = "to mix rules in one optimizer, use `AnyRule`: `ParamGroups::<AnyRule>::new(config.into())`"
)]
pub trait Twin: Rule {
    /// The twin of the WGSL: one step over slices of equal length, in the same statement order. `scalars` are those of
    /// the step's [`phase`](Rule::phase), as the WGSL takes them, and `state` has a slice for each slot that is kept.
    fn step(&self, scalars: &Scalars, params: &mut [f32], state: &mut [&mut [f32]], grads: &[f32]);

    /// Adds to each of the rule's [`sums`](Rule::sums) what some elements of a tensor contribute, before any of them is
    /// updated: the twin of `measure` in WGSL. By default there is nothing to add.
    fn measure(
        &self,
        scalars: &Scalars,
        params: &[f32],
        state: &[&[f32]],
        grads: &[f32],
        sums: &mut [f64],
    ) {
        let _ = (scalars, params, state, grads, sums);
    }

    /// Returns the scalars of a step over a tensor of so many elements with these [`sums`](Rule::sums): the twin of `decide`
    /// in WGSL. By default they are what they were.
    fn decide(&self, scalars: &Scalars, sums: &[f32], numel: f32) -> Scalars {
        let _ = (sums, numel);
        *scalars
    }

    /// Returns the scalars of a step over a whole tensor: those of the phase, and what the rule decides by its sums.
    fn decided(&self, phase: u64, params: &[f32], state: &[&[f32]], grads: &[f32]) -> Scalars {
        let scalars = self.scalars(phase);
        let count = self.sums().len();
        if count == 0 {
            return scalars;
        }
        let mut sums = [0.0; MAX_SUMS];
        self.measure(&scalars, params, state, grads, &mut sums[..count]);
        let sums = sums.map(|sum| sum as f32);
        self.decide(&scalars, &sums[..count], params.len() as f32)
    }

    /// Makes the step one element after the other. [`step`](Self::step) is bit for bit the same, where it is in vectors; by
    /// default this is `step` itself.
    fn step_in_turn(
        &self,
        scalars: &Scalars,
        params: &mut [f32],
        state: &mut [&mut [f32]],
        grads: &[f32],
    ) {
        self.step(scalars, params, state, grads);
    }
}
