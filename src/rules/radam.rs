//! RAdam: Adam that waits until its variance can be estimated.

use super::config::{config, scalars};
use super::elementwise::{Element, ElementRule, Momentum, Pass, shader};
use super::error::{check_betas, check_held, unsupported};
use super::{AdamForm, ConfigError, KnownRule, RulePreset, Slot, Slots};

config! {
    /// Checked hyper-parameters of RAdam (Liu et al. 2020, <https://arxiv.org/abs/1908.03265>).
    ///
    /// ```text
    /// h       = g + coupled_weight_decay*theta     g negated to maximize
    /// m       <- beta1*m + (1 - beta1)*h
    /// v       <- beta2*v + (1 - beta2)*h^2
    /// rho_inf = 2/(1 - beta2) - 1
    /// rho_t   = rho_inf - 2*t*beta2^t/bc2          at step t, which counts from one
    /// u       = m/bc1, and once rho_t > 5
    ///           m/bc1 / (sqrt(v/bc2 + eps_root) + eps)
    ///           * sqrt((rho_t - 4)*(rho_t - 2)*rho_inf / ((rho_inf - 4)*(rho_inf - 2)*rho_t))
    /// theta   <- (1 - lr*decoupled_weight_decay)*theta - lr*u
    /// ```
    ///
    /// with `bc1 = 1 - beta1^t`, `bc2 = 1 - beta2^t`; in PyTorch epsilon meets the root of `v` as it is
    /// ([`AdamForm::EpsilonHat`]). Slots: `exp_avg` (m) and `exp_avg_sq` (v); 28 bytes per element and step.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, RAdamConfig};
    ///
    /// let config = RAdamConfig::builder(1e-2).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
    /// let mut weight = [1.0, -1.0];
    /// optimizer.step(&mut [&mut weight], &[&[0.5, -2.0]])?;
    /// assert!(weight[0] < 1.0 && weight[1] > -1.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub struct RAdamConfig, built by RAdamConfigBuilder {
        /// Decay of `exp_avg`, below one.
        beta1: f64 = 0.9,
        /// Decay of `exp_avg_sq`, below one.
        beta2: f64 = 0.999,
        /// Added to the root.
        eps: f64 = 1e-8,
        /// Added under the root; [`AdamForm::Corrected`] only.
        eps_root: f64 = 0.0,
        /// The place of epsilon.
        form: AdamForm = AdamForm::EpsilonHat,
    }

    /// PyTorch's `RAdam`: betas 0.9 and 0.999, eps 1e-8 beside the uncorrected root.
    pub const fn builder(lr);
}

impl RAdamConfig {
    fn check(&self) -> Result<(), ConfigError> {
        check_betas(self.beta1, self.beta2)?;
        check_held("eps", self.eps, 1.0)?;
        check_held("eps_root", self.eps_root, 1.0)?;
        if self.form == AdamForm::EpsilonHat && self.eps_root != 0.0 {
            return unsupported(
                "form, eps_root",
                "epsilon hat has no epsilon under the root",
            );
        }
        Ok(())
    }

    /// The factor that rectifies the variance of the step, once that can be estimated.
    fn rectification(&self, t: f64) -> Option<f64> {
        let of_t = self.beta2.powf(t);
        let most = 2.0 / (1.0 - self.beta2) - 1.0;
        let length = most - 2.0 * t * of_t / (1.0 - of_t);
        let squared = |length: f64| (length - 4.0) * (length - 2.0) / length;
        (length > 5.0).then(|| (squared(length) / squared(most)).sqrt())
    }
}

scalars! {
    struct Coefficients {
        beta1, c1, beta2, c2, rectify, r, eps_root, eps, a,
    }
}

impl ElementRule for RAdamConfig {
    type K = Coefficients;
    shader!("radam");

    fn slots(&self) -> Slots {
        [Slot::new("exp_avg"), Slot::new("exp_avg_sq")].into()
    }

    fn terms(&self) -> Vec<(&'static str, bool)> {
        vec![
            ("HAS_R", self.form == AdamForm::Corrected),
            ("HAS_EPS_ROOT", self.eps_root != 0.0),
        ]
    }

    fn momentum(&mut self) -> Momentum<'_> {
        Momentum::Beta1(&mut self.beta1)
    }

    fn coefficients(&self, applied_steps: u64) -> Coefficients<f64> {
        let t = applied_steps as f64 + 1.0;
        let (bc1, bc2) = (1.0 - self.beta1.powf(t), 1.0 - self.beta2.powf(t));
        let rectification = self.rectification(t);
        let (a, r) = match (rectification, self.form) {
            (Some(by), AdamForm::EpsilonHat) => (self.lr * by * bc2.sqrt() / bc1, 1.0),
            (by, _) => (self.lr * by.unwrap_or(1.0) / bc1, 1.0 / bc2),
        };
        Coefficients {
            beta1: self.beta1,
            c1: 1.0 - self.beta1,
            beta2: self.beta2,
            c2: 1.0 - self.beta2,
            rectify: if rectification.is_some() { 1.0 } else { 0.0 },
            r,
            eps_root: self.eps_root,
            eps: self.eps,
            a,
        }
    }

    fn step(&self, pass: Pass<'_, '_>) {
        pass.over(*self);
    }
}

impl Element<Coefficients, 2> for RAdamConfig {
    #[inline(always)]
    fn update(self, k: Coefficients, theta: f32, h: f32, [m, v]: [f32; 2]) -> (f32, [f32; 2]) {
        let m = k.beta1 * m + k.c1 * h;
        let v = k.beta2 * v + k.c2 * (h * h);
        let u = if k.rectify != 0.0 {
            m / ((k.r * v + k.eps_root).sqrt() + k.eps)
        } else {
            m
        };
        (theta - k.a * u, [m, v])
    }
}

impl KnownRule for RAdamConfig {
    const PRESETS: &'static [RulePreset] = &[
        RulePreset::new("radam", "pytorch", |lr| Self::builder(lr).into()),
        RulePreset::new("radam", "optax", |lr| {
            Self::builder(lr).form(AdamForm::Corrected).into()
        }),
    ];

    fn is_pytorchs(&self) -> bool {
        self.form == AdamForm::EpsilonHat
    }
}
