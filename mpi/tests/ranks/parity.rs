//! Steps over several ranks, beside those of one process: bit for bit on the CPU.

use wgpu_optim::cpu::TensorValues;
use wgpu_optim::rules::Twin;
use wgpu_optim::{
    AdamConfig, AnyRule, CpuControl, CpuOptimizer, LossScale, Masters, Optimizer, ParamGroups,
    Precision, Rule as _, SgdConfig, StepControl, StorageType, TensorSlice, TensorSpec,
};
use wgpu_optim_mpi::mpi::topology::SimpleCommunicator;
use wgpu_optim_mpi::mpi::traits::Communicator as _;
use wgpu_optim_mpi::{CpuShare, ShardedOptimizer, Sharding};

use crate::model::{Model, bits};
use crate::on_ranks;

const F32: &[(StorageType, StorageType)] = &[(StorageType::F32, StorageType::F32)];
const STEPS: u64 = 5;

/// Runs both for some steps, in which a tensor is frozen and let go on and the learning rate changes, and compares
/// parameters and this rank's state after each.
fn compare<R: Twin>(
    world: &SimpleCommunicator,
    groups: &ParamGroups<R>,
    types: &[(StorageType, StorageType)],
    sharding: &Sharding,
) {
    let (rank, ranks) = (world.rank() as usize, world.size() as usize);
    let model = Model::new(14, types);
    let mut sharded =
        ShardedOptimizer::on_cpu(world, groups, model.tensors.clone(), sharding).unwrap();
    // Reduced gradients are f32.
    let specs = model.tensors.iter().map(|tensor| TensorSpec {
        grads_type: StorageType::F32,
        ..tensor.clone()
    });
    let mut whole = CpuOptimizer::with_groups(groups, specs).unwrap();
    let mut control = sharding.control.clone().map(CpuControl::new);
    let (mut own, mut expected) = (model.params.clone(), model.params.clone());
    for step in 0..STEPS {
        for optimizer_step in [1, 3] {
            if step == optimizer_step {
                let frozen = step == 1;
                sharded.set_frozen("layer4.weight", frozen).unwrap();
                whole.set_frozen("layer4.weight", frozen).unwrap();
                sharded.set_lr(0.01 / step as f64).unwrap();
                whole.set_lr(0.01 / step as f64).unwrap();
            }
        }
        let grads = model.grads(rank, step);
        let record = step_sharded(&mut sharded, &mut own, &grads);
        let mean = model.mean_grads(ranks, step);
        let mean: Vec<_> = mean.iter().map(|grads| TensorSlice::F32(grads)).collect();
        let mut params: Vec<_> = expected.iter_mut().map(TensorValues::slice_mut).collect();
        match &mut control {
            None => whole.step_mixed(&mut params, &mean).unwrap(),
            Some(control) => {
                let expected = whole.step_mixed_with(&mut params, &mean, control).unwrap();
                let record = record.unwrap();
                // Norms are added up in another order, and rounded to f32.
                assert!((record.norm - expected.norm).abs() <= expected.norm * f32::EPSILON);
                assert_eq!(record.is_skipped, expected.is_skipped);
                assert_eq!(sharded.loss_scale(), control.loss_scale());
            }
        }
        let is_exact = control.is_none() || ranks == 1;
        for (tensor, (own, expected)) in model.tensors.iter().zip(own.iter().zip(&expected)) {
            if is_exact {
                assert_eq!(
                    bits(own),
                    bits(expected),
                    "{} after step {step}",
                    tensor.name
                );
            }
        }
        let (state, expected) = (sharded.state().unwrap(), whole.state());
        assert_eq!(
            (state.steps, &state.config),
            (expected.steps, &expected.config)
        );
        for (index, (own, expected)) in state.tensors.iter().zip(&expected.tensors).enumerate() {
            assert_eq!(own.applied_steps, expected.applied_steps);
            let elems = sharded.shares().of_tensor(rank, index);
            let elems = elems.start as usize..elems.end as usize;
            for (own, expected) in own.slots.iter().zip(&expected.slots).filter(|_| is_exact) {
                assert_eq!(own.name, expected.name);
                assert_eq!(own.values.codec(), expected.values.codec());
                let [own, expected] = [
                    &own.values.to_f32()[..],
                    &expected.values.to_f32()[elems.clone()],
                ]
                .map(|values| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
                assert_eq!(
                    own, expected,
                    "{} after step {step}",
                    state.tensors[index].name
                );
            }
        }
    }
}

fn step_sharded<R: Twin>(
    optimizer: &mut ShardedOptimizer<CpuShare<R>>,
    params: &mut [TensorValues],
    grads: &[TensorValues],
) -> Option<wgpu_optim::control::ControlRecord> {
    let mut params: Vec<_> = params.iter_mut().map(TensorValues::slice_mut).collect();
    let grads: Vec<_> = grads.iter().map(TensorValues::slice).collect();
    optimizer.step(&mut params, &grads).unwrap()
}

/// Many buckets, and one.
fn shardings() -> [Sharding; 2] {
    let small = Sharding {
        bucket_bytes: 1 << 10,
        ..Sharding::default()
    };
    [small, Sharding::default()]
}

#[test]
fn momentum_is_that_of_one_process() {
    on_ranks(&[1, 2, 3, 4], |world| {
        let config = SgdConfig::builder(0.1)
            .momentum(0.9)
            .nesterov(true)
            .weight_decay(0.01);
        let groups = ParamGroups::new(config.build().unwrap());
        for sharding in shardings() {
            compare(world, &groups, F32, &sharding);
        }
    });
}

#[test]
fn adamw_with_decay_groups_is_that_of_one_process() {
    on_ranks(&[1, 2, 3, 4], |world| {
        let decay = AdamConfig::adamw(1e-3).weight_decay(0.01);
        let groups = ParamGroups::new(decay.build().unwrap())
            .with(
                "no_decay",
                decay.weight_decay(0.0).build().unwrap(),
                |name| name.ends_with("bias"),
            )
            .unwrap();
        for sharding in shardings() {
            compare(world, &groups, F32, &sharding);
        }
    });
}

/// Masters, rests, gradients of 16 bits: each rank has its part of them.
#[test]
fn sixteen_bits_are_those_of_one_process() {
    use StorageType::{Bf16, F16};
    const TYPES: &[(StorageType, StorageType)] = &[
        (Bf16, Bf16),
        (StorageType::F32, F16),
        (F16, F16),
        (Bf16, StorageType::F32),
    ];
    on_ranks(&[1, 2, 3], |world| {
        for masters in [Masters::F32, Masters::LowBits, Masters::None] {
            let precision = Precision {
                masters,
                ..Precision::default()
            };
            let groups = ParamGroups::new(AdamConfig::adamw(1e-3).build().unwrap());
            let groups = groups.with_precision(precision);
            for sharding in shardings() {
                compare(world, &groups, TYPES, &sharding);
            }
        }
    });
}

#[test]
fn every_rule_is_that_of_one_process() {
    on_ranks(&[3], |world| {
        for preset in AnyRule::presets() {
            let rule = AnyRule::preset(preset.rule, Some(preset.library), 0.01).unwrap();
            // No rank has a whole tensor to take sums over.
            if !rule.sums().is_empty() {
                continue;
            }
            compare(world, &ParamGroups::new(rule), F32, &shardings()[0]);
        }
    });
}

/// Norms over all ranks, groups with one of their own, and steps that all ranks skip.
#[test]
fn a_control_sees_the_gradients_of_all_ranks() {
    on_ranks(&[1, 2, 4], |world| {
        let groups = || {
            let sgd = SgdConfig::builder(0.1).momentum(0.9);
            ParamGroups::new(sgd.build().unwrap())
                .with("bias", sgd.build().unwrap(), |name| name.ends_with("bias"))
                .unwrap()
        };
        let control = StepControl::builder()
            .max_norm(1.0)
            .group_max_norm("bias", 0.5)
            .loss_scale(LossScale {
                initial: 1.0,
                growth_interval: 2,
                ..LossScale::default()
            });
        let sharding = Sharding {
            control: Some(control.build().unwrap()),
            ..shardings()[0].clone()
        };
        compare(world, &groups(), F32, &sharding);

        // Of one element on one rank: all ranks leave all elements.
        let model = Model::new(3, F32);
        let mut sharded =
            ShardedOptimizer::on_cpu(world, &groups(), model.tensors.clone(), &sharding).unwrap();
        let (rank, last) = (world.rank(), world.size() - 1);
        let mut params = model.params.clone();
        let mut grads = model.grads(rank as usize, 0);
        if let (true, TensorValues::F32(grads)) = (rank == last, &mut grads[4]) {
            grads[7] = f32::INFINITY;
        }
        let record = step_sharded(&mut sharded, &mut params, &grads).unwrap();
        assert!(record.is_skipped && record.found_nonfinite);
        assert_eq!(sharded.loss_scale(), 0.5);
        assert_eq!(
            (sharded.steps(), sharded.applied_steps("layer4.weight")),
            (1, Some(0))
        );
        assert_eq!(params, model.params);
        let grads = model.grads(rank as usize, 1);
        let record = step_sharded(&mut sharded, &mut params, &grads).unwrap();
        assert!(!record.is_skipped && params != model.params);
        assert_eq!(
            (sharded.steps(), sharded.applied_steps("layer4.weight")),
            (2, Some(1))
        );
    });
}
