//! States in files: saved by some ranks, taken over by others.

use std::fs;
use std::path::PathBuf;

use safetensors::SafeTensors;
use wgpu_optim::{
    AdamConfig, CpuOptimizer, LossScale, OptimizerState, ParamGroups, SgdConfig, StepControl,
    StorageType, TensorSlice, TensorSpec, TensorValues,
};
use wgpu_optim_mpi::mpi::topology::SimpleCommunicator;
use wgpu_optim_mpi::mpi::traits::*;
use wgpu_optim_mpi::{CpuShare, ShardError, ShardedOptimizer, Sharding};

use crate::model::{Model, bits};
use crate::on_ranks;

type Sharded = ShardedOptimizer<CpuShare<AdamConfig>>;

const TYPES: &[(StorageType, StorageType)] = &[
    (StorageType::F32, StorageType::F32),
    (StorageType::Bf16, StorageType::F32),
];

fn groups() -> ParamGroups<AdamConfig> {
    let decay = AdamConfig::adamw(1e-3).weight_decay(0.01);
    let no_decay = decay.weight_decay(0.0).build().unwrap();
    ParamGroups::new(decay.build().unwrap())
        .with("no_decay", no_decay, |name| name.ends_with("bias"))
        .unwrap()
}

fn sharded(world: &SimpleCommunicator, model: &Model) -> Sharded {
    let tensors = model.tensors.clone();
    ShardedOptimizer::on_cpu(world, &groups(), tensors, &Sharding::default()).unwrap()
}

/// Every rank has the same gradients, so their number does not matter. One tensor is never stepped.
fn step(
    optimizer: &mut Sharded,
    model: &Model,
    params: &mut [TensorValues],
    steps: std::ops::Range<u64>,
) {
    optimizer.set_frozen("layer6.weight", true).unwrap();
    for step in steps {
        let grads = model.grads(0, step);
        let mut slices: Vec<_> = params.iter_mut().map(TensorValues::slice_mut).collect();
        let grads: Vec<_> = grads.iter().map(TensorValues::slice).collect();
        optimizer.step(&mut slices, &grads).unwrap();
    }
}

/// The same in one process.
fn expected(model: &Model, steps: u64) -> (Vec<TensorValues>, OptimizerState<AdamConfig>) {
    let specs = model.tensors.iter().map(|tensor| TensorSpec {
        grads_type: StorageType::F32,
        ..tensor.clone()
    });
    let mut optimizer = CpuOptimizer::with_groups(&groups(), specs).unwrap();
    optimizer.set_frozen("layer6.weight", true).unwrap();
    let mut params = model.params.clone();
    for step in 0..steps {
        let grads = model.mean_grads(1, step);
        let grads: Vec<_> = grads.iter().map(|grads| TensorSlice::F32(grads)).collect();
        let mut slices: Vec<_> = params.iter_mut().map(TensorValues::slice_mut).collect();
        optimizer.step_mixed(&mut slices, &grads).unwrap();
    }
    (params, optimizer.state())
}

fn folder(world: &SimpleCommunicator, name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    if world.rank() == 0 {
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
    }
    world.barrier();
    folder
}

fn files(folder: &std::path::Path) -> Vec<String> {
    let entries = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = entries.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

fn check(
    world: &SimpleCommunicator,
    optimizer: &Sharded,
    model: &Model,
    params: &[TensorValues],
    steps: u64,
) {
    let (expected_params, expected) = expected(model, steps);
    for (own, expected) in params.iter().zip(&expected_params) {
        assert_eq!(bits(own), bits(expected));
    }
    let state = optimizer.state().unwrap();
    assert_eq!(state.steps, expected.steps);
    for (index, (own, expected)) in state.tensors.iter().zip(&expected.tensors).enumerate() {
        assert_eq!(
            (own.applied_steps, own.slots.len()),
            (expected.applied_steps, expected.slots.len())
        );
        let elems = optimizer.shares().of_tensor(world.rank() as usize, index);
        let elems = elems.start as usize..elems.end as usize;
        for (own, expected) in own.slots.iter().zip(&expected.slots) {
            assert_eq!(
                (&own.name, &own.values[..]),
                (&expected.name, &expected.values[elems.clone()])
            );
        }
    }
}

/// Four ranks save, three and one go on; what one saves everybody can read.
#[test]
fn a_state_of_four_ranks_is_taken_over_by_three_and_by_one() {
    on_ranks(&[4, 3, 1], |world| {
        let model = Model::new(21, TYPES);
        let mut optimizer = sharded(world, &model);
        let mut params = model.params.clone();
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("take-over");
        let index = folder.join("state.safetensors.index.json");
        if world.size() == 4 {
            crate::checkpoint::folder(world, "take-over");
            step(&mut optimizer, &model, &mut params, 0..3);
            optimizer.save(&index).unwrap();
            world.barrier();
            let names = (1..=4).map(|rank| format!("state-000001-{rank:05}-of-00004.safetensors"));
            let names: Vec<_> = names
                .chain(["state.safetensors.index.json".to_owned()])
                .collect();
            assert_eq!(files(&folder), names);
            // Its own file has what it remembers, behind a header.
            let file = fs::read(folder.join(&names[world.rank() as usize])).unwrap();
            let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
            let state = optimizer.state().unwrap();
            let slots = state.tensors.iter().flat_map(|tensor| &tensor.slots);
            let bytes: usize = slots.map(|slot| size_of_val(&*slot.values)).sum();
            assert_eq!(metadata.data_len(), bytes);
            return;
        }
        (params, _) = expected(&model, 3);
        optimizer.load(&index).unwrap();
        step(&mut optimizer, &model, &mut params, 3..6);
        check(world, &optimizer, &model, &params, 6);
        if world.size() == 1 {
            let index = folder.join("alone.json");
            optimizer.save(&index).unwrap();
            let file = fs::read(folder.join("alone-000001-00001-of-00001.safetensors")).unwrap();
            let alone = OptimizerState::<AdamConfig>::from_safetensors(&file).unwrap();
            let specs = model.tensors.iter().map(|tensor| TensorSpec {
                grads_type: StorageType::F32,
                ..tensor.clone()
            });
            let mut single = CpuOptimizer::with_groups(&groups(), specs).unwrap();
            single.load_state(&alone).unwrap();
            assert_eq!(single.state(), expected(&model, 6).1);
            // And the other way round.
            fs::write(
                folder.join("single.safetensors"),
                single.state().to_safetensors().unwrap(),
            )
            .unwrap();
            let mut back = sharded(world, &model);
            back.load(&folder.join("single.safetensors")).unwrap();
            check(world, &back, &model, &params, 6);
        }
    });
}

/// A scale that is constant belongs to the configuration.
#[test]
fn a_saved_scale_goes_on_where_it_was_dynamic_and_is() {
    on_ranks(&[2], |world| {
        let folder = folder(world, "scales");
        let dynamic = |initial| {
            let scale = LossScale {
                initial,
                growth_interval: 1,
                ..LossScale::default()
            };
            StepControl::builder().loss_scale(scale).build().unwrap()
        };
        let constant = StepControl::builder().grad_scale(4.0).build().unwrap();
        let controls = [constant, dynamic(8.0), dynamic(65536.0)];
        let sharded = |control: &StepControl| {
            let groups = ParamGroups::new(SgdConfig::builder(1.0).build().unwrap());
            let sharding = Sharding {
                control: Some(control.clone()),
                ..Sharding::default()
            };
            ShardedOptimizer::on_cpu(world, &groups, [("w", [20])], &sharding).unwrap()
        };
        let step_by_one = |optimizer: &mut ShardedOptimizer<CpuShare<SgdConfig>>| {
            let (mut params, scale) = ([0.0; 20], optimizer.loss_scale());
            let stepped = optimizer.step(
                &mut [(&mut params[..]).into()],
                &[(&[scale; 20][..]).into()],
            );
            assert_eq!(stepped.unwrap().unwrap().scale, scale);
            assert_eq!(params, [-1.0; 20]);
        };
        for before in &controls {
            for now in &controls {
                let (mut saved, mut loaded) = (sharded(before), sharded(now));
                let index = folder.join("state.index.json");
                step_by_one(&mut saved);
                saved.save(&index).unwrap();
                // What was there does not matter.
                step_by_one(&mut loaded);
                loaded.load(&index).unwrap();
                let expected = match (before.loss_scale(), now.loss_scale()) {
                    (Some(before), Some(_)) => 2.0 * before.initial as f32,
                    _ => now.initial_state().scale,
                };
                assert_eq!(loaded.loss_scale(), expected, "{before:?}, {now:?}");
                step_by_one(&mut loaded);
            }
        }
    });
}

/// Whatever happens to a save, the one before is whole; the next one clears up.
#[test]
fn a_save_that_fails_leaves_the_last_one() {
    on_ranks(&[3], |world| {
        let model = Model::new(22, TYPES);
        let folder = folder(world, "failing-save");
        let index = folder.join("state.index.json");
        let (mut optimizer, mut params) = (sharded(world, &model), model.params.clone());
        step(&mut optimizer, &model, &mut params, 0..1);
        optimizer.save(&index).unwrap();
        step(&mut optimizer, &model, &mut params, 1..2);
        let in_the_way = folder.join("state-000002-00002-of-00003.safetensors");
        if world.rank() == 0 {
            fs::create_dir_all(in_the_way.join("full")).unwrap();
            // What a run of more ranks, which was killed, might have left.
            fs::write(folder.join("state-000002-00007-of-00008.safetensors"), "").unwrap();
            fs::write(folder.join("other-000002-00007-of-00008.safetensors"), "").unwrap();
        }
        world.barrier();
        let error = optimizer.save(&index).unwrap_err();
        match world.rank() {
            1 => assert!(matches!(error, ShardError::Io { .. }), "{error}"),
            _ => assert!(matches!(error, ShardError::Rank { rank: 1, .. }), "{error}"),
        }
        world.barrier();
        let mut resumed = sharded(world, &model);
        resumed.load(&index).unwrap();
        let (params_then, _) = expected(&model, 1);
        check(world, &resumed, &model, &params_then, 1);
        world.barrier();

        if world.rank() == 0 {
            fs::remove_dir_all(&in_the_way).unwrap();
        }
        world.barrier();
        optimizer.save(&index).unwrap();
        resumed.load(&index).unwrap();
        check(world, &resumed, &model, &params, 2);
        world.barrier();
        let names = files(&folder);
        let expected = (1..=3).map(|rank| format!("state-000002-{rank:05}-of-00003.safetensors"));
        let other = "other-000002-00007-of-00008.safetensors".to_owned();
        let expected: Vec<_> = [other]
            .into_iter()
            .chain(expected)
            .chain(["state.index.json".to_owned()])
            .collect();
        assert_eq!(names, expected);
    });
}

#[test]
fn files_that_are_not_of_one_whole_state_are_refused() {
    on_ranks(&[2], |world| {
        let model = Model::new(23, TYPES);
        let folder = folder(world, "broken");
        let index = folder.join("state.index.json");
        let (mut optimizer, mut params) = (sharded(world, &model), model.params.clone());
        step(&mut optimizer, &model, &mut params, 0..1);
        optimizer.save(&index).unwrap();
        world.barrier();
        let second = folder.join("state-000001-00002-of-00002.safetensors");
        let whole = fs::read(&second).unwrap();
        step(&mut optimizer, &model, &mut params, 1..2);
        optimizer.save(&folder.join("later.index.json")).unwrap();
        world.barrier();
        let later = fs::read(folder.join("later-000001-00002-of-00002.safetensors")).unwrap();
        let before = optimizer.state().unwrap();
        for (content, message) in [
            (later, "of another state"),
            (
                whole[..whole.len() - 4].to_vec(),
                "state-000001-00002-of-00002.safetensors",
            ),
        ] {
            if world.rank() == 0 {
                fs::write(&second, content).unwrap();
            }
            world.barrier();
            let error = optimizer.load(&index).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
            assert_eq!(optimizer.state().unwrap(), before);
            world.barrier();
        }
        if world.rank() == 0 {
            fs::write(&second, whole).unwrap();
            let mut json = fs::read_to_string(&index).unwrap();
            let line = json
                .lines()
                .find(|line| line.contains("layer4.weight.exp_avg["))
                .unwrap();
            json = json.replace(&format!("{line}\n"), "");
            fs::write(&index, json).unwrap();
        }
        world.barrier();
        let error = optimizer.load(&index).unwrap_err();
        assert!(
            matches!(&error, ShardError::Coverage { tensor, slot, files: 0, .. } if tensor == "layer4.weight" && slot == "exp_avg"),
            "{error}"
        );
        assert_eq!(optimizer.state().unwrap(), before);
    });
}
