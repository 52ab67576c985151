//! Treatment of gradients before a step: unscale them, find what is not finite, clip, skip, and set the loss scale.
//!
//! [`StepControl`] says what is to happen. A [`GpuControl`](crate::GpuControl) does it on the device, recorded with the
//! step and without a word from the host; a [`CpuControl`](crate::CpuControl) does the same in memory:
//!
//! ```text
//! found  = a gradient is infinite or NaN
//! norm   = |g| / scale                            over all tensors that take part
//! factor = min(1, max_norm / (norm + 1e-6))
//! g      <- max(-clip_value, min(clip_value, g / scale * factor))
//! found:  nothing is stepped, nothing is counted; scale <- scale*backoff
//! else:   after `growth_interval` such steps in a row, scale <- scale*growth
//! ```
//!
//! as `torch.amp.GradScaler` (the dynamic [`LossScale`]), `torch.nn.utils.clip_grad_norm_` and `clip_grad_value_` do it,
//! in the order in which PyTorch's documentation has them: unscale, clip, step.

mod norm;
mod verdict;

use std::ops::RangeInclusive;

use crate::rules::ConfigError;

pub use norm::{GradNorm, GradNorms};
pub(crate) use verdict::Factors;
pub use verdict::Verdict;

/// Added to the norm, so that gradients of zero are divided by something; `torch.nn.utils.clip_grad_norm_` has it.
pub(crate) const NORM_EPS: f64 = 1e-6;

/// The range of a loss scale: neither it nor its inverse is subnormal.
pub(crate) const SCALES: RangeInclusive<f32> = f32::MIN_POSITIVE..=1.0 / f32::MIN_POSITIVE;

/// Most groups with a norm of their own.
pub(crate) const MAX_GROUP_NORMS: usize = 15;

/// The treatment of gradients that are infinite or NaN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NonFinite {
    /// The step is skipped: nothing is written, nothing is counted.
    #[default]
    Skip,
    /// They are applied as they are. Where a norm clips, an infinite gradient leaves zeros and NaN, as in PyTorch.
    Apply,
}

/// A loss scale that follows the gradients, as `torch.amp.GradScaler` has it, whose defaults these are.
///
/// The loss is multiplied by it before the backward pass, so that gradients of 16 bits do not vanish.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScale {
    /// The first scale: 65536.
    pub initial: f64,
    /// The factor of the scale after `growth_interval` steps without a skipped one: 2.
    pub growth_factor: f64,
    /// The factor of the scale after a skipped step: 0.5.
    pub backoff_factor: f64,
    /// The number of steps in a row that have to be applied for it to grow: 2000.
    pub growth_interval: u32,
}

impl Default for LossScale {
    fn default() -> Self {
        Self {
            initial: 65536.0,
            growth_factor: 2.0,
            backoff_factor: 0.5,
            growth_interval: 2000,
        }
    }
}

/// The scale of the gradients, which are divided by it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Scale {
    #[default]
    One,
    Constant(f64),
    Dynamic(LossScale),
}

/// The settings of one parameter group.
#[derive(Clone, Debug, PartialEq)]
struct GroupClip {
    group: String,
    max_norm: Option<f64>,
    clip_value: Option<f64>,
}

/// A checked description of what is done to gradients before they are applied.
///
/// ```
/// use wgpu_optim::{CpuControl, CpuOptimizer, LossScale, Optimizer, SgdConfig, StepControl};
///
/// let control = StepControl::builder().max_norm(1.0).loss_scale(LossScale::default()).build()?;
/// let mut control = CpuControl::new(control);
/// let mut optimizer = CpuOptimizer::new(SgdConfig::builder(0.5).build()?, [("weight", [2])])?;
/// let mut weight = [0.0, 0.0];
///
/// // The loss was multiplied by 65536: the gradient is [3, -4], its norm 5.
/// let scale = control.loss_scale();
/// let record = optimizer.step_with(&mut [&mut weight], &[&[3.0 * scale, -4.0 * scale]], &mut control)?;
/// assert_eq!((record.norm, record.is_skipped), (5.0, false));
/// assert!((weight[0] + 0.3).abs() < 1e-6 && (weight[1] - 0.4).abs() < 1e-6);
///
/// let record = optimizer.step_with(&mut [&mut weight], &[&[f32::INFINITY, 0.0]], &mut control)?;
/// assert!(record.is_skipped);
/// assert_eq!(control.loss_scale(), 32768.0);
/// assert_eq!(optimizer.applied_steps("weight"), Some(1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepControl {
    max_norm: Option<f64>,
    tensor_max_norm: Option<f64>,
    clip_value: Option<f64>,
    scale: Scale,
    nonfinite: NonFinite,
    groups: Vec<GroupClip>,
}

impl StepControl {
    /// One that only skips steps whose gradients are not finite.
    pub fn builder() -> StepControlBuilder {
        StepControlBuilder(Self::default())
    }

    /// The treatment of gradients that are not finite.
    #[must_use]
    pub const fn nonfinite(&self) -> NonFinite {
        self.nonfinite
    }

    /// The loss scale, if it is dynamic.
    #[must_use]
    pub const fn loss_scale(&self) -> Option<LossScale> {
        match self.scale {
            Scale::Dynamic(scale) => Some(scale),
            _ => None,
        }
    }

    /// The loss scale and its count before the first step.
    #[must_use]
    pub fn initial_state(&self) -> ControlState {
        ControlState {
            scale: match self.scale {
                Scale::One => 1.0,
                Scale::Constant(scale) => scale as f32,
                Scale::Dynamic(scale) => scale.initial as f32,
            },
            growth_tracker: 0,
            is_dynamic: self.loss_scale().is_some(),
            steps: 0,
            skipped: 0,
        }
    }

    /// The state that this control goes on with after another one's: of that it takes over the numbers of steps, and a
    /// dynamic loss scale.
    pub(crate) fn resumed(&self, state: &ControlState) -> ControlState {
        match self.scale {
            Scale::Dynamic(_) if state.is_dynamic => *state,
            _ => ControlState {
                steps: state.steps,
                skipped: state.skipped,
                ..self.initial_state()
            },
        }
    }

    /// The parameter groups that are clipped by themselves.
    pub fn groups(&self) -> impl Iterator<Item = &str> {
        self.groups.iter().map(|clip| &*clip.group)
    }

    fn of_group(&self, group: &str) -> Option<(usize, &GroupClip)> {
        let mut groups = self.groups.iter().enumerate();
        groups.find(|(_, clip)| clip.group == group)
    }

    /// The one of the [`norms`](Self::norms) that the gradients of a parameter group are part of: the first is that of all groups
    /// without one of their own.
    #[must_use]
    pub fn norm_of(&self, group: &str) -> usize {
        match self.of_group(group) {
            Some((index, clip)) if clip.max_norm.is_some() => index + 1,
            _ => 0,
        }
    }

    /// The number of norms that are taken, as [`CpuControl::decide`](crate::CpuControl::decide) wants them.
    #[must_use]
    pub fn norms(&self) -> usize {
        self.groups.len() + 1
    }

    /// The most that a norm may be.
    pub(crate) fn max_norm_of(&self, norm: usize) -> Option<f64> {
        match norm.checked_sub(1) {
            None => self.max_norm,
            Some(group) => self.groups.get(group)?.max_norm,
        }
    }

    /// The most that the norm of each tensor of a group may be, if they are clipped one by one.
    pub(crate) fn tensor_max_norm_of(&self, group: &str) -> Option<f64> {
        self.tensor_max_norm.filter(|_| self.norm_of(group) == 0)
    }

    /// The most that the norm of a tensor's gradients may be, where tensors are clipped one by one.
    #[must_use]
    pub const fn tensor_max_norm(&self) -> Option<f64> {
        self.tensor_max_norm
    }

    /// The most that a gradient of a group may be.
    pub(crate) fn clip_value_of(&self, group: &str) -> f32 {
        let of_group = self.of_group(group).and_then(|(_, clip)| clip.clip_value);
        let clip_value = of_group.or(self.clip_value);
        clip_value.map_or(f32::INFINITY, |value| value as f32)
    }

    /// Whether gradients of any group are cut off.
    pub(crate) fn clips_values(&self) -> bool {
        let mut groups = self.groups.iter();
        self.clip_value.is_some() || groups.any(|clip| clip.clip_value.is_some())
    }

    fn group_mut(&mut self, group: String) -> &mut GroupClip {
        let position = self.groups.iter().position(|clip| clip.group == group);
        let index = position.unwrap_or_else(|| {
            self.groups.push(GroupClip {
                group,
                max_norm: None,
                clip_value: None,
            });
            self.groups.len() - 1
        });
        &mut self.groups[index]
    }

    fn check(self) -> Result<Self, ConfigError> {
        let groups = self.groups.iter();
        let max_norms = groups.clone().filter_map(|clip| clip.max_norm);
        for max_norm in max_norms.chain(self.max_norm) {
            check("max_norm", max_norm, |value| value >= 0.0, NOT_NEGATIVE)?;
        }
        if let Some(max_norm) = self.tensor_max_norm {
            check(
                "tensor_max_norm",
                max_norm,
                |value| value >= 0.0,
                NOT_NEGATIVE,
            )?;
        }
        let clip_values = groups.filter_map(|clip| clip.clip_value);
        for clip_value in clip_values.chain(self.clip_value) {
            check("clip_value", clip_value, |value| value >= 0.0, NOT_NEGATIVE)?;
        }
        // Its inverse is an f32, too.
        let normal = |value: f64| (value as f32).is_normal() && (value.recip() as f32).is_normal();
        let scale = |value| value > 0.0 && normal(value);
        match self.scale {
            Scale::One => {}
            Scale::Constant(value) => check("grad_scale", value, scale, POSITIVE)?,
            Scale::Dynamic(loss) => {
                check("loss_scale", loss.initial, scale, POSITIVE)?;
                let growth = |value| value >= 1.0 && normal(value);
                check("growth_factor", loss.growth_factor, growth, "x >= 1")?;
                let backoff = |value| value > 0.0 && value <= 1.0 && normal(value);
                check("backoff_factor", loss.backoff_factor, backoff, "0 < x <= 1")?;
                let interval = f64::from(loss.growth_interval);
                let expected = "at least one step";
                check("growth_interval", interval, |value| value >= 1.0, expected)?;
            }
        }
        if self.groups.len() > MAX_GROUP_NORMS {
            return Err(ConfigError::OutOfRange {
                field: "groups",
                value: self.groups.len() as f64,
                expected: "at most 15 groups that are clipped by themselves",
            });
        }
        Ok(self)
    }
}

const NOT_NEGATIVE: &str = "zero or a positive number that f32 can hold";
const POSITIVE: &str = "a positive number that f32 can hold, and its inverse, too";

fn check(
    field: &'static str,
    value: f64,
    is_fine: impl Fn(f64) -> bool,
    expected: &'static str,
) -> Result<(), ConfigError> {
    if (value as f32).is_finite() && is_fine(value) {
        return Ok(());
    }
    Err(ConfigError::OutOfRange {
        field,
        value,
        expected,
    })
}

/// Collects what is to be done; [`build`](Self::build) checks it together.
#[derive(Clone, Debug)]
#[must_use]
pub struct StepControlBuilder(StepControl);

impl StepControlBuilder {
    /// Clips by the norm over all tensors of all optimizers that share the control, those of groups left out that have
    /// one of their own: gradients are multiplied by `min(1, max_norm / (norm + 1e-6))`, as `clip_grad_norm_` does. Takes
    /// the place of a largest norm of each tensor.
    pub fn max_norm(mut self, max_norm: f64) -> Self {
        (self.0.max_norm, self.0.tensor_max_norm) = (Some(max_norm), None);
        self
    }

    /// Clips the gradients of each tensor by its own norm, as `clip_grad_norm_` does with one parameter, burn's
    /// `GradientClipping::Norm` and Keras' `clipnorm`. Groups that have a norm of their own are clipped by that. Takes the
    /// place of a largest norm over all tensors.
    ///
    /// ```
    /// use wgpu_optim::{CpuControl, CpuOptimizer, SgdConfig, StepControl};
    ///
    /// let mut control = CpuControl::new(StepControl::builder().tensor_max_norm(1.0).build()?);
    /// let mut optimizer = CpuOptimizer::new(SgdConfig::builder(1.0).build()?, [("a", [2]), ("b", [1])])?;
    /// let (mut a, mut b) = ([0.0, 0.0], [0.0]);
    /// let record = optimizer.step_with(&mut [&mut a, &mut b], &[&[3.0, -4.0], &[0.5]], &mut control)?;
    /// assert!((a[0] + 0.6).abs() < 1e-6 && (a[1] - 0.8).abs() < 1e-6, "of norm 5");
    /// assert_eq!(b, [-0.5], "of norm 0.5");
    /// assert!((record.clip_factor - 0.2).abs() < 1e-6);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn tensor_max_norm(mut self, max_norm: f64) -> Self {
        (self.0.max_norm, self.0.tensor_max_norm) = (None, Some(max_norm));
        self
    }

    /// Clips the gradients of one parameter group, by name, by their norm alone. Groups of several optimizers that are
    /// called the same are one.
    pub fn group_max_norm(mut self, group: impl Into<String>, max_norm: f64) -> Self {
        self.0.group_mut(group.into()).max_norm = Some(max_norm);
        self
    }

    /// Cuts every gradient off at this magnitude, after it was unscaled and clipped by the norm.
    pub fn clip_value(mut self, clip_value: f64) -> Self {
        self.0.clip_value = Some(clip_value);
        self
    }

    /// Clips the norm of one parameter group by itself; the group is then part of no other norm.
    pub fn group_clip_value(mut self, group: impl Into<String>, clip_value: f64) -> Self {
        self.0.group_mut(group.into()).clip_value = Some(clip_value);
        self
    }

    /// Gradients were multiplied by this number: they are divided by it. Takes the place of a loss scale.
    pub fn grad_scale(mut self, scale: f64) -> Self {
        self.0.scale = Scale::Constant(scale);
        self
    }

    /// Gradients were multiplied by a loss scale that follows them. Takes the place of a constant one.
    pub fn loss_scale(mut self, scale: LossScale) -> Self {
        self.0.scale = Scale::Dynamic(scale);
        self
    }

    /// Sets the treatment of gradients that are not finite: by default the step is skipped.
    pub fn nonfinite(mut self, nonfinite: NonFinite) -> Self {
        self.0.nonfinite = nonfinite;
        self
    }

    /// Checks all of it together.
    ///
    /// # Errors
    /// [`ConfigError::OutOfRange`] naming what cannot be used.
    pub fn build(self) -> Result<StepControl, ConfigError> {
        self.0.check()
    }
}

/// The memory of a control from step to step: `scale` and `_growth_tracker` of `GradScaler.state_dict()`, and how far the
/// numbers of its records have come.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "safetensors",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct ControlState {
    /// The loss scale of the next step.
    pub scale: f32,
    /// Steps that were applied in a row since it last changed.
    pub growth_tracker: u32,
    /// Whether the scale follows the gradients. One that does not belongs to the control's configuration, and is not taken
    /// over by another control.
    #[cfg_attr(feature = "safetensors", serde(default = "is_dynamic"))]
    pub is_dynamic: bool,
    /// The number of the last step, which the records of later ones go on from. Older files do not say it.
    #[cfg_attr(feature = "safetensors", serde(default))]
    pub steps: u64,
    /// How many of the steps were skipped. Older files do not say it.
    #[cfg_attr(feature = "safetensors", serde(default))]
    pub skipped: u64,
}

/// The value for files that do not say so.
#[cfg(feature = "safetensors")]
const fn is_dynamic() -> bool {
    true
}

/// The outcome of a controlled step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ControlRecord {
    /// The number of the step of its control, from one on.
    pub step: u64,
    /// Norm of all gradients, unscaled and before they were clipped; infinite where `f32` cannot hold it, infinite or NaN
    /// where a gradient was.
    pub norm: f32,
    /// The smallest factor by which a norm clipped, of all tensors or of one; 1 if none did.
    pub clip_factor: f32,
    /// Whether a gradient was infinite or NaN.
    pub found_nonfinite: bool,
    /// Whether the step was skipped: because of such a gradient, or else because a
    /// [`GpuControl`](crate::GpuControl) had no scalars for it ([`StepError::TooFarAhead`](crate::StepError::TooFarAhead)).
    pub is_skipped: bool,
    /// The scale by which the gradients were divided.
    pub scale: f32,
    /// The number of steps that have been skipped, this one included.
    pub skipped: u64,
}
