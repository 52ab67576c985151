//! Ranks that differ, and ranks that fail: everybody hears of it, and nothing has changed.

use wgpu_optim::control::StepControlBuilder;
use wgpu_optim::cpu::{SliceError, TensorError, TensorValues};
use wgpu_optim::storage::Rounding;
use wgpu_optim::{
    AnyRule, Masters, Optimizer, ParamGroups, Precision, SgdConfig, StepControl, StorageType,
    TensorSpec,
};
use wgpu_optim_mpi::mpi::topology::SimpleCommunicator;
use wgpu_optim_mpi::mpi::traits::Communicator as _;
use wgpu_optim_mpi::{CpuShare, ShardError, ShardedOptimizer, Sharding};

use crate::model::{Model, bits};
use crate::{on_ranks, on_ranks_that_are_ended};

type Built = Result<ShardedOptimizer<CpuShare<SgdConfig>>, ShardError>;

const F32: &[(StorageType, StorageType)] = &[(StorageType::F32, StorageType::F32)];

fn build(world: &SimpleCommunicator, lr: f64, tensors: Vec<TensorSpec>) -> Built {
    let groups = ParamGroups::new(SgdConfig::builder(lr).momentum(0.9).build().unwrap());
    ShardedOptimizer::on_cpu(world, &groups, tensors, &Sharding::default())
}

fn message<T>(result: Result<T, ShardError>) -> String {
    result.map(drop).unwrap_err().to_string()
}

#[test]
fn ranks_that_differ_are_told_where() {
    on_ranks(&[3], |world| {
        let differs = world.rank() == 2;
        let tensors = || vec![TensorSpec::new("w", [3, 4]), TensorSpec::new("b", [4])];
        let with = |change: fn(&mut Vec<TensorSpec>)| {
            let mut tensors = tensors();
            if differs {
                change(&mut tensors);
            }
            message(build(world, 0.1, tensors))
        };
        let shape = with(|tensors| tensors[0].shape = vec![4, 3]);
        let is = |shape: &str| format!("{shape} of f32, gradients of f32, in group \"default\"");
        assert_eq!(
            shape,
            format!(
                "rank 2: tensor \"w\" is {}, on rank 0 it is {}",
                is("[4, 3]"),
                is("[3, 4]")
            )
        );
        let dtype = with(|tensors| tensors[1].grads_type = StorageType::F16);
        assert!(
            dtype.starts_with("rank 2: tensor \"b\" is [4] of f32, gradients of f16"),
            "{dtype}"
        );
        let name = with(|tensors| tensors[1].name = "c".to_owned());
        assert_eq!(
            name,
            "rank 2: the name of tensor 1 is \"c\", on rank 0 it is \"b\""
        );
        let more = with(|tensors| tensors.push(TensorSpec::new("d", [1])));
        assert_eq!(
            more,
            "rank 2: the number of tensors is 3, on rank 0 it is 2"
        );
        let lr = message(build(world, if differs { 0.2 } else { 0.1 }, tensors()));
        assert!(
            lr.starts_with("rank 2: group \"default\" is SgdConfig"),
            "{lr}"
        );
    });
}

/// A group that was mistyped would be clipped by nobody.
#[test]
fn a_control_of_a_group_that_is_not_there_is_refused_on_every_rank() {
    on_ranks(&[1, 2], |world| {
        let sgd = SgdConfig::builder(1.0).build().unwrap();
        let groups = ParamGroups::new(sgd).with("head", sgd, |name| name == "w");
        let groups = groups.unwrap();
        let build = |group: &str| {
            let sharding = Sharding {
                control: Some(
                    StepControl::builder()
                        .group_clip_value(group, 1.0)
                        .build()
                        .unwrap(),
                ),
                ..Sharding::default()
            };
            ShardedOptimizer::on_cpu(world, &groups, [TensorSpec::new("w", [3])], &sharding)
        };
        let error = build("heads").map(drop).unwrap_err();
        assert!(
            matches!(&error, ShardError::Slice(SliceError::UnknownGroup { group }) if group == "heads"),
            "{error}"
        );
        let mut optimizer = build("head").unwrap();
        let mut params = [0.0_f32; 3];
        optimizer
            .step(
                &mut [(&mut params[..]).into()],
                &[(&[9.0_f32; 3][..]).into()],
            )
            .unwrap();
        assert_eq!(params, [-1.0; 3]);
    });
}

/// What all have alike, but no rank may have.
#[test]
fn what_shards_cannot_be_is_refused_on_every_rank() {
    on_ranks(&[2], |world| {
        let twice = vec![TensorSpec::new("w", [1]), TensorSpec::new("w", [2])];
        let error = build(world, 0.1, twice).map(drop).unwrap_err();
        let is_said = matches!(error, ShardError::Tensor(TensorError::DuplicateName(_)));
        assert!(is_said, "{error}");

        let precision = Precision {
            masters: Masters::None,
            rounding: Rounding::Stochastic { seed: 1 },
            ..Precision::default()
        };
        let groups = ParamGroups::new(SgdConfig::builder(0.1).build().unwrap());
        let groups = groups.with_precision(precision);
        let half = TensorSpec::new("w", [9]).params_type(StorageType::Bf16);
        let error = ShardedOptimizer::on_cpu(world, &groups, [half], &Sharding::default());
        let error = error.map(drop).unwrap_err();
        assert!(
            matches!(&error, ShardError::Stochastic { tensor } if tensor == "w"),
            "{error}"
        );

        let groups = ParamGroups::new(SgdConfig::builder(0.1).build().unwrap());
        let sharded = |control: StepControlBuilder| {
            let sharding = Sharding {
                control: Some(control.build().unwrap()),
                ..Sharding::default()
            };
            ShardedOptimizer::on_cpu(world, &groups, [TensorSpec::new("w", [9])], &sharding)
        };
        let lamb = ParamGroups::new(AnyRule::preset("lamb", None, 0.1).unwrap());
        let spec = [TensorSpec::new("w", [9])];
        let error = ShardedOptimizer::on_cpu(world, &lamb, spec, &Sharding::default());
        let error = error.map(drop).unwrap_err().to_string();
        assert!(
            error.contains("lamb takes norms of whole tensors"),
            "{error}"
        );

        let by_tensor = StepControl::builder().tensor_max_norm(1.0);
        let error = sharded(by_tensor).map(drop).unwrap_err();
        assert!(matches!(error, ShardError::ClipsTensors), "{error}");
        assert!(error.to_string().contains("tensor_max_norm"), "{error}");
        sharded(StepControl::builder().max_norm(1.0)).unwrap();
    });
}

#[test]
fn a_step_that_ranks_differ_about_changes_nothing() {
    on_ranks(&[1, 3], |world| {
        let (rank, last) = (world.rank() as usize, world.size() as usize - 1);
        let model = Model::new(9, F32);
        let mut optimizer = build(world, 0.1, model.tensors.clone()).unwrap();
        let mut params = model.params.clone();
        let grads = model.grads(rank, 0);
        let mut step = |optimizer: &mut ShardedOptimizer<_>, grads: &[TensorValues]| {
            let mut slices: Vec<_> = params.iter_mut().map(TensorValues::slice_mut).collect();
            let grads: Vec<_> = grads.iter().map(TensorValues::slice).collect();
            let stepped = optimizer.step(&mut slices, &grads).map(drop);
            (stepped, params.iter().map(bits).collect::<Vec<_>>())
        };
        let (stepped, before) = step(&mut optimizer, &grads);
        stepped.unwrap();
        let state = optimizer.state().unwrap();
        if last > 0 {
            if rank == last {
                optimizer.set_lr(0.2).unwrap();
            }
            let (stepped, after) = step(&mut optimizer, &grads);
            let error = message(stepped);
            assert!(
                error.starts_with("rank 2: group \"default\" is Some(SgdConfig"),
                "{error}"
            );
            assert_eq!(after, before);
            optimizer.set_lr(0.1).unwrap();

            if rank == last {
                optimizer.set_frozen("layer2.weight", true).unwrap();
            }
            let (stepped, after) = step(&mut optimizer, &grads);
            let expected =
                "rank 2: frozen tensor \"layer2.weight\" is frozen, on rank 0 it is nothing";
            assert_eq!(message(stepped), expected);
            assert_eq!(after, before);
            optimizer.set_frozen("layer2.weight", false).unwrap();
        }

        let short = match rank == last {
            true => &grads[1..],
            false => &grads[..],
        };
        let (stepped, after) = step(&mut optimizer, short);
        let too_few = "expected 8 grads slices, one per tensor, got 7";
        let expected = match rank == last {
            true => too_few.to_owned(),
            false => format!("rank {last}: {too_few}"),
        };
        assert_eq!(message(stepped), expected);
        assert_eq!(after, before);
        assert_eq!(optimizer.state().unwrap(), state);

        let (stepped, after) = step(&mut optimizer, &grads);
        stepped.unwrap();
        assert_ne!(after, before);
    });
}

/// One that never comes to where the others wait for it.
#[test]
fn a_rank_that_panics_ends_the_others() {
    let said = on_ranks_that_are_ended(3, |world| {
        let model = Model::new(9, F32);
        let mut optimizer = build(world, 0.1, model.tensors.clone()).unwrap();
        assert!(world.rank() != 1, "rank 1 has lost its head");
        let mut params = model.params.clone();
        let grads = model.grads(0, 0);
        let mut slices: Vec<_> = params.iter_mut().map(TensorValues::slice_mut).collect();
        let grads: Vec<_> = grads.iter().map(TensorValues::slice).collect();
        optimizer.step(&mut slices, &grads).unwrap();
        unreachable!("a step without rank 1");
    });
    if !said.is_empty() {
        assert!(said.contains("rank 1 has lost its head"), "{said}");
        assert!(!said.contains("a step without rank 1"), "{said}");
    }
}
