//! What is printed.

use serde_json::Value;

use crate::model::{Model, Tensor, Workspace};
use crate::{DEVICES, wgpu_optim, without_driver};

fn json(output: &std::process::Output) -> Value {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn step_reports_what_it_did() {
    let workspace = Workspace::new();
    let params = Model::new([
        ("a", Tensor::f32(&[5], &[1.0; 5])),
        ("b", Tensor::f32(&[8], &[1.0; 8])),
        ("ids", Tensor::i64(&[1])),
    ]);
    params.write(&workspace.path("params"));
    let grads = Model::new([
        ("a", Tensor::f32(&[5], &[1.0; 5])),
        ("b", Tensor::f32(&[8], &[1.0; 8])),
    ]);
    grads.write(&workspace.path("grads"));
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
        let (update, total) = (&report["update_ms"], &report["total_ms"]);
        assert!(0.0 < update.as_f64().unwrap() && update.as_f64() <= total.as_f64());
    }
}

#[test]
fn auto_takes_the_cpu_twin_where_there_is_no_hardware_and_says_why() {
    let workspace = Workspace::new();
    let model = Model::new([("a", Tensor::f32(&[1], &[1.0]))]);
    model.write(&workspace.path("params"));
    model.write(&workspace.path("grads"));
    let mut step = without_driver();
    step.current_dir(workspace.path(""))
        .args([
            "step", "--params", "params", "--grads", "grads", "--lr", "0.1", "--json",
        ])
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

fn check_rows(report: &Value, backends: &[&str]) {
    let rows = report["rows"].as_array().unwrap();
    let numels = [1024, 4099];
    assert_eq!(rows.len(), numels.len() * backends.len());
    for (index, row) in rows.iter().enumerate() {
        let backend = backends[index % backends.len()];
        assert_eq!(row["backend"], backend);
        assert!(row["adapter"].is_string());
        assert_eq!(row["tensors"], 1);
        assert_eq!(row["numel"], numels[index / backends.len()]);
        let number = |key: &str| row[key].as_f64().unwrap();
        assert!(number("ms_min") <= number("ms_median"));
        assert!(number("ms_median") <= number("ms_max"));
        let gb_per_s = 20.0 * number("numel") / (number("ms_median") * 1e6);
        assert!((number("gb_per_s") / gb_per_s - 1.0).abs() < 1e-9);
        assert!(number("worst_ulp") > 0.0);
        assert_eq!(row["share_of_copy"].is_null(), backend != "gpu");
    }
}

#[test]
fn bench_measures_every_path() {
    let bench = ["bench", "--numel", "1K,4099", "--steps", "3", "--json"];
    let report = json(&wgpu_optim().args(bench).output().unwrap());
    check_rows(&report, &["gpu", "cpu", "reference"]);
    let report = json(
        &wgpu_optim()
            .args(bench)
            .args(["--device", "cpu"])
            .output()
            .unwrap(),
    );
    check_rows(&report, &["cpu", "reference"]);
    let report = json(&without_driver().args(bench).output().unwrap());
    check_rows(&report, &["cpu", "reference"]);
    let table = wgpu_optim().args(&bench[..5]).output().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(
        table.contains("worst ULP") && table.contains("CPU twin"),
        "{table}"
    );
}

#[test]
fn bench_measures_many_tensors_and_those_of_a_model() {
    let bench = |args: &[&str]| {
        let mut command = wgpu_optim();
        command.args(["bench", "--steps", "3", "--json"]).args(args);
        json(&command.output().unwrap())["rows"]
            .as_array()
            .unwrap()
            .clone()
    };
    for row in bench(&["--tensors", "50", "--numel-each", "33"]) {
        assert_eq!(
            (row["tensors"].as_u64(), row["numel"].as_u64()),
            (Some(50), Some(50 * 33))
        );
    }
    let workspace = Workspace::new();
    let model = Model::new([
        ("a", Tensor::f32(&[3, 7], &[1.0; 21])),
        ("b", Tensor::f32(&[64], &[1.0; 64])),
        ("ids", Tensor::i64(&[1])),
    ]);
    model.write(&workspace.path("model"));
    for row in bench(&["--model", workspace.path("model").to_str().unwrap()]) {
        assert_eq!(
            (row["tensors"].as_u64(), row["numel"].as_u64()),
            (Some(2), Some(85))
        );
    }
    Model::new([("ids", Tensor::i64(&[1]))]).write(&workspace.path("model"));
    for args in [
        &["--model", workspace.path("model").to_str().unwrap()][..],
        &["--model", "no such file"],
        &["--tensors", "3"],
        &["--numel-each", "3"],
        &["--tensors", "3", "--numel-each", "3", "--numel", "3"],
    ] {
        let output = wgpu_optim().arg("bench").args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn accuracy_compares_every_form_on_every_back_end() {
    let report = json(&wgpu_optim().args(["accuracy", "--json"]).output().unwrap());
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 11);
    for row in rows {
        for backend in ["reference", "cpu", "gpu"] {
            let share = row[backend]["worst_share_of_bound"].as_f64().unwrap();
            assert!(0.0 < share && share <= 1.0, "{row}");
        }
        assert_eq!(row["reference"], row["cpu"]);
    }
    let table = without_driver().arg("accuracy").output().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(
        table.contains("no adapter") && table.contains("| heavy-ball, Nesterov |"),
        "{table}"
    );
}

#[test]
fn sizes_that_are_none_are_refused() {
    for numel in ["0", "many", "1M,", "-5", "99999999G"] {
        let output = wgpu_optim()
            .args(["bench", "--numel", numel])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{numel}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
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
    assert!(text.contains(adapter["name"].as_str().unwrap()), "{text}");

    let nothing = without_driver()
        .arg("info")
        .env("WGPU_BACKEND", "vulkan")
        .output()
        .unwrap();
    assert!(nothing.status.success());
    assert!(
        String::from_utf8(nothing.stdout)
            .unwrap()
            .contains("mesa-vulkan-drivers")
    );
}

#[test]
fn info_plans_a_model() {
    let workspace = Workspace::new();
    let model = Model::new([
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
        assert!(plan["velocity_bytes"].as_u64().unwrap() >= 4 * 85);
    }
    let text = String::from_utf8(info(&["model"]).stdout).unwrap();
    assert!(
        text.contains("2 tensors, 85 parameters: 1 dispatches over 1 bindings"),
        "{text}"
    );
    assert_eq!(info(&["no such file"]).status.code(), Some(2));
}

#[test]
fn help_and_version_go_to_stdout() {
    for flag in ["--help", "--version"] {
        let output = wgpu_optim().arg(flag).output().unwrap();
        assert!(output.status.success() && !output.stdout.is_empty() && output.stderr.is_empty());
    }
}
