use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::rules::GroupError;
use wgpu_optim::state::SlotState;
use wgpu_optim::{ConfigError, CpuOptimizer, Optimizer, ParamGroups, SgdConfig, StateError};

use crate::cases::values;
use crate::test;

/// Decay on weights only, biases at twice the learning rate, and embeddings without momentum.
pub fn groups() -> ParamGroups {
    let weights = SgdConfig::builder(0.1).momentum(0.9).weight_decay(0.05);
    let biases = SgdConfig::builder(0.2)
        .momentum(0.8)
        .dampening(0.3)
        .build()
        .unwrap();
    let norms = weights.weight_decay(0.0).nesterov(true).build().unwrap();
    let embeddings = weights.momentum(0.0).build().unwrap();
    ParamGroups::new(weights.build().unwrap())
        .with("biases", biases, |tensor| tensor.ends_with("bias"))
        .unwrap()
        .with("norms", norms, |tensor| tensor.contains("norm"))
        .unwrap()
        .with("embeddings", embeddings, |tensor| {
            tensor.starts_with("embed")
        })
        .unwrap()
}

/// A tensor's group among `groups()`; the first that takes it.
pub fn group_of(tensor: &str) -> &'static str {
    match tensor {
        tensor if tensor.ends_with("bias") => "biases",
        tensor if tensor.contains("norm") => "norms",
        tensor if tensor.starts_with("embed") => "embeddings",
        _ => "default",
    }
}

/// Names and shapes.
pub fn shapes() -> [(&'static str, [usize; 1]); 6] {
    TENSORS.map(|(name, numel)| (name, [numel]))
}

pub const TENSORS: [(&str, usize); 6] = [
    ("0.weight", 33),
    ("embed", 71),
    ("0.bias", 7),
    ("norm.weight", 64),
    ("norm.bias", 5),
    ("1.weight", 128),
];

#[test]
fn every_tensor_follows_its_own_group() {
    let mut optimizer = CpuOptimizer::with_groups(&groups(), shapes()).unwrap();
    let mut params: Vec<_> = TENSORS.iter().map(|(_, n)| values(*n as u64, *n)).collect();
    let mut oracles: Vec<_> = params
        .iter()
        .map(|p| Oracle::new(p, Roundoff::NEAREST))
        .collect();
    for (step, lr) in [0.1, 0.03, 0.2].into_iter().enumerate() {
        optimizer.set_lr(lr).unwrap();
        if step == 1 {
            optimizer.set_group_lr("norms", 0.5).unwrap();
        }
        assert_eq!(optimizer.group_config("biases").unwrap().lr(), 2.0 * lr);
        let grads: Vec<_> = TENSORS
            .iter()
            .map(|(_, n)| values((n + step) as u64, *n))
            .collect();
        let mut slices: Vec<_> = params.iter_mut().map(Vec::as_mut_slice).collect();
        let grad_slices: Vec<_> = grads.iter().map(Vec::as_slice).collect();
        optimizer.step(&mut slices, &grad_slices).unwrap();
        for (((name, _), oracle), grads) in TENSORS.iter().zip(&mut oracles).zip(&grads) {
            oracle.step(optimizer.group_config(group_of(name)).unwrap(), grads);
        }
    }
    let state = optimizer.state();
    for ((oracle, params), state) in oracles.iter().zip(&params).zip(&state.tensors) {
        oracle.check_params(params).unwrap();
        match state.slot("momentum_buffer") {
            Some(velocity) => drop(oracle.check_velocity(&velocity).unwrap()),
            None => assert_eq!(group_of(&state.name), "embeddings"),
        }
        assert_eq!(state.applied_steps, 3);
    }
}

#[test]
fn a_group_without_momentum_stays_without() {
    let mut optimizer = CpuOptimizer::with_groups(&groups(), shapes()).unwrap();
    optimizer.set_momentum(0.5).unwrap();
    let momentum = |group| optimizer.group_config(group).unwrap().momentum();
    assert_eq!(["default", "biases", "norms"].map(momentum), [0.5; 3]);
    assert_eq!(momentum("embeddings"), 0.0);
    optimizer.set_momentum(0.0).unwrap();
    let has_velocity = |group| optimizer.group_config(group).unwrap().has_velocity();
    assert!(["default", "biases", "norms"].into_iter().all(has_velocity));
    assert!(!has_velocity("embeddings"));

    let plain = SgdConfig::builder(0.1).build().unwrap();
    let mut optimizer = CpuOptimizer::new(plain, shapes()).unwrap();
    assert!(
        optimizer.set_momentum(0.5).is_err(),
        "there is no group to take it"
    );
}

#[test]
fn a_state_holds_velocities_where_there_is_momentum() {
    let mut optimizer = CpuOptimizer::with_groups(&groups(), shapes()).unwrap();
    let mut params = TENSORS.map(|(_, n)| values(1, n));
    let grads = TENSORS.map(|(_, n)| values(2, n));
    let step = |optimizer: &mut CpuOptimizer, params: &mut [Vec<f32>]| {
        let mut params: Vec<_> = params.iter_mut().map(Vec::as_mut_slice).collect();
        optimizer
            .step(&mut params, &grads.each_ref().map(Vec::as_slice))
            .unwrap();
    };
    step(&mut optimizer, &mut params);
    step(&mut optimizer, &mut params);
    let state = optimizer.state();
    for tensor in &state.tensors {
        assert_eq!(tensor.slots.is_empty(), tensor.name == "embed");
        assert_eq!(tensor.applied_steps, 2);
    }
    let mut resumed = CpuOptimizer::with_groups(&groups(), shapes()).unwrap();
    resumed.load_state(&state).unwrap();
    assert_eq!(resumed.state(), state);
    let mut resumed_params = params.clone();
    step(&mut optimizer, &mut params);
    step(&mut resumed, &mut resumed_params);
    assert_eq!(
        (resumed.state(), resumed_params),
        (optimizer.state(), params)
    );

    let mut unexpected = state.clone();
    let embed = unexpected.tensors.iter_mut().find(|t| t.name == "embed");
    embed.unwrap().slots.push(SlotState {
        name: "momentum_buffer".into(),
        values: vec![1.0; 71].into(),
    });
    assert_eq!(
        resumed.load_state(&unexpected),
        Err(StateError::UnexpectedSlot {
            tensor: "embed".into(),
            slot: "momentum_buffer".into()
        })
    );
}

#[test]
fn learning_rates_change_together_or_not_at_all() {
    // Twice 0.6 would decay more than all.
    let base = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let fast = SgdConfig::builder(0.2)
        .momentum(0.9)
        .decoupled_weight_decay(1.0)
        .build()
        .unwrap();
    let groups = ParamGroups::new(base).with("fast", fast, |_| true).unwrap();
    let mut optimizer = CpuOptimizer::with_groups(&groups, [("a", [1])]).unwrap();
    assert!(matches!(
        optimizer.set_lr(0.6),
        Err(ConfigError::DecayTooLarge { .. })
    ));
    assert_eq!(optimizer.config().lr(), 0.1);
    assert_eq!(optimizer.group_config("fast").unwrap().lr(), 0.2);
    assert!(optimizer.set_momentum(2.0).is_err());
    optimizer.set_momentum(0.5).unwrap();
    assert_eq!(optimizer.group_config("fast").unwrap().momentum(), 0.5);
    let unknown = optimizer.set_group_lr("slow", 0.1);
    assert_eq!(
        unknown,
        Err(GroupError::Unknown {
            group: "slow".into()
        })
    );
    assert!(matches!(
        optimizer.set_group_lr("fast", -1.0),
        Err(GroupError::Config(_))
    ));
    assert_eq!(optimizer.group_config("slow"), None);
}

#[test]
fn two_groups_of_one_name_are_refused() {
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let refused = ParamGroups::new(config).with("default", config, |_| true);
    assert_eq!(
        refused.map(drop).unwrap_err(),
        GroupError::NameTaken {
            group: "default".into()
        }
    );
}

/// Learning rates of their own, beside a default group that is at rest.
pub fn groups_without_a_ratio(default_lr: f64) -> ParamGroups {
    let base = |lr| SgdConfig::builder(lr).momentum(0.9).build().unwrap();
    ParamGroups::new(base(default_lr))
        .with("biases", base(1.6e-4), |tensor| tensor.ends_with("bias"))
        .unwrap()
        .with("norms", base(default_lr), |tensor| tensor.contains("norm"))
        .unwrap()
}

#[test]
fn groups_without_a_ratio_keep_their_own_learning_rate() {
    for at_rest in [0.0, 1e-50, f64::from_bits(1)] {
        let groups = groups_without_a_ratio(at_rest);
        let mut optimizer = CpuOptimizer::with_groups(&groups, shapes()).unwrap();
        let lrs = |optimizer: &CpuOptimizer| {
            let lr = |group| optimizer.group_config(group).unwrap().lr();
            ["default", "biases", "norms"].map(lr)
        };
        assert_eq!(lrs(&optimizer), [at_rest, 1.6e-4, at_rest]);
        optimizer.set_lr(0.1).unwrap();
        assert_eq!(lrs(&optimizer), [0.1, 1.6e-4, 0.1]);
        optimizer.set_group_lr("biases", 1.6e-5).unwrap();
        optimizer.set_lr(0.2).unwrap();
        assert_eq!(lrs(&optimizer), [0.2, 1.6e-5, 0.2]);
    }
}

#[test]
fn ratios_of_learning_rates_neither_overflow_nor_vanish() {
    let config = |lr| SgdConfig::builder(lr).build().unwrap();
    let (least, most) = (f64::from(f32::MIN_POSITIVE), f64::from(f32::MAX));
    let with = |default, lr| {
        let groups = ParamGroups::new(config(default));
        let groups = groups.with("other", config(lr), |_| true).unwrap();
        CpuOptimizer::with_groups(&groups, [("a", [1])]).unwrap()
    };
    let other = |optimizer: &CpuOptimizer| optimizer.group_config("other").unwrap().lr();
    let mut steep = with(least, most);
    steep.set_lr(least / 2.0).unwrap();
    assert_eq!(other(&steep), most / 2.0);
    let refused = steep.set_lr(1.0);
    assert!(matches!(
        refused,
        Err(ConfigError::OutOfRange { field: "lr", .. })
    ));
    assert_eq!(
        (steep.config().lr(), other(&steep)),
        (least / 2.0, most / 2.0)
    );
    let mut flat = with(most, least);
    flat.set_lr(1.0).unwrap();
    approx::assert_relative_eq!(other(&flat), least / most);
    flat.set_lr(most).unwrap();
    assert_eq!(other(&flat), least);
    // A group at rest beside a default group that is not has a ratio, zero.
    let mut still = with(0.1, 0.0);
    still.set_lr(0.2).unwrap();
    assert_eq!(other(&still), 0.0);
}
