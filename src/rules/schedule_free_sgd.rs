//! Schedule-free SGD.

use super::config::{config, scalars};
use super::elementwise::{Element, ElementRule, Pass, shader, started};
use super::error::unsupported;
use super::schedule_free::{Rise, averaged, check_beta1};
use super::{ConfigError, KnownRule, RulePreset, Slot, Slots, Start};

config! {
    /// Checked hyper-parameters of schedule-free SGD (Defazio et al. 2024, <https://arxiv.org/abs/2405.15682>).
    ///
    /// ```text
    /// h      = g + coupled_weight_decay*y          g negated to maximize
    /// z      <- z - lr_t*h                         from y
    /// x      <- (1 - c_t)*x + c_t*z                c_t = lr_t^2 / (lr_1^2 + .. + lr_t^2)
    /// y      <- beta1*x + (1 - beta1)*z            lr_t = lr * min(1, t/warmup_steps)
    /// ```
    ///
    /// at step `t`, which counts from one; in optax `z` moves by `lr_(t-1)` while that warms up. Slot: `z`; `x` follows from it. 20 bytes per element and step.
    ///
    /// The parameters that are stepped are `y`, where gradients are to be taken. Models are evaluated and saved with the
    /// average [`averaged_params`](Self::averaged_params). The average weighs each step by the square of its learning
    /// rate while that warms up; a learning rate that is changed between steps moves `z` and is not in the weights, because
    /// there is to be no schedule.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, ScheduleFreeSgdConfig};
    ///
    /// let config = ScheduleFreeSgdConfig::builder(1.0).warmup_steps(10).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", [1])])?;
    /// let mut weight = [1.0];
    /// for _ in 0..50 {
    ///     let grads = weight; // of weight^2/2
    ///     optimizer.step(&mut [&mut weight], &[&grads])?;
    /// }
    /// let state = optimizer.state();
    /// let z = state.tensors[0].slot("z").ok_or("no step yet")?;
    /// let averaged = config.averaged_params(&weight, &z);
    /// assert!(averaged[0].abs() < 0.1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub struct ScheduleFreeSgdConfig, built by ScheduleFreeSgdConfigBuilder {
        /// The point between `z`, at zero, and the average, at one, where gradients are taken; above zero.
        beta1: f64 = 0.9,
        /// Steps over which the learning rate rises to `lr`.
        warmup_steps: u64 = 0,
        /// Whether it rises from zero: step `t` of the warm-up is made with `lr*(t - 1)/warmup_steps`, as in optax, and not
        /// with `lr*t/warmup_steps`, as in the package schedulefree. It weighs as the latter in both.
        warmup_from_zero: bool = true; else default,
    }

    /// optax's `schedule_free_sgd`: beta1 0.9, no warm-up.
    pub const fn builder(lr);
}

impl ScheduleFreeSgdConfig {
    /// `SGDScheduleFree` of facebookresearch's package schedulefree: the same with a warm-up that starts at
    /// `lr/warmup_steps`.
    pub const fn schedulefree(lr: f64) -> ScheduleFreeSgdConfigBuilder {
        Self::builder(lr).warmup_from_zero(false)
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
        if self.decoupled_weight_decay != 0.0 {
            return unsupported(
                "decoupled_weight_decay",
                "in schedule-free SGD both decays are one, weight_decay",
            );
        }
        Ok(())
    }
}

scalars! {
    struct Coefficients {
        keep, c, a, b,
    }
}

impl ElementRule for ScheduleFreeSgdConfig {
    type K = Coefficients;
    shader!("schedule_free_sgd");

    fn slots(&self) -> Slots {
        [Slot::new("z").starting(Start::Params)].into()
    }

    fn coefficients(&self, applied_steps: u64) -> Coefficients<f64> {
        let t = applied_steps.saturating_add(1);
        let rise = Rise {
            warmup_steps: self.warmup_steps,
            from_zero: self.warmup_from_zero,
            beta2: 0.0,
        };
        let (rate, c) = rise.at(t);
        let lr = self.lr * rate;
        Coefficients {
            keep: 1.0 - c,
            c,
            a: lr * (1.0 - self.beta1 * (1.0 - c)),
            b: lr,
        }
    }

    fn step(&self, pass: Pass<'_, '_>) {
        pass.over(*self);
    }
}

impl Element<Coefficients, 1> for ScheduleFreeSgdConfig {
    #[inline(always)]
    fn update(self, k: Coefficients, theta: f32, h: f32, [z]: [f32; 1]) -> (f32, [f32; 1]) {
        let z = started(z, theta);
        (k.keep * theta + k.c * z - k.a * h, [z - k.b * h])
    }
}

impl KnownRule for ScheduleFreeSgdConfig {
    const PRESETS: &'static [RulePreset] = &[
        RulePreset::new("schedule-free-sgd", "optax", |lr| Self::builder(lr).into()),
        RulePreset::new("schedule-free-sgd", "schedulefree", |lr| {
            Self::schedulefree(lr).into()
        }),
    ];
}
