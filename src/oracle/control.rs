//! The control of gradients, in PyTorch's words, with the ranges in which its `f32` twins may be.

use super::{Arithmetic, Bounded, Roundoff};
use crate::control::{NORM_EPS, NonFinite, SCALES, StepControl};

/// A control's exact decisions.
///
/// ```
/// use wgpu_optim::oracle::{ControlOracle, Oracle, Roundoff};
/// use wgpu_optim::{CpuControl, CpuOptimizer, SgdConfig, StepControl};
///
/// let config = SgdConfig::builder(0.1).momentum(0.9).build()?;
/// let control = StepControl::builder().max_norm(1.0).build()?;
/// let (mut params, grads) = ([0.3, -0.7], [3.0, 4.0]);
/// let mut oracle = Oracle::new(&params, Roundoff::NEAREST);
/// let mut decisions = ControlOracle::new(&control, Roundoff::NEAREST);
/// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
/// let mut control = CpuControl::new(control);
/// for _ in 0..10 {
///     let record = optimizer.step_with(&mut [&mut params], &[&grads], &mut control)?;
///     let decision = decisions.decide(&[("default", &grads)]);
///     assert!(decision.norm.low <= record.norm.into() && f64::from(record.norm) <= decision.norm.high);
///     oracle.step_by(&config, &grads, &decision.of_group("default"));
/// }
/// oracle.check_params(&params)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct ControlOracle {
    control: StepControl,
    rounding: Roundoff,
    scale: f64,
    growth_tracker: u32,
}

/// The decision about one step.
#[derive(Clone, Debug)]
pub struct Decision {
    /// Norm of all gradients, unscaled.
    pub norm: Bounded,
    /// Whether a gradient was not finite.
    pub found_nonfinite: bool,
    /// Whether the step is skipped.
    pub is_skipped: bool,
    control: StepControl,
    unscale: Bounded,
    clips: Vec<Bounded>,
    /// The factor of each tensor, where it is clipped by itself.
    tensor_clips: Vec<Option<Bounded>>,
    at: Arithmetic,
}

/// The factors that the gradients of one parameter group go through.
#[derive(Clone, Copy, Debug)]
pub struct GradFactors {
    unscale: Bounded,
    clip: Bounded,
    clip_value: f64,
    at: Arithmetic,
}

impl ControlOracle {
    /// Before its first step.
    #[must_use]
    pub fn new(control: &StepControl, rounding: Roundoff) -> Self {
        Self {
            control: control.clone(),
            rounding,
            scale: control.initial_state().scale.into(),
            growth_tracker: 0,
        }
    }

    /// The loss scale of the next step.
    #[must_use]
    pub const fn scale(&self) -> f64 {
        self.scale
    }

    /// Sees the gradients of all tensors that take part, each with the name of its parameter group.
    pub fn decide(&mut self, grads: &[(&str, &[f32])]) -> Decision {
        let at = Arithmetic(self.rounding);
        let mut sums = vec![0.0_f64; self.control.norms()];
        let mut found_nonfinite = false;
        for (group, grads) in grads {
            let sum = &mut sums[self.control.norm_of(group)];
            for grad in grads.iter() {
                *sum += f64::from(*grad).powi(2);
                found_nonfinite |= !grad.is_finite();
            }
        }
        let numel: usize = grads.iter().map(|(_, grads)| grads.len()).sum();
        let relative = self.rounding.gamma(roundings(numel, grads.len()));
        // torch.amp.GradScaler multiplies by the inverse as f32.
        let inverse = f64::from(self.scale.recip() as f32);
        let norm_of = |sum: f64| {
            let exact = sum.sqrt() * inverse;
            // What is below the normal range may be flushed.
            let tiny = f64::from(f32::MIN_POSITIVE);
            let low = exact * (1.0 - relative);
            Bounded {
                exact,
                low: if low < tiny { 0.0 } else { low },
                high: exact * (1.0 + relative) + f64::from(f32::from_bits(1)),
            }
        };
        let clip_of = |norm: Bounded, max_norm: f64| {
            // torch.nn.utils.clip_grad_norm_.
            let factor = |norm: f64| max_norm / (norm + NORM_EPS);
            // NaN stays, as in torch.clamp.
            let least = |factor: f64| if factor > 1.0 { 1.0 } else { factor };
            let off = self.rounding.gamma(4 + self.rounding.division);
            Bounded {
                exact: least(factor(norm.exact)),
                low: least(factor(norm.high) * (1.0 - off)),
                high: least(factor(norm.low) * (1.0 + off)),
            }
        };
        let of_sum = |(index, sum): (usize, &f64)| match self.control.max_norm_of(index) {
            Some(max_norm) => clip_of(norm_of(*sum), max_norm),
            None => Bounded::exactly(1.0),
        };
        let clips = sums.iter().enumerate().map(of_sum).collect();
        let of_tensor = |(group, grads): &(&str, &[f32])| {
            let max_norm = self.control.tensor_max_norm_of(group)?;
            let squares = grads.iter().map(|grad| f64::from(*grad).powi(2));
            Some(clip_of(norm_of(squares.sum()), max_norm))
        };
        let tensor_clips = grads.iter().map(of_tensor).collect();
        let is_skipped = found_nonfinite && self.control.nonfinite() == NonFinite::Skip;
        let decision = Decision {
            norm: norm_of(sums.iter().sum()),
            found_nonfinite,
            is_skipped,
            control: self.control.clone(),
            unscale: Bounded {
                exact: inverse,
                ..at.quotient(Bounded::exactly(1.0), Bounded::exactly(self.scale as f32))
            },
            clips,
            tensor_clips,
            at,
        };
        self.follow(found_nonfinite);
        decision
    }

    /// torch.amp.GradScaler.update, whose scale is an f32.
    fn follow(&mut self, found_nonfinite: bool) {
        let Some(loss) = self.control.loss_scale() else {
            return;
        };
        let mut next = self.scale;
        if found_nonfinite {
            next *= loss.backoff_factor;
            self.growth_tracker = 0;
        } else {
            self.growth_tracker += 1;
            if self.growth_tracker == loss.growth_interval {
                next *= loss.growth_factor;
                self.growth_tracker = 0;
            }
        }
        if SCALES.contains(&(next as f32)) {
            self.scale = (next as f32).into();
        }
    }
}

impl Decision {
    /// The factors that the gradients of a parameter group go through.
    #[must_use]
    pub fn of_group(&self, group: &str) -> GradFactors {
        GradFactors {
            unscale: self.unscale,
            clip: self.clips[self.control.norm_of(group)],
            clip_value: self.control.clip_value_of(group).into(),
            at: self.at,
        }
    }

    /// The factors that the gradients of a tensor of a parameter group go through, by its place among the gradients that
    /// were decided about.
    #[must_use]
    pub fn of_tensor(&self, index: usize, group: &str) -> GradFactors {
        let of_group = self.of_group(group);
        GradFactors {
            clip: self.tensor_clips[index].unwrap_or(of_group.clip),
            ..of_group
        }
    }
}

impl GradFactors {
    /// A gradient behind them.
    pub(super) fn apply(&self, grad: f32) -> Bounded {
        let unscaled = self.at.product(Bounded::exactly(grad), self.unscale);
        let clipped = self.at.product(unscaled, self.clip);
        let cut = |value: f64| value.clamp(-self.clip_value, self.clip_value);
        Bounded {
            exact: cut(clipped.exact),
            low: cut(clipped.low),
            high: cut(clipped.high),
        }
    }
}

/// The most roundings that a norm goes through, with each invocation's share, those of the last workgroup's, the root and
/// the scale.
fn roundings(numel: usize, tensors: usize) -> u32 {
    // Four loads of four at a time, up to three more and two ends for every tensor, and four sums into one.
    let invocation = numel.min(4096) / 16 + 6 + 5 * tensors.min(8192);
    // Of 256 to 4096 elements each, and a workgroup of 64 more for every tensor; then halves of them.
    let finish = numel.div_ceil(1 << 16).min(128) + numel / (1 << 20) + tensors.div_ceil(4) + 8;
    (invocation + finish + 24) as u32
}
