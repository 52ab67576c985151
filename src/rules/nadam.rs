//! NAdam: Adam with Nesterov's look-ahead.

use super::config::{config, scalars};
use super::elementwise::{Element, ElementRule, Momentum, Pass, shader};
use super::error::{check_betas, check_held, check_range, unsupported};
use super::{ConfigError, KnownRule, RulePreset, Slot, Slots};

config! {
    /// Checked hyper-parameters of NAdam (Dozat 2016, <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>).
    ///
    /// ```text
    /// h     = g + coupled_weight_decay*theta       g negated to maximize
    /// m     <- beta1*m + (1 - beta1)*h
    /// v     <- beta2*v + (1 - beta2)*h^2
    /// mu_t  = beta1 * (1 - 0.96^(t*momentum_decay)/2)    at step t, which counts from one; M_t = mu_1 * .. * mu_t
    /// theta <- (1 - lr*decoupled_weight_decay)*theta
    ///          - lr * (mu_t+1 * m/(1 - M_t+1) + (1 - mu_t) * h/(1 - M_t)) / (sqrt(v/bc2 + eps_root) + eps)
    /// ```
    ///
    /// with `bc2 = 1 - beta2^t`. Without [`momentum_schedule`](Self::momentum_schedule) `mu_t` is `beta1`. Slots:
    /// `exp_avg` (m) and `exp_avg_sq` (v); 28 bytes per element and step.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, NAdamConfig};
    ///
    /// let config = NAdamConfig::builder(2e-3).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
    /// let mut weight = [1.0, -1.0];
    /// optimizer.step(&mut [&mut weight], &[&[0.5, -2.0]])?;
    /// assert!(weight[0] < 1.0 && weight[1] > -1.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub struct NAdamConfig, built by NAdamConfigBuilder {
        /// Decay of `exp_avg`, below one.
        beta1: f64 = 0.9,
        /// Decay of `exp_avg_sq`, below one.
        beta2: f64 = 0.999,
        /// Added to the root.
        eps: f64 = 1e-8,
        /// Added under the root.
        eps_root: f64 = 0.0,
        /// Whether the momentum rises to `beta1` step by step, as in PyTorch and Keras, or is `beta1` from the first, as
        /// in optax.
        momentum_schedule: bool = true,
        /// The rate at which it rises; 4e-3 in PyTorch, 1 in Keras.
        momentum_decay: f64 = 4e-3,
    }

    /// PyTorch's `NAdam`: betas 0.9 and 0.999, eps 1e-8, momentum decay 4e-3.
    pub const fn builder(lr);
}

impl NAdamConfig {
    fn check(&self) -> Result<(), ConfigError> {
        check_betas(self.beta1, self.beta2)?;
        check_held("eps", self.eps, 1.0)?;
        check_held("eps_root", self.eps_root, 1.0)?;
        check_range("momentum_decay", self.momentum_decay, f64::INFINITY)?;
        if !self.momentum_schedule && self.momentum_decay != 0.0 {
            return unsupported(
                "momentum_schedule, momentum_decay",
                "without a schedule the momentum does not rise",
            );
        }
        Ok(())
    }

    /// The momentum at step `t`, which counts from one.
    fn momentum_at(&self, t: f64) -> f64 {
        match self.momentum_schedule {
            true => self.beta1 * (1.0 - 0.5 * 0.96_f64.powf(t * self.momentum_decay)),
            false => self.beta1,
        }
    }

    /// The product of the momenta of steps 1 to `t`: what PyTorch calls `mu_product`. Zero below `least`. Every dispatch
    /// asks for it, so that a power at every step would cost more than recording does.
    fn momentum_product(&self, t: u64, least: f64) -> f64 {
        if !self.momentum_schedule {
            return self.beta1.powf(t as f64);
        }
        let falls_by = 0.96_f64.powf(self.momentum_decay);
        let (mut missing, mut product) = (0.5, 1.0);
        for step in 1..=t {
            missing *= falls_by;
            let momentum = self.beta1 * (1.0 - missing);
            if momentum == self.beta1 {
                // It has risen all the way, and stays.
                return product * self.beta1.powf((t - step) as f64 + 1.0);
            }
            product *= momentum;
            if product < least {
                return 0.0;
            }
        }
        product
    }
}

scalars! {
    struct Coefficients {
        beta1, c1, beta2, c2, r, eps_root, eps, a, b,
    }
}

impl ElementRule for NAdamConfig {
    type K = Coefficients;
    shader!("nadam");

    fn slots(&self) -> Slots {
        [Slot::new("exp_avg"), Slot::new("exp_avg_sq")].into()
    }

    fn terms(&self) -> Vec<(&'static str, bool)> {
        vec![("HAS_EPS_ROOT", self.eps_root != 0.0)]
    }

    fn momentum(&mut self) -> Momentum<'_> {
        Momentum::Beta1(&mut self.beta1)
    }

    fn coefficients(&self, applied_steps: u64) -> Coefficients<f64> {
        let t = applied_steps.saturating_add(1);
        let (now, next) = (self.momentum_at(t as f64), self.momentum_at(t as f64 + 1.0));
        // Less than that leaves one as it is.
        let product = self.momentum_product(t, f64::EPSILON / 4.0);
        Coefficients {
            beta1: self.beta1,
            c1: 1.0 - self.beta1,
            beta2: self.beta2,
            c2: 1.0 - self.beta2,
            r: 1.0 / (1.0 - self.beta2.powf(t as f64)),
            eps_root: self.eps_root,
            eps: self.eps,
            a: self.lr * next / (1.0 - product * next),
            b: self.lr * (1.0 - now) / (1.0 - product),
        }
    }

    fn step(&self, pass: Pass<'_, '_>) {
        pass.over(*self);
    }
}

impl Element<Coefficients, 2> for NAdamConfig {
    #[inline(always)]
    fn update(self, k: Coefficients, theta: f32, h: f32, [m, v]: [f32; 2]) -> (f32, [f32; 2]) {
        let m = k.beta1 * m + k.c1 * h;
        let v = k.beta2 * v + k.c2 * (h * h);
        let w = k.r * v + k.eps_root;
        let update = (k.a * m + k.b * h) / (w.sqrt() + k.eps);
        (theta - update, [m, v])
    }
}

impl KnownRule for NAdamConfig {
    const PRESETS: &'static [RulePreset] = &[
        RulePreset::new("nadam", "pytorch", |lr| Self::builder(lr).into()),
        RulePreset::new("nadam", "optax", |lr| {
            Self::builder(lr)
                .momentum_schedule(false)
                .momentum_decay(0.0)
                .into()
        }),
        RulePreset::new("nadam", "keras", |lr| {
            Self::builder(lr)
                .momentum_decay(1.0)
                .eps(1e-7)
                .decoupling(0.0)
                .into()
        }),
    ];

    fn is_pytorchs(&self) -> bool {
        self.momentum_schedule && self.eps_root == 0.0
    }

    fn pytorch_scalars(&self, applied_steps: u64) -> Option<Vec<(&'static str, f64)>> {
        let mu_product = self.momentum_product(applied_steps, f64::MIN_POSITIVE);
        let scalars = vec![("step", applied_steps as f64), ("mu_product", mu_product)];
        self.is_pytorchs().then_some(scalars)
    }
}
