//! Every rule without a device: the textbook, the twin, and the optimizer on all cores.

use serde_json::json;
use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::rules::{AmsGrad, RulePreset, Twin};
use wgpu_optim::{
    AdamConfig, AnyRule, ConfigError, CpuOptimizer, Optimizer, ParamGroups, Rule, StateError,
};

use crate::cases::{LRS, sizes, values};
use crate::golden_rules;
use crate::rule_cases::{pairs, rules};
use crate::test;

#[test]
fn the_oracle_visits_the_points_that_the_libraries_printed() {
    for golden in golden_rules::all() {
        let oracles = golden.oracles(Roundoff::NEAREST);
        let config = golden.config();
        for (step, (oracle, expected)) in oracles.iter().zip(&golden.theta_f64).enumerate() {
            for (ours, theirs) in oracle.params().zip(expected) {
                let close = (ours - theirs).abs() <= golden.tolerance() * theirs.abs().max(1.0);
                assert!(close, "{}, step {step}: {ours} and {theirs}", golden.name);
            }
        }
        // What PyTorch computes in f32 lies within the bound, too, slots included: that of twice the rounding, because it
        // rounds oftener (NAdam's parameters twice a step).
        let oracles = golden.oracles(Roundoff::WGSL);
        for (oracle, theirs) in oracles.iter().zip(&golden.theta_f32) {
            oracle
                .check_params(theirs)
                .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
        }
        for (oracle, state) in oracles.iter().zip(&golden.state_f32) {
            for slot in config.slots().kept() {
                let Some(theirs) = state.get(slot.name) else {
                    assert!(state.is_empty(), "{}: no {}", golden.name, slot.name);
                    continue;
                };
                let theirs: Vec<f32> = serde_json::from_value(theirs.clone()).unwrap();
                oracle
                    .check_slot(slot.name, &theirs)
                    .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
            }
        }
    }
}

#[test]
fn twin_and_reference_visit_them_within_the_bound() {
    for golden in golden_rules::all() {
        let config = golden.config();
        let numel = golden.theta0.len();
        let fresh = || CpuOptimizer::new(config.clone(), [("theta", [numel])]).unwrap();
        let mut optimizer = fresh();
        let mut params = golden.theta0.clone();
        let mut reference = Reference::new(&config, &params);
        for (step, oracle) in golden.oracles(Roundoff::NEAREST).iter().enumerate() {
            optimizer.set_lr(golden.lr[step]).unwrap();
            let frozen = golden.frozen_steps.contains(&step);
            optimizer.set_frozen("theta", frozen).unwrap();
            optimizer
                .step(&mut [&mut params], &[&golden.grads[step]])
                .unwrap();
            if !frozen {
                reference.step(optimizer.config(), &golden.grads[step]);
            }
            for values in [&params, &reference.params] {
                oracle
                    .check_params(values)
                    .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
            }
            for slot in &optimizer.state().tensors[0].slots {
                oracle
                    .check_slot(&slot.name, &slot.values.to_f32())
                    .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
            }
        }
    }
}

#[test]
fn schedule_free_rules_evaluate_where_the_libraries_do() {
    let mut seen = 0;
    for golden in golden_rules::all() {
        let numel = golden.theta0.len();
        let mut optimizer = CpuOptimizer::new(golden.config(), [("theta", [numel])]).unwrap();
        let mut twin = golden.theta0.clone();
        for (step, oracle) in golden.oracles(Roundoff::NEAREST).iter().enumerate() {
            optimizer
                .step(&mut [&mut twin], &[&golden.grads[step]])
                .unwrap();
            let Some(z) = optimizer.state().tensors[0].slot("z") else {
                continue;
            };
            seen += golden.check_averaged(step, oracle, &twin, &z);
            // The exact trajectory, rounded.
            let rounded = |x: f64| x as f32;
            let params: Vec<_> = oracle.params().map(rounded).collect();
            let z: Vec<_> = oracle.slot("z").map(rounded).collect();
            golden.check_averaged(step, oracle, &params, &z);
        }
    }
    assert_eq!(seen, 2 * 7 * 13 + 8 * 6 * 19);
}

/// One element after the other.
pub struct Reference {
    pub params: Vec<f32>,
    /// Those that are kept.
    pub slots: Vec<Vec<f32>>,
    pub applied_steps: u64,
}

impl Reference {
    pub fn new(rule: &impl Rule, params: &[f32]) -> Self {
        let slots = rule.slots();
        let slots = slots
            .kept()
            .map(|slot| vec![slot.start.value(); params.len()]);
        Self {
            params: params.to_vec(),
            slots: slots.collect(),
            applied_steps: 0,
        }
    }

    pub fn step(&mut self, rule: &impl Twin, grads: &[f32]) {
        let slots: Vec<_> = self.slots.iter().map(Vec::as_slice).collect();
        let phase = rule.phase(self.applied_steps);
        let scalars = rule.decided(phase, &self.params, &slots, grads);
        let mut slots: Vec<_> = self.slots.iter_mut().map(Vec::as_mut_slice).collect();
        rule.step_in_turn(&scalars, &mut self.params, &mut slots, grads);
        self.applied_steps += 1;
    }
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn parallel_and_vectorised_is_one_element_after_the_other_bit_for_bit() {
    let numels: Vec<_> = sizes().chain([32 * 1024]).collect();
    for config in rules() {
        let tensors = numels.iter().map(|numel| (numel.to_string(), [*numel]));
        let mut optimizer = CpuOptimizer::new(config.clone(), tensors).unwrap();
        let mut params: Vec<_> = numels.iter().map(|n| values(*n as u64, *n)).collect();
        let mut references: Vec<_> = params.iter().map(|p| Reference::new(&config, p)).collect();
        for (step, lr) in LRS.into_iter().enumerate() {
            let grads: Vec<_> = numels
                .iter()
                .map(|n| values((step * 7 + n) as u64, *n))
                .collect();
            let grads: Vec<_> = grads.iter().map(Vec::as_slice).collect();
            optimizer.set_lr(lr).unwrap();
            let mut slices: Vec<_> = params.iter_mut().map(Vec::as_mut_slice).collect();
            optimizer.step(&mut slices, &grads).unwrap();
            for (reference, grads) in references.iter_mut().zip(&grads) {
                reference.step(optimizer.config(), grads);
            }
        }
        for ((ours, reference), state) in params
            .iter()
            .zip(&references)
            .zip(optimizer.state().tensors)
        {
            assert_eq!(bits(ours), bits(&reference.params), "{config:?}");
            for (slot, expected) in state.slots.iter().zip(&reference.slots) {
                assert_eq!(bits(&slot.values.to_f32()), bits(expected), "{config:?}");
            }
        }
    }
}

#[test]
fn every_config_stays_within_its_bound() {
    let gradients = |step: u64| values(100 + step, 257);
    let configs = pairs();
    assert!(configs.len() > 300, "{}", configs.len());
    for config in configs {
        let mut params = values(1, 257);
        let mut oracle = Oracle::new(&params, Roundoff::NEAREST);
        let mut optimizer = CpuOptimizer::new(config.clone(), [("theta", [257])]).unwrap();
        let mut worst = 0.0_f64;
        for step in 0..20 {
            // Zero at first: averages are zero, and zero is divided by epsilon.
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
            for slot in &optimizer.state().tensors[0].slots {
                oracle
                    .check_slot(&slot.name, &slot.values.to_f32())
                    .unwrap_or_else(|e| panic!("{config:?}: {e}"));
            }
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
    let mut oracle = Oracle::new(&params, Roundoff::WGSL);
    oracle.step(&config, &grads);
    let (mut m, mut v) = (vec![0.0; 64], vec![0.0; 64]);
    config.step_in_turn(
        &config.scalars(1),
        &mut params,
        &mut [&mut m, &mut v],
        &grads,
    );
    assert!(oracle.check_params(&params).is_err());
    oracle.check_slot("exp_avg", &m).unwrap();
    v[3] *= 1.000_01;
    assert!(oracle.check_slot("exp_avg_sq", &v).is_err());
}

#[test]
fn presets_are_found_by_name_and_what_is_not_there_is_said() {
    let adamw = AnyRule::preset("adamw", None, 0.1).unwrap();
    assert_eq!(adamw, AdamConfig::adamw(0.1).build().unwrap().into());
    for preset in AnyRule::presets() {
        let found = RulePreset::find(preset.rule, Some(preset.library)).unwrap();
        assert_eq!(found.config(0.01), preset.config(0.01));
        assert_eq!(preset.config(0.01).unwrap().lr(), 0.01);
        assert!(preset.config(f64::NAN).is_err());
    }
    let error = |rule, library| {
        let refused = AnyRule::preset(rule, library, 0.1).unwrap_err();
        refused.to_string()
    };
    assert!(
        error("adamx", None).starts_with(r#"unknown rule "adamx": expected one of sgd, adam,"#)
    );
    assert_eq!(
        error("adamw", Some("tinygrad")),
        r#"unknown preset "tinygrad": expected one of pytorch, optax, keras"#
    );
}

/// Whatever a field is, it is checked when it comes from a file, too.
#[test]
fn every_field_of_every_rule_is_checked() {
    for rule in rules() {
        let fields = serde_json::to_value(&rule).unwrap();
        assert_eq!(
            serde_json::from_value::<AnyRule>(fields.clone()).unwrap(),
            rule
        );
        for (name, value) in fields.as_object().unwrap() {
            if !value.is_f64() {
                continue;
            }
            for wrong in [-1.0, 1e40] {
                let mut fields = fields.clone();
                fields[name] = wrong.into();
                let refused = serde_json::from_value::<AnyRule>(fields).unwrap_err();
                assert!(refused.to_string().contains(name), "{name}: {refused}");
            }
        }
    }
}

/// What a state of an older version says of its rule: it was made with a warm-up that starts above zero.
#[test]
fn a_field_that_came_later_is_what_the_rule_was_before() {
    for (name, expected) in [
        ("schedule-free-sgd", json!({"warmup_from_zero": false})),
        (
            "schedule-free-adamw",
            json!({"warmup_from_zero": false, "form": "corrected"}),
        ),
    ] {
        let now = AnyRule::preset(name, Some("optax"), 0.1).unwrap();
        let mut before = serde_json::to_value(&now).unwrap();
        let fields = before.as_object_mut().unwrap();
        for field in expected.as_object().unwrap().keys() {
            assert!(fields.remove(field).is_some(), "{field}");
        }
        let read: AnyRule = serde_json::from_value(before.clone()).unwrap();
        let mut all = before;
        all.as_object_mut()
            .unwrap()
            .extend(expected.as_object().unwrap().clone());
        assert_eq!(serde_json::to_value(&read).unwrap(), all);
    }
    // No other field may be missing.
    let lion = json!({"rule": "lion", "lr": 0.1, "beta1": 0.9, "weight_decay": 0.0});
    assert!(serde_json::from_value::<AnyRule>(lion).is_err());
}

/// An epsilon of 1e-46 is zero in `f32`, and zero over zero no number. However small or close to one a hyper-parameter is,
/// it is refused by its name, or no finite gradient makes a NaN.
#[test]
fn what_f32_does_not_hold_makes_no_nan() {
    let least = f64::from(f32::MIN_POSITIVE);
    let (mut refused, mut stepped) = (0, 0);
    for rule in rules() {
        let fields = serde_json::to_value(&rule).unwrap();
        for (name, value) in fields.as_object().unwrap() {
            if !value.is_f64() || name == "lr" {
                continue;
            }
            for close in [
                1e-300,
                1e-46,
                1e-40,
                1e-38,
                least,
                2e-38,
                1e-36,
                1.0 - 1e-8,
                1.0 - 1e-16,
            ] {
                let mut fields = fields.clone();
                fields[name] = close.into();
                let rule = match serde_json::from_value::<AnyRule>(fields) {
                    Ok(rule) => rule,
                    Err(error) => {
                        assert!(
                            error.to_string().contains(&**name),
                            "{name} = {close}: {error}"
                        );
                        refused += 1;
                        continue;
                    }
                };
                let mut params = [1.0, -0.5, 0.0, 2.0];
                let mut optimizer = CpuOptimizer::new(rule.clone(), [("theta", [4])]).unwrap();
                for grads in [[0.0; 4], [0.0, 1e-30, -1.0, 0.5], [0.0, 0.0, 0.25, -2.0]] {
                    optimizer.step(&mut [&mut params], &[&grads]).unwrap();
                    assert!(params.iter().all(|x| x.is_finite()), "{params:?}: {rule:?}");
                }
                stepped += 1;
            }
        }
    }
    assert!(refused > 100 && stepped > 100, "{refused} and {stepped}");
}

#[test]
fn the_smallest_epsilon_that_is_held_is_said_and_taken() {
    let adam = || AdamConfig::builder(0.1);
    for (config, field) in [
        (adam().eps(1e-46), "eps"),
        // The bias correction of the first step is in it: 3e-38 is held, and a thirtieth of it is not.
        (adam().eps(3e-38), "eps"),
        (adam().eps_root(1e-36), "eps_root"),
        (AdamConfig::keras(0.1).eps(1e-38), "eps"),
        (adam().amsgrad(AmsGrad::OfCorrected).eps(1e-38), "eps"),
    ] {
        let Err(ConfigError::Vanishes {
            field: named,
            least,
            ..
        }) = config.build()
        else {
            panic!("{config:?}");
        };
        assert_eq!(named, field);
        let held = match field {
            "eps" => config.eps(least),
            _ => config.eps_root(least),
        };
        let config = held.build().unwrap();
        let mut params = [1.0];
        let mut optimizer = CpuOptimizer::new(config, [("theta", [1])]).unwrap();
        optimizer.step(&mut [&mut params], &[&[0.0]]).unwrap();
        assert_eq!(params, [1.0]);
    }
    let refused = AdamConfig::keras(0.1).eps(1e-46).build().unwrap_err();
    let expected = "eps = 1e-46 is zero in f32: expected at least 1.1754943508222875e-38";
    assert_eq!(refused.to_string(), expected);
    // No epsilon at all can be asked for, as in PyTorch.
    adam().eps(0.0).build().unwrap();
    // The averages forget in f32, too.
    for beta in [1.0 - 1e-9, 1.0 - 1e-16] {
        let field = |built: Result<AdamConfig, ConfigError>| match built {
            Err(ConfigError::OutOfRange { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field(adam().betas(beta, 0.9).build()), "beta1");
        assert_eq!(field(adam().betas(0.9, beta).build()), "beta2");
    }
    adam().betas(0.999_999, 0.999_999_9).build().unwrap();
}

#[test]
fn a_momentum_or_a_beta_can_be_scheduled_and_none_can_come_from_nowhere() {
    for rule in rules() {
        match rule.momentum() {
            Some(_) => {
                assert_eq!(rule.with_momentum(0.5).unwrap().momentum(), Some(0.5));
                assert!(rule.with_momentum(1.5).is_err());
                let still = rule.with_momentum(0.0).unwrap();
                assert_eq!(still.slots(), rule.slots(), "{rule:?}");
                assert_eq!(still.terms(), rule.terms(), "{rule:?}");
            }
            None => assert!(rule.with_momentum(0.5).is_err(), "{rule:?}"),
        }
    }
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
        Err(StateError::StateKind { .. })
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
        .map(|start| Oracle::new(start, Roundoff::NEAREST));
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
