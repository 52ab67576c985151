//! LAMB: Adam whose every tensor moves in proportion to its norm.

use super::config::{config, scalars};
use super::elementwise::{Element, ElementRule, Measure, Measured, Momentum, Pass, shader};
use super::error::{check_betas, check_held};
use super::{ConfigError, KnownRule, RulePreset, Slot, Slots};

config! {
    /// Checked hyper-parameters of LAMB (You et al. 2020, <https://arxiv.org/abs/1904.00962>).
    ///
    /// ```text
    /// h     = g + coupled_weight_decay*theta       g negated to maximize
    /// m     <- beta1*m + (1 - beta1)*h
    /// v     <- beta2*v + (1 - beta2)*h^2
    /// d     = (m/bc1) / (sqrt(v/bc2 + eps_root) + eps) + decoupled_weight_decay*theta
    /// ratio = |theta|/|d|, or one where either is zero
    /// theta <- theta - lr*ratio*d
    /// ```
    ///
    /// with norms over the whole tensor and `bc1 = 1 - beta1^t`, `bc2 = 1 - beta2^t` at step `t`. Slots: `exp_avg` (m) and
    /// `exp_avg_sq` (v). 44 bytes per element and step: 16 to take the norms, and 28 to update. Their squares are added up
    /// in `f32`: a norm below 1e-19 counts as zero, and 1e19 is too large.
    ///
    /// NVIDIA's Apex and timm also clip all gradients by their norm at 1; that is
    /// [`max_norm`](crate::control::StepControlBuilder::max_norm) here.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, LambConfig};
    ///
    /// let config = LambConfig::builder(0.1).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("small", [2]), ("large", [2])])?;
    /// let (mut small, mut large) = ([0.3, -0.4], [30.0, -40.0]);
    /// optimizer.step(&mut [&mut small, &mut large], &[&[1.0, 1.0], &[1.0, 1.0]])?;
    /// // Each tensor moves by a tenth of its norm.
    /// let moved = |theta: &[f32; 2], from: [f32; 2]| (theta[0] - from[0]).hypot(theta[1] - from[1]);
    /// assert!((moved(&small, [0.3, -0.4]) - 0.05).abs() < 1e-6);
    /// assert!((moved(&large, [30.0, -40.0]) - 5.0).abs() < 1e-4);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub struct LambConfig, built by LambConfigBuilder {
        /// Decay of `exp_avg`, below one.
        beta1: f64 = 0.9,
        /// Decay of `exp_avg_sq`, below one.
        beta2: f64 = 0.999,
        /// Added to the root.
        eps: f64 = 1e-6,
        /// Added under the root.
        eps_root: f64 = 0.0,
        /// Takes the ratio also of tensors without a weight decay. Apex and timm do not.
        always_adapt: bool = true,
        /// Has no ratio above one (LAMBC, Fong et al. 2020).
        trust_clip: bool = false,
    }

    /// optax's `lamb`: betas 0.9 and 0.999, eps 1e-6, a ratio for every tensor, no decay by default.
    pub const fn builder(lr) where decoupled_weight_decay = 0.0;
}

impl LambConfig {
    /// timm's and Apex's LAMB: a decoupled weight decay of 0.01, and a ratio only for tensors with one. Both clip the norm of
    /// all gradients at 1, too: [`max_norm`](crate::control::StepControlBuilder::max_norm).
    pub const fn timm(lr: f64) -> LambConfigBuilder {
        Self::builder(lr).always_adapt(false).decoupling(1e-2)
    }

    fn check(&self) -> Result<(), ConfigError> {
        check_betas(self.beta1, self.beta2)?;
        // At the first step, where the correction is the smallest.
        let root = (1.0 - self.beta2).sqrt();
        check_held("eps", self.eps, root)?;
        check_held("eps_root", self.eps_root, root * root)
    }

    fn has_w(&self) -> bool {
        self.decoupled_weight_decay != 0.0
    }

    /// Whether the learning rate of a tensor follows its norm.
    pub(crate) fn adapts(&self) -> bool {
        self.always_adapt || self.has_w() || self.coupled_weight_decay != 0.0
    }
}

scalars! {
    struct Coefficients {
        c1, beta2, c2, eps_root, eps, a, w, lr,
    }
}

impl Coefficients {
    #[inline(always)]
    fn averages(&self, h: f32, m: f32, v: f32) -> (f32, f32) {
        (m + self.c1 * (h - m), self.beta2 * v + self.c2 * (h * h))
    }

    /// Where the kernel leaves out a sum with zero, this has it: it rounds nothing.
    #[inline(always)]
    fn moved(&self, theta: f32, m: f32, v: f32) -> f32 {
        self.a * (m / ((v + self.eps_root).sqrt() + self.eps)) + self.w * theta
    }
}

impl ElementRule for LambConfig {
    type K = Coefficients;
    shader!("lamb");
    const SUMS: &'static [&'static str] = &["params_sq", "update_sq"];

    fn slots(&self) -> Slots {
        [Slot::new("exp_avg"), Slot::new("exp_avg_sq")].into()
    }

    fn terms(&self) -> Vec<(&'static str, bool)> {
        vec![
            ("ADAPTS", self.adapts()),
            ("HAS_CLIP", self.trust_clip),
            ("HAS_EPS_ROOT", self.eps_root != 0.0),
            ("HAS_W", self.has_w()),
        ]
    }

    /// The decay is part of the update.
    fn rho(&self) -> f64 {
        1.0
    }

    fn momentum(&mut self) -> Momentum<'_> {
        Momentum::Beta1(&mut self.beta1)
    }

    fn coefficients(&self, applied_steps: u64) -> Coefficients<f64> {
        let t = applied_steps as f64 + 1.0;
        let (bc1, bc2) = (1.0 - self.beta1.powf(t), 1.0 - self.beta2.powf(t));
        Coefficients {
            c1: 1.0 - self.beta1,
            beta2: self.beta2,
            c2: 1.0 - self.beta2,
            eps_root: self.eps_root * bc2,
            eps: self.eps * bc2.sqrt(),
            a: bc2.sqrt() / bc1,
            w: self.decoupled_weight_decay,
            lr: self.lr,
        }
    }

    fn step(&self, pass: Pass<'_, '_>) {
        pass.over(*self);
    }

    fn measure(&self, measure: Measure<'_, '_>) {
        measure.over::<_, 2, 2>(*self);
    }

    fn decide(&self, k: Coefficients, sums: &[f32], _numel: f32) -> Coefficients {
        let [params_sq, update_sq] = *sums else {
            return k;
        };
        let mut decided = k;
        if self.adapts() && params_sq > 0.0 && update_sq > 0.0 {
            let mut ratio = params_sq.sqrt() / update_sq.sqrt();
            if self.trust_clip {
                ratio = ratio.min(1.0);
            }
            decided.lr = k.lr * ratio;
        }
        decided
    }
}

impl Element<Coefficients, 2> for LambConfig {
    #[inline(always)]
    fn update(self, k: Coefficients, theta: f32, h: f32, [m, v]: [f32; 2]) -> (f32, [f32; 2]) {
        let (m, v) = k.averages(h, m, v);
        (theta - k.lr * k.moved(theta, m, v), [m, v])
    }
}

impl Measured<Coefficients, 2, 2> for LambConfig {
    #[inline(always)]
    fn summands(self, k: Coefficients, theta: f32, h: f32, [m, v]: [f32; 2]) -> [f32; 2] {
        let (m, v) = k.averages(h, m, v);
        let d = k.moved(theta, m, v);
        [theta * theta, d * d]
    }
}

impl KnownRule for LambConfig {
    const PRESETS: &'static [RulePreset] = &[
        RulePreset::new("lamb", "optax", |lr| Self::builder(lr).into()),
        RulePreset::new("lamb", "timm", |lr| Self::timm(lr).into()),
    ];
}

impl LambConfigBuilder {
    /// Decays of the two averages, `0 <= beta < 1`.
    pub const fn betas(mut self, beta1: f64, beta2: f64) -> Self {
        (self.config.beta1, self.config.beta2) = (beta1, beta2);
        self
    }
}
