//! Adamax: Adam by the largest gradient instead of the mean square.

use std::borrow::Cow;

use super::config::{beta1_is_momentum, config, preset, rule_functions, scalars, twin};
use super::decay::{DecayTwin, with_decay};
use super::elementwise::{Element, Walk, larger};
use super::error::{check_below_one, check_decays, check_held};
use super::{ConfigError, KnownRule, Rule, RulePreset, Scalars, Slot, Slots};

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
        beta1: f64,
        /// Decay of `exp_inf`, below one.
        beta2: f64,
        /// Keeps the denominator from zero.
        eps: f64,
        /// Whether epsilon joins the norm that `exp_inf` is the largest of, as in PyTorch and optax, or the denominator,
        /// as in Keras.
        eps_in_norm: bool,
    }
}

impl AdamaxConfig {
    /// PyTorch's `Adamax`: betas 0.9 and 0.999, eps 1e-8.
    pub const fn builder(lr: f64) -> AdamaxConfigBuilder {
        AdamaxConfigBuilder::new(Self {
            lr,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            eps_in_norm: true,
            coupled_weight_decay: 0.0,
            decoupled_weight_decay: 0.0,
            maximize: false,
        })
    }

    fn check(self) -> Result<Self, ConfigError> {
        check_below_one("beta1", self.beta1)?;
        check_below_one("beta2", self.beta2)?;
        check_held("eps", self.eps, 1.0)?;
        check_decays(
            self.lr,
            self.coupled_weight_decay,
            self.decoupled_weight_decay,
        )?;
        Ok(self)
    }

    fn coefficients(&self, applied_steps: u64) -> Coefficients {
        let t = applied_steps as f64 + 1.0;
        Coefficients {
            lambda: self.coupled_weight_decay,
            beta1: self.beta1,
            c1: 1.0 - self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            a: self.lr / (1.0 - self.beta1.powf(t)),
            rho: 1.0 - self.lr * self.decoupled_weight_decay,
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
        if let [m, u] = state {
            with_decay!(self, |decay| {
                let element = Adamax {
                    k,
                    decay,
                    eps_in_norm: self.eps_in_norm,
                };
                W::walk(element, params, [m, u], grads);
            });
        }
    }
}

scalars! {
    struct Coefficients {
        lambda, beta1, c1, beta2, eps, a, rho,
    }
}

#[derive(Clone, Copy)]
struct Adamax<const LAMBDA: bool> {
    k: Coefficients,
    decay: DecayTwin<LAMBDA>,
    eps_in_norm: bool,
}

impl<const LAMBDA: bool> Element<2> for Adamax<LAMBDA> {
    #[inline(always)]
    fn update(self, theta: f32, g: f32, [m, u]: [f32; 2]) -> (f32, [f32; 2]) {
        let Self {
            k,
            decay,
            eps_in_norm,
        } = self;
        let h = decay.direction(k.lambda, theta, g);
        let m = k.beta1 * m + k.c1 * h;
        let mut norm = h.abs();
        if eps_in_norm {
            norm += k.eps;
        }
        let u = larger(k.beta2 * u, norm);
        let denominator = if eps_in_norm { u } else { u + k.eps };
        (
            decay.decayed(k.rho, theta) - k.a * (m / denominator),
            [m, u],
        )
    }
}

impl Rule for AdamaxConfig {
    fn stem(&self) -> &'static str {
        "adamax"
    }

    fn slots(&self) -> Slots {
        [Slot::new("exp_avg"), Slot::new("exp_inf")].into()
    }

    fn terms(&self) -> Cow<'static, [(&'static str, bool)]> {
        self.decay().terms([("EPS_IN_NORM", self.eps_in_norm)])
    }

    rule_functions!("adamax");

    beta1_is_momentum!();
}

twin!(AdamaxConfig);

impl KnownRule for AdamaxConfig {
    const PRESETS: &'static [RulePreset] = &[
        preset!("adamax", "pytorch", |lr| Self::builder(lr)),
        preset!("adamax", "optax", |lr| Self::builder(lr)),
        preset!("adamax", "keras", |lr| Self::builder(lr)
            .eps(1e-7)
            .eps_in_norm(false)
            .decoupling(0.0)),
    ];

    fn pytorch_scalars(&self, applied_steps: u64) -> Option<Vec<(&'static str, f64)>> {
        if !self.eps_in_norm {
            return None;
        }
        Some(vec![("step", applied_steps as f64)])
    }
}
