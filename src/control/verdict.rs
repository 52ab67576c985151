//! The decision about a step, by norms and loss scale: the twin of `shaders/control/finish.wgsl`.

use super::{ControlRecord, ControlState, GradNorm, NORM_EPS, NonFinite, SCALES, StepControl};

/// The decision about a step, once its gradients have been seen.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    control: StepControl,
    unscale: f32,
    /// The factor by which each norm clips.
    clips: Vec<f32>,
    record: ControlRecord,
}

/// The factors and the bound that a gradient goes through on its way into a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Factors {
    pub(crate) unscale: f32,
    pub(crate) clip: f32,
    pub(crate) clip_value: f32,
}

impl Factors {
    /// Whether gradients come through as they are.
    pub(crate) fn change_nothing(&self) -> bool {
        (self.unscale, self.clip, self.clip_value) == (1.0, 1.0, f32::INFINITY)
    }

    /// Twin of `wo_gradient` in `shaders/frame/rule.wgsl`.
    #[inline(always)]
    pub(crate) fn apply(&self, grad: f32) -> f32 {
        let grad = grad * self.unscale * self.clip;
        // NaN is neither larger nor smaller.
        if grad > self.clip_value {
            self.clip_value
        } else if grad < -self.clip_value {
            -self.clip_value
        } else {
            grad
        }
    }
}

impl Verdict {
    /// Decides about gradients that are summed by the norms they are part of, [`StepControl::norms`] many and perhaps those
    /// of tensors, and moves the state on to the next step.
    pub(crate) fn of(
        control: &StepControl,
        norms: &[GradNorm],
        tensors: impl Iterator<Item = GradNorm>,
        state: &mut ControlState,
    ) -> Self {
        let scale = state.scale;
        let clip = |(index, norm)| match control.max_norm_of(index) {
            Some(max_norm) => clip_factor(norm, scale, max_norm),
            None => 1.0,
        };
        let all = norms
            .iter()
            .copied()
            .fold(GradNorm::default(), GradNorm::and);
        let clips: Vec<f32> = norms.iter().enumerate().map(clip).collect();
        let of_tensors = tensors.filter_map(|norm| {
            let max_norm = control.tensor_max_norm?;
            Some(clip_factor(&norm, scale, max_norm))
        });
        let found_nonfinite = !all.is_finite();
        let is_skipped = found_nonfinite && control.nonfinite == NonFinite::Skip;
        // A loaded state may say any number.
        state.steps = state.steps.saturating_add(1);
        state.skipped = state.skipped.saturating_add(is_skipped.into());
        let record = ControlRecord {
            step: state.steps,
            norm: unscaled(&all, scale) as f32,
            clip_factor: clips.iter().copied().chain(of_tensors).fold(1.0, least),
            found_nonfinite,
            is_skipped,
            scale,
            skipped: state.skipped,
        };
        state.follow(control, found_nonfinite);
        Self {
            control: control.clone(),
            unscale: f64::from(scale).recip() as f32,
            clips,
            record,
        }
    }

    /// The outcome of the step.
    #[must_use]
    pub const fn record(&self) -> &ControlRecord {
        &self.record
    }

    /// The treatment of the gradients of a parameter group, of a tensor of which they have this norm.
    pub(crate) fn factors(&self, group: &str, tensor: Option<&GradNorm>) -> Factors {
        let by_tensor = self.control.tensor_max_norm_of(group).zip(tensor);
        Factors {
            unscale: self.unscale,
            clip: match by_tensor {
                Some((max_norm, norm)) => clip_factor(norm, self.record.scale, max_norm),
                None => self.clips[self.control.norm_of(group)],
            },
            clip_value: self.control.clip_value_of(group),
        }
    }

    /// Does to gradients of a parameter group what a step does to them before it applies them: they are divided by the
    /// scale, multiplied by the factor of their norm, and cut off at the largest value.
    ///
    /// `of_tensor` is the norm of the whole tensor that they are of, by which it is clipped where the control clips
    /// [tensors one by one](super::StepControlBuilder::tensor_max_norm); without it they are not clipped there.
    pub fn apply_to(&self, group: &str, of_tensor: Option<&GradNorm>, grads: &mut [f32]) {
        let factors = self.factors(group, of_tensor);
        if !factors.change_nothing() {
            for grad in grads {
                *grad = factors.apply(*grad);
            }
        }
    }
}

impl ControlState {
    /// `torch._amp_update_scale_`, but never to where the scale or its inverse is subnormal.
    fn follow(&mut self, control: &StepControl, found_nonfinite: bool) {
        let Some(loss) = control.loss_scale() else {
            return;
        };
        self.growth_tracker = if found_nonfinite {
            0
        } else {
            self.growth_tracker.saturating_add(1)
        };
        let factor = if found_nonfinite {
            loss.backoff_factor
        } else if self.growth_tracker >= loss.growth_interval {
            self.growth_tracker = 0;
            loss.growth_factor
        } else {
            return;
        };
        let next = (f64::from(self.scale) * factor) as f32;
        if SCALES.contains(&next) {
            self.scale = next;
        }
    }
}

/// A norm of gradients that have been divided by the scale.
fn unscaled(norm: &GradNorm, scale: f32) -> f64 {
    norm.value() / f64::from(scale)
}

/// The factor by which gradients of this norm are clipped.
fn clip_factor(norm: &GradNorm, scale: f32, max_norm: f64) -> f32 {
    // A comparison with NaN is false.
    match max_norm / (unscaled(norm, scale) + NORM_EPS) {
        factor if factor > 1.0 => 1.0,
        factor => factor as f32,
    }
}

/// The smaller; NaN where one is.
fn least(x: f32, y: f32) -> f32 {
    if y < x || y.is_nan() { y } else { x }
}
