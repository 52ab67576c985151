//! Adam, AdamW and AMSGrad.

use super::config::{config, scalars};
use super::elementwise::{Element, ElementRule, Momentum, Pass, shader};
use super::error::{check_betas, check_held, unsupported};
use super::{ConfigError, KnownRule, RulePreset, Slot, Slots};

/// The place of epsilon among the bias corrections. With `m` and `v` the averages of the gradient and of its square, and
/// `bc1 = 1 - beta1^t`, `bc2 = 1 - beta2^t` at step `t`, which counts from one:
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "safetensors",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "kebab-case")
)]
#[non_exhaustive]
pub enum AdamForm {
    /// `theta <- theta - lr * (m/bc1) / (sqrt(v/bc2 + eps_root) + eps)`: both averages are corrected first. PyTorch
    /// (without `eps_root`), optax.
    #[default]
    Corrected,
    /// `theta <- theta - lr*sqrt(bc2)/bc1 * m / (sqrt(v) + eps)`: the correction is in the learning rate, so epsilon
    /// meets the average as it is (the "epsilon hat" of Kingma and Ba 2015, end of section 2). Keras, TensorFlow.
    EpsilonHat,
}

/// The choice of the largest value that AMSGrad divides by (Reddi, Kale and Kumar 2018).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "safetensors",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "kebab-case")
)]
#[non_exhaustive]
pub enum AmsGrad {
    /// None: Adam.
    #[default]
    Off,
    /// The largest `v` so far. PyTorch, Keras.
    OfAverage,
    /// The largest `v/bc2` so far. optax.
    OfCorrected,
}

config! {
    /// Checked hyper-parameters of Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019).
    ///
    /// ```text
    /// h     = g + coupled_weight_decay*theta       g negated to maximize
    /// m     <- beta1*m + (1 - beta1)*h
    /// v     <- beta2*v + (1 - beta2)*h^2
    /// theta <- (1 - lr*decoupled_weight_decay)*theta
    ///          - lr * (m/bc1) / (sqrt(v/bc2 + eps_root) + eps)
    /// ```
    ///
    /// with the last line by [`AdamForm`]. Slots: `exp_avg` (m), `exp_avg_sq` (v) and, with AMSGrad, `max_exp_avg_sq`.
    /// 28 bytes per element and step, 36 with AMSGrad. Bias corrections follow the applied steps of each tensor.
    ///
    /// ```
    /// use wgpu_optim::{AdamConfig, CpuOptimizer};
    ///
    /// let config = AdamConfig::adamw(1e-3).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
    /// let mut weight = [1.0, -1.0];
    /// optimizer.step(&mut [&mut weight], &[&[0.5, -2.0]])?;
    /// // At the first step every element moves by about the learning rate, whatever its gradient.
    /// assert!((weight[0] - 0.99899).abs() < 1e-6 && (weight[1] + 0.99899).abs() < 1e-6);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub struct AdamConfig, built by AdamConfigBuilder {
        /// Decay of `exp_avg`, below one.
        beta1: f64 = 0.9,
        /// Decay of `exp_avg_sq`, below one.
        beta2: f64 = 0.999,
        /// Added to the root.
        eps: f64 = 1e-8,
        /// Added under the root; [`AdamForm::Corrected`] only.
        eps_root: f64 = 0.0,
        /// The place of epsilon.
        form: AdamForm = AdamForm::Corrected,
        /// Divides by the largest average so far.
        amsgrad: AmsGrad = AmsGrad::Off,
    }

    /// PyTorch's `Adam`: betas 0.9 and 0.999, eps 1e-8, no decay.
    pub const fn builder(lr);
}

impl AdamConfig {
    /// PyTorch's `AdamW`: the same with a weight decay that is decoupled, 0.01 by default.
    pub const fn adamw(lr: f64) -> AdamConfigBuilder {
        Self::builder(lr).decoupling(1e-2)
    }

    /// Keras's `Adam`: [`AdamForm::EpsilonHat`], eps 1e-7; its weight decay is decoupled.
    pub const fn keras(lr: f64) -> AdamConfigBuilder {
        Self::builder(lr)
            .form(AdamForm::EpsilonHat)
            .eps(1e-7)
            .decoupling(0.0)
    }

    fn check(&self) -> Result<(), ConfigError> {
        check_betas(self.beta1, self.beta2)?;
        // At the first step, where the correction is the smallest.
        let root = self.taken_out(1.0 - self.beta2);
        check_held("eps", self.eps, root)?;
        check_held("eps_root", self.eps_root, root * root)?;
        if self.form == AdamForm::EpsilonHat && self.eps_root != 0.0 {
            return unsupported(
                "form, eps_root",
                "epsilon hat has no epsilon under the root",
            );
        }
        if self.form == AdamForm::EpsilonHat && self.amsgrad == AmsGrad::OfCorrected {
            return unsupported("form, amsgrad", "epsilon hat corrects no average");
        }
        Ok(())
    }

    /// The factor that numerator and divisor of `(m/bc1) / (sqrt(v/bc2 + eps_root) + eps)` are multiplied by, so that `v` is
    /// not corrected element by element.
    fn taken_out(&self, bc2: f64) -> f64 {
        match (self.form, self.amsgrad) {
            (AdamForm::Corrected, AmsGrad::OfCorrected) | (AdamForm::EpsilonHat, _) => 1.0,
            (AdamForm::Corrected, _) => bc2.sqrt(),
        }
    }
}

scalars! {
    struct Coefficients {
        c1, beta2, c2, r, eps_root, eps, a,
    }
}

impl Coefficients {
    #[inline(always)]
    fn averages(&self, h: f32, m: f32, v: f32) -> (f32, f32) {
        (m + self.c1 * (h - m), self.beta2 * v + self.c2 * (h * h))
    }

    /// The update by averages and divisor. It has the sum with zero that the kernel leaves out, which rounds nothing.
    #[inline(always)]
    fn update(&self, m: f32, w: f32) -> f32 {
        self.a * (m / ((w + self.eps_root).sqrt() + self.eps))
    }
}

impl ElementRule for AdamConfig {
    type K = Coefficients;
    shader!("adam");

    fn stem(&self) -> &'static str {
        match self.amsgrad {
            AmsGrad::Off => "adam",
            AmsGrad::OfAverage | AmsGrad::OfCorrected => "amsgrad",
        }
    }

    fn slots(&self) -> Slots {
        [
            Slot::new("exp_avg"),
            Slot::new("exp_avg_sq"),
            Slot::new("max_exp_avg_sq").kept_if(self.amsgrad != AmsGrad::Off),
        ]
        .into()
    }

    fn terms(&self) -> Vec<(&'static str, bool)> {
        vec![
            ("HAS_EPS_ROOT", self.eps_root != 0.0),
            ("HAS_MAX", self.amsgrad == AmsGrad::OfAverage),
            ("HAS_MAX_OF_CORRECTED", self.amsgrad == AmsGrad::OfCorrected),
        ]
    }

    fn state_kind(&self) -> &'static str {
        match self.amsgrad {
            AmsGrad::Off => "adam",
            AmsGrad::OfAverage => "amsgrad",
            AmsGrad::OfCorrected => "amsgrad-of-corrected",
        }
    }

    fn momentum(&mut self) -> Momentum<'_> {
        Momentum::Beta1(&mut self.beta1)
    }

    fn coefficients(&self, applied_steps: u64) -> Coefficients<f64> {
        let t = applied_steps as f64 + 1.0;
        let (bc1, bc2) = (1.0 - self.beta1.powf(t), 1.0 - self.beta2.powf(t));
        let root = self.taken_out(bc2);
        let (a, r) = match (self.form, self.amsgrad) {
            (AdamForm::Corrected, AmsGrad::OfCorrected) => (self.lr / bc1, 1.0 / bc2),
            _ => (self.lr * bc2.sqrt() / bc1, 1.0),
        };
        Coefficients {
            c1: 1.0 - self.beta1,
            beta2: self.beta2,
            c2: 1.0 - self.beta2,
            r,
            eps_root: self.eps_root * (root * root),
            eps: self.eps * root,
            a,
        }
    }

    fn step(&self, pass: Pass<'_, '_>) {
        match self.amsgrad {
            AmsGrad::Off => pass.over::<_, 2>(*self),
            AmsGrad::OfAverage | AmsGrad::OfCorrected => pass.over::<_, 3>(*self),
        }
    }
}

impl Element<Coefficients, 2> for AdamConfig {
    #[inline(always)]
    fn update(self, k: Coefficients, theta: f32, h: f32, [m, v]: [f32; 2]) -> (f32, [f32; 2]) {
        let (m, v) = k.averages(h, m, v);
        (theta - k.update(m, v), [m, v])
    }
}

/// AMSGrad.
impl Element<Coefficients, 3> for AdamConfig {
    #[inline(always)]
    fn update(
        self,
        k: Coefficients,
        theta: f32,
        h: f32,
        [m, v, largest]: [f32; 3],
    ) -> (f32, [f32; 3]) {
        let (m, v) = k.averages(h, m, v);
        // Where the kernel leaves out a factor of one, this has it: it rounds nothing.
        let largest = largest.max(k.r * v);
        let update = k.update(m, largest);
        (theta - update, [m, v, largest])
    }
}

impl KnownRule for AdamConfig {
    const PRESETS: &'static [RulePreset] = &[
        RulePreset::new("adam", "pytorch", |lr| Self::builder(lr).into()),
        RulePreset::new("adam", "optax", |lr| Self::builder(lr).into()),
        RulePreset::new("adam", "keras", |lr| Self::keras(lr).into()),
        RulePreset::new("adamw", "pytorch", |lr| Self::adamw(lr).into()),
        RulePreset::new("adamw", "optax", |lr| {
            Self::builder(lr).decoupling(1e-4).into()
        }),
        RulePreset::new("adamw", "keras", |lr| {
            Self::keras(lr).decoupling(0.004).into()
        }),
        RulePreset::new("amsgrad", "optax", |lr| {
            Self::builder(lr).amsgrad(AmsGrad::OfCorrected).into()
        }),
    ];

    fn is_pytorchs(&self) -> bool {
        self.form == AdamForm::Corrected
            && self.eps_root == 0.0
            && self.amsgrad != AmsGrad::OfCorrected
    }
}

impl AdamConfigBuilder {
    /// Decays of the two averages, `0 <= beta < 1`.
    pub const fn betas(mut self, beta1: f64, beta2: f64) -> Self {
        (self.config.beta1, self.config.beta2) = (beta1, beta2);
        self
    }
}
