//! Adadelta.

use std::borrow::Cow;

use super::config::{config, preset, rule_functions, scalars, twin};
use super::decay::{DecayTwin, with_decay};
use super::elementwise::{Element, Walk};
use super::error::{check_decays, check_held, check_range};
use super::{ConfigError, KnownRule, Rule, RulePreset, Scalars, Slot, Slots};

config! {
    /// Checked hyper-parameters of Adadelta (Zeiler 2012, <https://arxiv.org/abs/1212.5701>).
    ///
    /// ```text
    /// h     = g + coupled_weight_decay*theta       g negated to maximize
    /// s     <- rho*s + (1 - rho)*h^2
    /// d     = sqrt(acc + eps) / sqrt(s + eps) * h
    /// acc   <- rho*acc + (1 - rho)*d^2
    /// theta <- (1 - lr*decoupled_weight_decay)*theta - lr*d
    /// ```
    ///
    /// Slots: `square_avg` (s) and `acc_delta` (acc); 28 bytes per element and step.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, AdadeltaConfig};
    ///
    /// let config = AdadeltaConfig::builder(1.0).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
    /// let mut weight = [1.0, -1.0];
    /// optimizer.step(&mut [&mut weight], &[&[0.5, -2.0]])?;
    /// assert!(weight[0] < 1.0 && weight[1] > -1.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub struct AdadeltaConfig, built by AdadeltaConfigBuilder {
        /// Decay of both averages, at most one.
        rho: f64,
        /// Added under both roots: without it nothing would ever move.
        eps: f64,
    }
}

impl AdadeltaConfig {
    /// PyTorch's `Adadelta`: rho 0.9, eps 1e-6; its learning rate is 1.
    pub const fn builder(lr: f64) -> AdadeltaConfigBuilder {
        AdadeltaConfigBuilder::new(Self {
            lr,
            rho: 0.9,
            eps: 1e-6,
            coupled_weight_decay: 0.0,
            decoupled_weight_decay: 0.0,
            maximize: false,
        })
    }

    fn check(self) -> Result<Self, ConfigError> {
        check_range("rho", self.rho, 1.0)?;
        check_held("eps", self.eps, 1.0)?;
        check_decays(
            self.lr,
            self.coupled_weight_decay,
            self.decoupled_weight_decay,
        )?;
        Ok(self)
    }

    fn coefficients(&self, _applied_steps: u64) -> Coefficients {
        Coefficients {
            lambda: self.coupled_weight_decay,
            keep: self.rho,
            c: 1.0 - self.rho,
            eps: self.eps,
            lr: self.lr,
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
        if let [s, acc] = state {
            with_decay!(self, |decay| {
                let element = Adadelta { k, decay };
                W::walk(element, params, [s, acc], grads);
            });
        }
    }
}

scalars! {
    struct Coefficients {
        lambda, keep, c, eps, lr, rho,
    }
}

#[derive(Clone, Copy)]
struct Adadelta<const LAMBDA: bool> {
    k: Coefficients,
    decay: DecayTwin<LAMBDA>,
}

impl<const LAMBDA: bool> Element<2> for Adadelta<LAMBDA> {
    #[inline(always)]
    fn update(self, theta: f32, g: f32, [s, acc]: [f32; 2]) -> (f32, [f32; 2]) {
        let Self { k, decay } = self;
        let h = decay.direction(k.lambda, theta, g);
        let s = k.keep * s + k.c * (h * h);
        let d = (acc + k.eps).sqrt() / (s + k.eps).sqrt() * h;
        let acc = k.keep * acc + k.c * (d * d);
        (decay.decayed(k.rho, theta) - k.lr * d, [s, acc])
    }
}

impl Rule for AdadeltaConfig {
    fn stem(&self) -> &'static str {
        "adadelta"
    }

    fn slots(&self) -> Slots {
        [Slot::new("square_avg"), Slot::new("acc_delta")].into()
    }

    fn terms(&self) -> Cow<'static, [(&'static str, bool)]> {
        self.decay().terms([])
    }

    rule_functions!("adadelta");

    /// The steps do not differ.
    fn phase(&self, _applied_steps: u64) -> u64 {
        0
    }
}

twin!(AdadeltaConfig);

impl KnownRule for AdadeltaConfig {
    const PRESETS: &'static [RulePreset] = &[
        preset!("adadelta", "pytorch", |lr| Self::builder(lr)),
        preset!("adadelta", "optax", |lr| Self::builder(lr)),
        preset!("adadelta", "keras", |lr| Self::builder(lr)
            .rho(0.95)
            .eps(1e-7)
            .decoupling(0.0)),
    ];

    fn pytorch_scalars(&self, applied_steps: u64) -> Option<Vec<(&'static str, f64)>> {
        Some(vec![("step", applied_steps as f64)])
    }
}
