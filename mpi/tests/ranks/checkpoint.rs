//! States in files: saved by some ranks, taken over by others.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use wgpu_optim::cpu::TensorValues;
use wgpu_optim::{
    AdamConfig, CpuOptimizer, LossScale, Optimizer, OptimizerState, ParamGroups, SgdConfig,
    StepControl, StorageType, TensorSlice, TensorSpec,
};
use wgpu_optim_mpi::mpi::topology::SimpleCommunicator;
use wgpu_optim_mpi::mpi::traits::*;
use wgpu_optim_mpi::{
    ContentError, CpuShare, FileError, ShardError, ShardedOptimizer, Sharding, SlotError,
};

use crate::model::{Model, bits};
use crate::on_ranks;
use crate::round::bytes;

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

/// An optimizer of all tensors in one process.
fn single(model: &Model) -> CpuOptimizer<AdamConfig> {
    let specs = model.tensors.iter().map(|tensor| TensorSpec {
        grads_type: StorageType::F32,
        ..tensor.clone()
    });
    CpuOptimizer::with_groups(&groups(), specs).unwrap()
}

/// The same in one process.
fn expected(model: &Model, steps: u64) -> (Vec<TensorValues>, OptimizerState<AdamConfig>) {
    let mut optimizer = single(model);
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
    by_first(world, || {
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
    });
    folder
}

/// What rank 0 does while the others wait.
fn by_first(world: &SimpleCommunicator, change: impl FnOnce()) {
    if world.rank() == 0 {
        change();
    }
    world.barrier();
}

fn files(folder: &Path) -> Vec<String> {
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
                (&own.name, &own.values.to_f32()[..]),
                (&expected.name, &expected.values.to_f32()[elems.clone()])
            );
        }
    }
}

/// Ranks that step a model, and a folder for their states.
struct Run {
    model: Model,
    folder: PathBuf,
    index: PathBuf,
    optimizer: Sharded,
    params: Vec<TensorValues>,
}

impl Run {
    fn new(world: &SimpleCommunicator, seed: u64, name: &str) -> Self {
        let model = Model::new(seed, TYPES);
        let folder = folder(world, name);
        Self {
            index: folder.join("state.index.json"),
            optimizer: sharded(world, &model),
            params: model.params.clone(),
            model,
            folder,
        }
    }

    /// Ranks that have saved their states after so many steps.
    fn saved(world: &SimpleCommunicator, seed: u64, name: &str, steps: u64) -> Self {
        let mut run = Self::new(world, seed, name);
        run.step(0..steps);
        run.optimizer.save(&run.index).unwrap();
        run
    }

    fn step(&mut self, steps: std::ops::Range<u64>) {
        step(&mut self.optimizer, &self.model, &mut self.params, steps);
    }
}

/// Loads states that were saved after so many steps.
fn check_saved(world: &SimpleCommunicator, model: &Model, index: &Path, steps: u64) {
    let mut resumed = sharded(world, model);
    resumed.load(index).unwrap();
    let (params, _) = expected(model, steps);
    check(world, &resumed, model, &params, steps);
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
            let stem = "state.safetensors.index";
            let names = (1..=4).map(|rank| format!("{stem}-000001-{rank:05}-of-00004.safetensors"));
            let names: Vec<_> = names
                .chain(["state.safetensors.index.json".to_owned()])
                .collect();
            assert_eq!(files(&folder), names);
            // Its own file has what it remembers, behind a header.
            let file = fs::read(folder.join(&names[world.rank() as usize])).unwrap();
            let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
            let state = optimizer.state().unwrap();
            let slots = state.tensors.iter().flat_map(|tensor| &tensor.slots);
            let bytes: usize = slots.map(|slot| slot.values.bytes().len()).sum();
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
            let mut single = single(&model);
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
        let mut run = Run::saved(world, 22, "failing-save", 1);
        run.step(1..2);
        let in_the_way = run
            .folder
            .join("state.index-000002-00002-of-00003.safetensors");
        by_first(world, || {
            fs::create_dir_all(in_the_way.join("full")).unwrap();
            // What a run of more ranks, which was killed, might have left.
            fs::write(
                run.folder
                    .join("state.index-000002-00007-of-00008.safetensors"),
                "",
            )
            .unwrap();
            fs::write(
                run.folder.join("other-000002-00007-of-00008.safetensors"),
                "",
            )
            .unwrap();
        });
        let error = run.optimizer.save(&run.index).unwrap_err();
        match world.rank() {
            1 => assert!(
                matches!(error, ShardError::File(FileError::Io { .. })),
                "{error}"
            ),
            _ => assert!(matches!(error, ShardError::Rank { rank: 1, .. }), "{error}"),
        }
        world.barrier();
        check_saved(world, &run.model, &run.index, 1);
        world.barrier();

        by_first(world, || {
            fs::remove_dir_all(&in_the_way).unwrap();
        });
        run.optimizer.save(&run.index).unwrap();
        check_saved(world, &run.model, &run.index, 2);
        world.barrier();
        let names = files(&run.folder);
        let expected =
            (1..=3).map(|rank| format!("state.index-000002-{rank:05}-of-00003.safetensors"));
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
        let mut run = Run::saved(world, 23, "broken", 1);
        world.barrier();
        let second = run
            .folder
            .join("state.index-000001-00002-of-00002.safetensors");
        let whole = fs::read(&second).unwrap();
        run.step(1..2);
        run.optimizer
            .save(&run.folder.join("later.index.json"))
            .unwrap();
        world.barrier();
        let later = fs::read(
            run.folder
                .join("later.index-000001-00002-of-00002.safetensors"),
        )
        .unwrap();
        let before = run.optimizer.state().unwrap();
        for (content, message) in [
            (later, "of another state"),
            (
                whole[..whole.len() - 4].to_vec(),
                "state.index-000001-00002-of-00002.safetensors",
            ),
        ] {
            by_first(world, || {
                fs::write(&second, content).unwrap();
            });
            let error = run.optimizer.load(&run.index).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
            assert_eq!(run.optimizer.state().unwrap(), before);
            world.barrier();
        }
        by_first(world, || {
            fs::write(&second, whole).unwrap();
            let mut json = fs::read_to_string(&run.index).unwrap();
            let line = json
                .lines()
                .find(|line| line.contains("layer4.weight.exp_avg["))
                .unwrap();
            json = json.replace(&format!("{line}\n"), "");
            fs::write(&run.index, json).unwrap();
        });
        let error = run.optimizer.load(&run.index).unwrap_err();
        assert!(
            matches!(
                &error,
                ShardError::File(FileError::Slot { tensor, slot, why: SlotError::Coverage { files: 0, .. } })
                    if tensor == "layer4.weight" && slot == "exp_avg"
            ),
            "{error}"
        );
        assert_eq!(run.optimizer.state().unwrap(), before);
    });
}

/// What there is in a folder, to be compared.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let names = files(folder).into_iter();
    names
        .map(|name| (name.clone(), fs::read(folder.join(name)).unwrap()))
        .collect()
}

#[test]
fn the_index_of_something_else_is_not_replaced() {
    on_ranks(&[2], |world| {
        let mut run = Run::new(world, 24, "not-a-state");
        run.step(0..1);
        let (optimizer, folder) = (run.optimizer, run.folder);
        let index = folder.join("model.safetensors.index.json");
        by_first(world, || {
            let shard = "model-00001-of-00001.safetensors";
            let json =
                format!(r#"{{"metadata":{{"total_size":4}},"weight_map":{{"w":"{shard}"}}}}"#);
            fs::write(&index, json).unwrap();
            fs::write(folder.join(shard), "precious").unwrap();
            fs::write(folder.join("text.json"), "no index").unwrap();
        });
        let before = contents(&folder);
        world.barrier();
        type IsExpected = fn(&ShardError) -> bool;
        let refusals: [(&str, IsExpected); 4] = [
            ("model.safetensors.index.json", |error| {
                matches!(error, ShardError::NotAState { .. })
            }),
            ("text.json", |error| {
                let expected = |source: &_| matches!(source, ContentError::Index(_));
                matches!(error, ShardError::File(FileError::Content { source, .. }) if expected(source))
            }),
            ("state.safetensors", |error| {
                matches!(error, ShardError::IndexName { .. })
            }),
            (".json", |error| {
                matches!(error, ShardError::IndexName { .. })
            }),
        ];
        for (name, is_expected) in refusals {
            let error = optimizer.save(&folder.join(name)).unwrap_err();
            let is_other = matches!(error, ShardError::Rank { rank: 0, .. });
            assert!(
                is_expected(&error) || (world.rank() == 1 && is_other),
                "{error}"
            );
            world.barrier();
            assert_eq!(contents(&folder), before);
        }
    });
}

/// Names alike, indices that were copied, and ones that were lost.
#[test]
fn no_index_loses_its_files_to_another_one() {
    on_ranks(&[2], |world| {
        let mut run = Run::new(world, 25, "side-by-side");
        let folder = run.folder.clone();
        let mut saved: Vec<(String, u64)> = Vec::new();
        let mut save = |name: &str, steps: u64| {
            run.step(steps - 1..steps);
            run.optimizer.save(&folder.join(name)).unwrap();
            saved.retain(|(other, _)| other != name);
            saved.push((name.to_owned(), steps));
            world.barrier();
            if steps == 4 && world.rank() == 0 {
                fs::copy(folder.join("state.json"), folder.join("backup.json")).unwrap();
            }
            if steps == 4 {
                saved.push(("backup.json".to_owned(), 4));
            }
            if steps == 5 && world.rank() == 0 {
                fs::remove_file(folder.join("state.json")).unwrap();
            }
            world.barrier();
        };
        for (name, steps) in [
            ("state.safetensors.index.json", 1),
            ("state.index.json", 2),
            ("state-000001.json", 3),
            ("state.json", 4),
            ("state.json", 5),
            // That one is lost, and starts afresh beside its copy, twice.
            ("state.json", 6),
            ("state.json", 7),
        ] {
            save(name, steps);
        }
        for (name, steps) in &saved {
            check_saved(world, &run.model, &folder.join(name), *steps);
        }
        assert_eq!(saved.len(), 5);
        // Nothing but what is named; what the lost index had named is nobody's.
        let left: Vec<_> = files(&folder)
            .into_iter()
            .filter(|name| name.ends_with(".safetensors"))
            .collect();
        assert_eq!(left.len(), 2 * saved.len(), "{left:?}");
    });
}

#[test]
fn a_folder_that_ranks_do_not_share_is_refused() {
    on_ranks(&[3], |world| {
        let mut run = Run::saved(world, 26, "not-shared", 1);
        world.barrier();
        let before = contents(&run.folder);
        world.barrier();
        run.step(1..2);
        // Two ranks on another disk, where nothing lies, or a file of that name from some other time.
        let own = run.folder.join(format!("of-rank-{}", world.rank()));
        for stale in [false, true] {
            let elsewhere = match world.rank() {
                0 => run.index.clone(),
                _ => {
                    fs::create_dir_all(&own).unwrap();
                    own.join("state.index.json")
                }
            };
            if stale && world.rank() == 0 {
                let name = "state.index-000002-00002-of-00003.safetensors";
                fs::write(run.folder.join(name), "old").unwrap();
            }
            world.barrier();
            let error = run.optimizer.save(&elsewhere).unwrap_err();
            match world.rank() {
                0 => assert!(
                    matches!(error, ShardError::NotShared { rank: 1, .. }),
                    "{error}"
                ),
                _ => assert!(matches!(error, ShardError::Rank { rank: 0, .. }), "{error}"),
            }
            assert!(
                error.to_string().contains("a folder that all ranks share"),
                "{error}"
            );
            // Nothing of it stays, and the last generation is whole.
            if world.rank() > 0 {
                assert_eq!(files(&own), Vec::<String>::new());
                fs::remove_dir(&own).unwrap();
            }
            if stale && world.rank() == 0 {
                let name = "state.index-000002-00002-of-00003.safetensors";
                fs::remove_file(run.folder.join(name)).unwrap();
            }
            world.barrier();
            assert_eq!(contents(&run.folder), before);
            check_saved(world, &run.model, &run.index, 1);
            world.barrier();
        }
        run.optimizer.save(&run.index).unwrap();
    });
}

/// Files of these tensors, in several with an index if the name is that of one.
fn write_model(path: &Path, model: &Model, values: &[TensorValues]) {
    let is_index = path
        .extension()
        .is_some_and(|extension| extension == "json");
    let shards = if is_index { 3 } else { 1 };
    let name = |shard: usize| match is_index {
        true => format!("model-{shard}.safetensors"),
        false => path.file_name().unwrap().to_str().unwrap().to_owned(),
    };
    let mut weight_map = serde_json::Map::new();
    for shard in 0..shards {
        let tensors = model.tensors.iter().zip(values).skip(shard).step_by(shards);
        let datas: Vec<_> = tensors
            .map(|(tensor, values)| {
                weight_map.insert(tensor.name.clone(), name(shard).into());
                let dtype = match values {
                    TensorValues::F32(_) => Dtype::F32,
                    TensorValues::Bf16(_) => Dtype::BF16,
                    TensorValues::F16(_) => Dtype::F16,
                };
                (&tensor.name, dtype, tensor.shape.clone(), bytes(values))
            })
            .collect();
        let views = datas
            .iter()
            .map(|(name, dtype, shape, bytes): &(_, _, _, Vec<u8>)| {
                (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
            });
        let file = safetensors::serialize(views, None).unwrap();
        fs::write(path.with_file_name(name(shard)), file).unwrap();
    }
    if is_index {
        let index = serde_json::json!({"metadata": {}, "weight_map": weight_map});
        fs::write(path, index.to_string()).unwrap();
    }
}

/// Gradients of the third step, `grads.safetensors`.
fn write_grads(folder: &Path, model: &Model) {
    let grads = model.mean_grads(1, 2).into_iter();
    let grads: Vec<_> = grads.map(TensorValues::F32).collect();
    write_model(&folder.join("grads.safetensors"), model, &grads);
}

/// The exit code of `wgpu-optim step` from these gradients, with these files of the folder.
fn command_step<const N: usize>(folder: &Path, files: [(&str, &str); N]) -> u8 {
    let words = "wgpu-optim step --device cpu --rule adamw --lr 1e-3 --weight-decay 0.01";
    let mut args: Vec<_> = words.split(' ').map(OsString::from).collect();
    for (option, file) in files.into_iter().chain([("--grads", "grads.safetensors")]) {
        args.extend([option.into(), folder.join(file).into()]);
    }
    wgpu_optim_cli::run(args)
}

/// A state in shards, of one rank or several, is one to the command `step`, too, and its states in files are one to ranks.
#[test]
fn ranks_and_the_command_step_read_each_others_states() {
    on_ranks(&[1, 3], |world| {
        let Run {
            model,
            folder,
            index,
            ..
        } = Run::saved(world, 27, "either-way", 2);
        world.barrier();

        by_first(world, || {
            // The same state in one file.
            let (single_params, state) = expected(&model, 2);
            fs::write(
                folder.join("single.safetensors"),
                state.to_safetensors().unwrap(),
            )
            .unwrap();
            let index = folder.join("params.index.json");
            write_model(&index, &model, &single_params);
            write_grads(&folder, &model);
            for (state, out) in [
                ("single.safetensors", "single"),
                ("state.index.json", "ranks"),
            ] {
                fs::create_dir(folder.join(out)).unwrap();
                let files = [
                    ("--params", "params.index.json"),
                    ("--state", state),
                    ("--out-params", &format!("{out}/params.index.json")),
                    ("--out-state", &format!("{out}/state.index.json")),
                ];
                assert_eq!(command_step(&folder, files), 0, "{state}");
            }
            assert_eq!(
                contents(&folder.join("ranks")),
                contents(&folder.join("single"))
            );
        });

        // What step has written is three files, none of which says everything.
        let mut resumed = sharded(world, &model);
        resumed
            .load(&folder.join("ranks/state.index.json"))
            .unwrap();
        let resumed = resumed.state().unwrap();
        assert_eq!(resumed.steps, 3);
        let mut mine = sharded(world, &model);
        mine.load(&index).unwrap();
        // One that step knows of no exception for: all its tensors have the decay of the weights.
        for (own, before) in resumed.tensors.iter().zip(&mine.state().unwrap().tensors) {
            assert_eq!(own.applied_steps, before.applied_steps + 1, "{}", own.name);
            assert_eq!(own.slots.len().max(2), before.slots.len().max(2));
        }
    });
}

#[test]
fn a_state_with_a_part_that_is_missing_is_refused_by_the_command_step() {
    on_ranks(&[2], |world| {
        let run = Run::saved(world, 28, "missing-part", 1);
        world.barrier();
        if world.rank() > 0 {
            return;
        }
        write_model(
            &run.folder.join("params.safetensors"),
            &run.model,
            &run.params,
        );
        write_grads(&run.folder, &run.model);
        let json = fs::read_to_string(&run.index).unwrap();
        let parts: Vec<_> = json
            .lines()
            .filter(|line| line.contains("exp_avg["))
            .collect();
        assert_eq!(parts.len(), 2);
        for part in parts {
            fs::write(&run.index, json.replace(&format!("{part}\n"), "")).unwrap();
            let files = [
                ("--params", "params.safetensors"),
                ("--state", "state.index.json"),
                ("--out-params", "out"),
                ("--out-state", "out_state"),
            ];
            assert_eq!(command_step(&run.folder, files), 2);
            assert!(!run.folder.join("out").exists());
        }
    });
}
