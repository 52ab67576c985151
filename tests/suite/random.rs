//! Random runs of an optimizer over one tensor.

use proptest::prelude::*;
use wgpu_optim::SgdConfig;
use wgpu_optim::rules::sgd::MomentumForm;

use crate::cases::values;

/// What happens at one step.
#[derive(Clone, Debug)]
pub struct Planned {
    lr: f64,
    momentum: f64,
    pub frozen: bool,
}

/// A whole run.
#[derive(Clone, Debug)]
pub struct Run {
    pub config: SgdConfig,
    pub numel: usize,
    pub seed: u64,
    pub steps: Vec<Planned>,
}

impl Run {
    /// The configuration with the learning rate and momentum of a step.
    pub fn config_at(&self, step: usize) -> SgdConfig {
        let planned = &self.steps[step];
        let config = self.config.with_lr(planned.lr).unwrap();
        if config.has_velocity() {
            config.with_momentum(planned.momentum).unwrap()
        } else {
            config
        }
    }

    pub fn grads(&self, step: usize) -> Vec<f32> {
        values(self.seed.wrapping_add(1 + step as u64), self.numel)
    }
}

fn config() -> impl Strategy<Value = SgdConfig> {
    let hyper = (
        0.0..0.5f64,
        0.01..0.999f64,
        0.0..1.0f64,
        0.001..0.5f64,
        0.001..0.5f64,
        0.1..3.0f64,
    );
    let flags = (
        any::<[bool; 6]>(),
        prop::sample::select(MomentumForm::ALL.to_vec()),
    );
    (hyper, flags).prop_filter_map(
        "a combination that no library defines",
        |((lr, momentum, dampening, lambda, lambda_d, time_step), (flag, form))| {
            let given = |flag: bool, value: f64| if flag { value } else { 0.0 };
            SgdConfig::builder(lr)
                .momentum(given(flag[0], momentum))
                .dampening(given(flag[1], dampening))
                .nesterov(flag[2])
                .coupled_weight_decay(given(flag[3], lambda))
                .decoupled_weight_decay(given(flag[4], lambda_d))
                .maximize(flag[5])
                .form(form)
                .time_step(if form == MomentumForm::Particle {
                    time_step
                } else {
                    1.0
                })
                .build()
                .ok()
        },
    )
}

/// Runs of up to eight steps over up to `max_numel` elements.
pub fn runs(max_numel: usize) -> impl Strategy<Value = Run> {
    let step = (0.0..0.5f64, 0.01..0.999f64, prop::bool::weighted(0.25)).prop_map(
        |(lr, momentum, frozen)| Planned {
            lr,
            momentum,
            frozen,
        },
    );
    (
        config(),
        0..=max_numel,
        any::<u64>(),
        prop::collection::vec(step, 1..8),
    )
        .prop_map(|(config, numel, seed, steps)| Run {
            config,
            numel,
            seed,
            steps,
        })
}
