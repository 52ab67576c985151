//! Rounds over a model, state carried from file to file, against the oracle.

use std::collections::BTreeMap;
use std::fs;

use safetensors::Dtype;
use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::state::Recorded as _;
use wgpu_optim::{AnyRule, RmsPropConfig, Rule as _, SgdConfig};

use crate::DEVICES;
use crate::model::{Model, Tensor, Workspace, values};
use crate::refusals::{assert_refused, refused};
use crate::shards::check_that_shards_are_one_model;
use crate::sixteen_bits::check_as_bf16;

/// Learning rate and frozen tensors of one round.
struct Round {
    lr: f64,
    frozen: fn(&str) -> bool,
}

const ROUNDS: [Round; 3] = [
    Round {
        lr: 0.7,
        frozen: |name| name.contains("LayerNorm.bias"),
    },
    Round {
        lr: 0.05,
        frozen: |_| false,
    },
    Round {
        lr: 0.3,
        frozen: |name| name.contains("attention"),
    },
];

/// A small model with all that a real one has: many tensors, odd sizes, an index tensor, an empty one, a
/// scalar, a half-precision buffer, metadata.
fn small_model() -> Model {
    let mut model = Model::new([
        ("embeddings.position_ids", Tensor::i64(&[0, 1, 2, 3, 4])),
        ("empty", Tensor::f32(&[0, 7], &[])),
        ("scalar", Tensor::f32(&[], &[1.5])),
        (
            "half",
            Tensor {
                dtype: Dtype::F16,
                shape: vec![3],
                bytes: vec![1, 2, 3, 4, 5, 6],
            },
        ),
    ]);
    for layer in 0..6 {
        for (index, (name, shape)) in [
            ("attention.weight", vec![33, 17]),
            ("attention.bias", vec![33]),
            ("dense.weight", vec![64, 32]),
            ("LayerNorm.bias", vec![31]),
        ]
        .into_iter()
        .enumerate()
        {
            let values = values(100 * layer + index as u64, shape.iter().product());
            model.tensors.insert(
                format!("layer.{layer}.{name}"),
                Tensor::f32(&shape, &values),
            );
        }
    }
    let metadata = [("format", "pt"), ("note", "kept")];
    model.metadata = Some(
        metadata
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
    );
    model
}

/// Dampened momentum with a coupled decay.
fn check(device: &str, start: &Model) {
    let config = SgdConfig::builder(1.0)
        .momentum(0.9)
        .dampening(0.1)
        .weight_decay(0.01);
    let flags = "--momentum 0.9 --dampening 0.1 --weight-decay 0.01";
    check_rule(device, start, &config.build().unwrap().into(), flags);
}

/// Runs all rounds through the command and compares every element after each.
/// A rule that takes sums over tensors is refused, and nothing is written: windows have parts of tensors.
fn check_whole_tensors_are_needed(start: &Model, flags: &str) {
    let workspace = Workspace::new();
    start.write(&workspace.path("params"));
    start.write(&workspace.path("grads"));
    let flags = flags.split(' ');
    let args: Vec<_> = flags.chain(["--lr", "0.1", "--skip-non-float"]).collect();
    refused(&workspace, &args, &["takes norms of whole tensors"]);
}

fn check_rule(device: &str, start: &Model, config: &AnyRule, flags: &str) {
    let rounding = if device == "cpu" {
        Roundoff::NEAREST
    } else {
        Roundoff::WGSL
    };
    let workspace = Workspace::new();
    start.write(&workspace.path("params"));
    let updated = |name: &str| start.tensors[name].dtype == Dtype::F32;
    let mut oracles: BTreeMap<_, _> = start
        .tensors
        .keys()
        .filter(|name| updated(name))
        .map(|name| {
            (
                name.clone(),
                Oracle::new(&start.tensors[name].values(), rounding),
            )
        })
        .collect();
    let mut applied: BTreeMap<String, u64> = BTreeMap::new();

    for (index, round) in ROUNDS.iter().enumerate() {
        let mut grads = Model::default();
        for (name, oracle) in oracles.iter_mut().filter(|(name, _)| !(round.frozen)(name)) {
            let shape = &start.tensors[name].shape;
            let gradient = values((1000 + index) as u64, shape.iter().product());
            oracle.step(&config.with_lr(round.lr).unwrap(), &gradient);
            grads
                .tensors
                .insert(name.clone(), Tensor::f32(shape, &gradient));
            *applied.entry(name.clone()).or_default() += 1;
        }
        grads.write(&workspace.path("grads"));
        let mut step = workspace.step();
        step.args(["--device", device, "--lr", &round.lr.to_string()])
            .args(flags.split_whitespace());
        if index > 0 {
            step.args(["--state", "state"]);
        }
        step.assert().success();

        let params = Model::read(&workspace.path("out_params"));
        let state = Model::read(&workspace.path("out_state"));
        assert!(params.tensors.keys().eq(start.tensors.keys()));
        assert_eq!(params.metadata, start.metadata);
        for (name, tensor) in &params.tensors {
            assert_eq!(tensor.shape, start.tensors[name].shape);
            let Some(oracle) = oracles.get(name) else {
                assert_eq!(
                    tensor, &start.tensors[name],
                    "{name} is copied byte for byte"
                );
                continue;
            };
            let here = |e| panic!("{device}, {flags}, round {index}, {name}: {e}");
            oracle.check_params(&tensor.values()).unwrap_or_else(here);
            for slot in config.slots().kept() {
                match state.tensors.get(&format!("{name}.{}", slot.name)) {
                    Some(values) => {
                        assert_eq!(values.shape, tensor.shape);
                        oracle
                            .check_slot(slot.name, &values.values())
                            .unwrap_or_else(here);
                    }
                    None => assert!(!applied.contains_key(name), "{name} has lost its state"),
                }
            }
        }
        let metadata = state.metadata.unwrap();
        assert_eq!(metadata["format_version"], "2");
        let rule = AnyRule::from_record(&metadata["rule"]).unwrap();
        assert_eq!(rule, config.with_lr(round.lr).unwrap());
        let counts: BTreeMap<String, u64> =
            serde_json::from_str(&metadata["applied_steps"]).unwrap();
        assert_eq!(counts, applied);
        workspace.go_on();
    }
}

#[test]
fn three_rounds_over_a_small_model() {
    for device in DEVICES {
        check(device, &small_model());
    }
}

/// Every rule as every library has it, and what keeps the most state.
#[test]
fn three_rounds_by_every_rule() {
    let start = small_model();
    for preset in AnyRule::presets() {
        let flags = format!("--rule {} --preset {}", preset.rule, preset.library);
        let config = preset.config(1.0).unwrap();
        if !config.sums().is_empty() {
            check_whole_tensors_are_needed(&start, &flags);
            continue;
        }
        for device in DEVICES {
            check_rule(device, &start, &config, &flags);
        }
    }
    let rmsprop = RmsPropConfig::builder(1.0).momentum(0.9).centered(true);
    let flags = "--rule rmsprop --momentum 0.9 --centered";
    for device in DEVICES {
        check_rule(device, &start, &rmsprop.build().unwrap().into(), flags);
    }
}

/// Tensors that are cut and tensors that share a window, on both devices, at their first step and later.
#[test]
fn three_rounds_over_a_model_of_many_windows() {
    let tensors = [
        ("a.attention", vec![3, 1 << 20]),
        ("b", vec![5]),
        ("c.attention", vec![(1 << 18) + 3]),
        ("d.LayerNorm.bias", vec![1 << 18]),
        ("e", vec![2_500_001]),
    ];
    let mut model = Model::default();
    for (index, (name, shape)) in tensors.into_iter().enumerate() {
        let values = values(index as u64, shape.iter().product());
        let tensor = Tensor::f32(&shape, &values);
        model.tensors.insert(name.to_owned(), tensor);
    }
    for device in DEVICES {
        check(device, &model);
    }

    // What `info` says that a step takes is what it takes.
    let workspace = Workspace::with(&model, &model);
    let json = |command: &mut assert_cmd::Command| -> serde_json::Value {
        let output = command.arg("--json").output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let mut info = crate::wgpu_optim();
    info.current_dir(workspace.path(""))
        .args(["info", "--plan", "params"]);
    let planned = json(&mut info)["adapters"][0]["plan"]["step_dispatches"].clone();
    let stepped = json(workspace.step().args(["--device", "gpu", "--lr", "0.1"]));
    assert_eq!((&planned, &stepped["dispatches"]), (&3.into(), &3.into()));
}

#[test]
#[ignore = "needs a real model: cargo xtask real-model fetches one and runs this"]
fn three_rounds_over_the_model_in_wgpu_optim_test_model() {
    let path = std::env::var_os("WGPU_OPTIM_TEST_MODEL").expect("the path of a model");
    let model = Model::read(path.as_ref());
    for device in DEVICES {
        check(device, &model);
        check_that_shards_are_one_model(device, &model);
        check_as_bf16(device, &model);
    }
}

fn one_tensor() -> Workspace {
    let model = |values: [f32; 3]| Model::new([("w", Tensor::f32(&[3], &values))]);
    Workspace::with(&model([1.0, 2.0, 3.0]), &model([1.0, 0.0, -1.0]))
}

#[test]
fn outputs_may_replace_inputs() {
    for device in DEVICES {
        let workspace = one_tensor();
        let step = |state: &[&str]| {
            let mut step = workspace.step_between("params", ["params", "state"]);
            step.args(["--device", device, "--lr", "0.5", "--momentum", "0.5"]);
            step.args(state).assert().success();
        };
        step(&[]);
        step(&["--state", "state"]);
        let params = Model::read(&workspace.path("params"));
        assert_eq!(params.tensors["w"].values(), [-0.25, 2.0, 4.25]);
        assert_eq!(workspace.snapshot().len(), 3, "nothing else is left behind");
    }
}

/// The second round of a script that forgets `--state`: momentum would start at zero again in every round.
#[test]
fn a_fresh_start_over_a_state_is_refused() {
    for (out_state, first_shard) in [
        ("state", "state"),
        ("s.safetensors.index.json", "s-00001-of-00001.safetensors"),
    ] {
        let workspace = one_tensor();
        let step = |args: &[&str]| {
            let mut step = workspace.step_between("params", ["params", out_state]);
            step.args(["--device", "cpu", "--lr", "0.5"]).args(args);
            step.output().unwrap()
        };
        let momentum = ["--momentum", "0.5"];
        let done = |args: &[&str]| {
            let output = step(&[&momentum[..], args].concat());
            assert!(output.status.success(), "{output:?}");
            Model::read(&workspace.path("params")).tensors["w"].values()[0]
        };
        // Without slots there is nothing to lose, and what is no state is nobody's.
        for _ in 0..2 {
            assert!(step(&[]).status.success());
        }
        fs::copy(one_tensor().path("params"), workspace.path("params")).unwrap();
        assert_eq!(done(&[]), 0.5);
        let before = workspace.snapshot();
        for rule in [&momentum[..], &["--rule", "adamw"], &[]] {
            let words = format!(
                "{out_state} is the state of 1 steps, which a fresh start would lose: --state {out_state} goes on from it, \
                 --overwrite-state starts afresh"
            );
            assert_refused(&step(rule), &[&words]);
            assert!(workspace.snapshot() == before);
        }
        assert_eq!(done(&["--state", out_state]), -0.25);
        assert_eq!(done(&["--overwrite-state"]), -0.75);
        let steps = Model::read(&workspace.path(first_shard)).metadata.unwrap()["steps"].clone();
        assert_eq!(steps, "1");
    }
}

/// A state of another run fits as well as its own.
#[test]
fn a_state_beside_other_parameters_is_noted() {
    let tensors = |seed| {
        let [large, small] = [300_001, 3].map(|numel| Tensor::f32(&[numel], &values(seed, numel)));
        Model::new([
            ("large", large),
            ("small", small),
            ("frozen", Tensor::f32(&[1], &[1.0])),
        ])
    };
    for device in DEVICES {
        for state in ["state", "s.safetensors.index.json"] {
            let workspace = Workspace::new();
            tensors(1).write(&workspace.path("params"));
            let mut grads = tensors(2);
            grads.tensors.remove("frozen");
            grads.write(&workspace.path("grads"));
            let step = |args: &[&str]| {
                let mut step = workspace.step_between("params", ["params", state]);
                step.args([
                    "--device",
                    device,
                    "--json",
                    "--lr",
                    "0.5",
                    "--momentum",
                    "0.5",
                ]);
                crate::reports::json(&step.args(args).output().unwrap())["notes"].clone()
            };
            let resume = ["--state", state];
            assert_eq!(step(&[]), serde_json::json!([]));
            assert_eq!(step(&resume), serde_json::json!([]));
            let good = workspace.snapshot();
            let noted = |change: &dyn Fn(&mut Model), words: &str| {
                for (path, content) in &good {
                    fs::write(path, content).unwrap();
                }
                let mut params = Model::read(&workspace.path("params"));
                change(&mut params);
                params.write(&workspace.path("params"));
                let notes = step(&[&resume[..], &["--nonfinite", "skip"]].concat());
                let words = format!("the state was written beside other parameters: {words}");
                assert_eq!(notes.as_array().unwrap().len(), 1, "{notes}");
                assert!(notes[0].as_str().unwrap().contains(&words), "{notes}");
                // It goes with these now.
                assert_eq!(step(&resume), serde_json::json!([]));
            };
            noted(
                &|params| *params = tensors(3),
                "2 of 2 tensors have been changed since, the first of them \"large\"",
            );
            let small = |params: &mut Model| {
                let small = params.tensors.get_mut("small").unwrap();
                small.bytes[11] ^= 1;
            };
            noted(
                &small,
                "1 of 2 tensors have been changed since, the first of them \"small\"",
            );
        }
    }
}

#[test]
fn hyper_parameters_that_the_state_was_not_made_with_are_noted() {
    let workspace = one_tensor();
    let step = |args: &str| {
        let mut step = workspace.step();
        step.args(["--device", "cpu"]).args(args.split(' '));
        let text = String::from_utf8(step.output().unwrap().stdout).unwrap();
        let report = crate::reports::json(&step.arg("--json").output().unwrap());
        let notes: Vec<String> = serde_json::from_value(report["notes"].clone()).unwrap();
        for note in &notes {
            assert!(text.contains(&format!("note        {note}\n")), "{text}");
        }
        workspace.go_on();
        notes
    };
    assert_eq!(step("--lr 0.5 --momentum 0.9"), [""; 0]);
    assert_eq!(step("--lr 0.1 --momentum 0.9 --state state"), [""; 0]);
    assert_eq!(
        step("--lr 0.1 --momentum 0.5 --nesterov --weight-decay 0.01 --state state"),
        [
            "momentum is 0.5, and was 0.9 where the state was made",
            "nesterov is true, and was false where the state was made",
            "weight_decay is 0.01, and was 0.0 where the state was made"
        ]
    );
    fs::remove_file(workspace.path("state")).unwrap();
    step("--lr 0.1 --rule adamw");
    assert_eq!(
        step("--lr 0.1 --rule adamw --beta2 0.95 --state state"),
        ["beta2 is 0.95, and was 0.999 where the state was made"]
    );
}

#[test]
fn repeat_applies_the_same_gradient_again() {
    for device in DEVICES {
        let workspace = one_tensor();
        let run = |args: &[&str]| {
            workspace
                .step()
                .args(["--device", device, "--lr", "0.5", "--momentum", "0.5"])
                .args(args)
                .assert()
                .success();
            let state = Model::read(&workspace.path("out_state"));
            (Model::read(&workspace.path("out_params")), state)
        };
        let (params, state) = run(&["--repeat", "2"]);
        assert_eq!(params.tensors["w"].values(), [-0.25, 2.0, 4.25]);
        assert_eq!(state.metadata.unwrap()["applied_steps"], "{\"w\":2}");
    }
}

#[test]
fn without_momentum_the_state_holds_metadata_only() {
    for device in DEVICES {
        let workspace = one_tensor();
        workspace
            .step()
            .args(["--device", device, "--lr", "0.5"])
            .assert()
            .success();
        let params = Model::read(&workspace.path("out_params"));
        assert_eq!(params.tensors["w"].values(), [0.5, 2.0, 3.5]);
        let state = Model::read(&workspace.path("out_state"));
        assert!(state.tensors.is_empty());
        let rule = SgdConfig::from_record(&state.metadata.unwrap()["rule"]).unwrap();
        assert_eq!(rule, SgdConfig::builder(0.5).build().unwrap());
    }
}

#[test]
fn every_form_and_flag_reaches_the_update() {
    // lr 0.5, momentum 0.5, theta 1, gradient 1; two steps, by hand.
    for (flags, expected) in [
        ("--momentum 0.5", -0.25),
        ("--momentum 0.5 --nesterov", -0.625),
        ("--momentum 0.5 --form ema", 0.375),
        ("--momentum 0.5 --form lr-inside", -0.25),
        ("--momentum 0.5 --dampening 0.5", 0.0),
        ("--momentum 0.5 --form particle --time-step 0.5", -0.25),
        ("--momentum 0.5 --preset keras", -0.25),
        ("--momentum 0.5 --preset optax-ema", 0.375),
        // Keras decouples: theta is 0.25 and 0.75 of that, less 0.75.
        ("--momentum 0.5 --preset keras --weight-decay 0.5", -0.5625),
        (
            "--momentum 0.5 --preset pytorch --weight-decay 0.5",
            -0.6875,
        ),
        ("--maximize", 2.0),
        ("--momentum 0.5 --weight-decay 0.5", -0.6875),
        ("--momentum 0.5 --weight-decay 0.5 --decoupled", -0.5625),
    ] {
        for device in DEVICES {
            let workspace = one_tensor();
            workspace
                .step()
                .args(["--device", device, "--lr", "0.5", "--repeat", "2"])
                .args(flags.split(' '))
                .assert()
                .success();
            let params = Model::read(&workspace.path("out_params"));
            assert_eq!(
                params.tensors["w"].values()[0],
                expected,
                "{device} {flags:?}"
            );
        }
    }
}

/// What an earlier version wrote: velocities under their tensors' own names, and the form beside the configuration.
#[test]
fn a_state_of_format_1_goes_on() {
    let workspace = one_tensor();
    let step = |args: &[&str]| {
        let mut step = workspace.step();
        step.args(["--device", "cpu", "--lr", "0.5", "--momentum", "0.5"])
            .args(args);
        step.assert().success();
        ["out_params", "out_state"].map(|name| fs::read(workspace.path(name)).unwrap())
    };
    step(&[]);
    let mut state = Model::read(&workspace.path("out_state"));
    state.write(&workspace.path("state"));
    let velocity = state.tensors.remove("w.momentum_buffer").unwrap();
    state.tensors.insert("w".into(), velocity);
    let config = r#"{"lr":0.5,"momentum":0.5,"dampening":0.0,"nesterov":false,"weight_decay":0.0,
        "decoupled_weight_decay":0.0,"maximize":false,"time_step":1.0}"#;
    let metadata = [
        ("format_version", "1"),
        ("form", "heavy-ball"),
        ("config", config),
        ("steps", "1"),
        ("applied_steps", "{\"w\":1}"),
    ];
    state.metadata = Some(
        metadata
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
    );
    state.write(&workspace.path("state 1"));
    for options in [&[][..], &["--nonfinite", "skip"]] {
        let with = |state| [&["--state", state], options].concat();
        assert!(step(&with("state 1")) == step(&with("state")));
        // Skipped, it is written anew.
        let nan = Tensor::f32(&[3], &[1.0, f32::NAN, -1.0]);
        Model::new([("w", nan)]).write(&workspace.path("grads"));
    }
}

#[cfg(unix)]
#[test]
fn outputs_have_the_permissions_of_what_they_replace_and_follow_links() {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    let workspace = one_tensor();
    let mode = |name: &str| {
        fs::metadata(workspace.path(name))
            .unwrap()
            .permissions()
            .mode()
            & 0o777
    };
    fs::write(workspace.path("real"), "old").unwrap();
    fs::set_permissions(workspace.path("real"), fs::Permissions::from_mode(0o640)).unwrap();
    symlink("real", workspace.path("out_params")).unwrap();
    workspace
        .step()
        .args(["--device", "cpu", "--lr", "0.5"])
        .assert()
        .success();
    assert_eq!(mode("real"), 0o640);
    assert!(
        fs::symlink_metadata(workspace.path("out_params"))
            .unwrap()
            .is_symlink()
    );
    assert_eq!(
        Model::read(&workspace.path("real")).tensors["w"].values(),
        [0.5, 2.0, 3.5]
    );
    // A new file is as private as any other new file.
    assert_eq!(mode("out_state"), mode("params"));
}
