//! Adamax: Adam by the largest gradient instead of the mean square.

use super::config::{config, scalars};
use super::elementwise::{Element, ElementRule, Momentum, Pass, larger, shader};
use super::error::{check_betas, check_held};
use super::{ConfigError, KnownRule, RulePreset, Slot, Slots};

config! {
    /// Checked hyper-parameters of Adamax (Kingma and Ba 2015, section 7.1, <https://arxiv.org/abs/1412.6980>).
    ///
    /// ```text
    /// h     = g + coupled_weight_decay*theta       g negated to maximize
    /// m     <- beta1*m + (1 - beta1)*h
    /// u     <- max(beta2*u, |h| + eps)             Keras: max(beta2*u, |h|)
    /// theta <- (1 - lr*decoupled_weight_decay)*theta - lr/(1 - beta1^t) * m/u
    ///                                              Keras: m/(u + eps)
    /// ```
    ///
    /// at step `t`, which counts from one. Slots: `exp_avg` (m) and `exp_inf` (u); 28 bytes per element and step.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, AdamaxConfig};
    ///
    /// let config = AdamaxConfig::builder(2e-3).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
    /// let mut weight = [1.0, -1.0];
    /// optimizer.step(&mut [&mut weight], &[&[0.5, -2.0]])?;
    /// assert!(weight[0] < 1.0 && weight[1] > -1.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub struct AdamaxConfig, built by AdamaxConfigBuilder {
        /// Decay of `exp_avg`, below one.
        beta1: f64 = 0.9,
        /// Decay of `exp_inf`, below one.
        beta2: f64 = 0.999,
        /// Keeps the denominator from zero.
        eps: f64 = 1e-8,
        /// Whether epsilon joins the norm that `exp_inf` is the largest of, as in PyTorch and optax, or the denominator,
        /// as in Keras.
        eps_in_norm: bool = true,
    }

    /// PyTorch's `Adamax`: betas 0.9 and 0.999, eps 1e-8.
    pub const fn builder(lr);
}

impl AdamaxConfig {
    fn check(&self) -> Result<(), ConfigError> {
        check_betas(self.beta1, self.beta2)?;
        check_held("eps", self.eps, 1.0)
    }
}

scalars! {
    struct Coefficients {
        beta1, c1, beta2, eps, a,
    }
}

impl ElementRule for AdamaxConfig {
    type K = Coefficients;
    shader!("adamax");

    fn slots(&self) -> Slots {
        [Slot::new("exp_avg"), Slot::new("exp_inf")].into()
    }

    fn terms(&self) -> Vec<(&'static str, bool)> {
        vec![("EPS_IN_NORM", self.eps_in_norm)]
    }

    fn momentum(&mut self) -> Momentum<'_> {
        Momentum::Beta1(&mut self.beta1)
    }

    fn coefficients(&self, applied_steps: u64) -> Coefficients<f64> {
        let t = applied_steps as f64 + 1.0;
        Coefficients {
            beta1: self.beta1,
            c1: 1.0 - self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            a: self.lr / (1.0 - self.beta1.powf(t)),
        }
    }

    fn step(&self, pass: Pass<'_, '_>) {
        pass.over(*self);
    }
}

impl Element<Coefficients, 2> for AdamaxConfig {
    #[inline(always)]
    fn update(self, k: Coefficients, theta: f32, h: f32, [m, u]: [f32; 2]) -> (f32, [f32; 2]) {
        let m = k.beta1 * m + k.c1 * h;
        let mut norm = h.abs();
        if self.eps_in_norm {
            norm += k.eps;
        }
        let u = larger(k.beta2 * u, norm);
        let denominator = if self.eps_in_norm { u } else { u + k.eps };
        (theta - k.a * (m / denominator), [m, u])
    }
}

impl KnownRule for AdamaxConfig {
    const PRESETS: &'static [RulePreset] = &[
        RulePreset::new("adamax", "pytorch", |lr| Self::builder(lr).into()),
        RulePreset::new("adamax", "optax", |lr| Self::builder(lr).into()),
        RulePreset::new("adamax", "keras", |lr| {
            Self::builder(lr)
                .eps(1e-7)
                .eps_in_norm(false)
                .decoupling(0.0)
                .into()
        }),
    ];

    fn is_pytorchs(&self) -> bool {
        self.eps_in_norm
    }
}
