//! Whatever is wrong: exit code 2, one clear line, and no file created or changed.

use std::fs;
use std::process::Output;

use safetensors::Dtype;
use wgpu_optim::AdamConfig;
use wgpu_optim::state::Recorded as _;

use crate::model::{Model, Tensor, Workspace};
use crate::{wgpu_optim, without_driver};

/// A workspace in which a step would succeed, with outputs that are already there.
fn good() -> Workspace {
    let params = Model::new([
        ("a", Tensor::f32(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])),
        ("b", Tensor::f32(&[4], &[1.0; 4])),
        ("ids", Tensor::i64(&[1, 2])),
    ]);
    let grads = Model::new([
        ("a", Tensor::f32(&[2, 3], &[1.0; 6])),
        ("b", Tensor::f32(&[4], &[1.0; 4])),
    ]);
    let workspace = Workspace::with(&params, &grads);
    workspace
        .step()
        .args(["--device", "cpu", "--lr", "0.1", "--momentum", "0.9"])
        .assert()
        .success();
    fs::rename(workspace.path("out_state"), workspace.path("state")).unwrap();
    fs::write(workspace.path("out_params"), "precious").unwrap();
    workspace
}

/// The one line on stderr of a run that ended with this code.
pub fn line(output: &Output, code: i32) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
}

/// The output of a run that has to have been refused with a line that holds all of `words`.
#[track_caller]
pub fn assert_refused(output: &Output, words: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{words:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{words:?}: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{word:?} is not in {stderr}");
    }
}

/// Runs a step, on the CPU if `args` do not say otherwise, that has to be refused with a line that holds all of `words`.
pub fn refused(workspace: &Workspace, args: &[&str], words: &[&str]) {
    let before = workspace.snapshot();
    let mut step = workspace.step();
    if !args.contains(&"--device") {
        step.args(["--device", "cpu"]);
    }
    step.args(args);
    let output = step.output().unwrap();
    let mut stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert!(output.stdout.is_empty());
    if args.contains(&"gpu") {
        // A driver may have had something to say before.
        stderr = stderr.lines().last().unwrap().to_owned();
    }
    assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
    for word in words {
        assert!(
            stderr.contains(word),
            "{args:?}: {word:?} is not in {stderr}"
        );
    }
    // The last words are not those of an error and of its cause, too.
    let words: Vec<_> = stderr.trim_end().split(": ").collect();
    assert!(!words.ends_with(&[words[words.len() - 1]; 2]), "{stderr}");
    assert_eq!(
        workspace.snapshot(),
        before,
        "{args:?} left something behind"
    );
}

const STEP: [&str; 4] = ["--lr", "0.1", "--momentum", "0.9"];
const RESUME: [&str; 6] = ["--lr", "0.1", "--momentum", "0.9", "--state", "state"];

#[test]
fn hyper_parameters() {
    let workspace = good();
    for (args, words) in [
        (&["--lr", "nan"][..], &["lr = NaN", "out of range"][..]),
        (&["--lr", "-0.1"], &["lr = -0.1"]),
        (&["--lr", "inf"], &["lr = inf"]),
        (&["--lr", "1e60"], &["lr = 1e60"]),
        (&["--lr=-0.1"], &["lr = -0.1"]),
        (&["--lr", "-1e-3"], &["lr = -0.001"]),
        (&["--lr", "-.5"], &["lr = -0.5"]),
        (&["--lr", "-inf"], &["lr = -inf"]),
        (
            &["--lr", "0.1", "--momentum", "-1e-3"],
            &["momentum = -0.001"],
        ),
        (
            &["--lr", "--momentum", "0.9"],
            &["a value is required for '--lr"],
        ),
        (
            &["--lr", "0.1", "--warmup-steps", "-1"],
            &["invalid value '-1'", "--warmup-steps"],
        ),
        (
            &["--lr", "0.1", "--momentum", "0.9", "--set", "momentum=0.5"],
            &["--momentum 0.9 and --set momentum=0.5"],
        ),
        (
            &["--lr", "0.1", "--set", "momentum=null"],
            &["--set momentum=null", "null"],
        ),
        (&["--lr", "much"], &["invalid value 'much'", "--lr"]),
        (
            &["--lr", "0.1", "--momentum", "1.5"],
            &["momentum = 1.5", "0 <= x <= 1"],
        ),
        (
            &["--lr", "0.1", "--momentum", "1", "--form", "ema"],
            &["momentum = 1.0", "0 <= x < 1"],
        ),
        (
            &["--lr", "0.1", "--momentum", "0.9", "--dampening", "2"],
            &["dampening = 2.0"],
        ),
        (
            &["--lr", "0.1", "--weight-decay", "-1"],
            &["weight_decay = -1.0"],
        ),
        (
            &["--lr", "9", "--weight-decay", "1", "--decoupled"],
            &["lr = 9.0", "decoupled_weight_decay = 1.0"],
        ),
        (&["--lr", "0.1", "--nesterov"], &["nesterov, momentum"]),
        (
            &[
                "--lr",
                "0.1",
                "--nesterov",
                "--momentum",
                "0.9",
                "--dampening",
                "0.1",
            ],
            &["nesterov, dampening"],
        ),
        (
            &[
                "--lr",
                "0.1",
                "--nesterov",
                "--momentum",
                "0.9",
                "--form",
                "ema",
            ],
            &["nesterov, form"],
        ),
        (
            &["--lr", "0.1", "--dampening", "0.1"],
            &["dampening, momentum"],
        ),
        (
            &[
                "--lr",
                "0.1",
                "--momentum",
                "0.9",
                "--dampening",
                "0.1",
                "--form",
                "lr-inside",
            ],
            &["dampening, form"],
        ),
        (
            &["--lr", "0.1", "--form", "nonsense"],
            &["nonsense", "heavy-ball"],
        ),
        (&["--lr", "0.1", "--preset", "torch"], &["torch", "pytorch"]),
        (
            &["--lr", "0.1", "--preset", "keras", "--form", "ema"],
            &["--preset", "--form"],
        ),
        (
            &["--lr", "0.1", "--beta1", "0.9"],
            &["--beta1", "the rule sgd has no beta1"],
        ),
        (
            &["--lr", "0.1", "--amsgrad"],
            &["--amsgrad", "the rule sgd has no amsgrad"],
        ),
        (
            &["--lr", "0.1", "--momentum", "nan"],
            &["--momentum", "'nan'"],
        ),
        (
            &["--lr", "0.1", "--rule", "nonsense"],
            &["--rule", "nonsense", "adamw"],
        ),
        (
            &["--lr", "0.1", "--rule", "adamw", "--momentum", "0.9"],
            &["--momentum", "the rule adamw has no momentum"],
        ),
        (
            &["--lr", "0.1", "--rule", "adam", "--form", "ema"],
            &["--form", "ema", "epsilon-hat"],
        ),
        (
            &["--lr", "0.1", "--rule", "adamw", "--preset", "optax-ema"],
            &["optax-ema", "pytorch, optax, keras"],
        ),
        (&["--lr", "0.1", "--time-step", "2"], &["time_step, form"]),
        (
            &["--lr", "0.1", "--form", "particle", "--time-step", "0"],
            &["time_step = 0.0"],
        ),
    ] {
        refused(&workspace, args, words);
    }
}

#[test]
fn arguments() {
    let workspace = good();
    refused(&workspace, &[], &["--lr"]);
    refused(&workspace, &["--lr", "0.1", "--repeat", "0"], &["--repeat"]);
    refused(
        &workspace,
        &["--lr", "0.1", "--repeat", "-1"],
        &["invalid value '-1'", "--repeat"],
    );
    refused(
        &workspace,
        &["--lr", "0.1", "--seed", "-1"],
        &["invalid value '-1'", "--seed"],
    );
    refused(
        &workspace,
        &["--lr", "0.1", "--clip-norm", "-1e-3"],
        &["--clip-norm -0.001 is out of range"],
    );
    refused(&workspace, &["--lr", "0.1", "--nonsense"], &["--nonsense"]);
    refused(&workspace, &["--lr", "0.1", "extra"], &["extra"]);
    refused(
        &workspace,
        &["--lr", "0.1", "--adapter", "llvmpipe"],
        &["--adapter", "--device cpu"],
    );
    let none = wgpu_optim().args(["step"]).output().unwrap();
    assert_refused(&none, &["--params"]);
}

#[test]
fn files_that_are_not_there_or_not_safetensors() {
    for name in ["params", "grads", "state"] {
        let workspace = good();
        let path = workspace.path(name);
        let good_bytes = fs::read(&path).unwrap();
        fs::write(&path, &good_bytes[..good_bytes.len() - 3]).unwrap();
        refused(&workspace, &RESUME, &[name, "not a safetensors file"]);
        fs::write(&path, "this is text, and a rather long one").unwrap();
        refused(&workspace, &RESUME, &[name, "not a safetensors file"]);
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n";
        fs::write(&path, pointer).unwrap();
        refused(
            &workspace,
            &RESUME,
            &[name, "Git LFS pointer", "git lfs pull"],
        );
        for (other, words) in [
            (&b"PK\x03\x04\x00\x00\x08\x08data.pkl"[..], "zip archive"),
            (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
            (b"GGUF\x03\x00\x00\x00\x23\x01\x00\x00", "GGUF"),
            (b"<!DOCTYPE html>\n<title>Log in</title>", "web page"),
            (b"{\"metadata\": {}, \"weight_map\": {}}", ".json"),
        ] {
            fs::write(&path, other).unwrap();
            refused(
                &workspace,
                &RESUME,
                &[name, "not a safetensors file but", words],
            );
        }
        // A name twice at the same place, as a careless merge leaves it.
        let tensor = match name {
            "state" => "a.momentum_buffer",
            _ => "a",
        };
        let twice = good_bytes.clone();
        let header = String::from_utf8_lossy(&twice[8..]).into_owned();
        let entry_start = header.find(&format!("\"{tensor}\":")).unwrap();
        let entry_end = entry_start + header[entry_start..].find("}").unwrap() + 1;
        let doubled = format!(
            "{},{}",
            &header[entry_start..entry_end],
            &header[entry_start..entry_end]
        );
        let json_bytes = u64::from_le_bytes(twice[..8].try_into().unwrap()) as usize;
        let json = header[..json_bytes].replacen(&header[entry_start..entry_end], &doubled, 1);
        let mut twice = (json.len() as u64).to_le_bytes().to_vec();
        twice.extend(json.bytes());
        twice.extend(&good_bytes[8 + json_bytes..]);
        fs::write(&path, twice).unwrap();
        let twice = format!("tensor {tensor:?} comes twice");
        refused(&workspace, &RESUME, &[name, &twice]);
        fs::write(&path, "").unwrap();
        refused(&workspace, &RESUME, &[name, "not a safetensors file"]);
        // What a terminal would obey is spelled out.
        let json = r#"{"a":{"dtype":"\u001b[2J\n","shape":[],"data_offsets":[0,1]}}"#;
        let mut escape = (json.len() as u64).to_le_bytes().to_vec();
        escape.extend(json.bytes());
        fs::write(&path, escape).unwrap();
        refused(&workspace, &RESUME, &[name, "`\\u{1b}[2J `"]);
        fs::remove_file(&path).unwrap();
        refused(&workspace, &RESUME, &["cannot read", name, "No such file"]);
        fs::create_dir(&path).unwrap();
        refused(&workspace, &RESUME, &["cannot read", name, "directory"]);
    }
}

#[test]
fn gradients_that_do_not_fit() {
    let workspace = good();
    let with = |name: &str, tensor: Tensor| {
        let gradient = Tensor::f32(&[4], &[1.0; 4]);
        let mut grads = Model::new([("b", gradient)]);
        grads.tensors.insert(name.to_owned(), tensor);
        grads.write(&workspace.path("grads"));
    };
    with("stranger", Tensor::f32(&[1], &[1.0]));
    refused(&workspace, &STEP, &["\"stranger\"", "no parameter"]);
    with("a", Tensor::f32(&[3, 2], &[1.0; 6]));
    refused(
        &workspace,
        &STEP,
        &["\"a\"", "gradient", "[3, 2]", "[2, 3]"],
    );
    with(
        "a",
        Tensor {
            dtype: Dtype::F64,
            shape: vec![2, 3],
            bytes: vec![0; 48],
        },
    );
    let expected = "expected F32, BF16 or F16";
    refused(&workspace, &STEP, &["\"a\"", "gradient", "F64", expected]);
    with("ids", Tensor::f32(&[2], &[1.0; 2]));
    refused(
        &workspace,
        &STEP,
        &["\"ids\"", "parameter", "I64", expected],
    );
}

#[test]
fn states_that_do_not_fit() {
    let workspace = good();
    let original = Model::read(&workspace.path("state"));
    let with = |change: &dyn Fn(&mut Model)| {
        let mut state = original.clone();
        change(&mut state);
        state.write(&workspace.path("state"));
    };
    let ema = [
        "--lr",
        "0.1",
        "--momentum",
        "0.9",
        "--state",
        "state",
        "--form",
        "ema",
    ];
    refused(&workspace, &ema, &["state", "heavy-ball", "ema"]);
    let adam = AdamConfig::adamw(0.1).build().unwrap();
    let record = adam.to_record().unwrap();
    with(&|state| {
        let metadata = state.metadata.as_mut().unwrap();
        metadata.insert("rule".into(), record.clone());
        state.tensors.clear();
    });
    let words = "the state was made by the rule adamw: --momentum: ";
    refused(&workspace, &RESUME, &[words]);
    let sgd = [&RESUME[..], &["--rule", "sgd"]].concat();
    refused(&workspace, &sgd, &["state", "adam form", "heavy-ball"]);
    with(&|_| {});
    refused(
        &workspace,
        &["--momentum", "0", "--state", "state"],
        &["\"a\"", "momentum_buffer", "with these options"],
    );

    let set = |key: &'static str, value: &'static str| {
        move |state: &mut Model| {
            state
                .metadata
                .as_mut()
                .unwrap()
                .insert(key.into(), value.into());
        }
    };
    with(&|state| state.metadata = None);
    refused(&workspace, &RESUME, &["not a state file", "format_version"]);
    with(&set("format_version", "3"));
    refused(&workspace, &RESUME, &["version is 3", "expected 1 or 2"]);
    with(&set("rule", "{\"rule\":\"nonsense\"}"));
    refused(&workspace, &RESUME, &["rule does not read", "nonsense"]);
    with(&set("meanings", "{\"b\":\"ema\"}"));
    refused(&workspace, &RESUME, &["\"b\"", "ema", "heavy-ball"]);
    with(&set("applied_steps", "[1]"));
    refused(&workspace, &RESUME, &["applied_steps"]);
    with(&set("applied_steps", "{\"a\":1}"));
    refused(&workspace, &RESUME, &["\"b\"", "no applied step count"]);
    with(&set("applied_steps", "{\"a\":1,\"b\":1,\"stranger\":1}"));
    refused(&workspace, &RESUME, &["\"stranger\"", "no parameter"]);
    with(&|state| {
        state
            .tensors
            .insert("a.momentum_buffer".into(), Tensor::f32(&[6], &[0.0; 6]));
    });
    refused(
        &workspace,
        &RESUME,
        &["\"a\"", "momentum_buffer", "[6]", "[2, 3]"],
    );
    with(&|state| {
        let integers = Tensor::i64(&[1, 2, 3, 4]);
        state.tensors.insert("b.momentum_buffer".into(), integers);
    });
    refused(
        &workspace,
        &RESUME,
        &["\"b\"", "momentum_buffer", "I64", "F32"],
    );
    for (name, words) in [
        ("b", &["\"b\"", "names no slot"][..]),
        ("b.exp_avg", &["\"b\"", "exp_avg", "momentum_buffer"]),
        ("b.c.momentum_buffer", &["\"b.c\"", "no applied step count"]),
    ] {
        with(&|state| {
            state
                .tensors
                .insert(name.into(), Tensor::f32(&[4], &[0.0; 4]));
        });
        refused(&workspace, &RESUME, words);
    }
}

#[test]
fn outputs_that_cannot_be_written() {
    let workspace = good();
    let step = |out_params: &str, out_state: &str, words: &[&str]| {
        let before = workspace.snapshot();
        let mut step = workspace.step_between("params", [out_params, out_state]);
        step.args(["--device", "cpu", "--lr", "0.1"]);
        assert_refused(&step.output().unwrap(), words);
        assert_eq!(workspace.snapshot(), before);
    };
    step(
        "out_params",
        "no/such/directory/state",
        &["cannot write", "no/such/directory/state"],
    );
    step(
        "no/such/directory/params",
        "out_state",
        &["cannot write", "no/such/directory/params"],
    );
    step(
        "same",
        "same",
        &["--out-params and --out-state are the same file"],
    );
    step(
        "params",
        "./params",
        &["--out-params and --out-state are the same file"],
    );
    fs::create_dir(workspace.path("directory")).unwrap();
    step(
        "out_params",
        "directory",
        &["cannot write", "directory", "not a file"],
    );
    let mut read_only = fs::metadata(workspace.path("out_params"))
        .unwrap()
        .permissions();
    read_only.set_readonly(true);
    fs::set_permissions(workspace.path("out_params"), read_only).unwrap();
    step(
        "out_params",
        "out_state",
        &["cannot write", "out_params", "read-only"],
    );
}

/// A header has an end, and the state's is longer than those of its inputs.
#[test]
fn a_state_whose_header_no_file_may_have() {
    let workspace = Workspace::new();
    let mut model = Model::default();
    for index in 0..20_u8 {
        let name = char::from(b'a' + index).to_string().repeat(1_700_000);
        model.tensors.insert(name, Tensor::f32(&[1], &[1.0]));
    }
    model.write(&workspace.path("params"));
    model.write(&workspace.path("grads"));
    let words = [
        "--out-state would have a header of",
        "expected at most 100000000",
        "--out-state that ends in .index.json",
    ];
    refused(&workspace, &["--lr", "0.1", "--rule", "adamw"], &words);
}

#[test]
fn devices_that_are_not_there() {
    let workspace = good();
    let before = workspace.snapshot();
    for (args, word) in [
        (&["--device", "gpu"][..], "mesa-vulkan-drivers"),
        (&["--adapter", "no such adapter"], "no such adapter"),
    ] {
        let output = without_driver()
            .current_dir(workspace.path(""))
            .args("step --params params --grads grads --lr 0.1".split(' '))
            .args(["--out-params", "out_params", "--out-state", "out_state"])
            .args(args)
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        let ours: Vec<_> = stderr
            .lines()
            .filter(|line| line.contains("no adapter found"))
            .collect();
        assert!(ours.len() == 1 && ours[0].contains(word), "{stderr}");
        assert_eq!(workspace.snapshot(), before);
    }
    let missing = without_driver()
        .args(["bench", "--device", "gpu", "--numel", "1K"])
        .output();
    assert_eq!(missing.unwrap().status.code(), Some(2));
}
