//! The schedule-free rules in the words of optax's `contrib.schedule_free` and of the package schedulefree.

use super::{Arithmetic, Bounded, Element, Textbook};
use crate::rules::{
    AdamForm, Hyperparameters as _, ScheduleFreeAdamWConfig, ScheduleFreeSgdConfig,
};

/// Learning rate and averaging weight of a step.
struct Average {
    beta1: f64,
    lr: f64,
    ck: f64,
}

impl Average {
    /// The average at a step, from the learning rate of each step and the factor by which that corrects a bias.
    fn at(
        beta1: f64,
        lr: f64,
        (warmup_steps, from_zero): (u64, bool),
        bias_correction: impl Fn(u64) -> f64,
        step: u64,
    ) -> Self {
        let warmed_up = |count: u64| match warmup_steps {
            0 => 1.0,
            warmup => (count as f64 / warmup as f64).min(1.0),
        };
        // weight_lr_power is 2; what the learning rate is after the warm-up cancels.
        let weight = |step: u64| (warmed_up(step) * bias_correction(step)).powi(2);
        let weight_sum: f64 = (1..=step).map(weight).sum();
        // optax asks the base optimizer's schedule, which counts from zero.
        let count = if from_zero { step - 1 } else { step };
        Self {
            beta1,
            lr: lr * warmed_up(count) * bias_correction(step),
            ck: weight(step) / weight_sum,
        }
    }

    /// Moves `z` by the base optimizer's update, `x` towards it, and `y` between the two.
    fn follow(self, step: u64, y: &mut f64, z: &mut f64, update: f64) {
        let Self { beta1, lr, ck } = self;
        if step == 1 {
            *z = *y;
        }
        let prev_x = (*y - (1.0 - beta1) * *z) / beta1;
        *z -= lr * update;
        let x = (1.0 - ck) * prev_x + ck * *z;
        *y = beta1 * x + (1.0 - beta1) * *z;
    }

    fn bound(self, step: u64, at: Arithmetic, y: &mut Bounded, z: &mut Bounded, update: Bounded) {
        let Self { beta1, lr, ck } = self;
        if step == 1 {
            *z = *y;
        }
        let a = lr * (1.0 - beta1 * (1.0 - ck));
        *y = at.sum([
            at.scaled(1.0 - ck, *y),
            at.scaled(ck, *z),
            at.scaled(a, update).negative(),
        ]);
        *z = at.difference(*z, at.scaled(lr, update));
    }
}

impl ScheduleFreeSgdConfig {
    fn average(&self, step: u64) -> Average {
        let warmup = (self.warmup_steps(), self.warmup_from_zero());
        Average::at(self.beta1(), self.lr(), warmup, |_| 1.0, step)
    }
}

impl Textbook for ScheduleFreeSgdConfig {
    fn follow(&self, step: u64, element: &mut Element<f64>, grad: f64) {
        let (theta, [z, ..]) = element.split();
        let g = self.decay().follow(theta, grad);
        self.average(step).follow(step, theta, z, g);
    }

    fn bound(&self, step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
        let (theta, [z, ..]) = element.split();
        let h = self.decay().bound(at, theta, grad);
        self.average(step).bound(step, at, theta, z, h);
    }
}

impl ScheduleFreeAdamWConfig {
    fn average(&self, step: u64) -> Average {
        let warmup = (self.warmup_steps(), self.warmup_from_zero());
        let bias_correction = |step: u64| match self.form() {
            AdamForm::EpsilonHat => (1.0 - self.beta2().powf(step as f64)).sqrt(),
            AdamForm::Corrected => 1.0,
        };
        Average::at(self.beta1(), self.lr(), warmup, bias_correction, step)
    }

    /// The divisor of the average of squares.
    fn bias_correction2(&self, step: u64) -> f64 {
        match self.form() {
            AdamForm::Corrected => 1.0 - self.beta2().powf(step as f64),
            AdamForm::EpsilonHat => 1.0,
        }
    }
}

impl Textbook for ScheduleFreeAdamWConfig {
    fn follow(&self, step: u64, element: &mut Element<f64>, grad: f64) {
        let (theta, [z, nu, ..]) = element.split();
        let mut g = if self.maximize() { -grad } else { grad };
        g += self.coupled_weight_decay() * *theta;
        *nu = (1.0 - self.beta2()) * g * g + self.beta2() * *nu;
        let nu_hat = *nu / self.bias_correction2(step);
        let update = g / (nu_hat.sqrt() + self.eps()) + self.decoupled_weight_decay() * *theta;
        self.average(step).follow(step, theta, z, update);
    }

    fn bound(&self, step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
        let (theta, [z, v, ..]) = element.split();
        // The decoupled decay is in the update, not before it.
        let mut undecayed = *theta;
        let h = self.decay().bound(at, &mut undecayed, grad);
        *v = at.average(self.beta2(), *v, at.product(h, h));
        let root = at.root(at.scaled(1.0 / self.bias_correction2(step), *v));
        let normalized = at.quotient(h, at.sum([root, at.scalar(self.eps())]));
        let d = at.sum([normalized, at.scaled(self.decoupled_weight_decay(), *theta)]);
        self.average(step).bound(step, at, theta, z, d);
    }
}
