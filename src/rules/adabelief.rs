//! AdaBelief: Adam by how far the gradient is from what was expected.

use super::config::{config, scalars};
use super::elementwise::{Element, ElementRule, Momentum, Pass, shader};
use super::error::{check_betas, check_held};
use super::{ConfigError, KnownRule, RulePreset, Slot, Slots};

config! {
    /// Checked hyper-parameters of AdaBelief (Zhuang et al. 2020, <https://arxiv.org/abs/2010.07468>).
    ///
    /// ```text
    /// h     = g + coupled_weight_decay*theta       g negated to maximize
    /// m     <- beta1*m + (1 - beta1)*h
    /// s     <- beta2*s + (1 - beta2)*(h - m)^2 + eps_root
    /// theta <- (1 - lr*decoupled_weight_decay)*theta - lr * (m/bc1) / (sqrt(s/bc2) + eps)
    /// ```
    ///
    /// with `bc1 = 1 - beta1^t`, `bc2 = 1 - beta2^t` at step `t`, which counts from one. Slots: `exp_avg` (m) and
    /// `exp_avg_var` (s); 28 bytes per element and step.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, AdaBeliefConfig};
    ///
    /// let config = AdaBeliefConfig::builder(1e-3).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
    /// let mut weight = [1.0, -1.0];
    /// optimizer.step(&mut [&mut weight], &[&[0.5, -2.0]])?;
    /// assert!(weight[0] < 1.0 && weight[1] > -1.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub struct AdaBeliefConfig, built by AdaBeliefConfigBuilder {
        /// Decay of `exp_avg`, below one.
        beta1: f64 = 0.9,
        /// Decay of `exp_avg_var`, below one.
        beta2: f64 = 0.999,
        /// Added to the root.
        eps: f64 = 1e-16,
        /// Added to the variance at every step.
        eps_root: f64 = 1e-16,
    }

    /// optax's `adabelief`: betas 0.9 and 0.999, both epsilons 1e-16.
    pub const fn builder(lr);
}

impl AdaBeliefConfig {
    fn check(&self) -> Result<(), ConfigError> {
        check_betas(self.beta1, self.beta2)?;
        check_held("eps", self.eps, 1.0)?;
        check_held("eps_root", self.eps_root, 1.0)
    }
}

scalars! {
    struct Coefficients {
        beta1, c1, beta2, c2, r, eps_root, eps, a,
    }
}

impl ElementRule for AdaBeliefConfig {
    type K = Coefficients;
    shader!("adabelief");

    fn slots(&self) -> Slots {
        [Slot::new("exp_avg"), Slot::new("exp_avg_var")].into()
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
            c2: 1.0 - self.beta2,
            r: 1.0 / (1.0 - self.beta2.powf(t)),
            eps_root: self.eps_root,
            eps: self.eps,
            a: self.lr / (1.0 - self.beta1.powf(t)),
        }
    }

    fn step(&self, pass: Pass<'_, '_>) {
        pass.over(*self);
    }
}

impl Element<Coefficients, 2> for AdaBeliefConfig {
    #[inline(always)]
    fn update(self, k: Coefficients, theta: f32, h: f32, [m, s]: [f32; 2]) -> (f32, [f32; 2]) {
        let m = k.beta1 * m + k.c1 * h;
        let e = h - m;
        let s = k.beta2 * s + k.c2 * (e * e) + k.eps_root;
        let update = k.a * (m / ((k.r * s).sqrt() + k.eps));
        (theta - update, [m, s])
    }
}

impl KnownRule for AdaBeliefConfig {
    const PRESETS: &'static [RulePreset] = &[RulePreset::new("adabelief", "optax", |lr| {
        Self::builder(lr).into()
    })];
}
