use wgpu_optim::cpu::{SliceError, TensorError};
use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::rules::Real;
use wgpu_optim::rules::sgd::reference::{sgd, sgd_plain};
use wgpu_optim::rules::sgd::{Coefficients, Terms};
use wgpu_optim::state::{DuplicateName, TensorState};
use wgpu_optim::{
    CpuOptimizer, Optimizer, OptimizerState, SgdConfig, StateError, StorageType, TensorSpec,
};

use crate::cases::{LRS, configs, sizes, values};
use crate::test;

fn reference_step<T: Real>(
    config: &SgdConfig,
    is_first: bool,
    params: &mut [T],
    velocity: &mut [T],
    grads: &[T],
) {
    let k = Coefficients::new(config, is_first).cast();
    let has = Terms::of(config);
    if has.velocity {
        sgd(&k, has, params, velocity, grads);
    } else {
        sgd_plain(&k, has, params, grads);
    }
}

#[test]
fn reference_follows_the_oracle_in_every_config() {
    for config in configs() {
        let numel = 257;
        let (mut params, mut velocity) = (values(1, numel), vec![0.0; numel]);
        let mut oracle = Oracle::new(&params, Roundoff::NEAREST);
        for (step, lr) in LRS.into_iter().enumerate() {
            let config = config.with_lr(lr).unwrap();
            let grads = values(10 + step as u64, numel);
            reference_step(&config, step == 0, &mut params, &mut velocity, &grads);
            oracle.step(&config, &grads);
            oracle
                .check_params(&params)
                .unwrap_or_else(|e| panic!("{config:?}: {e}"));
            oracle
                .check_velocity(&velocity)
                .unwrap_or_else(|e| panic!("{config:?}: {e}"));
        }
    }
}

#[test]
fn reference_in_f64_is_the_oracle_to_f64_precision() {
    for config in configs() {
        let start = values(1, 50);
        let mut params: Vec<f64> = start.iter().copied().map(f64::from).collect();
        let mut velocity = vec![0.0; 50];
        let mut oracle = Oracle::new(&start, Roundoff::NEAREST);
        for (step, lr) in LRS.into_iter().enumerate() {
            let config = config.with_lr(lr).unwrap();
            let grads = values(10 + step as u64, 50);
            let exact_grads: Vec<_> = grads.iter().copied().map(f64::from).collect();
            reference_step(&config, step == 0, &mut params, &mut velocity, &exact_grads);
            oracle.step(&config, &grads);
        }
        for (actual, expected) in params.iter().zip(oracle.params()) {
            // Four steps of about ten roundings of terms of magnitude 10.
            approx::assert_abs_diff_eq!(*actual, expected, epsilon = 40.0 * 10.0 * f64::EPSILON);
        }
    }
}

#[test]
fn parallel_is_the_reference_bit_for_bit() {
    let numels: Vec<_> = sizes().chain([32 * 1024, 100_003]).collect();
    for config in configs() {
        let names = numels.iter().map(|numel| (numel.to_string(), [*numel]));
        let mut optimizer = CpuOptimizer::new(config, names).unwrap();
        let mut params: Vec<_> = numels.iter().map(|n| values(*n as u64, *n)).collect();
        let mut expected = params.clone();
        let mut velocity: Vec<_> = numels.iter().map(|n| vec![0.0; *n]).collect();
        for (step, lr) in LRS.into_iter().enumerate() {
            optimizer.set_lr(lr).unwrap();
            let grads: Vec<_> = numels
                .iter()
                .map(|n| values((n * 7 + step) as u64, *n))
                .collect();
            let mut slices: Vec<_> = params.iter_mut().map(Vec::as_mut_slice).collect();
            let grad_slices: Vec<_> = grads.iter().map(Vec::as_slice).collect();
            optimizer.step(&mut slices, &grad_slices).unwrap();

            let k = Coefficients::new(&config.with_lr(lr).unwrap(), step == 0).cast();
            let has = Terms::of(&config);
            for ((params, velocity), grads) in expected.iter_mut().zip(&mut velocity).zip(&grads) {
                if has.velocity {
                    sgd(&k, has, params, velocity, grads);
                } else {
                    sgd_plain(&k, has, params, grads);
                }
            }
        }
        for (actual, expected) in params.iter().zip(&expected) {
            assert!(
                actual
                    .iter()
                    .map(|x| x.to_bits())
                    .eq(expected.iter().map(|x| x.to_bits()))
            );
        }
        let state = optimizer.state();
        for (tensor, expected) in state.tensors.iter().zip(&velocity) {
            assert_eq!(tensor.applied_steps, 4);
            assert_eq!(
                tensor.slot("momentum_buffer"),
                config.has_velocity().then(|| expected.clone())
            );
        }
    }
}

#[test]
fn many_threads_leave_frozen_tensors_alone_whatever_their_size() {
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    // Parts of one tensor, whole tensors and nothing, in every order.
    let numels = [200_000, 3, 0, 70_001, 32 * 1024, 5, 32 * 1024 + 1, 0];
    for frozen in 0..1_u32 << numels.len() {
        let is_frozen = |tensor: usize| frozen & (1 << tensor) != 0;
        let names = numels
            .iter()
            .enumerate()
            .map(|(i, n)| (i.to_string(), [*n]));
        let mut optimizer = CpuOptimizer::new(config, names).unwrap();
        let mut params: Vec<_> = numels.iter().map(|n| vec![1.0; *n]).collect();
        let grads: Vec<_> = numels.iter().map(|n| vec![0.5; *n]).collect();
        for tensor in 0..numels.len() {
            let name = tensor.to_string();
            optimizer.set_frozen(&name, is_frozen(tensor)).unwrap();
        }
        let mut slices: Vec<_> = params.iter_mut().map(Vec::as_mut_slice).collect();
        let grads: Vec<_> = grads.iter().map(Vec::as_slice).collect();
        optimizer.step(&mut slices, &grads).unwrap();
        for (tensor, params) in params.iter().enumerate() {
            let expected = if is_frozen(tensor) {
                1.0
            } else {
                1.0 - 0.1 * 0.5
            };
            assert!(params.iter().all(|theta| *theta == expected), "{frozen:b}");
        }
    }
}

fn two_tensors() -> CpuOptimizer {
    let config = SgdConfig::builder(0.1)
        .momentum(0.9)
        .dampening(0.5)
        .build()
        .unwrap();
    CpuOptimizer::new(config, [("a", [2]), ("b", [3])]).unwrap()
}

#[test]
fn a_frozen_tensor_keeps_its_undampened_first_step() {
    let mut optimizer = two_tensors();
    let (mut a, mut b) = ([1.0, 2.0], [3.0, 4.0, 5.0]);
    optimizer.set_frozen("b", true).unwrap();
    optimizer
        .step(&mut [&mut a, &mut b], &[&[1.0; 2], &[1.0; 3]])
        .unwrap();
    assert_eq!(b, [3.0, 4.0, 5.0]);
    optimizer.set_frozen("b", false).unwrap();
    optimizer
        .step(&mut [&mut a, &mut b], &[&[1.0; 2], &[1.0; 3]])
        .unwrap();
    assert_eq!(
        (optimizer.applied_steps("a"), optimizer.applied_steps("b")),
        (Some(2), Some(1))
    );
    let state = optimizer.state();
    assert_eq!(
        state.tensors[0].slot("momentum_buffer"),
        Some(vec![0.9 + 0.5; 2])
    );
    assert_eq!(state.tensors[1].slot("momentum_buffer"), Some(vec![1.0; 3]));
    assert_eq!(optimizer.set_frozen("c", true).unwrap_err().tensor, "c");
}

#[test]
fn wrong_slices_are_refused_before_anything_is_written() {
    let mut optimizer = two_tensors();
    let (mut a, mut b) = ([1.0, 2.0], [3.0, 4.0, 5.0]);
    let refused = optimizer.step(&mut [&mut a], &[&[1.0; 2]]);
    assert!(matches!(
        refused,
        Err(SliceError::TensorCount {
            role: "params",
            expected: 2,
            actual: 1
        })
    ));
    let refused = optimizer.step(&mut [&mut a, &mut b], &[&[1.0; 2], &[1.0; 4]]);
    let expected = SliceError::Length {
        tensor: "b".into(),
        role: "grads",
        expected: 3,
        actual: 4,
    };
    assert_eq!(refused, Err(expected));
    assert_eq!((a, b), ([1.0, 2.0], [3.0, 4.0, 5.0]));
    assert_eq!(optimizer.applied_steps("a"), Some(0));
    optimizer
        .step(&mut [&mut a, &mut b], &[&[1.0; 2], &[1.0; 3]])
        .unwrap();
    assert_eq!(a, [0.9, 1.9]);
}

#[test]
fn two_tensors_of_one_name_are_refused() {
    let twice = CpuOptimizer::new(*two_tensors().config(), [("a", [1]), ("a", [2])]);
    assert_eq!(
        twice.unwrap_err(),
        DuplicateName { tensor: "a".into() }.into()
    );
}

#[test]
fn tensors_that_memory_cannot_hold_are_named_and_the_next_list_builds() {
    let momentum = *two_tensors().config();
    let plain = SgdConfig::builder(0.1).build().unwrap();
    let a = || TensorSpec::new("a", [2]);
    // More than a `usize`, more than a slice, with state and without, and of 16 bits.
    for shape in [
        vec![usize::MAX, 2],
        vec![usize::MAX; 2],
        vec![usize::MAX / 2],
    ] {
        for config in [momentum, plain] {
            for of in [StorageType::F32, StorageType::Bf16] {
                let large = TensorSpec::new("b", shape.clone())
                    .params_type(of)
                    .grads_type(of);
                let refused = CpuOptimizer::new(config, [a(), large]).unwrap_err();
                let expected = TensorError::TooLarge {
                    tensor: "b".into(),
                    shape: shape.clone(),
                };
                assert_eq!(refused, expected);
            }
        }
    }
    // A slice could be as long, and no machine of 64 bits has the memory.
    let numel = isize::MAX as usize / 4 - 1024;
    if cfg!(target_pointer_width = "64") {
        let refused = CpuOptimizer::new(momentum, [a(), TensorSpec::new("b", [numel])]);
        let expected = TensorError::OutOfMemory {
            tensor: "b".into(),
            numel: numel as u64,
        };
        assert_eq!(refused.unwrap_err(), expected);
    }
    // Without state nothing is allocated, and nothing times anything may be nothing.
    CpuOptimizer::new(plain, [a(), TensorSpec::new("b", [numel])]).unwrap();
    CpuOptimizer::new(
        momentum,
        [a(), TensorSpec::new("b", [usize::MAX, usize::MAX, 0])],
    )
    .unwrap();
}

#[test]
fn a_state_has_the_shapes_of_its_tensors_and_flat_ones_fit_any() {
    let config = *two_tensors().config();
    let fresh = || CpuOptimizer::new(config, [("a", [2, 3]), ("b", [3, 2])]).unwrap();
    let mut optimizer = fresh();
    let grads: [&[f32]; 2] = [&[0.5; 6], &[-0.5; 6]];
    optimizer
        .step(&mut [&mut [1.0; 6], &mut [2.0; 6]], &grads)
        .unwrap();
    let state = optimizer.state();
    assert_eq!(state.tensors[0].shape, [2, 3]);
    let mut swapped = state.clone();
    swapped.tensors[0].name = "b".to_owned();
    swapped.tensors[1].name = "a".to_owned();
    let refused = fresh().load_state(&swapped);
    assert!(matches!(refused, Err(StateError::Shape { tensor, .. }) if tensor == "a"));
    let mut flat = state.clone();
    for tensor in &mut flat.tensors {
        tensor.shape = vec![6];
    }
    let mut resumed = fresh();
    resumed.load_state(&flat).unwrap();
    assert_eq!(resumed.state(), state);
}

#[test]
fn state_carries_on_and_a_foreign_state_is_refused() {
    let mut whole = two_tensors();
    let (mut a, mut b) = ([1.0, 2.0], [3.0, 4.0, 5.0]);
    let grads: [&[f32]; 2] = [&[0.3, -0.4], &[0.1, 0.2, 0.7]];
    whole.step(&mut [&mut a, &mut b], &grads).unwrap();
    let state = whole.state();
    let (mut a2, mut b2) = (a, b);
    whole.step(&mut [&mut a, &mut b], &grads).unwrap();

    let mut resumed = two_tensors();
    let refused = |change: &dyn Fn(&mut OptimizerState)| {
        let mut foreign = state.clone();
        change(&mut foreign);
        let mut optimizer = two_tensors();
        let refused = optimizer.load_state(&foreign).unwrap_err();
        assert_eq!(
            optimizer.state(),
            two_tensors().state(),
            "a refused state leaves no trace"
        );
        refused
    };
    assert_eq!(
        refused(&|state| state.tensors[1].state_kind = "ema".into()),
        StateError::StateKind {
            tensor: "b".into(),
            expected: "heavy-ball".into(),
            actual: "ema".into()
        }
    );
    assert_eq!(
        refused(&|state| state.tensors[1].name = "c".into()),
        StateError::MissingTensor { tensor: "b".into() }
    );
    assert_eq!(
        refused(&|state| {
            let extra = TensorState {
                name: "c".into(),
                ..state.tensors[0].clone()
            };
            state.tensors.push(extra);
        }),
        StateError::UnknownTensor { tensor: "c".into() }
    );
    assert_eq!(
        refused(&|state| state.tensors[1].shape = vec![1, 3]),
        StateError::Shape {
            tensor: "b".into(),
            expected: vec![3],
            actual: vec![1, 3]
        }
    );
    assert_eq!(
        refused(&|state| state.tensors.push(state.tensors[0].clone())),
        StateError::DuplicateTensor { tensor: "a".into() }
    );
    assert_eq!(
        refused(&|state| state.tensors[1].slots[0].values = vec![1.0].into()),
        StateError::Length {
            tensor: "b".into(),
            slot: "momentum_buffer".into(),
            expected: 3,
            actual: 1
        }
    );

    assert_eq!(
        refused(&|state| state.tensors[1].slots[0].name = "exp_avg".into()),
        StateError::UnexpectedSlot {
            tensor: "b".into(),
            slot: "exp_avg".into()
        }
    );

    resumed.load_state(&state).unwrap();
    resumed.step(&mut [&mut a2, &mut b2], &grads).unwrap();
    assert_eq!((a2, b2), (a, b));

    let plain = SgdConfig::builder(0.1).build().unwrap();
    let mut plain = CpuOptimizer::new(plain, [("a", [2]), ("b", [3])]).unwrap();
    assert!(matches!(
        plain.load_state(&state),
        Err(StateError::UnexpectedSlot { .. })
    ));
}

#[test]
fn a_state_without_velocity_starts_the_velocity_fresh() {
    let mut optimizer = two_tensors();
    let (mut a, mut b) = ([1.0, 2.0], [3.0, 4.0, 5.0]);
    optimizer
        .step(&mut [&mut a, &mut b], &[&[1.0; 2], &[1.0; 3]])
        .unwrap();
    let mut state = optimizer.state();
    state.tensors[0].slots.clear();
    state.tensors[0].applied_steps = 9;
    optimizer.load_state(&state).unwrap();
    assert_eq!(
        (optimizer.applied_steps("a"), optimizer.applied_steps("b")),
        (Some(0), Some(1))
    );
    assert_eq!(optimizer.steps(), 1);
}
