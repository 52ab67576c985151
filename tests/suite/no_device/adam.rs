//! Adam without a device: the textbook, the twin, and the optimizer on all cores.

use wgpu_optim::oracle::{Oracle, Rounding};
use wgpu_optim::{
    AdamConfig, AdamForm, AmsGrad, ConfigError, CpuOptimizer, ParamGroups, Rule as _, StateError,
    Twin as _,
};

use crate::cases::{LRS, sizes, values};
use crate::golden_rules;

/// One config for every combination of terms that is allowed, with betas that differ.
pub fn configs() -> Vec<AdamConfig> {
    let mut configs = Vec::new();
    for form in [AdamForm::Corrected, AdamForm::EpsilonHat] {
        for amsgrad in [AmsGrad::Off, AmsGrad::OfAverage, AmsGrad::OfCorrected] {
            for bits in 0..16_u32 {
                let flag = |bit: u32, value: f64| if bits & (1 << bit) == 0 { 0.0 } else { value };
                let config = AdamConfig::builder(0.05)
                    .betas(0.8, 0.95)
                    .eps(1e-6)
                    .form(form)
                    .amsgrad(amsgrad)
                    .eps_root(flag(0, 1e-5))
                    .weight_decay(flag(1, 0.02))
                    .decoupled_weight_decay(flag(2, 0.1))
                    .maximize(bits & (1 << 3) != 0)
                    .build();
                configs.extend(config);
            }
        }
    }
    assert_eq!(configs.len(), 3 * 16 + 2 * 8);
    configs
}

#[test]
fn the_oracle_visits_the_points_that_the_libraries_printed() {
    for golden in golden_rules::adam() {
        let oracles = golden.oracles(Rounding::NEAREST);
        for (step, (oracle, expected)) in oracles.iter().zip(&golden.theta_f64).enumerate() {
            for (ours, theirs) in oracle.params().zip(expected) {
                let close = (ours - theirs).abs() <= 1e-12 * theirs.abs().max(1.0);
                assert!(close, "{}, step {step}: {ours} and {theirs}", golden.name);
            }
        }
        // What PyTorch computes in f32 lies within the bound, too, slots included.
        for (oracle, theirs) in oracles.iter().zip(&golden.theta_f32) {
            oracle
                .check_params(theirs)
                .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
        }
        for (oracle, state) in oracles.iter().zip(&golden.state_f32) {
            for slot in ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"] {
                if let Some(theirs) = state.get(slot) {
                    let theirs: Vec<f32> = serde_json::from_value(theirs.clone()).unwrap();
                    oracle
                        .check_slot(slot, &theirs)
                        .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
                }
            }
        }
    }
}

#[test]
fn the_cpu_visits_them_within_the_bound() {
    for golden in golden_rules::adam() {
        let config = golden.config().unwrap();
        let mut optimizer = CpuOptimizer::new(config, [("theta", [golden.theta0.len()])]).unwrap();
        let mut params = golden.theta0.clone();
        for (step, oracle) in golden.oracles(Rounding::NEAREST).iter().enumerate() {
            optimizer.set_lr(golden.lr[step]).unwrap();
            let frozen = golden.frozen_steps.contains(&step);
            optimizer.set_frozen("theta", frozen).unwrap();
            optimizer
                .step(&mut [&mut params], &[&golden.grads[step]])
                .unwrap();
            oracle
                .check_params(&params)
                .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
            for slot in &optimizer.state().tensors[0].slots {
                let name = config
                    .slots()
                    .iter()
                    .find(|s| s.name == slot.name)
                    .unwrap()
                    .name;
                oracle
                    .check_slot(name, &slot.values)
                    .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
            }
        }
    }
}

#[test]
fn parallel_and_vectorised_is_one_element_after_the_other_bit_for_bit() {
    let numels: Vec<_> = sizes().chain([32 * 1024, 100_003]).collect();
    for config in configs() {
        let tensors = numels.iter().map(|numel| (numel.to_string(), [*numel]));
        let mut optimizer = CpuOptimizer::new(config, tensors).unwrap();
        let mut params: Vec<_> = numels.iter().map(|n| values(*n as u64, *n)).collect();
        let mut expected = params.clone();
        let mut slots: Vec<[Vec<f32>; 3]> = numels
            .iter()
            .map(|n| std::array::from_fn(|_| vec![0.0; *n]))
            .collect();
        let kept = config.slots().kept().count();
        for (step, lr) in LRS.into_iter().enumerate() {
            let grads: Vec<_> = numels
                .iter()
                .map(|n| values((step * 7 + n) as u64, *n))
                .collect();
            let grads: Vec<_> = grads.iter().map(Vec::as_slice).collect();
            optimizer.set_lr(lr).unwrap();
            let mut slices: Vec<_> = params.iter_mut().map(Vec::as_mut_slice).collect();
            optimizer.step(&mut slices, &grads).unwrap();
            let config = config.with_lr(lr).unwrap();
            for ((params, slots), grads) in expected.iter_mut().zip(&mut slots).zip(&grads) {
                let mut slots: Vec<_> = slots.iter_mut().map(Vec::as_mut_slice).collect();
                config.step_in_turn(step as u64, params, &mut slots[..kept], grads);
            }
        }
        for ((ours, theirs), (state, slots)) in params
            .iter()
            .zip(&expected)
            .zip(optimizer.state().tensors.iter().zip(&slots))
        {
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(ours), bits(theirs), "{config:?}");
            for (slot, expected) in state.slots.iter().zip(slots) {
                assert_eq!(bits(&slot.values), bits(expected), "{config:?}");
            }
        }
    }
}

#[test]
fn every_config_stays_within_its_bound() {
    let gradients = |step: u64| values(100 + step, 257);
    for config in configs() {
        let mut params = values(1, 257);
        let mut oracle = Oracle::new(&params, Rounding::NEAREST);
        let mut optimizer = CpuOptimizer::new(config, [("theta", [257])]).unwrap();
        let mut worst = 0.0_f64;
        for step in 0..20 {
            // Zero at first: the averages are zero, and zero is divided by epsilon.
            let grads = if step < 2 {
                vec![0.0; 257]
            } else {
                gradients(step)
            };
            optimizer.step(&mut [&mut params], &[&grads]).unwrap();
            oracle.step(&config, &grads);
            let agreement = oracle
                .check_params(&params)
                .unwrap_or_else(|e| panic!("{config:?}: {e}"));
            worst = worst.max(agreement.worst_share_of_bound);
        }
        assert!(
            worst > 0.01,
            "the bound is too wide to say anything: {worst} for {config:?}"
        );
    }
}

#[test]
fn a_wrong_kernel_is_found() {
    // The corrections one step late, as they are where steps count from zero.
    let config = AdamConfig::builder(0.05).build().unwrap();
    let (mut params, grads) = (values(1, 64), values(2, 64));
    let mut oracle = Oracle::new(&params, Rounding::WGSL);
    oracle.step(&config, &grads);
    let (mut m, mut v) = (vec![0.0; 64], vec![0.0; 64]);
    config.step_in_turn(1, &mut params, &mut [&mut m, &mut v], &grads);
    assert!(oracle.check_params(&params).is_err());
    oracle.check_slot("exp_avg", &m).unwrap();
    v[3] *= 1.000_01;
    assert!(oracle.check_slot("exp_avg_sq", &v).is_err());
}

#[test]
fn hyper_parameters_out_of_range_are_named() {
    let field = |built: Result<AdamConfig, ConfigError>| match built.unwrap_err() {
        ConfigError::OutOfRange { field, .. } => field,
        ConfigError::Unsupported { fields, .. } => fields,
        other => panic!("{other}"),
    };
    let adam = || AdamConfig::builder(1e-3);
    assert_eq!(field(AdamConfig::builder(f64::NAN).build()), "lr");
    assert_eq!(field(AdamConfig::builder(-1.0).build()), "lr");
    assert_eq!(field(adam().betas(1.0, 0.9).build()), "beta1");
    assert_eq!(field(adam().betas(0.9, 1.0).build()), "beta2");
    assert_eq!(field(adam().betas(0.9, -0.1).build()), "beta2");
    assert_eq!(field(adam().eps(-1e-8).build()), "eps");
    assert_eq!(field(adam().eps_root(f64::INFINITY).build()), "eps_root");
    assert_eq!(field(adam().weight_decay(-1.0).build()), "weight_decay");
    assert_eq!(
        field(adam().decoupled_weight_decay(-1.0).build()),
        "decoupled_weight_decay"
    );
    assert_eq!(
        field(AdamConfig::keras(1e-3).eps_root(1e-8).build()),
        "form, eps_root"
    );
    assert_eq!(
        field(
            AdamConfig::keras(1e-3)
                .amsgrad(AmsGrad::OfCorrected)
                .build()
        ),
        "form, amsgrad"
    );
    let decayed = AdamConfig::builder(1.0)
        .decoupled_weight_decay(0.9)
        .build()
        .unwrap();
    assert!(matches!(
        decayed.with_lr(2.0),
        Err(ConfigError::DecayTooLarge { .. })
    ));
}

#[test]
fn a_state_carries_on_and_one_of_other_slots_is_refused() {
    let config = AdamConfig::adamw(0.01).build().unwrap();
    let fresh = |config| CpuOptimizer::new(config, [("a", [2, 3]), ("b", [3, 2])]).unwrap();
    let mut whole = fresh(config);
    let mut params = [values(1, 6), values(2, 6)];
    let grads = [values(3, 6), values(4, 6)];
    let grads = grads.each_ref().map(Vec::as_slice);
    let step = |optimizer: &mut CpuOptimizer<AdamConfig>, params: &mut [Vec<f32>; 2]| {
        let mut slices = params.each_mut().map(Vec::as_mut_slice);
        optimizer.step(&mut slices, &grads).unwrap();
    };
    step(&mut whole, &mut params);
    whole.set_frozen("b", true).unwrap();
    step(&mut whole, &mut params);
    whole.set_frozen("b", false).unwrap();
    let state = whole.state();
    assert_eq!(
        (
            state.tensors[0].applied_steps,
            state.tensors[1].applied_steps
        ),
        (2, 1)
    );
    let mut resumed = fresh(config);
    resumed.load_state(&state).unwrap();
    let mut resumed_params = params.clone();
    step(&mut whole, &mut params);
    step(&mut resumed, &mut resumed_params);
    assert_eq!(resumed_params, params);
    assert_eq!(resumed.state(), whole.state());

    let mut half = state.clone();
    half.tensors[0].slots.pop();
    assert!(matches!(
        fresh(config).load_state(&half),
        Err(StateError::MissingSlot { tensor, slot }) if tensor == "a" && slot == "exp_avg_sq"
    ));
    let amsgrad = AdamConfig::adamw(0.01)
        .amsgrad(AmsGrad::OfAverage)
        .build()
        .unwrap();
    assert!(matches!(
        fresh(amsgrad).load_state(&state),
        Err(StateError::Meaning { .. })
    ));
}

/// The betas of a group are its own, and the momentum of a schedule is the first of them, as in PyTorch.
#[test]
fn groups_and_schedules_work_as_with_any_rule() {
    let config = AdamConfig::builder(0.1).build().unwrap();
    let other = AdamConfig::builder(0.2)
        .betas(0.5, 0.9)
        .weight_decay(0.01)
        .build()
        .unwrap();
    let groups = ParamGroups::new(config)
        .with("other", other, |name| name == "b")
        .unwrap();
    let mut optimizer = CpuOptimizer::with_groups(&groups, [("a", [33]), ("b", [7])]).unwrap();
    let mut params = [values(1, 33), values(2, 7)];
    let mut oracles = params
        .each_ref()
        .map(|start| Oracle::new(start, Rounding::NEAREST));
    for step in 0..5 {
        let (lr, momentum) = (0.1 / f64::from(step + 1), 0.85 + 0.02 * f64::from(step));
        optimizer.set_lr(lr).unwrap();
        optimizer.set_momentum(momentum).unwrap();
        let grads = [values(10 + step as u64, 33), values(20 + step as u64, 7)];
        let slices = grads.each_ref().map(Vec::as_slice);
        optimizer
            .step(&mut params.each_mut().map(Vec::as_mut_slice), &slices)
            .unwrap();
        let configs = [
            *optimizer.config(),
            *optimizer.group_config("other").unwrap(),
        ];
        assert_eq!((configs[1].lr(), configs[1].beta1()), (2.0 * lr, momentum));
        for ((oracle, config), grads) in oracles.iter_mut().zip(configs).zip(&grads) {
            oracle.step(&config, grads);
        }
    }
    for (oracle, params) in oracles.iter().zip(&params) {
        oracle.check_params(params).unwrap();
    }
}
