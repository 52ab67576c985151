//! What is printed.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::process::{Command as Process, Stdio};

use ::wgpu_optim::AnyRule;
use assert_cmd::Command;
use safetensors::Dtype;
use serde_json::Value;

use crate::model::{Model, Tensor, Workspace};
use crate::refusals::assert_refused;
use crate::{DEVICES, program, wgpu_optim, without_driver};

pub fn json(output: &std::process::Output) -> Value {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn step_reports_what_it_did() {
    let params = Model::new([
        ("a", Tensor::f32(&[5], &[1.0; 5])),
        ("b", Tensor::f32(&[8], &[1.0; 8])),
        ("ids", Tensor::i64(&[1])),
    ]);
    let grads = Model::new([
        ("a", Tensor::f32(&[5], &[1.0; 5])),
        ("b", Tensor::f32(&[8], &[1.0; 8])),
    ]);
    let workspace = Workspace::with(&params, &grads);
    for device in DEVICES {
        let mut step = workspace.step();
        step.args(["--device", device, "--lr", "0.1", "--momentum", "0.9"]);
        let text = String::from_utf8(step.output().unwrap().stdout).unwrap();
        assert!(
            text.contains("2 updated, 1 frozen") && text.contains("GB/s"),
            "{text}"
        );
        let report = json(&step.arg("--json").output().unwrap());
        assert_eq!(report["backend"], device);
        assert!(!report["adapter"].as_str().unwrap().is_empty());
        assert_eq!(report["tensors_updated"], 2);
        assert_eq!(report["tensors_frozen"], 1);
        assert_eq!(report["numel"], 13);
        // Both tensors lie side by side.
        assert_eq!(report["dispatches"], if device == "gpu" { 1 } else { 0 });
        assert!(report["total_ms"].as_f64().unwrap() > 0.0);
        // Parameters, gradients and the integers; no velocity before the first step.
        assert_eq!(report["bytes_read"], 4 * (13 + 13) + 8);
        assert_eq!(report["bytes_written"], 4 * (13 + 13) + 8);
        let peak = &report["peak_memory_bytes"];
        match cfg!(target_os = "linux") {
            true => assert!(peak.as_u64().unwrap() > 1 << 20),
            false => assert!(peak.is_null()),
        }
    }
}

#[test]
fn auto_takes_the_cpu_twin_where_there_is_no_hardware_and_says_why() {
    let model = Model::new([("a", Tensor::f32(&[1], &[1.0]))]);
    let workspace = Workspace::with(&model, &model);
    let mut step = without_driver();
    step.current_dir(workspace.path(""))
        .args("step --params params --grads grads --lr 0.1 --json".split(' '))
        .args(["--out-params", "out_params", "--out-state", "out_state"]);
    let report = json(&step.output().unwrap());
    assert_eq!(report["backend"], "cpu");
    assert!(
        report["reason"]
            .as_str()
            .unwrap()
            .contains("no adapter found that is hardware")
    );
}

#[test]
fn accuracy_compares_every_rule_and_form_on_every_back_end() {
    let accuracy = |args: &[&str]| {
        let mut command = wgpu_optim();
        let report = json(
            &command
                .args(["accuracy", "--numel", "65539", "--json"])
                .args(args)
                .output()
                .unwrap(),
        );
        let rows = report["rows"].as_array().unwrap().clone();
        for row in &rows {
            for backend in ["reference", "cpu", "gpu"] {
                let share = row[backend]["worst_share_of_bound"].as_f64().unwrap();
                assert!(0.0 < share && share <= 1.0, "{row}");
            }
            assert_eq!(row["reference"], row["cpu"]);
        }
        let rule = |row: &Value| row["rule"].as_str().unwrap().to_owned();
        rows.iter().map(rule).collect::<Vec<_>>()
    };
    let all = accuracy(&[]);
    assert_eq!(all[10], "heavy-ball, maximize");
    let rules = &all[11..];
    // Each configuration once; sgd is what plain descent is, by another name.
    let mut configs = vec![AnyRule::preset("sgd", None, 0.1).unwrap()];
    for name in AnyRule::presets().map(|preset| preset.rule) {
        let config = AnyRule::preset(name, None, 0.1).unwrap();
        if !configs.contains(&config) {
            assert_eq!(rules[configs.len() - 1], name);
            configs.push(config);
        }
    }
    assert_eq!(rules.len(), configs.len() - 1);
    let distinct: BTreeSet<_> = all.iter().collect();
    assert_eq!(distinct.len(), all.len());

    let typed = ["--rule", "adamw", "--beta2", "0.95", "--lr", "0.01"];
    assert_eq!(accuracy(&typed), ["adamw --lr 0.01 --beta2 0.95"]);
    for (args, words) in [
        (
            &["--rule", "adamw", "--rho", "0.9"][..],
            "--rho: the rule adamw has no rho",
        ),
        (
            &["--rule", "adamw", "--beta1", "1"],
            "beta1 = 1.0 is out of range",
        ),
        (
            &["--rule", "adamw", "--preset", "torch"],
            "\"torch\": expected one of pytorch",
        ),
        (&["--beta1", "0.9"], "--rule"),
    ] {
        let refused = wgpu_optim().arg("accuracy").args(args).output().unwrap();
        assert_eq!(refused.status.code(), Some(2));
        let stderr = String::from_utf8(refused.stderr).unwrap();
        assert!(
            stderr.contains(words) && stderr.lines().count() == 1,
            "{stderr}"
        );
    }

    let table = without_driver().arg("accuracy").output().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(
        table.contains("no adapter") && table.contains("| heavy-ball, Nesterov |"),
        "{table}"
    );
}

#[test]
fn info_lists_adapters_or_says_how_to_get_one() {
    let report = json(&wgpu_optim().args(["info", "--json"]).output().unwrap());
    let adapter = &report["adapters"][0];
    assert!(
        adapter["max_storage_buffer_binding_bytes"]
            .as_u64()
            .unwrap()
            >= 128 << 20
    );
    assert!(adapter["driver"].is_string() && adapter["scalars"].is_string());
    let text = wgpu_optim().arg("info").output().unwrap().stdout;
    let text = String::from_utf8(text).unwrap();
    let summary = report["summary"].as_str().unwrap();
    let first = format!("{summary}\n\n0: {}", adapter["name"].as_str().unwrap());
    assert!(text.starts_with(&first), "{text}");
    assert!(
        text.contains("  ids  ") && text.contains("vendor 0x"),
        "{text}"
    );

    let nothing = without_driver().arg("info").output().unwrap();
    assert!(nothing.status.success());
    assert!(
        String::from_utf8(nothing.stdout)
            .unwrap()
            .contains("mesa-vulkan-drivers")
    );
}

/// In one sentence, whatever is asked for, as `step` would do.
#[test]
fn info_says_where_steps_are_computed() {
    let summary = |mut command: Command, args: &[&str]| {
        let output = command.args(["info", "--json"]).args(args).output();
        let report = json(&output.unwrap());
        (report["summary"].as_str().unwrap().to_owned(), report)
    };
    let (said, report) = summary(wgpu_optim(), &["--device", "gpu"]);
    let adapters = report["adapters"].as_array().unwrap();
    let best = |adapter: &&Value| said.contains(adapter["full_name"].as_str().unwrap());
    let adapter = adapters.iter().find(best).unwrap();
    let kind = match adapter["device_type"].as_str().unwrap() {
        "Cpu" => "software adapter",
        "DiscreteGpu" => "discrete GPU",
        "IntegratedGpu" => "integrated GPU",
        "VirtualGpu" => "virtual GPU",
        _ => "GPU of unknown kind",
    };
    let start = format!("Steps are computed on the {kind} ");
    assert!(said.starts_with(&start), "{said}");
    assert!(said.ends_with(": asked for with --device gpu."), "{said}");

    let is_hardware = |adapter: &Value| adapter["device_type"] != "Cpu";
    let (said, _) = summary(wgpu_optim(), &[]);
    let on_twin = said.starts_with("Steps are computed on the CPU twin (");
    assert_ne!(adapters.iter().any(is_hardware), on_twin, "{said}");
    let (said, _) = summary(wgpu_optim(), &["--device", "cpu"]);
    assert!(said.ends_with("threads): asked for with --device cpu."));
    let (said, _) = summary(without_driver(), &[]);
    assert!(
        said.contains("CPU twin (") && said.contains("no adapter found"),
        "{said}"
    );
    let (said, _) = summary(without_driver(), &["--device", "gpu"]);
    assert!(said.starts_with("Steps cannot be computed: no adapter found"));
}

#[test]
fn info_plans_a_model() {
    let workspace = Workspace::new();
    let mut model = Model::new([
        ("a", Tensor::f32(&[3, 7], &[1.0; 21])),
        ("b", Tensor::f32(&[64], &[1.0; 64])),
        ("ids", Tensor::i64(&[1])),
    ]);
    model.write(&workspace.path("model"));
    let info = |args: &[&str]| {
        let mut command = wgpu_optim();
        command
            .current_dir(workspace.path(""))
            .args(["info", "--plan"])
            .args(args);
        command.output().unwrap()
    };
    let report = json(&info(&["model", "--json"]));
    for adapter in report["adapters"].as_array().unwrap() {
        let plan = &adapter["plan"];
        assert_eq!((&plan["tensors"], &plan["numel"]), (&2.into(), &85.into()));
        assert_eq!(
            (&plan["dispatches"], &plan["buffers"]),
            (&1.into(), &1.into())
        );
        assert!(plan["state_bytes"].as_u64().unwrap() >= 4 * 85);
        assert_eq!(plan["masters_bytes"], 0);
        assert_eq!(plan["tensors_left_out"], 1);
    }
    let text = String::from_utf8(info(&["model"]).stdout).unwrap();
    assert!(
        ["2 tensors, 85 parameters", "1 dispatches over 1 bindings"]
            .iter()
            .all(|words| text.contains(words)),
        "{text}"
    );
    assert_eq!(info(&["no such file"]).status.code(), Some(2));

    // More than there is of F32, half as large, in an arena of each dtype.
    let half = vec![1.0; 1 << 20];
    for (name, dtype) in [("c", Dtype::BF16), ("d", Dtype::F16)] {
        let tensor = Tensor::stored_as(dtype, &[1 << 20], &half);
        model.tensors.insert(name.to_owned(), tensor);
    }
    model.write(&workspace.path("model"));
    let report = json(&info(&["model", "--json"]));
    for adapter in report["adapters"].as_array().unwrap() {
        let plan = &adapter["plan"];
        let numel = 85 + (2 << 20);
        assert_eq!(plan["numel"], numel);
        assert_eq!((&plan["tensors"], &plan["arenas"]), (&4.into(), &3.into()));
        assert_eq!(plan["step_dispatches"], 2);
        let bytes = |key: &str| plan[key].as_u64().unwrap();
        // But for what aligns them.
        for (key, expected) in [
            ("params_bytes", 2 * numel),
            ("grads_bytes", 2 * numel),
            ("state_bytes", 4 * numel),
            ("masters_bytes", 4 * (2 << 20)),
        ] {
            assert!((expected..expected + 4096).contains(&bytes(key)), "{plan}");
        }
    }
    let text = String::from_utf8(info(&["model"]).stdout).unwrap();
    assert!(
        [
            "1 left out, not F32, BF16 or F16",
            "in 3 arenas",
            "8 MiB masters"
        ]
        .iter()
        .all(|words| text.contains(words)),
        "{text}"
    );
}

/// On any machine, for any rule: of `AdamW` two slots beside what the step reads and writes.
#[test]
fn info_plans_a_rule_over_sizes_with_and_without_an_adapter() {
    let args = "info --plan --rule adamw --numel 1M,3 --json".split(' ');
    let numel = (1 << 20) + 3;
    for mut command in [wgpu_optim(), without_driver()] {
        let report = json(&command.args(args.clone()).output().unwrap());
        let cpu = &report["cpu_plan"];
        assert_eq!((&cpu["tensors"], &cpu["numel"]), (&2.into(), &numel.into()));
        for (key, expected) in [
            ("params_bytes", 4 * numel),
            ("grads_bytes", 4 * numel),
            ("state_bytes", 8 * numel),
            ("masters_bytes", 0),
            ("traffic_bytes", (2 * 4 + 4 + 2 * 8) * numel),
            // Of 256K elements.
            ("step_windows", 5),
        ] {
            assert_eq!(cpu[key], expected, "{key}");
        }
        for adapter in report["adapters"].as_array().unwrap() {
            let plan = &adapter["plan"];
            assert_eq!(plan["traffic_bytes"], cpu["traffic_bytes"]);
            let state = plan["state_bytes"].as_u64().unwrap();
            assert!((8 * numel..8 * numel + 4096).contains(&state), "{plan}");
            // Both lie in one arena.
            assert_eq!(
                (&plan["pieces"], &plan["dispatches"]),
                (&1.into(), &1.into())
            );
            assert_eq!(plan["batches"], 0);
        }
    }
    let mut text = without_driver();
    text.args("info --plan --rule adamw --numel 1M".split(' '));
    let text = String::from_utf8(text.output().unwrap().stdout).unwrap();
    for words in [
        "  plan              adamw, 1 tensors, 1048576 parameters\n",
        "  memory            16 MiB: 4 MiB parameters, 4 MiB gradients, 8 MiB state, 0 MiB masters\n",
        "  traffic           28 MiB read and written by a step\n",
    ] {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }
    for (line, words) in [
        ("info --rule adamw", "go with --plan"),
        ("info --numel 5", "go with --plan"),
        ("info --plan", "expected the file of a model, or --numel"),
        ("info --plan x --numel 5", "are two models"),
        (
            "info --plan --numel 5 --rule lion --eps 1",
            "the rule lion has no eps",
        ),
    ] {
        let output = wgpu_optim().args(line.split(' ')).output().unwrap();
        assert_refused(&output, &[words]);
    }
}

/// Cargo names the package whose program it runs: that alone is a benchmark, and says so before it measures.
#[test]
fn without_a_command_there_is_help_but_under_cargo_run() {
    for package in [None, Some("/somebody/elses")] {
        let mut command = wgpu_optim();
        match package {
            Some(package) => command.env("CARGO_MANIFEST_DIR", package),
            None => command.env_remove("CARGO_MANIFEST_DIR"),
        };
        let output = command.output().unwrap();
        // As clap has it.
        assert_eq!(output.status.code(), Some(2));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(
            output.stdout.is_empty() && stderr.contains("Usage: wgpu-optim"),
            "{stderr}"
        );
        assert!(
            stderr.contains("  round ") && stderr.contains("  step "),
            "{stderr}"
        );
        let output = command.arg("--json").output().unwrap();
        assert_refused(&output, &["requires a subcommand"]);
    }
    // With any argument it is what was typed.
    let package = env!("CARGO_MANIFEST_DIR");
    let mut version = wgpu_optim();
    version.env("CARGO_MANIFEST_DIR", package).arg("--version");
    let output = version.output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
    let mut bench = Process::new(program());
    bench.env("CARGO_MANIFEST_DIR", package);
    let mut bench = bench
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    let stderr = bench.stderr.take().unwrap();
    BufReader::new(stderr).read_line(&mut first).unwrap();
    bench.kill().unwrap();
    bench.wait().unwrap();
    assert!(
        first.starts_with("cargo run without a command: bench") && first.contains("--help"),
        "{first}"
    );
}

#[test]
fn help_and_version_go_to_stdout() {
    for flag in ["--help", "--version"] {
        let output = wgpu_optim().arg(flag).output().unwrap();
        assert!(output.status.success() && !output.stdout.is_empty() && output.stderr.is_empty());
    }
}
