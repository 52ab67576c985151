//! Schedule-free AdamW.

use super::config::{config, scalars};
use super::elementwise::{Element, ElementRule, Pass, shader, started};
use super::error::{check_below_one, check_held};
use super::schedule_free::{Rise, averaged, check_beta1};
use super::{AdamForm, ConfigError, KnownRule, RulePreset, Slot, Slots, Start};

config! {
    /// Checked hyper-parameters of schedule-free AdamW (Defazio et al. 2024, <https://arxiv.org/abs/2405.15682>).
    ///
    /// ```text
    /// h      = g + coupled_weight_decay*y          g negated to maximize
    /// v      <- beta2*v + (1 - beta2)*h^2
    /// d      = h / (sqrt(v/bc2) + eps) + decoupled_weight_decay*y
    /// z      <- z - lr_t*d                         from y
    /// x      <- (1 - c_t)*x + c_t*z                c_t = lr_t^2 / (lr_1^2 + .. + lr_t^2)
    /// y      <- beta1*x + (1 - beta1)*z            lr_t = lr * min(1, t/warmup_steps)
    /// ```
    ///
    /// with `bc2 = 1 - beta2^t` at step `t`, which counts from one; in optax `z` moves by `lr_(t-1)` while that warms up. With
    /// [`AdamForm::EpsilonHat`] the gradient is divided by `sqrt(v) + eps`, and `lr_t` has a factor `sqrt(bc2)`, in the
    /// weights of the average, too. Slots: `z` and `exp_avg_sq` (v); `x` follows from them.
    /// 28 bytes per element and step.
    ///
    /// The parameters that are stepped are `y`, where gradients are to be taken. Models are evaluated and saved with the
    /// average [`averaged_params`](Self::averaged_params). The average weighs each step by the square of its learning
    /// rate while that warms up; a learning rate that is changed between steps moves `z` and is not in the weights, because
    /// there is to be no schedule.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, ScheduleFreeAdamWConfig};
    ///
    /// let config = ScheduleFreeAdamWConfig::builder(2.5e-3).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
    /// let mut weight = [1.0, -1.0];
    /// optimizer.step(&mut [&mut weight], &[&[0.5, -2.0]])?;
    /// assert!(weight[0] < 1.0 && weight[1] > -1.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub struct ScheduleFreeAdamWConfig, built by ScheduleFreeAdamWConfigBuilder {
        /// The point between `z`, at zero, and the average, at one, where gradients are taken; above zero.
        beta1: f64 = 0.9,
        /// Decay of `exp_avg_sq`, below one.
        beta2: f64 = 0.999,
        /// Added to the root.
        eps: f64 = 1e-8,
        /// Steps over which the learning rate rises to `lr`.
        warmup_steps: u64 = 0,
        /// Whether it rises from zero: step `t` of the warm-up is made with `lr*(t - 1)/warmup_steps`, as in optax, and not
        /// with `lr*t/warmup_steps`, as in the package schedulefree. It weighs as the latter in both.
        warmup_from_zero: bool = true; else default,
        /// The place of epsilon: beside the corrected root, or, with [`AdamForm::EpsilonHat`], beside the root as it is, and the
        /// correction in the learning rate.
        form: AdamForm = AdamForm::Corrected; else default,
    }

    /// optax's `schedule_free_adamw`: betas 0.9 and 0.999, eps 1e-8, no warm-up; its weight decay is decoupled, zero by
    /// default.
    pub const fn builder(lr) where decoupled_weight_decay = 0.0;
}

impl ScheduleFreeAdamWConfig {
    /// `AdamWScheduleFree` of facebookresearch's package schedulefree: the same with a warm-up that starts at
    /// `lr/warmup_steps`.
    pub const fn schedulefree(lr: f64) -> ScheduleFreeAdamWConfigBuilder {
        Self::builder(lr).warmup_from_zero(false)
    }

    /// `AdamWScheduleFreePaper` of that package, the algorithm of the paper: that with [`AdamForm::EpsilonHat`].
    pub const fn paper(lr: f64) -> ScheduleFreeAdamWConfigBuilder {
        Self::schedulefree(lr).form(AdamForm::EpsilonHat)
    }

    /// The parameters to evaluate with, the average of the points so far: `(theta - (1 - beta1)*z) / beta1`, from the
    /// parameters that are stepped and the slot `z` of their state
    /// ([`TensorState::slot`](crate::state::TensorState::slot); before the first step there is none, and the parameters
    /// are the average). Both of one length.
    #[must_use]
    pub fn averaged_params(&self, params: &[f32], z: &[f32]) -> Vec<f32> {
        averaged(self.beta1, params, z)
    }

    fn check(&self) -> Result<(), ConfigError> {
        check_beta1(self.beta1)?;
        check_below_one("beta2", self.beta2)?;
        check_held("eps", self.eps, 1.0)
    }
}

scalars! {
    struct Coefficients {
        beta2, c2, r, eps, mu, keep, c, a, b,
    }
}

impl ElementRule for ScheduleFreeAdamWConfig {
    type K = Coefficients;
    shader!("schedule_free_adamw");

    fn slots(&self) -> Slots {
        [
            Slot::new("z").starting(Start::Params),
            Slot::new("exp_avg_sq"),
        ]
        .into()
    }

    fn coefficients(&self, applied_steps: u64) -> Coefficients<f64> {
        let t = applied_steps.saturating_add(1);
        let (r, corrected_by) = match self.form {
            AdamForm::Corrected => (1.0 / (1.0 - self.beta2.powf(t as f64)), 0.0),
            AdamForm::EpsilonHat => (1.0, self.beta2),
        };
        let rise = Rise {
            warmup_steps: self.warmup_steps,
            from_zero: self.warmup_from_zero,
            beta2: corrected_by,
        };
        let (rate, c) = rise.at(t);
        let lr = self.lr * rate;
        Coefficients {
            beta2: self.beta2,
            c2: 1.0 - self.beta2,
            r,
            eps: self.eps,
            mu: self.decoupled_weight_decay,
            keep: 1.0 - c,
            c,
            a: lr * (1.0 - self.beta1 * (1.0 - c)),
            b: lr,
        }
    }

    /// The decoupled decay is in the update.
    fn rho(&self) -> f64 {
        1.0
    }

    fn step(&self, pass: Pass<'_, '_>) {
        pass.over(*self);
    }
}

impl Element<Coefficients, 2> for ScheduleFreeAdamWConfig {
    #[inline(always)]
    fn update(self, k: Coefficients, theta: f32, h: f32, [z, v]: [f32; 2]) -> (f32, [f32; 2]) {
        let v = k.beta2 * v + k.c2 * (h * h);
        let mut d = h / ((k.r * v).sqrt() + k.eps);
        if self.decoupled_weight_decay != 0.0 {
            d += k.mu * theta;
        }
        let z = started(z, theta);
        (k.keep * theta + k.c * z - k.a * d, [z - k.b * d, v])
    }
}

impl KnownRule for ScheduleFreeAdamWConfig {
    const PRESETS: &'static [RulePreset] = &[
        RulePreset::new("schedule-free-adamw", "optax", |lr| {
            Self::builder(lr).into()
        }),
        RulePreset::new("schedule-free-adamw", "schedulefree", |lr| {
            Self::schedulefree(lr).into()
        }),
        RulePreset::new("schedule-free-adamw", "schedulefree-paper", |lr| {
            Self::paper(lr).into()
        }),
    ];
}
