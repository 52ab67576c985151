//! Rprop: steps whose size follows from whether the gradient keeps its sign.

use super::config::{config, scalars};
use super::elementwise::{Element, ElementRule, Pass, shader, sign, started};
use super::error::{check_held, check_range, unsupported};
use super::{ConfigError, KnownRule, RulePreset, Slot, Slots, Start};

config! {
    /// Checked hyper-parameters of Rprop (Riedmiller and Braun 1993,
    /// <https://doi.org/10.1109/ICNN.1993.298623>): for gradients of whole data sets.
    ///
    /// ```text
    /// h     = g + coupled_weight_decay*theta       g negated to maximize
    /// size  <- size * eta_plus                     where h and prev have one sign
    ///          size * eta_minus, and h = 0         where they have different ones
    ///          within step_size_min and step_size_max; lr at the first step
    /// prev  <- h
    /// theta <- (1 - lr*decoupled_weight_decay)*theta - sign(h)*size
    /// ```
    ///
    /// The learning rate is the size of the first step only. Slots: `prev` and `step_size`; 28 bytes per element and step.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, RpropConfig};
    ///
    /// let config = RpropConfig::builder(1e-2).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
    /// let mut weight = [1.0, -1.0];
    /// optimizer.step(&mut [&mut weight], &[&[0.5, -2.0]])?;
    /// assert!(weight[0] < 1.0 && weight[1] > -1.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub struct RpropConfig, built by RpropConfigBuilder {
        /// The factor of a step whose gradient changes its sign, above zero and at most one.
        eta_minus: f64 = 0.5,
        /// The factor of a step whose gradient keeps its sign, at least one.
        eta_plus: f64 = 1.2,
        /// The least size of a step.
        step_size_min: f64 = 1e-6,
        /// The largest size of a step.
        step_size_max: f64 = 50.0,
    }

    /// PyTorch's `Rprop`: etas 0.5 and 1.2, sizes from 1e-6 to 50.
    pub const fn builder(lr);
}

impl RpropConfig {
    fn check(&self) -> Result<(), ConfigError> {
        check_range("eta_minus", self.eta_minus, 1.0)?;
        check_held("eta_minus", self.eta_minus, 1.0)?;
        check_range("eta_plus", self.eta_plus, f64::INFINITY)?;
        check_held("step_size_min", self.step_size_min, 1.0)?;
        check_held("step_size_max", self.step_size_max, 1.0)?;
        if self.eta_plus < 1.0 || self.eta_minus == 0.0 {
            return unsupported(
                "eta_minus, eta_plus",
                "a step shrinks by the one and grows by the other",
            );
        }
        if self.step_size_min > self.step_size_max {
            return unsupported(
                "step_size_min, step_size_max",
                "the least size is above the largest",
            );
        }
        Ok(())
    }
}

scalars! {
    struct Coefficients {
        lr, eta_minus, eta_plus, least, most,
    }
}

impl ElementRule for RpropConfig {
    type K = Coefficients;
    shader!("rprop");
    const IS_STATIONARY: bool = true;

    fn slots(&self) -> Slots {
        [
            Slot::new("prev"),
            Slot::new("step_size").starting(Start::FirstStep),
        ]
        .into()
    }

    fn coefficients(&self, _applied_steps: u64) -> Coefficients<f64> {
        Coefficients {
            lr: self.lr,
            eta_minus: self.eta_minus,
            eta_plus: self.eta_plus,
            least: self.step_size_min,
            most: self.step_size_max,
        }
    }

    fn step(&self, pass: Pass<'_, '_>) {
        pass.over(*self);
    }
}

impl Element<Coefficients, 2> for RpropConfig {
    #[inline(always)]
    fn update(
        self,
        k: Coefficients,
        theta: f32,
        h: f32,
        [prev, size]: [f32; 2],
    ) -> (f32, [f32; 2]) {
        let agreement = sign(h) * sign(prev);
        let size = started(size, k.lr);
        let factor = if agreement > 0.0 {
            k.eta_plus
        } else if agreement < 0.0 {
            k.eta_minus
        } else {
            1.0
        };
        let size = size * factor;
        let size = if size < k.least { k.least } else { size };
        let size = if size > k.most { k.most } else { size };
        let d = if agreement < 0.0 { 0.0 } else { h };
        (theta - sign(d) * size, [d, size])
    }
}

impl KnownRule for RpropConfig {
    const PRESETS: &'static [RulePreset] = &[RulePreset::new("rprop", "pytorch", |lr| {
        Self::builder(lr).into()
    })];

    fn is_pytorchs(&self) -> bool {
        true
    }
}
