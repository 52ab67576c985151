//! Schedule-free SGD.

use std::borrow::Cow;

use super::config::{config, preset, rule_functions, scalars, twin};
use super::decay::{DecayTwin, with_decay};
use super::elementwise::{Element, Walk, started};
use super::error::{check_decays, unsupported};
use super::schedule_free::{Rise, averaged, check_beta1};
use super::{ConfigError, KnownRule, Rule, RulePreset, Scalars, Slot, Slots, Start};

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
    /// let averaged = config.averaged_params(&weight, z);
    /// assert!(averaged[0].abs() < 0.1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub struct ScheduleFreeSgdConfig, built by ScheduleFreeSgdConfigBuilder {
        /// Where gradients are taken between `z`, at zero, and the average, at one; above zero.
        beta1: f64,
        /// Steps over which the learning rate rises to `lr`.
        warmup_steps: u64,
        /// Whether it rises from zero: step `t` of the warm-up is made with `lr*(t - 1)/warmup_steps`, as in optax, and not
        /// with `lr*t/warmup_steps`, as in the package schedulefree. It weighs as the latter in both.
        warmup_from_zero: bool = default,
    }
}

impl ScheduleFreeSgdConfig {
    /// optax's `schedule_free_sgd`: beta1 0.9, no warm-up.
    pub const fn builder(lr: f64) -> ScheduleFreeSgdConfigBuilder {
        ScheduleFreeSgdConfigBuilder::new(Self {
            lr,
            beta1: 0.9,
            warmup_steps: 0,
            warmup_from_zero: true,
            coupled_weight_decay: 0.0,
            decoupled_weight_decay: 0.0,
            maximize: false,
        })
    }

    /// `SGDScheduleFree` of facebookresearch's package schedulefree: the same with a warm-up that starts at
    /// `lr/warmup_steps`.
    pub const fn schedulefree(lr: f64) -> ScheduleFreeSgdConfigBuilder {
        Self::builder(lr).warmup_from_zero(false)
    }

    /// The parameters to evaluate with, the average of the points so far: `(theta - (1 - beta1)*z) / beta1`, from the
    /// parameters that are stepped and the slot `z` of their state
    /// ([`TensorState::slot`](crate::TensorState::slot); before the first step there is none, and the parameters are the
    /// average). Both of one length.
    #[must_use]
    pub fn averaged_params(&self, params: &[f32], z: &[f32]) -> Vec<f32> {
        averaged(self.beta1, params, z)
    }

    fn check(self) -> Result<Self, ConfigError> {
        check_beta1(self.beta1)?;
        check_decays(
            self.lr,
            self.coupled_weight_decay,
            self.decoupled_weight_decay,
        )?;
        if self.decoupled_weight_decay != 0.0 {
            return unsupported(
                "decoupled_weight_decay",
                "in schedule-free SGD both decays are one, weight_decay",
            );
        }
        Ok(self)
    }

    fn coefficients(&self, applied_steps: u64) -> Coefficients {
        let t = applied_steps.saturating_add(1);
        let rise = Rise {
            warmup_steps: self.warmup_steps,
            from_zero: self.warmup_from_zero,
            beta2: 0.0,
        };
        let (rate, c) = rise.at(t);
        let lr = self.lr * rate;
        Coefficients {
            lambda: self.coupled_weight_decay,
            keep: 1.0 - c,
            c,
            a: lr * (1.0 - self.beta1 * (1.0 - c)),
            b: lr,
            rho: 1.0,
        }
        .cast()
    }

    fn walk<W: Walk>(
        &self,
        k: Coefficients,
        params: &mut [f32],
        state: &mut [&mut [f32]],
        grads: &[f32],
    ) {
        if let [z] = state {
            with_decay!(self, |decay| {
                let element = ScheduleFreeSgd { k, decay };
                W::walk(element, params, [z], grads);
            });
        }
    }
}

scalars! {
    struct Coefficients {
        lambda, keep, c, a, b, rho,
    }
}

#[derive(Clone, Copy)]
struct ScheduleFreeSgd<const LAMBDA: bool> {
    k: Coefficients,
    decay: DecayTwin<LAMBDA>,
}

impl<const LAMBDA: bool> Element<1> for ScheduleFreeSgd<LAMBDA> {
    #[inline(always)]
    fn update(self, theta: f32, g: f32, [z]: [f32; 1]) -> (f32, [f32; 1]) {
        let Self { k, decay } = self;
        let h = decay.direction(k.lambda, theta, g);
        let z = started(z, theta);
        (k.keep * theta + k.c * z - k.a * h, [z - k.b * h])
    }
}

impl Rule for ScheduleFreeSgdConfig {
    fn stem(&self) -> &'static str {
        "schedule_free_sgd"
    }

    fn slots(&self) -> Slots {
        [Slot::new("z").starting(Start::Params)].into()
    }

    fn terms(&self) -> Cow<'static, [(&'static str, bool)]> {
        self.decay().terms([])
    }

    rule_functions!("schedule_free_sgd");
}

twin!(ScheduleFreeSgdConfig);

impl KnownRule for ScheduleFreeSgdConfig {
    const PRESETS: &'static [RulePreset] = &[
        preset!("schedule-free-sgd", "optax", |lr| Self::builder(lr)),
        preset!(
            "schedule-free-sgd",
            "schedulefree",
            |lr| Self::schedulefree(lr)
        ),
    ];
}
