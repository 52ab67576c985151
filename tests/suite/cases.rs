//! The configurations, sizes and values that the tests of every tier share.

use wgpu_optim::SgdConfig;
use wgpu_optim::rules::sgd::MomentumForm;

/// One config for every combination of form, Nesterov, dampening, decay and direction that is allowed.
pub fn configs() -> Vec<SgdConfig> {
    let mut configs = Vec::new();
    for form in MomentumForm::ALL {
        for bits in 0..64u32 {
            let flag = |bit: u32, value: f64| if bits & (1 << bit) == 0 { 0.0 } else { value };
            let config = SgdConfig::builder(0.05)
                .form(form)
                .momentum(flag(0, 0.9))
                .dampening(flag(1, 0.3))
                .nesterov(bits & (1 << 2) != 0)
                .coupled_weight_decay(flag(3, 0.02))
                .decoupled_weight_decay(flag(4, 0.1))
                .maximize(bits & (1 << 5) != 0)
                .time_step(if form == MomentumForm::Particle {
                    0.7
                } else {
                    1.0
                })
                .build();
            configs.extend(config);
        }
    }
    configs
}

/// Momentum in one of its forms.
pub fn in_form(form: MomentumForm, lr: f64, momentum: f64) -> SgdConfig {
    let config = SgdConfig::builder(lr).momentum(momentum).form(form);
    config.build().unwrap()
}

/// Learning rates of successive steps: they change, and one is zero.
pub const LRS: [f64; 4] = [0.05, 0.02, 0.0, 0.3];

/// Sizes around every boundary of a small dispatch.
pub fn sizes() -> impl Iterator<Item = usize> {
    (0..=12)
        .chain(63..=65)
        .chain(255..=257)
        .chain(1023..=1025)
        .chain([4095, 4099])
}

/// Values between 2^-6 and 4 in magnitude, of both signs, none of them zero.
pub fn values(seed: u64, numel: usize) -> Vec<f32> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let value = |rng: &mut fastrand::Rng| {
        let magnitude = (rng.f32() * 8.0 - 6.0).exp2();
        if rng.bool() { magnitude } else { -magnitude }
    };
    (0..numel).map(|_| value(&mut rng)).collect()
}
