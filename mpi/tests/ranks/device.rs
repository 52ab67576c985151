//! Steps of a device's share, beside the oracle.

use std::fs;
use std::path::PathBuf;

use wgpu_optim::cpu::TensorValues;
use wgpu_optim::oracle::{Oracle, Roundoff, Textbook};
use wgpu_optim::storage::Storage;
use wgpu_optim::{
    AdamConfig, AdapterRequest, Arena, Gpu, Kernels, Masters, Optimizer, OptimizerState,
    ParamGroups, Precision, SgdConfig, StepControl, StorageType, TensorSpec, readback,
};
use wgpu_optim_mpi::mpi::topology::SimpleCommunicator;
use wgpu_optim_mpi::mpi::traits::Communicator as _;
use wgpu_optim_mpi::{ShardError, ShardedOptimizer, Sharding};

use crate::model::{Model, numel};
use crate::on_ranks;

const STEPS: u64 = 4;

#[test]
fn an_adapter_is_there() {
    open();
}

fn open() -> Gpu {
    let opened = Gpu::open_blocking(&AdapterRequest::default());
    opened.expect("an adapter; `cargo xtask mpi-test` installs one")
}

/// Runs some steps and compares all parameters and this rank's state with the oracle; returns both.
fn run<R: Textbook>(
    world: &SimpleCommunicator,
    gpu: &Gpu,
    groups: &ParamGroups<R>,
    types: (StorageType, StorageType),
    sharding: &Sharding,
) -> (Vec<Vec<f32>>, OptimizerState<R>) {
    let (rank, ranks) = (world.rank() as usize, world.size() as usize);
    let Gpu { device, queue, .. } = gpu;
    let kernels = Kernels::new(device, queue).unwrap();
    let model = Model::new(7, &[types]);
    let layout = model.tensors.iter().map(|tensor| {
        TensorSpec::new(tensor.name.clone(), tensor.shape.clone())
            .params_type(types.0)
            .grads_type(types.1)
    });
    let arena = Arena::new(device, queue, layout).unwrap();
    let params: Vec<_> = model.params.iter().map(TensorValues::to_f32).collect();
    arena.upload_all_params(&params).unwrap();
    let mut optimizer =
        ShardedOptimizer::on_gpu(world, &kernels, groups, &arena, sharding).unwrap();

    let group_of = |name: &str| {
        groups
            .iter()
            .find(|(group, ..)| *group == groups.group_of(name))
    };
    let storage_of = |name: &str| {
        let (_, config, precision) = group_of(name).unwrap();
        let slots = config.slots();
        Storage::new(types.0, StorageType::F32, slots.kept_names(), precision)
    };
    let oracle_of = |name: &str, params: &[f32]| {
        Oracle::<R>::new(params, Roundoff::WGSL).stored(storage_of(name))
    };
    let own_elems = |index: usize| {
        let elems = optimizer.shares().of_tensor(rank, index);
        elems.start as usize..elems.end as usize
    };
    let elems: Vec<_> = (0..params.len()).map(own_elems).collect();
    let tensors = model.tensors.iter().zip(&params).enumerate();
    let mut oracles: Vec<_> = tensors
        .map(|(index, (tensor, params))| {
            let own = &params[elems[index].clone()];
            (
                oracle_of(&tensor.name, params),
                oracle_of(&tensor.name, own),
            )
        })
        .collect();
    for step in 0..STEPS {
        let frozen = step == 1;
        optimizer.set_frozen("layer4.weight", frozen).unwrap();
        let grads: Vec<_> = model
            .grads(rank, step)
            .iter()
            .map(TensorValues::to_f32)
            .collect();
        arena.upload_all_grads(&grads).unwrap();
        optimizer.step_arena().unwrap();
        let mean = model.mean_grads(ranks, step);
        for (index, (tensor, grads)) in model.tensors.iter().zip(&mean).enumerate() {
            let (_, config, _) = group_of(&tensor.name).unwrap();
            if !(frozen && tensor.name == "layer4.weight") {
                oracles[index].0.step(config, grads);
                oracles[index].1.step(config, &grads[elems[index].clone()]);
            }
        }
    }
    let params = readback::block_on(device, arena.download_all_params()).unwrap();
    let state = optimizer.state().unwrap();
    assert_eq!(state.steps, STEPS);
    for (index, (whole, own)) in oracles.iter().enumerate() {
        let tensor = &model.tensors[index];
        let agrees = whole.check_params(&params[index]);
        agrees.unwrap_or_else(|error| panic!("{}: {error}", tensor.name));
        let state = &state.tensors[index];
        let applied = STEPS - u64::from(tensor.name == "layer4.weight");
        assert_eq!(state.applied_steps, applied);
        assert!(!state.slots.is_empty());
        for slot in &state.slots {
            let agrees = match &*slot.name {
                "master_params" => own.check_masters(&slot.values.to_f32()),
                name => own.check_slot(name, &slot.values.to_f32()),
            };
            agrees.unwrap_or_else(|error| panic!("{}: {error}", tensor.name));
        }
    }
    (params, state)
}

fn sharding() -> Sharding {
    Sharding {
        bucket_bytes: 4 << 10,
        ..Sharding::default()
    }
}

#[test]
fn a_device_steps_its_share_within_the_oracle_s_bound_and_repeats_it() {
    on_ranks(&[1, 2, 3], |world| {
        let gpu = open();
        let momentum = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
        let groups = ParamGroups::new(momentum);
        let f32 = (StorageType::F32, StorageType::F32);
        let first = run(world, &gpu, &groups, f32, &sharding());
        assert_eq!(run(world, &gpu, &groups, f32, &sharding()), first);

        let decay = AdamConfig::adamw(1e-3).weight_decay(0.01);
        let no_decay = decay.weight_decay(0.0).build().unwrap();
        let groups = ParamGroups::new(decay.build().unwrap())
            .with("no_decay", no_decay, |name| name.ends_with("bias"))
            .unwrap();
        run(world, &gpu, &groups, f32, &sharding());
        let halves = (StorageType::Bf16, StorageType::F16);
        run(world, &gpu, &groups, halves, &sharding());
        let precision = Precision {
            masters: Masters::None,
            ..Precision::default()
        };
        run(
            world,
            &gpu,
            &groups.with_precision(precision),
            halves,
            &sharding(),
        );
    });
}

#[test]
fn an_arena_s_share_is_one_dispatch_for_each_group() {
    // Without MPI: a share of neighbours is planned as the whole is.
    on_ranks(&[2], |world| {
        let Gpu { device, queue, .. } = open();
        let kernels = Kernels::new(&device, &queue).unwrap();
        let tensors = (0..100).map(|index| (format!("{index}"), vec![100 + index]));
        let arena = Arena::new(&device, &queue, tensors).unwrap();
        let groups = ParamGroups::new(SgdConfig::builder(0.1).momentum(0.9).build().unwrap());
        let mut optimizer =
            ShardedOptimizer::on_gpu(world, &kernels, &groups, &arena, &sharding()).unwrap();
        optimizer.step_arena().unwrap();
        assert_eq!(optimizer.dispatches(), 1);
    });
}

/// What one rank finds, all skip.
#[test]
fn devices_skip_a_step_together() {
    on_ranks(&[3], |world| {
        let Gpu { device, queue, .. } = open();
        let kernels = Kernels::new(&device, &queue).unwrap();
        let model = Model::new(1, &[(StorageType::F32, StorageType::F32)]);
        let layout = model
            .tensors
            .iter()
            .map(|tensor| (tensor.name.clone(), tensor.shape.clone()));
        let arena = Arena::new(&device, &queue, layout).unwrap();
        let params: Vec<_> = model.params.iter().map(TensorValues::to_f32).collect();
        arena.upload_all_params(&params).unwrap();
        let groups = ParamGroups::new(SgdConfig::builder(0.5).build().unwrap());
        let control = StepControl::builder().max_norm(1.0).build().unwrap();
        let sharding = Sharding {
            control: Some(control),
            ..sharding()
        };
        let mut optimizer =
            ShardedOptimizer::on_gpu(world, &kernels, &groups, &arena, &sharding).unwrap();
        let mut grads: Vec<_> = model
            .tensors
            .iter()
            .map(|tensor| vec![1.0; numel(tensor)])
            .collect();
        let numel: usize = model.tensors.iter().map(numel).sum();
        if world.rank() == 1 {
            grads[4][4000] = f32::NAN;
        }
        arena.upload_all_grads(&grads).unwrap();
        assert!(optimizer.step_arena().unwrap().unwrap().is_skipped);
        assert_eq!(
            (optimizer.steps(), optimizer.applied_steps("layer4.weight")),
            (1, Some(0))
        );
        let after = readback::block_on(&device, arena.download_all_params()).unwrap();
        assert_eq!(after, params);

        if world.rank() == 1 {
            grads[4][4000] = 1.0;
            arena.upload_all_grads(&grads).unwrap();
        }
        let record = optimizer.step_arena().unwrap().unwrap();
        // Of as many ones.
        let norm = (numel as f64).sqrt();
        assert_eq!(record.norm, norm as f32);
        let after = readback::block_on(&device, arena.download_all_params()).unwrap();
        let expected = params[4][0] - 0.5 / norm as f32;
        assert!((after[4][0] - expected).abs() <= 4.0 * f32::EPSILON);
    });
}

/// One rank's device is gone: no rank steps, and those whose devices are there can go on without it.
#[test]
fn a_lost_device_ends_the_step_of_all() {
    on_ranks(&[3], |world| {
        let Gpu { device, queue, .. } = open();
        let kernels = Kernels::new(&device, &queue).unwrap();
        let arena = Arena::new(&device, &queue, [("w", [1000])]).unwrap();
        let params = vec![vec![1.0; 1000]];
        arena.upload_all_params(&params).unwrap();
        arena.upload_all_grads(&params).unwrap();
        let groups = ParamGroups::new(SgdConfig::builder(0.5).momentum(0.9).build().unwrap());
        let mut optimizer =
            ShardedOptimizer::on_gpu(world, &kernels, &groups, &arena, &sharding()).unwrap();
        optimizer.step_arena().unwrap();
        if world.rank() == 1 {
            device.destroy();
        }
        for _ in 0..2 {
            let error = optimizer.step_arena().unwrap_err();
            match world.rank() {
                1 => assert!(matches!(error, ShardError::Transfer(_)), "{error}"),
                _ => assert!(matches!(error, ShardError::Rank { rank: 1, .. }), "{error}"),
            }
        }
        if world.rank() != 1 {
            let after = readback::block_on(&device, arena.download_all_params()).unwrap();
            assert_eq!(after, [[0.5; 1000]]);
            assert_eq!(optimizer.steps(), 1);
        }
    });
}

/// A step that fails on one rank when others have made theirs: nobody goes on from it, until a state is loaded.
#[test]
fn a_step_that_goes_half_way_is_said_until_a_state_is_loaded() {
    on_ranks(&[3], |world| {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("half-way");
        let index = folder.join("state.index.json");
        let Gpu { device, queue, .. } = open();
        let kernels = Kernels::new(&device, &queue).unwrap();
        let new_arena = || Arena::new(&device, &queue, [("w", [1000])]).unwrap();
        let arena = new_arena();
        arena.upload_all_grads(&[vec![1.0; 1000]]).unwrap();
        let groups = ParamGroups::new(SgdConfig::builder(0.5).momentum(0.9).build().unwrap());
        let mut optimizer =
            ShardedOptimizer::on_gpu(world, &kernels, &groups, &arena, &sharding()).unwrap();
        optimizer.step_arena().unwrap();
        fs::create_dir_all(&folder).unwrap();
        optimizer.save(&index).unwrap();
        if world.rank() == 1 {
            arena.params()[0].destroy();
        }
        let error = optimizer.step_arena().unwrap_err();
        match world.rank() {
            1 => assert!(matches!(error, ShardError::Transfer(_)), "{error}"),
            _ => assert!(matches!(error, ShardError::Rank { rank: 1, .. }), "{error}"),
        }
        for _ in 0..2 {
            let error = optimizer.step_arena().unwrap_err();
            assert!(matches!(error, ShardError::HalfWay), "{error}");
        }

        // With the parameters that go with the state, which rank 1 has in buffers of its own again.
        let arena = new_arena();
        arena.upload_all_params(&[vec![-0.5; 1000]]).unwrap();
        arena.upload_all_grads(&[vec![1.0; 1000]]).unwrap();
        let mut resumed =
            ShardedOptimizer::on_gpu(world, &kernels, &groups, &arena, &sharding()).unwrap();
        resumed.load(&index).unwrap();
        resumed.step_arena().unwrap();
        let after = readback::block_on(&device, arena.download_all_params()).unwrap();
        assert!(
            after[0]
                .iter()
                .all(|theta| (theta + 1.45).abs() <= 4.0 * f32::EPSILON)
        );
        // Where the buffers are there, the optimizer itself goes on, too.
        optimizer.load(&index).unwrap();
        assert!(!matches!(
            optimizer.step_arena().unwrap_err(),
            ShardError::HalfWay
        ));
    });
}
