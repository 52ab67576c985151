//! RMSprop.

use super::config::{config, scalars};
use super::elementwise::{Element, ElementRule, Momentum, Pass, larger, shader};
use super::error::{check_held, check_range, unsupported};
use super::{ConfigError, KnownRule, RulePreset, Slot, Slots};

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
        alpha: f64 = 0.99,
        /// Keeps the denominator from zero.
        eps: f64 = 1e-8,
        /// Whether epsilon is added under the root, as in optax and Keras, or to it, as in PyTorch.
        eps_in_sqrt: bool = false,
        /// Momentum, at most one; zero, the default, keeps no buffer.
        momentum: f64 = 0.0,
        /// Nesterov's look-ahead, as optax has it. Needs momentum.
        nesterov: bool = false,
        /// Whether the momentum buffer holds updates, as in optax and Keras, or what the learning rate multiplies, as in
        /// PyTorch: it makes a difference once the learning rate changes.
        lr_inside: bool = false,
        /// Divides by the deviation of the gradient instead of its root mean square.
        centered: bool = false,
        /// The first value of `square_avg`.
        initial_square_avg: f64 = 0.0,
    }

    /// PyTorch's `RMSprop`: alpha 0.99, eps 1e-8 beside the root, no momentum.
    pub const fn builder(lr);
}

impl RmsPropConfig {
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

    fn check(&self) -> Result<(), ConfigError> {
        check_range("alpha", self.alpha, 1.0)?;
        check_held("eps", self.eps, 1.0)?;
        check_range("momentum", self.momentum, 1.0)?;
        check_held("initial_square_avg", self.initial_square_avg, 1.0)?;
        if self.nesterov && self.momentum == 0.0 {
            return unsupported(
                "nesterov, momentum",
                "Nesterov momentum needs a momentum above zero",
            );
        }
        Ok(())
    }
}

scalars! {
    struct Coefficients {
        alpha, c, eps, mu, lr,
    }
}

impl ElementRule for RmsPropConfig {
    type K = Coefficients;
    shader!("rmsprop");
    const IS_STATIONARY: bool = true;

    fn slots(&self) -> Slots {
        [
            Slot::new("square_avg").starting_at(self.initial_square_avg as f32),
            Slot::new("momentum_buffer").kept_if(self.momentum != 0.0),
            Slot::new("grad_avg").kept_if(self.centered),
        ]
        .into()
    }

    fn terms(&self) -> Vec<(&'static str, bool)> {
        vec![
            ("CENTERED", self.centered),
            ("EPS_IN_SQRT", self.eps_in_sqrt),
            ("HAS_MOMENTUM", self.momentum != 0.0),
            ("NESTEROV", self.nesterov),
            ("LR_INSIDE", self.lr_inside),
        ]
    }

    /// The momentum buffer holds updates, or what the learning rate multiplies.
    fn state_kind(&self) -> &'static str {
        match self.momentum != 0.0 && self.lr_inside {
            true => "rmsprop-lr-inside",
            false => "rmsprop",
        }
    }

    fn momentum(&mut self) -> Momentum<'_> {
        Momentum::Buffered(&mut self.momentum)
    }

    fn coefficients(&self, _applied_steps: u64) -> Coefficients<f64> {
        Coefficients {
            alpha: self.alpha,
            c: 1.0 - self.alpha,
            eps: self.eps,
            mu: self.momentum,
            lr: self.lr,
        }
    }

    fn step(&self, pass: Pass<'_, '_>) {
        match (self.momentum != 0.0, self.centered) {
            (false, false) => pass.over::<_, 1>(RmsProp::<false, false>(*self)),
            (true, false) => pass.over::<_, 2>(RmsProp::<true, false>(*self)),
            (false, true) => pass.over::<_, 2>(RmsProp::<false, true>(*self)),
            (true, true) => pass.over::<_, 3>(RmsProp::<true, true>(*self)),
        }
    }
}

/// The element with its slots: `s`, then the momentum buffer and the average, as far as there are these.
#[derive(Clone, Copy)]
struct RmsProp<const MOMENTUM: bool, const CENTERED: bool>(RmsPropConfig);

impl<const SLOTS: usize, const MOMENTUM: bool, const CENTERED: bool> Element<Coefficients, SLOTS>
    for RmsProp<MOMENTUM, CENTERED>
{
    #[inline(always)]
    fn update(
        self,
        k: Coefficients,
        theta: f32,
        h: f32,
        mut slots: [f32; SLOTS],
    ) -> (f32, [f32; SLOTS]) {
        let config = self.0;
        let s = k.alpha * slots[0] + k.c * (h * h);
        slots[0] = s;
        let mut w = s;
        if CENTERED {
            let grad_avg = &mut slots[1 + usize::from(MOMENTUM)];
            let avg = k.alpha * *grad_avg + k.c * h;
            *grad_avg = avg;
            w = larger(s - avg * avg, 0.0);
        }
        let mut d = if config.eps_in_sqrt {
            h / (w + k.eps).sqrt()
        } else {
            h / (w.sqrt() + k.eps)
        };
        if config.lr_inside || !MOMENTUM {
            d *= k.lr;
        }
        let mut u = d;
        if MOMENTUM {
            let b = k.mu * slots[1] + d;
            slots[1] = b;
            u = if config.nesterov { k.mu * b + d } else { b };
            if !config.lr_inside {
                u *= k.lr;
            }
        }
        (theta - u, slots)
    }
}

impl KnownRule for RmsPropConfig {
    const PRESETS: &'static [RulePreset] = &[
        RulePreset::new("rmsprop", "pytorch", |lr| Self::builder(lr).into()),
        RulePreset::new("rmsprop", "optax", |lr| Self::optax(lr).into()),
        RulePreset::new("rmsprop", "keras", |lr| Self::keras(lr).into()),
    ];

    fn is_pytorchs(&self) -> bool {
        !self.eps_in_sqrt && !self.nesterov && (self.momentum == 0.0 || !self.lr_inside)
    }
}
