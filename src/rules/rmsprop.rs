//! RMSprop.

use std::borrow::Cow;

use super::config::{
    changed_momentum, config, momentum_is_its_own, preset, rule_functions, scalars, twin,
};
use super::decay::{DecayTwin, with_decay};
use super::elementwise::{Element, Walk, larger};
use super::error::{check_decays, check_held, check_range, unsupported};
use super::{ConfigError, KnownRule, Rule, RulePreset, Scalars, Slot, Slots};

config! {
    /// Checked hyper-parameters of RMSprop (Hinton 2012,
    /// <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>; centered: Graves 2013,
    /// <https://arxiv.org/abs/1308.0850>).
    ///
    /// ```text
    /// h     = g + coupled_weight_decay*theta       g negated to maximize
    /// s     <- alpha*s + (1 - alpha)*h^2
    /// w     = s, or centered: avg <- alpha*avg + (1 - alpha)*h; w = s - avg^2
    /// d     = h / (sqrt(w) + eps)                  or h / sqrt(w + eps)
    /// b     <- momentum*b + d                      with Nesterov momentum*b + d stands for b below
    /// theta <- (1 - lr*decoupled_weight_decay)*theta - lr*b
    /// ```
    ///
    /// without momentum `d` in place of `b`; with [`lr_inside`](Self::lr_inside) `b` takes in `lr*d`, as it does in optax
    /// and Keras, and theta loses `b`. Where `s - avg^2` rounds below zero it is zero; PyTorch then has NaN. Slots:
    /// `square_avg` (s), `momentum_buffer` (b) and `grad_avg` (avg); 20 bytes per element and step, and 8 for each of the
    /// other two slots.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, RmsPropConfig};
    ///
    /// let config = RmsPropConfig::builder(1e-2).momentum(0.9).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
    /// let mut weight = [1.0, -1.0];
    /// optimizer.step(&mut [&mut weight], &[&[0.5, -2.0]])?;
    /// assert!(weight[0] < 1.0 && weight[1] > -1.0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub struct RmsPropConfig, built by RmsPropConfigBuilder {
        /// Decay of the averages, at most one.
        alpha: f64,
        /// Keeps the denominator from zero.
        eps: f64,
        /// Whether epsilon is added under the root, as in optax and Keras, or to it, as in PyTorch.
        eps_in_sqrt: bool,
        /// Momentum, at most one; zero, the default, keeps no buffer.
        momentum: f64,
        /// Nesterov's look-ahead, as optax has it. Needs momentum.
        nesterov: bool,
        /// Whether the momentum buffer holds updates, as in optax and Keras, or what the learning rate multiplies, as in
        /// PyTorch: it makes a difference once the learning rate changes.
        lr_inside: bool,
        /// Divides by the deviation of the gradient instead of its root mean square.
        centered: bool,
        /// What `square_avg` starts as.
        initial_square_avg: f64,
    }
}

impl RmsPropConfig {
    /// PyTorch's `RMSprop`: alpha 0.99, eps 1e-8 beside the root, no momentum.
    pub const fn builder(lr: f64) -> RmsPropConfigBuilder {
        RmsPropConfigBuilder::new(Self {
            lr,
            alpha: 0.99,
            eps: 1e-8,
            eps_in_sqrt: false,
            momentum: 0.0,
            nesterov: false,
            lr_inside: false,
            centered: false,
            initial_square_avg: 0.0,
            coupled_weight_decay: 0.0,
            decoupled_weight_decay: 0.0,
            maximize: false,
        })
    }

    /// optax's `rmsprop`: alpha 0.9, eps 1e-8 under the root, the learning rate inside.
    pub const fn optax(lr: f64) -> RmsPropConfigBuilder {
        Self::builder(lr)
            .alpha(0.9)
            .eps_in_sqrt(true)
            .lr_inside(true)
    }

    /// Keras's `RMSprop`: the same with eps 1e-7; its weight decay is decoupled.
    pub const fn keras(lr: f64) -> RmsPropConfigBuilder {
        Self::optax(lr).eps(1e-7).decoupling(0.0)
    }

    fn check(self) -> Result<Self, ConfigError> {
        check_range("alpha", self.alpha, 1.0)?;
        check_held("eps", self.eps, 1.0)?;
        check_range("momentum", self.momentum, 1.0)?;
        check_held("initial_square_avg", self.initial_square_avg, 1.0)?;
        check_decays(
            self.lr,
            self.coupled_weight_decay,
            self.decoupled_weight_decay,
        )?;
        if self.nesterov && self.momentum == 0.0 {
            return unsupported(
                "nesterov, momentum",
                "Nesterov momentum needs a momentum above zero",
            );
        }
        Ok(self)
    }

    fn coefficients(&self, _applied_steps: u64) -> Coefficients {
        Coefficients {
            lambda: self.coupled_weight_decay,
            alpha: self.alpha,
            c: 1.0 - self.alpha,
            eps: self.eps,
            mu: self.momentum,
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
        with_decay!(
            self,
            |decay| match (self.momentum != 0.0, self.centered, state) {
                (false, false, [s]) => {
                    W::walk(
                        self.element::<_, false, false>(k, decay),
                        params,
                        [s],
                        grads,
                    );
                }
                (true, false, [s, b]) => {
                    W::walk(
                        self.element::<_, true, false>(k, decay),
                        params,
                        [s, b],
                        grads,
                    );
                }
                (false, true, [s, avg]) => {
                    W::walk(
                        self.element::<_, false, true>(k, decay),
                        params,
                        [s, avg],
                        grads,
                    );
                }
                (true, true, [s, b, avg]) => {
                    W::walk(
                        self.element::<_, true, true>(k, decay),
                        params,
                        [s, b, avg],
                        grads,
                    );
                }
                // The frame gives as many slots as are kept.
                _ => {}
            }
        );
    }

    fn element<const LAMBDA: bool, const MOMENTUM: bool, const CENTERED: bool>(
        &self,
        k: Coefficients,
        decay: DecayTwin<LAMBDA>,
    ) -> RmsProp<LAMBDA, MOMENTUM, CENTERED> {
        RmsProp {
            k,
            decay,
            eps_in_sqrt: self.eps_in_sqrt,
            nesterov: self.nesterov,
            lr_inside: self.lr_inside,
        }
    }
}

scalars! {
    struct Coefficients {
        lambda, alpha, c, eps, mu, lr, rho,
    }
}

/// Its slots: `s`, then the momentum buffer and the average, as far as there are these.
#[derive(Clone, Copy)]
struct RmsProp<const LAMBDA: bool, const MOMENTUM: bool, const CENTERED: bool> {
    k: Coefficients,
    decay: DecayTwin<LAMBDA>,
    eps_in_sqrt: bool,
    nesterov: bool,
    lr_inside: bool,
}

impl<const SLOTS: usize, const LAMBDA: bool, const MOMENTUM: bool, const CENTERED: bool>
    Element<SLOTS> for RmsProp<LAMBDA, MOMENTUM, CENTERED>
{
    #[inline(always)]
    fn update(self, theta: f32, g: f32, mut slots: [f32; SLOTS]) -> (f32, [f32; SLOTS]) {
        let Self { k, decay, .. } = self;
        let h = decay.direction(k.lambda, theta, g);
        let s = k.alpha * slots[0] + k.c * (h * h);
        slots[0] = s;
        let mut w = s;
        if CENTERED {
            let grad_avg = &mut slots[1 + usize::from(MOMENTUM)];
            let avg = k.alpha * *grad_avg + k.c * h;
            *grad_avg = avg;
            w = larger(s - avg * avg, 0.0);
        }
        let mut d = if self.eps_in_sqrt {
            h / (w + k.eps).sqrt()
        } else {
            h / (w.sqrt() + k.eps)
        };
        if self.lr_inside || !MOMENTUM {
            d *= k.lr;
        }
        let mut u = d;
        if MOMENTUM {
            let b = k.mu * slots[1] + d;
            slots[1] = b;
            u = if self.nesterov { k.mu * b + d } else { b };
            if !self.lr_inside {
                u *= k.lr;
            }
        }
        (decay.decayed(k.rho, theta) - u, slots)
    }
}

impl Rule for RmsPropConfig {
    fn stem(&self) -> &'static str {
        "rmsprop"
    }

    fn slots(&self) -> Slots {
        [
            Slot::new("square_avg").starting_at(self.initial_square_avg as f32),
            Slot::new("momentum_buffer").kept_if(self.momentum != 0.0),
            Slot::new("grad_avg").kept_if(self.centered),
        ]
        .into()
    }

    fn terms(&self) -> Cow<'static, [(&'static str, bool)]> {
        self.decay().terms([
            ("CENTERED", self.centered),
            ("EPS_IN_SQRT", self.eps_in_sqrt),
            ("HAS_MOMENTUM", self.momentum != 0.0),
            ("NESTEROV", self.nesterov),
            ("LR_INSIDE", self.lr_inside),
        ])
    }

    /// The momentum buffer holds updates, or what the learning rate multiplies.
    fn meaning(&self) -> String {
        match self.momentum != 0.0 && self.lr_inside {
            true => "rmsprop-lr-inside",
            false => "rmsprop",
        }
        .to_owned()
    }

    rule_functions!("rmsprop");

    /// The steps do not differ.
    fn phase(&self, _applied_steps: u64) -> u64 {
        0
    }

    momentum_is_its_own!();
}

twin!(RmsPropConfig);

impl KnownRule for RmsPropConfig {
    const PRESETS: &'static [RulePreset] = &[
        preset!("rmsprop", "pytorch", |lr| Self::builder(lr)),
        preset!("rmsprop", "optax", |lr| Self::optax(lr)),
        preset!("rmsprop", "keras", |lr| Self::keras(lr)),
    ];

    fn pytorch_scalars(&self, applied_steps: u64) -> Option<Vec<(&'static str, f64)>> {
        if self.eps_in_sqrt || self.nesterov || (self.lr_inside && self.momentum != 0.0) {
            return None;
        }
        Some(vec![("step", applied_steps as f64)])
    }
}
