//! Rounds of local training without MPI: the mean, the outer step, what is written and what is refused.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use assert_cmd::Command;
use safetensors::Dtype;
use serde_json::Value;
use wgpu_optim::SgdConfig;
use wgpu_optim::oracle::{Oracle, Roundoff};

use crate::DEVICES;
use crate::model::{Model, Tensor, Workspace, values};
use crate::refusals::assert_refused;
use crate::reports::json;

/// Local models of a tensor whose mean in `f64` is what the global one is less this gradient, exactly: each takes the most
/// that an `f32` holds of what is left of four times that.
fn four_locals(global: &[f32], grads: &[f32]) -> [Vec<f32>; 4] {
    let mut left: Vec<f64> = global
        .iter()
        .zip(grads)
        .map(|(global, grad)| 4.0 * (f64::from(*global) - f64::from(*grad)))
        .collect();
    let locals = [0.3, 0.4, 1.0, 1.0].map(|share| {
        let take = |left: &mut f64| {
            let own = (*left * share) as f32;
            *left -= f64::from(own);
            own
        };
        left.iter_mut().map(take).collect::<Vec<_>>()
    });
    for (elem, grad) in grads.iter().enumerate() {
        let mean = locals
            .iter()
            .fold(0.0, |sum, own| sum + f64::from(own[elem]))
            / 4.0;
        assert_eq!((f64::from(global[elem]) - mean) as f32, *grad);
    }
    locals
}

fn floats(value: &Value) -> Vec<f32> {
    let values = value.as_array().unwrap().iter();
    values.map(|value| value.as_f64().unwrap() as f32).collect()
}

fn round(workspace: &Workspace, device: &str, locals: usize) -> Command {
    let mut round = workspace.command("round --global global");
    round.args(["--device", device]);
    for local in 0..locals {
        round.args(["--local", &format!("local{local}")]);
    }
    round
}

/// PyTorch's own trajectory of Nesterov momentum over these pseudo-gradients, `torch.optim.SGD` on the mean, beside three
/// rounds of four workers; both within the oracle's bound.
#[test]
fn three_rounds_of_four_workers_are_pytorchs_sgd_on_the_mean() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/pytorch_sgd.json");
    let golden: Value = serde_json::from_slice(&fs::read(golden).unwrap()).unwrap();
    let mut cases = golden.as_array().unwrap().iter();
    let case = cases.find(|case| case["name"] == "nesterov").unwrap();
    let config = serde_json::json!({"momentum": 0.9, "nesterov": true});
    assert_eq!(case["config"], config);
    let lr = case["lr"][0].as_f64().unwrap();
    let start = floats(&case["theta0"]);
    let tensors = |values: &[f32]| {
        Model::new([
            ("w", Tensor::f32(&[values.len()], values)),
            ("batches", Tensor::i64(&[7])),
        ])
    };
    for device in DEVICES {
        let workspace = Workspace::new();
        tensors(&start).write(&workspace.path("global"));
        let config = SgdConfig::builder(lr).momentum(0.9).nesterov(true);
        let rounding = if device == "cpu" {
            Roundoff::NEAREST
        } else {
            Roundoff::WGSL
        };
        let mut oracle = Oracle::new(&start, rounding);
        let mut global = start.clone();
        for step in 0..3 {
            assert_eq!(case["lr"][step], lr);
            let grads = floats(&case["grads"][step]);
            for (worker, local) in four_locals(&global, &grads).iter().enumerate() {
                tensors(local).write(&workspace.path(&format!("local{worker}")));
            }
            let mut command = round(&workspace, device, 4);
            // DiLoCo's, and from then on what the state says.
            match step {
                0 => command.args(["--lr", &lr.to_string(), "--out-state", "outer"]),
                _ => command.args(["--state", "outer"]),
            };
            let output = command.output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            let rule = match step {
                0 => format!(
                    "rule        sgd --lr {lr}; form heavy-ball, momentum 0.9, nesterov, time_step 1.0 by default\n"
                ),
                _ => format!(
                    "rule        sgd; form heavy-ball, lr {lr}, momentum 0.9, nesterov, time_step 1.0 from outer\n"
                ),
            };
            let words = [
                format!("round       {}\n", step + 1),
                "models      4 local\n".to_owned(),
                rule,
            ];
            assert!(words.iter().all(|words| text.contains(words)), "{text}");

            oracle.step(&config.build().unwrap(), &grads);
            let written = Model::read(&workspace.path("global"));
            assert_eq!(written.tensors["batches"], Tensor::i64(&[7]));
            global = written.tensors["w"].values();
            oracle.check_params(&global).unwrap();
            let velocity = Model::read(&workspace.path("outer"));
            let velocity = velocity.tensors["w.momentum_buffer"].values();
            oracle.check_velocity(&velocity).unwrap();
            // PyTorch's in single precision, and in double, which is the oracle's: a few roundings of numbers below 10.
            let pytorch = floats(&case["theta_f32"][step]);
            oracle.check_params(&pytorch).unwrap();
            let in_f64 = case["theta_f64"][step].as_array().unwrap().iter();
            for (ours, theirs) in oracle.params().zip(in_f64) {
                let theirs = theirs.as_f64().unwrap();
                assert!((ours - theirs).abs() <= 3.0 * 10.0 * 10.0 * f64::EPSILON);
            }
            let metadata = written.metadata.unwrap();
            assert_eq!(metadata["wgpu_optim.outer_steps"], (step + 1).to_string());
        }
    }
}

/// Models of every type, in one file or by an index, whose rounds are the same to the bit.
#[test]
fn a_round_over_shards_is_that_over_one_file() {
    let names = ["a", "b", "c", "d"];
    let model = |seed: u64| {
        let dtypes = [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F32];
        let mut model = Model::default();
        for (index, (name, dtype)) in names.into_iter().zip(dtypes).enumerate() {
            // The last is larger than a window of the twin.
            let numel = [5, 777, 31, 300_000][index];
            let values = values(seed + index as u64, numel);
            let tensor = Tensor::stored_as(dtype, &[numel], &values);
            model.tensors.insert(name.to_owned(), tensor);
        }
        model
    };
    let workspace = Workspace::new();
    for folder in ["one", "sharded"] {
        fs::create_dir(workspace.path(folder)).unwrap();
    }
    let write = |model: &Model, name: &str| {
        model.write(&workspace.path(&format!("one/{name}.safetensors")));
        let mut weight_map = HashMap::new();
        for (shard, names) in names.chunks(2).enumerate() {
            let file = format!("{name}-{shard}.safetensors");
            let tensors = names.iter().map(|name| {
                weight_map.insert(*name, file.clone());
                ((*name).to_owned(), model.tensors[*name].clone())
            });
            let shard = Model {
                tensors: tensors.collect(),
                metadata: None,
            };
            shard.write(&workspace.path(&format!("sharded/{file}")));
        }
        let index = serde_json::json!({"metadata": {}, "weight_map": weight_map});
        let path = workspace.path(&format!("sharded/{name}.index.json"));
        fs::write(path, index.to_string()).unwrap();
    };
    write(&model(1), "global");
    for step in 0..2 {
        for local in 0..3 {
            write(&model(100 * (1 + local) + step), &format!("local{local}"));
        }
        for (folder, ending) in [("one", "safetensors"), ("sharded", "index.json")] {
            let mut round = workspace.command("round --device cpu --weights 1,0.5,2");
            round.current_dir(workspace.path(folder));
            round.args(["--global", &format!("global.{ending}")]);
            for local in 0..3 {
                round.args(["--local", &format!("local{local}.{ending}")]);
            }
            let state = format!("outer.{ending}");
            if step > 0 {
                round.args(["--state", &state]);
            }
            round.args(["--out-state", &state]).assert().success();
        }
        let one = Model::read(&workspace.path("one/global.safetensors"));
        let state = Model::read(&workspace.path("one/outer.safetensors"));
        let mut found = 0;
        for shard in 0..2 {
            let global =
                Model::read(&workspace.path(&format!("sharded/global-{shard}.safetensors")));
            let outer = format!("sharded/outer-{:05}-of-00002.safetensors", shard + 1);
            let outer = Model::read(&workspace.path(&outer));
            assert_eq!(global.metadata, one.metadata);
            for (name, tensor) in &global.tensors {
                assert!(*tensor == one.tensors[name], "{name} after round {step}");
            }
            for (name, slot) in &outer.tensors {
                assert!(*slot == state.tensors[name], "{name} after round {step}");
            }
            found += global.tensors.len() + outer.tensors.len();
        }
        // Masters of two.
        assert_eq!(found, 4 + 4 + 2);
    }
}

/// Bytes of files, as `docs/scale.md` has them.
#[test]
fn a_round_moves_the_bytes_of_the_formulas() {
    for (dtype, elem_bytes, state_bytes) in [(Dtype::F32, 4, 4), (Dtype::BF16, 2, 8)] {
        let workspace = Workspace::new();
        let (numel, locals) = (1234, 3);
        for (seed, name) in ["global", "local0", "local1", "local2"]
            .into_iter()
            .enumerate()
        {
            let values = values(seed as u64, numel);
            let tensor = Tensor::stored_as(dtype, &[numel], &values);
            Model::new([("w", tensor), ("batches", Tensor::i64(&[7]))])
                .write(&workspace.path(name));
        }
        let numel = numel as u64;
        for step in 1..=2 {
            let mut round = round(&workspace, "cpu", locals);
            match step {
                1 => round.args(["--out-state", "outer"]),
                _ => round.args(["--state", "outer"]),
            };
            let report = json(&round.arg("--json").output().unwrap());
            let params = elem_bytes * numel;
            let state = state_bytes * numel;
            let read = (locals as u64 + 1) * params + if step == 1 { 0 } else { state };
            // And the integers of the global model.
            assert_eq!(report["bytes_read"], read + 8);
            assert_eq!(report["bytes_written"], params + state + 8);
            assert_eq!(report["local_models"], locals);
            assert_eq!(report["outer_step"], step);
        }
    }
}

/// Makes sure that a command is refused with a line that holds these words, and has left everything as it was.
fn check_refused(workspace: &Workspace, command: &mut Command, words: &str) {
    let before = workspace.snapshot();
    assert_refused(&command.output().unwrap(), &[words]);
    assert!(workspace.snapshot() == before, "{words}");
}

#[test]
fn a_round_of_models_that_do_not_fit_is_refused() {
    let model = || Model::new([("w", Tensor::f32(&[3], &[1.0, 2.0, 4.0]))]);
    let prepare = || {
        let workspace = Workspace::new();
        for name in ["global", "local0", "local1"] {
            model().write(&workspace.path(name));
        }
        workspace
    };
    let fresh = ["--out-state", "outer"];
    let refused = |local: &Model, args: &[&str], words: &str| {
        let workspace = prepare();
        local.write(&workspace.path("local1"));
        let mut round = round(&workspace, "cpu", 2);
        round.args(args);
        check_refused(&workspace, &mut round, words);
    };
    let nan = Model::new([("w", Tensor::f32(&[3], &[1.0, f32::NAN, 4.0]))]);
    refused(
        &nan,
        &fresh,
        "local model local1: tensor \"w\": the local model's element 1 is infinite or NaN",
    );
    let other = Model::new([("w", Tensor::f32(&[1, 3], &[1.0; 3]))]);
    refused(
        &other,
        &fresh,
        "local model local1: tensor \"w\": the local model has F32 of [1, 3], the global one F32 of [3]",
    );
    refused(
        &Model::default(),
        &fresh,
        "local model local1: tensor \"w\" is not in the local model",
    );
    let mut more = model();
    more.tensors
        .insert("x".to_owned(), Tensor::f32(&[1], &[1.0]));
    refused(&more, &fresh, "tensor \"x\" is not in the global model");
    for (weights, words) in [
        (
            "1",
            "--weights has 1 numbers, expected one for each of 2 local models",
        ),
        ("1,-2", "weight -2: expected zero or a positive number"),
        (
            "0,0",
            "the weights of all local models are zero, or their sum is infinite",
        ),
    ] {
        refused(
            &model(),
            &[&fresh[..], &["--weights", weights]].concat(),
            words,
        );
    }
    refused(
        &model(),
        &["--out-state", "local0"],
        "--out-state and --local are the same file",
    );
    refused(
        &model(),
        &[&fresh[..], &["--momentum", "0"]].concat(),
        "without --rule it starts from sgd: ",
    );
    refused(&model(), &[], "--out-state");

    // Killed between the model and the state, say: of two rounds.
    let workspace = prepare();
    round(&workspace, "cpu", 2).args(fresh).assert().success();
    let first = fs::read(workspace.path("global")).unwrap();
    round(&workspace, "cpu", 2)
        .args(["--state", "outer"])
        .assert()
        .success();
    fs::write(workspace.path("global"), first).unwrap();
    let mut third = round(&workspace, "cpu", 2);
    third.args(["--state", "outer"]);
    check_refused(
        &workspace,
        &mut third,
        "global model global: it is of round 1, and the state of round 2",
    );
    let mut afresh = round(&workspace, "cpu", 2);
    afresh.args(fresh);
    check_refused(&workspace, &mut afresh, "--overwrite-state starts afresh");
}
