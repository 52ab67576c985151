//! The command's rounds over files, beside an optimizer in memory.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use wgpu_optim::cpu::TensorValues;
use wgpu_optim::rules::Twin;
use wgpu_optim::{
    AdamConfig, AnyRule, CpuOptimizer, Rule, SgdConfig, StorageType, TensorSlice, TensorSpec,
};
use wgpu_optim_files::{Model as FileModel, SavedState};

use crate::model::{Model, numel};
use crate::{alone, mpirun};

const TYPES: &[(StorageType, StorageType)] = &[
    (StorageType::F32, StorageType::F32),
    (StorageType::Bf16, StorageType::F32),
    (StorageType::F16, StorageType::F32),
];

const NESTEROV: &[&str] = &["--lr", "0.7", "--momentum", "0.9", "--nesterov"];

/// A folder of this test's own, empty.
fn folder(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Values as they lie in files.
pub fn bytes(values: &TensorValues) -> Vec<u8> {
    match values {
        TensorValues::F32(values) => values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
        TensorValues::Bf16(values) => values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
        TensorValues::F16(values) => values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
    }
}

/// A model's file, with a tensor of integers beside the others.
fn write(path: &Path, model: &Model, params: &[TensorValues], count: i64) {
    let mut datas: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = model
        .tensors
        .iter()
        .zip(params)
        .map(|(tensor, params)| {
            let dtype = match tensor.params_type {
                StorageType::F32 => Dtype::F32,
                StorageType::Bf16 => Dtype::BF16,
                StorageType::F16 => Dtype::F16,
            };
            (
                tensor.name.clone(),
                dtype,
                tensor.shape.clone(),
                bytes(params),
            )
        })
        .collect();
    datas.push((
        "batches".to_owned(),
        Dtype::I64,
        vec![1],
        count.to_le_bytes().to_vec(),
    ));
    let views = datas.iter().map(|(name, dtype, shape, data)| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let file = safetensors::serialize(views, Some(metadata)).unwrap();
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, file).unwrap();
}

fn data(path: &Path) -> HashMap<String, Vec<u8>> {
    let file = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let tensors = file.iter();
    tensors
        .map(|(name, tensor)| (name.to_owned(), tensor.data().to_vec()))
        .collect()
}

/// The files of the outer state in a folder.
fn shards_in(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    paths
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "safetensors")
        })
        .collect()
}

/// A round of so many ranks in a folder, whose state is in `outer.index.json` there from the second on.
fn round(folder: &Path, ranks: usize, more: &[&str]) -> Command {
    let mut command = mpirun(ranks);
    command
        .arg(env!("CARGO_BIN_EXE_wgpu-optim-mpi"))
        .arg("round")
        .args([
            "--local",
            "rank{rank}/local.safetensors",
            "--global",
            "rank{rank}/global.safetensors",
            "--out-global",
            "rank{rank}/global.safetensors",
            "--out-state",
            "outer.index.json",
        ]);
    if folder.join("outer.index.json").exists() {
        command.args(["--state", "outer.index.json"]);
    }
    // Many buckets.
    for (flag, value) in [("--bucket-bytes", "4096"), ("--device", "cpu")] {
        if !more.contains(&flag) {
            command.args([flag, value]);
        }
    }
    command.args(more).current_dir(folder);
    command
}

fn run(mut command: Command) -> Output {
    let _alone = alone();
    command.output().unwrap()
}

fn succeeded(output: Output) -> String {
    let [stdout, stderr] =
        [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(
        output.status.success(),
        "{}\n{stdout}\n{stderr}",
        output.status
    );
    stdout
}

/// The first line of stderr, where that is the command's own.
fn refused(output: Output, code: i32) -> String {
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    let own: Vec<_> = stderr
        .lines()
        .filter(|line| line.starts_with("error: "))
        .collect();
    assert_eq!(own.len(), 1, "{stderr}");
    own[0].to_owned()
}

/// Rounds of these numbers of ranks, one after the other, whose outer state goes from the shards of one to those of the
/// next; every parameter compared, bit for bit.
fn compare<R: Rule + Twin>(
    name: &str,
    config: R,
    args: &[&str],
    weights: Option<&[f64]>,
    ranks: &[usize],
) {
    let folder = folder(name);
    let model = Model::new(31, TYPES);
    let specs: Vec<_> = model
        .tensors
        .iter()
        .map(|tensor| TensorSpec {
            grads_type: StorageType::F32,
            ..tensor.clone()
        })
        .collect();
    let mut expected = model.params.clone();
    let mut optimizer = CpuOptimizer::new(config, specs).unwrap();
    for rank in 0..*ranks.iter().max().unwrap() {
        write(
            &folder.join(format!("rank{rank}/global.safetensors")),
            &model,
            &expected,
            5,
        );
    }
    for (step, ranks) in ranks.iter().enumerate() {
        let locals: Vec<Vec<TensorValues>> = (0..*ranks)
            .map(|rank| {
                let moved = model.grads(rank, step as u64);
                let pairs = model.tensors.iter().zip(expected.iter().zip(&moved));
                pairs
                    .map(|(tensor, (global, moved))| {
                        let (global, moved) = (global.to_f32(), moved.to_f32());
                        let local: Vec<_> = global
                            .iter()
                            .zip(&moved)
                            .map(|(global, moved)| global + 0.1 * moved)
                            .collect();
                        TensorValues::new(tensor.params_type, &local)
                    })
                    .collect()
            })
            .collect();
        for (rank, local) in locals.iter().enumerate() {
            write(
                &folder.join(format!("rank{rank}/local.safetensors")),
                &model,
                local,
                6,
            );
            let global = folder.join(format!("rank{rank}/global.safetensors"));
            if rank > 0 {
                fs::copy(folder.join("rank0/global.safetensors"), global).unwrap();
            }
        }
        let mut command = round(&folder, *ranks, args);
        if let Some(weights) = weights {
            let weights: Vec<_> = weights[..*ranks].iter().map(f64::to_string).collect();
            command.args(["--weight", &weights.join(",")]);
        }
        let stdout = succeeded(run(command));
        assert!(
            stdout.contains(&format!("round       {}", step + 1)),
            "{stdout}"
        );

        let weight = |rank: usize| weights.map_or(1.0, |weights| weights[rank]);
        let total: f64 = (0..*ranks).map(weight).sum();
        let grads: Vec<Vec<f32>> = expected
            .iter()
            .enumerate()
            .map(|(tensor, global)| {
                let locals: Vec<_> = locals.iter().map(|local| local[tensor].to_f32()).collect();
                let global = global.to_f32().into_iter().enumerate();
                global
                    .map(|(elem, global)| {
                        let sum: f64 = (0..*ranks)
                            .map(|rank| weight(rank) * f64::from(locals[rank][elem]))
                            .sum();
                        (f64::from(global) - sum / total) as f32
                    })
                    .collect()
            })
            .collect();
        let grads: Vec<_> = grads.iter().map(|grads| TensorSlice::F32(grads)).collect();
        let mut slices: Vec<_> = expected.iter_mut().map(TensorValues::slice_mut).collect();
        optimizer.step_mixed(&mut slices, &grads).unwrap();
        let first = fs::read(folder.join("rank0/global.safetensors")).unwrap();
        for rank in 0..*ranks {
            let path = folder.join(format!("rank{rank}/global.safetensors"));
            assert!(fs::read(&path).unwrap() == first, "rank {rank}");
        }
        let data = data(&folder.join("rank0/global.safetensors"));
        for (tensor, expected) in model.tensors.iter().zip(&expected) {
            assert_eq!(
                data[&tensor.name],
                bytes(expected),
                "{} after round {step}",
                tensor.name
            );
        }
        assert_eq!(data["batches"], 5_i64.to_le_bytes());
    }
    assert_eq!(shards_in(&folder).len(), *ranks.last().unwrap());
}

#[test]
fn rounds_are_those_of_one_process_however_many_ranks_each_has() {
    let nesterov = SgdConfig::builder(0.7)
        .momentum(0.9)
        .nesterov(true)
        .build()
        .unwrap();
    compare("rounds", nesterov, NESTEROV, None, &[3, 2, 1, 4]);
    let adam = AdamConfig::builder(0.1).build().unwrap();
    let args = ["--rule", "adam", "--lr", "0.1"];
    compare(
        "weighted-rounds",
        adam,
        &args,
        Some(&[1.0, 2.5, 0.0]),
        &[3, 2, 3],
    );
}

/// The slots of a state in one file or several, in whole.
fn slots(path: &Path) -> HashMap<String, Vec<u8>> {
    let saved = SavedState::<AnyRule>::new(FileModel::open(path).unwrap()).unwrap();
    let slots = saved.slots();
    slots
        .map(|(tensor, slot)| {
            let parts = saved.parts(tensor, slot);
            let end = parts.last().map_or(0, |part| part.elems.end);
            let values = saved.read(parts, slot, 0..end).unwrap();
            (format!("{tensor}.{slot}"), values.bytes().to_vec())
        })
        .collect()
}

/// Three rounds with MPI and without: the same models to the byte, and states that each goes on from.
#[test]
fn a_round_without_mpi_writes_the_same_bytes() {
    let adam = ["--rule", "adamw", "--lr", "0.1", "--weight-decay", "0.5"];
    for (ranks, args, weights) in [
        (1, &[][..], "1"),
        (2, &adam, "2,0.5"),
        (4, &["--lr", "0.5"], "1,0,3,0.25"),
    ] {
        let folder = folder("without-mpi");
        let model = Model::new(17, TYPES);
        let global = |rank: usize| folder.join(format!("rank{rank}/global.safetensors"));
        let local = |rank: usize| folder.join(format!("rank{rank}/local.safetensors"));
        let of_files = folder.join("files/global.safetensors");
        for path in (0..ranks).map(global).chain([of_files.clone()]) {
            write(&path, &model, &model.params, 3);
        }
        let (by_mpi, by_files) = (
            folder.join("outer.index.json"),
            folder.join("files/outer.safetensors"),
        );
        for step in 0..3 {
            for rank in 0..ranks {
                let moved = model.grads(rank, step);
                let tensors = model.tensors.iter().zip(&moved);
                let moved: Vec<_> = tensors
                    .map(|(tensor, moved)| TensorValues::new(tensor.params_type, &moved.to_f32()))
                    .collect();
                write(&local(rank), &model, &moved, 4);
            }
            // From the second on each goes on from the state that the other has written, and by what that says.
            let typed = if step == 0 { args } else { &[] };
            let mut with_mpi = mpirun(ranks);
            with_mpi
                .arg(env!("CARGO_BIN_EXE_wgpu-optim-mpi"))
                .args(["round", "--device", "cpu", "--bucket-bytes", "4096"])
                .args(["--local", "rank{rank}/local.safetensors"])
                .args(["--global", "rank{rank}/global.safetensors"])
                .args(["--out-global", "rank{rank}/global.safetensors"])
                .args(["--out-state", "outer.index.json", "--weight", weights])
                .args(typed)
                .current_dir(&folder);
            let mut without: Vec<OsString> = ["wgpu-optim", "round", "--device", "cpu"]
                .map(OsString::from)
                .into();
            let mut add = |flag: &str, value: &Path| {
                without.extend([flag.into(), value.into()]);
            };
            add("--global", &of_files);
            (0..ranks).for_each(|rank| add("--local", &local(rank)));
            add("--weights", Path::new(weights));
            add("--out-state", &by_files);
            if step > 0 {
                let before = folder.join(format!("files/before-{step}.safetensors"));
                fs::copy(&by_files, &before).unwrap();
                with_mpi.arg("--state").arg(before);
                add("--state", &by_mpi);
            }
            without.extend(typed.iter().map(OsString::from));
            // Before MPI replaces the shards that it goes on from.
            assert_eq!(wgpu_optim_cli::run(without), 0);
            let stdout = succeeded(run(with_mpi));
            assert!(step == 0 || stdout.contains("before-"), "{stdout}");

            let expected = fs::read(&of_files).unwrap();
            for rank in 0..ranks {
                assert!(
                    fs::read(global(rank)).unwrap() == expected,
                    "round {step}, rank {rank}"
                );
            }
            assert!(slots(&by_mpi) == slots(&by_files), "after round {step}");
            let metadata = |path: &Path| {
                let file = fs::read(path).unwrap();
                let (_, header) = SafeTensors::read_metadata(&file).unwrap();
                header.metadata().clone().unwrap()
            };
            let [one, ..] = &*shards_in(&folder) else {
                panic!("no shards");
            };
            assert_eq!(metadata(one), metadata(&by_files));
            // The one shard of one rank is a state file as any other.
            let is_the_file = fs::read(one).unwrap() == fs::read(&by_files).unwrap();
            assert_eq!(is_the_file, ranks == 1);
            assert_eq!(
                metadata(&of_files)["wgpu_optim.outer_steps"],
                (step + 1).to_string()
            );
        }
    }
}

#[test]
fn a_state_of_groups_is_refused_by_ranks() {
    let folder = folder("groups");
    let model = Model::new(5, &TYPES[..1]);
    for name in ["global", "local"] {
        write(
            &folder.join(format!("rank0/{name}.safetensors")),
            &model,
            &model.params,
            0,
        );
    }
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let args = [
        "wgpu-optim",
        "round",
        "--device",
        "cpu",
        "--global",
        &path("rank0/global.safetensors"),
        "--local",
        &path("rank0/local.safetensors"),
        "--out-state",
        &path("outer.safetensors"),
        "--group",
        "match=*.bias,lr=0.1",
    ];
    assert_eq!(wgpu_optim_cli::run(args), 0);
    let command = round(&folder, 1, &["--state", "outer.safetensors"]);
    let error = refused(run(command), 2);
    assert!(
        error.contains("made with groups, the first of them match=*.bias,lr=0.1"),
        "{error}"
    );
}

#[test]
fn an_adapter_makes_the_round_of_the_twin() {
    let folders = ["on-cpu", "on-gpu"].map(folder);
    let model = Model::new(4, TYPES);
    for (folder, device) in folders.iter().zip(["cpu", "gpu"]) {
        for rank in 0..2 {
            let global = folder.join(format!("rank{rank}/global.safetensors"));
            write(&global, &model, &model.params, 0);
            let local = folder.join(format!("rank{rank}/local.safetensors"));
            write(
                &local,
                &model,
                &model
                    .grads(rank, 0)
                    .iter()
                    .zip(&model.tensors)
                    .map(|(grads, tensor)| TensorValues::new(tensor.params_type, &grads.to_f32()))
                    .collect::<Vec<_>>(),
                0,
            );
        }
        for _ in 0..2 {
            let device = ["--device", device];
            succeeded(run(round(folder, 2, &[NESTEROV, &device].concat())));
        }
    }
    let [cpu, gpu] = folders.map(|folder| data(&folder.join("rank0/global.safetensors")));
    for tensor in model
        .tensors
        .iter()
        .filter(|tensor| tensor.params_type == StorageType::F32)
    {
        let [cpu, gpu] = [&cpu, &gpu].map(|data| {
            let (words, _) = data[&tensor.name].as_chunks();
            words
                .iter()
                .map(|word| f32::from_le_bytes(*word))
                .collect::<Vec<_>>()
        });
        // Two steps of a handful of roundings each, of numbers up to 4.
        for (cpu, gpu) in cpu.iter().zip(&gpu) {
            assert!(
                (cpu - gpu).abs() <= 16.0 * 4.0 * f32::EPSILON,
                "{}",
                tensor.name
            );
        }
    }
}

/// Bytes of all ranks on wire and disk, as `docs/scale.md` has them.
#[test]
fn a_round_moves_the_bytes_of_the_formulas() {
    for (types, elem_bytes, state_bytes) in [(&TYPES[..1], 4, 4), (&TYPES[1..2], 2, 8)] {
        for ranks in [1, 2, 4] {
            let folder = folder("counted");
            let model = Model::new(3, types);
            for rank in 0..ranks {
                let global = folder.join(format!("rank{rank}/global.safetensors"));
                write(&global, &model, &model.params, 0);
                let local = folder.join(format!("rank{rank}/local.safetensors"));
                write(&local, &model, &model.params, 0);
            }
            for round_number in 1..=2 {
                let stdout = succeeded(run(round(
                    &folder,
                    ranks,
                    &[NESTEROV, &["--json"]].concat(),
                )));
                let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
                let count = |name: &str| report[name].as_u64().unwrap();
                let ranks = ranks as u64;
                let numel = model
                    .tensors
                    .iter()
                    .map(|tensor| numel(tensor) as u64)
                    .sum::<u64>();
                let params = elem_bytes * numel;
                // The integers of each global model.
                let copied = 8 * ranks;
                let state_read = if round_number == 1 {
                    0
                } else {
                    state_bytes * numel
                };
                assert_eq!(
                    count("bytes_read"),
                    (ranks + 2) * params + state_read + copied
                );
                assert_eq!(
                    count("bytes_written"),
                    ranks * params + state_bytes * numel + copied
                );
                // Whether all is well is asked before each bucket and after the last.
                let exchanged = 2 * (ranks - 1) * params;
                let small = count("bytes_sent") - exchanged;
                let share = numel.div_ceil(ranks) + 8;
                let buckets = share.div_ceil(4096 / 4 / ranks);
                let agreement = 64 * 1024;
                assert!(
                    small <= ranks * (ranks - 1) * (2 * buckets + 4) + agreement,
                    "{small}"
                );
                assert_eq!(count("outer_step"), round_number);
            }
            // Each rank's shard has its part, behind a header.
            let bytes: u64 = shards_in(&folder)
                .iter()
                .map(|shard| {
                    let file = fs::read(shard).unwrap();
                    let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
                    metadata.data_len() as u64
                })
                .sum();
            let numel = model
                .tensors
                .iter()
                .map(|tensor| numel(tensor) as u64)
                .sum::<u64>();
            assert_eq!(bytes, state_bytes * numel);
        }
    }
}

/// What there is in a folder, to be compared.
fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut contents = Vec::new();
    for entry in fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
    {
        match entry.is_dir() {
            true => contents.extend(self::contents(&entry)),
            false => contents.push((entry.clone(), fs::read(&entry).unwrap())),
        }
    }
    contents.sort();
    contents
}

#[test]
fn what_one_rank_cannot_do_ends_the_round_of_all() {
    let folder = folder("refused");
    let model = Model::new(8, TYPES);
    let prepare = |rank: usize, local: &[TensorValues]| {
        let global = folder.join(format!("rank{rank}/global.safetensors"));
        write(&global, &model, &model.params, 0);
        write(
            &folder.join(format!("rank{rank}/local.safetensors")),
            &model,
            local,
            0,
        );
    };
    for rank in 0..3 {
        prepare(rank, &model.params);
    }
    succeeded(run(round(&folder, 3, NESTEROV)));
    for rank in 0..3 {
        let global = folder.join(format!("rank{rank}/global.safetensors"));
        let _ = fs::copy(global, folder.join(format!("rank{rank}/local.safetensors")));
    }
    let before = contents(&folder);
    let refused = |change: &dyn Fn(), args: &[&str], code: i32| {
        for (path, content) in &before {
            fs::write(path, content).unwrap();
        }
        change();
        let changed = contents(&folder);
        let error = refused(run(round(&folder, 3, &[NESTEROV, args].concat())), code);
        assert!(contents(&folder) == changed, "{error}");
        error
    };

    let mut broken = model.params.clone();
    if let TensorValues::F32(values) = &mut broken[3] {
        values[0] = f32::NAN;
    }
    let local = folder.join("rank2/local.safetensors");
    let error = refused(&|| write(&local, &model, &broken, 0), &[], 2);
    assert_eq!(
        error,
        "error: rank 2: tensor \"layer3.bias\": the local model's element 0 is infinite or NaN"
    );

    let other = Model::new(8, &TYPES[..1]);
    let error = refused(&|| write(&local, &other, &other.params, 0), &[], 2);
    assert!(
        error.starts_with("error: rank 2: tensor \"layer"),
        "{error}"
    );

    let error = refused(
        &|| fs::remove_file(folder.join("rank1/local.safetensors")).unwrap(),
        &[],
        2,
    );
    assert!(
        error.starts_with("error: rank 1: cannot read rank1/local.safetensors"),
        "{error}"
    );

    // Of the round before: the folder's state is of round 1.
    let old = || {
        write(
            &folder.join("rank1/global.safetensors"),
            &model,
            &model.params,
            0,
        )
    };
    let error = refused(
        &|| {
            old();
            let path = folder.join("rank1/global.safetensors");
            let file = fs::read(&path).unwrap();
            let tensors = SafeTensors::deserialize(&file).unwrap();
            let metadata = HashMap::from([("wgpu_optim.outer_steps".to_owned(), "7".to_owned())]);
            let file = safetensors::serialize(tensors.tensors(), Some(metadata)).unwrap();
            fs::write(path, file).unwrap();
        },
        &[],
        2,
    );
    assert_eq!(
        error,
        "error: rank 1: global model rank1/global.safetensors: it is of round 7, and the state of round 1"
    );

    for (weight, why) in [
        ("-1e-3", "weight -0.001: expected zero or a positive number"),
        (
            "1,2",
            "--weight has 2 numbers, expected one, or one for each of 3 ranks",
        ),
        (
            "0",
            "the weights of all local models are zero, or their sum is infinite",
        ),
    ] {
        let error = refused(&|| {}, &["--weight", weight], 2);
        assert_eq!(error, format!("error: {why}"));
    }
    let error = refused(&|| {}, &["--rule", "lion"], 2);
    assert!(
        error.starts_with("error: a hyper-parameter") || error.contains("momentum"),
        "{error}"
    );
}

/// What a command line says of files that another one is.
#[test]
fn a_round_takes_the_place_of_no_model_and_of_no_other_disk() {
    let folder = folder("places");
    let model = Model::new(5, &TYPES[..1]);
    for rank in 0..2 {
        let index = folder.join(format!("rank{rank}/model.index.json"));
        let shard = folder.join(format!("rank{rank}/model.safetensors"));
        write(&shard, &model, &model.params, 0);
        let names = model.tensors.iter().map(|tensor| &*tensor.name);
        let names = names.chain(["batches"]);
        let weight_map: HashMap<_, _> = names.map(|name| (name, "model.safetensors")).collect();
        let index_json = serde_json::json!({"metadata": {}, "weight_map": weight_map});
        fs::write(index, index_json.to_string()).unwrap();
    }
    let before = contents(&folder);
    let places = |out_global: &str, out_state: &str| {
        let mut command = mpirun(2);
        command
            .arg(env!("CARGO_BIN_EXE_wgpu-optim-mpi"))
            .args([
                "round",
                "--device",
                "cpu",
                "--local",
                "rank{rank}/model.safetensors",
            ])
            .args([
                "--global",
                "rank{rank}/model.index.json",
                "--out-global",
                out_global,
            ])
            .args(["--out-state", out_state])
            .args(NESTEROV)
            .current_dir(&folder);
        let error = refused(run(command), 2);
        assert!(contents(&folder) == before, "{error}");
        error
    };
    fs::create_dir(folder.join("new")).unwrap();
    let own = "rank{rank}/model.index.json";
    let error = places(own, "rank0/model.index.json");
    assert!(
        error.contains("rank0/model.index.json is not the index of a state"),
        "{error}"
    );
    let error = places("new/model.index.json", "new/./model.index.json");
    assert!(
        error.contains("--out-state and --out-global are one file"),
        "{error}"
    );
    let error = places(own, "new/state.safetensors");
    assert!(
        error.contains("expected a name that ends in .json"),
        "{error}"
    );

    // Ranks whose working directories are two, as on machines that share no disk.
    let mut command = mpirun(1);
    for rank in 0..2 {
        if rank > 0 {
            command.args([":", "-n", "1"]);
        }
        command
            .args([
                "-wdir",
                folder.join(format!("rank{rank}")).to_str().unwrap(),
            ])
            .arg(env!("CARGO_BIN_EXE_wgpu-optim-mpi"))
            .args(["round", "--device", "cpu", "--local", "model.safetensors"])
            .args([
                "--global",
                "model.index.json",
                "--out-global",
                "model.index.json",
            ])
            .args(["--out-state", "state.index.json"])
            .args(NESTEROV);
    }
    let error = refused(run(command), 2);
    assert!(
        error.contains("rank 1 has written") && error.contains("that all ranks share"),
        "{error}"
    );
    assert!(contents(&folder) == before, "{error}");
}

/// All files of the round before are whole, and the round can be made again.
#[test]
fn a_rank_that_is_killed_leaves_the_last_round() {
    let folder = folder("killed");
    // Enough buckets for a second or two.
    let mut model = Model::new(1, &TYPES[..1]);
    model.tensors = vec![TensorSpec::new("w", [8_000_003])];
    let values = |offset: f32| {
        let numel = numel(&model.tensors[0]);
        vec![TensorValues::F32(
            (0..numel).map(|elem| (elem % 97) as f32 + offset).collect(),
        )]
    };
    let prepare = || {
        for rank in 0..3 {
            let global = folder.join(format!("rank{rank}/global.safetensors"));
            write(&global, &model, &values(0.0), 0);
            let local = folder.join(format!("rank{rank}/local.safetensors"));
            write(&local, &model, &values(rank as f32), 0);
        }
    };
    prepare();
    succeeded(run(round(
        &folder,
        3,
        &[NESTEROV, &["--bucket-bytes", "16777216"]].concat(),
    )));
    let before = contents(&folder);

    let alone = alone();
    let mut child = round(&folder, 3, NESTEROV)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    let victim = loop {
        assert!(started.elapsed() < Duration::from_secs(60));
        assert!(
            child.try_wait().unwrap().is_none(),
            "it was over before it could be killed"
        );
        let ranks = ranks_in(&folder);
        // All at work for a while.
        if ranks.len() == 3 && started.elapsed() > Duration::from_millis(700) {
            break ranks[1];
        }
        thread::sleep(Duration::from_millis(5));
    };
    let killed = Command::new("kill")
        .args(["-KILL", &victim.to_string()])
        .status()
        .unwrap();
    assert!(killed.success());
    assert!(!child.wait().unwrap().success());
    drop(alone);
    let after: HashMap<_, _> = contents(&folder).into_iter().collect();
    for (path, content) in &before {
        assert!(after[path] == *content, "{}", path.display());
    }
    let stdout = succeeded(run(round(
        &folder,
        3,
        &[NESTEROV, &["--bucket-bytes", "16777216"]].concat(),
    )));
    assert!(stdout.contains("round       2"), "{stdout}");
}

/// The processes of the command that run in a folder.
fn ranks_in(folder: &Path) -> Vec<u32> {
    let folder = folder.canonicalize().unwrap();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let processes = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut ranks: Vec<u32> = processes
        .filter(|process| {
            let of = |what| fs::read_link(format!("/proc/{process}/{what}"));
            let is_command = of("exe").is_ok_and(|exe| exe.ends_with("wgpu-optim-mpi"));
            is_command && of("cwd").is_ok_and(|cwd| cwd == folder)
        })
        .collect();
    ranks.sort_unstable();
    ranks
}
