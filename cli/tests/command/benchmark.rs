//! What `bench` measures, prints and writes.

use std::collections::BTreeSet;
use std::fs;

use ::wgpu_optim::{AnyRule, Rule as _};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::model::{Model, Tensor, Workspace};
use crate::refusals::{assert_refused, line};
#[cfg(target_os = "linux")]
use crate::running::Running;
use crate::{wgpu_optim, without_driver};

const GPU_PATHS: [&str; 5] = [
    "fused",
    "unfused",
    "copy",
    "upload-grads",
    "download-params",
];
const CPU_PATHS: [&str; 3] = ["cpu-twin", "stream", "reference"];

/// A report, after a look at its schema.
pub fn report(command: &mut assert_cmd::Command) -> Value {
    let output = command.arg("--json").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let report = serde_json::from_slice(&output.stdout).unwrap();
    let complaints = complaints(&schema(), &report, "");
    assert!(complaints.is_empty(), "{complaints:?}");
    report
}

fn schema() -> Value {
    serde_json::from_str(include_str!("../../schema/bench.json")).unwrap()
}

/// Where a value does not keep to a schema of the keywords that ours has; another one fails, so that none is passed over.
fn complaints(schema: &Value, value: &Value, path: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    for (keyword, said) in schema.as_object().unwrap() {
        let is_kept = match keyword.as_str() {
            "$schema" | "title" | "description" => true,
            "type" => match said {
                Value::Array(types) => types.iter().any(|said| is_of_type(value, said)),
                said => is_of_type(value, said),
            },
            "const" => value == said,
            "enum" => said.as_array().unwrap().contains(value),
            "minimum" => value.as_f64().is_none_or(|v| v >= said.as_f64().unwrap()),
            "exclusiveMinimum" => value.as_f64().is_none_or(|v| v > said.as_f64().unwrap()),
            "minItems" => {
                let items = value.as_array().map(Vec::len);
                items.is_none_or(|items| items as u64 >= said.as_u64().unwrap())
            }
            "required" => {
                let mut keys = said.as_array().unwrap().iter();
                let has = |key: &Value| value.get(key.as_str().unwrap()).is_some();
                !value.is_object() || keys.all(has)
            }
            "additionalProperties" => {
                assert_eq!(said, &Value::Bool(false), "{path}");
                let mut keys = value
                    .as_object()
                    .into_iter()
                    .flat_map(|object| object.keys());
                keys.all(|key| schema["properties"].get(key).is_some())
            }
            "properties" => {
                for (key, schema) in said.as_object().unwrap() {
                    let property = value.get(key).into_iter();
                    complaints.extend(property.flat_map(|property| {
                        self::complaints(schema, property, &format!("{path}/{key}"))
                    }));
                }
                true
            }
            "items" => {
                for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                    complaints.extend(self::complaints(said, item, &format!("{path}/{index}")));
                }
                true
            }
            _ => panic!("{path}: {keyword} is none of the keywords that are looked at"),
        };
        if !is_kept {
            complaints.push(format!("{path}: {value} is against {keyword} {said}"));
        }
    }
    complaints
}

fn is_of_type(value: &Value, said: &Value) -> bool {
    match said.as_str().unwrap() {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        said => panic!("there is no type {said}"),
    }
}

#[test]
fn the_schema_tells_a_report_from_what_is_none() {
    let good = report(wgpu_optim().args(QUICK).args(["--device", "cpu"]));
    for (pointer, other, complaint) in [
        ("/format", json!(1), "/format: 1 is against const 2"),
        ("/date", json!(1), r#"/date: 1 is against type "string""#),
        ("/system", json!({}), r#"/system: {} is against required"#),
        (
            "/system/threads",
            json!(0),
            "/system/threads: 0 is against minimum 1",
        ),
        (
            "/system/threads",
            json!(1.5),
            r#"is against type "integer""#,
        ),
        (
            "/rows/1/path",
            json!("fast"),
            r#"/rows/1/path: "fast" is against enum"#,
        ),
        (
            "/rows/0/ms_median",
            json!(0),
            "/rows/0/ms_median: 0 is against exclusiveMinimum",
        ),
        (
            "/rows/0/worst_ulp",
            json!("1"),
            r#"is against type ["number","null"]"#,
        ),
        ("/rows/0", json!([]), "/rows/0: [] is against type"),
    ] {
        let mut report = good.clone();
        *report.pointer_mut(pointer).unwrap() = other;
        let found = complaints(&schema(), &report, "");
        assert!(
            found.iter().any(|found| found.contains(complaint)),
            "{found:?}"
        );
    }
    let mut report = good;
    report["rows"][0]["colour"] = "red".into();
    let found = complaints(&schema(), &report, "");
    assert!(
        found.len() == 1 && found[0].contains("additionalProperties"),
        "{found:?}"
    );
}

pub fn rows(report: &Value) -> &[Value] {
    report["rows"].as_array().unwrap()
}

fn check_rows(report: &Value, paths: &[&str]) {
    // Rules, then sizes, then paths.
    let mut expected = Vec::new();
    for rule in ["heavy-ball", "adamw"] {
        for numel in [1024, 4099] {
            let paths = paths.iter().map(|path| (rule, numel, *path));
            // No chain of scale and add makes a step of Adam.
            expected.extend(paths.filter(|path| *path != ("adamw", numel, "unfused")));
        }
    }
    assert_eq!(rows(report).len(), expected.len());
    for (row, (rule, numel, path)) in rows(report).iter().zip(expected) {
        assert_eq!((&row["rule"], &row["path"]), (&rule.into(), &path.into()));
        assert_eq!((&row["numel"], &row["tensors"]), (&numel.into(), &1.into()));
        let number = |key: &str| row[key].as_f64().unwrap();
        assert!(number("ms_low") <= number("ms_median"));
        assert!(number("ms_median") <= number("ms_high"));
        assert!(number("rounds") >= 6.0);
        let bytes = match (path, rule) {
            ("unfused", _) => 40.0,
            ("upload-grads" | "download-params", _) => 4.0,
            (_, "adamw") => 28.0,
            _ => 20.0,
        };
        assert_eq!(number("bytes_per_elem"), bytes);
        let gb_per_s = bytes * number("numel") / (number("ms_median") * 1e6);
        assert!((number("gb_per_s") / gb_per_s - 1.0).abs() < 1e-9);
        let is_step = ["fused", "unfused", "cpu-twin", "reference"].contains(&path);
        assert_eq!(row["worst_ulp"].is_number(), is_step, "{row}");
        assert_eq!(row["share_of_roof"].is_number(), is_step, "{row}");
        let is_gpu_work = ["fused", "unfused", "copy"].contains(&path);
        assert_eq!(row["record_us"].is_number(), is_gpu_work, "{row}");
        assert_eq!(row["dispatches"].is_number(), is_gpu_work, "{row}");
    }
}

const QUICK: [&str; 5] = ["bench", "--numel", "1K,4099", "--seconds", "0"];

#[test]
fn every_path_is_measured_with_an_adapter_and_without() {
    let found = report(wgpu_optim().args(QUICK));
    check_rows(&found, &[&GPU_PATHS[..], &CPU_PATHS].concat());
    assert_eq!(found["adapters"].as_array().unwrap().len(), 1);
    assert_eq!(found["hot_caches"], false);
    // Two sizes: there is something to say about the break-even, with transfers and without, for each rule.
    assert_eq!(found["break_even"].as_array().unwrap().len(), 4);

    let found = report(
        wgpu_optim()
            .args(QUICK)
            .args(["--device", "cpu", "--hot-caches"]),
    );
    check_rows(&found, &CPU_PATHS);
    assert_eq!(found["hot_caches"], true);
    let found = report(without_driver().args(QUICK));
    check_rows(&found, &CPU_PATHS);
    assert!(
        found["reason"]
            .as_str()
            .unwrap()
            .contains("no adapter found")
    );

    let text = wgpu_optim().args(QUICK).output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    for part in [
        "worst ULP",
        "CPU twin",
        "of roof",
        "GPU ms",
        "adamw, 4099 elements in 1 tensor",
    ] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn every_adapter_is_measured_beside_the_others() {
    let mut bench = wgpu_optim();
    bench.args("bench --numel 1K --seconds 0 --form nesterov --all-adapters".split(' '));
    let found = report(&mut bench);
    let adapters = found["adapters"].as_array().unwrap();
    let devices: BTreeSet<_> = rows(&found)
        .iter()
        .filter(|row| row["path"] == "fused")
        .map(|row| row["device"].as_str().unwrap())
        .collect();
    assert!(!adapters.is_empty());
    assert_eq!(devices.len(), adapters.len());
    // No chain of scale and add makes a Nesterov step.
    assert!(rows(&found).iter().all(|row| row["path"] != "unfused"));
}

#[test]
fn any_rule_is_measured_in_any_number_of_tensors() {
    let mut names = Vec::new();
    for preset in AnyRule::presets() {
        if !names.contains(&preset.rule) {
            names.push(preset.rule);
        }
    }
    let mut bench = wgpu_optim();
    bench
        .args(["bench", "--seconds", "0", "--tensors", "50"])
        .args(["--numel-each", "33", "--form", "plain", "--rule"])
        .arg(names.join(","));
    let found = report(&mut bench);
    let of_path = |path: &str| {
        let rows = rows(&found).iter().filter(|row| row["path"] == path);
        let bytes = rows.map(|row| {
            let bytes = row["bytes_per_elem"].as_u64().unwrap();
            (row["rule"].as_str().unwrap(), bytes)
        });
        bytes.collect::<Vec<_>>()
    };
    let (mut of_step, mut of_copy) = (vec![("plain", 12)], vec![("plain", 12)]);
    for name in &names {
        let rule = AnyRule::preset(name, None, 0.1).unwrap();
        of_step.push((name, rule.bytes_per_elem()));
        // A copy reads nothing before, as a rule does that takes sums.
        of_copy.push((name, 12 + 8 * rule.slots().kept().count() as u64));
    }
    for path in ["fused", "cpu-twin", "reference"] {
        assert_eq!(of_path(path), of_step);
    }
    for path in ["copy", "stream"] {
        assert_eq!(of_path(path), of_copy);
    }
    // Plain descent by either name.
    assert_eq!(of_path("unfused"), [("plain", 20), ("sgd", 20)]);
}

#[test]
fn a_rule_is_measured_as_it_was_typed() {
    let mut bench = wgpu_optim();
    bench
        .args("bench --seconds 0 --numel 1K --rule adamw".split(' '))
        .args(["--preset", "keras", "--amsgrad", "--lr", "0.01"]);
    let found = report(&mut bench);
    for row in rows(&found) {
        let rule = "adamw --preset keras --lr 0.01 --amsgrad of-average";
        assert_eq!(row["rule"], rule);
    }
    assert_eq!(rows(&found)[0]["bytes_per_elem"], 36);
}

#[test]
fn tensors_come_in_grids_and_from_models() {
    let bench = |args: &[&str]| {
        let mut command = wgpu_optim();
        command
            .args(["bench", "--seconds", "0", "--form", "heavy-ball"])
            .args(args);
        let found = report(&mut command);
        let number = |row: &Value, name: &str| row[name].as_u64().unwrap();
        let cases = rows(&found).iter();
        let cases = cases.map(|row| (number(row, "tensors"), number(row, "numel")));
        let cases: BTreeSet<_> = cases.collect();
        cases.into_iter().collect::<Vec<_>>()
    };
    assert_eq!(
        bench(&["--tensors", "50", "--numel-each", "33"]),
        [(50, 50 * 33)]
    );
    let grid = bench(&["--tensors", "1,3", "--numel", "100,1000"]);
    assert_eq!(grid, [(1, 100), (1, 1000), (3, 100), (3, 1000)]);

    let workspace = Workspace::new();
    let model = Model::new([
        ("a", Tensor::f32(&[3, 7], &[1.0; 21])),
        ("b", Tensor::f32(&[64], &[1.0; 64])),
        ("ids", Tensor::i64(&[1])),
    ]);
    model.write(&workspace.path("model"));
    let path = workspace.path("model");
    assert_eq!(bench(&["--model", path.to_str().unwrap()]), [(2, 85)]);
}

/// Each dtype of a model by itself, with gradients of the same, but for what is said otherwise.
#[test]
fn a_model_is_measured_in_its_own_dtypes() {
    let workspace = Workspace::new();
    let stored_as = |dtype, numel| Tensor::stored_as(dtype, &[numel], &vec![1.0; numel]);
    let model = Model::new([
        ("a", stored_as(Dtype::F32, 85)),
        ("b", stored_as(Dtype::BF16, 100)),
        ("c", stored_as(Dtype::BF16, 33)),
        ("d", stored_as(Dtype::F16, 7)),
        ("empty", stored_as(Dtype::F16, 0)),
        ("ids", Tensor::i64(&[1])),
    ]);
    model.write(&workspace.path("model"));
    let bench = |args: &[&str]| {
        let mut command =
            workspace.command("bench --model model --seconds 0 --device cpu --form heavy-ball");
        let found = report(command.args(args));
        let note = "1 tensors of model are left out: not F32, BF16 or F16";
        assert!(found["notes"].as_array().unwrap().contains(&note.into()));
        let twins = rows(&found).iter().filter(|row| row["path"] == "cpu-twin");
        let case = |row: &Value| {
            let rule = row["rule"].as_str().unwrap().to_owned();
            (rule, row["tensors"].as_u64(), row["numel"].as_u64())
        };
        twins.map(case).collect::<Vec<_>>()
    };
    let of = |suffix: &str, tensors, numel| {
        let rule = format!("heavy-ball{suffix}");
        (rule, Some(tensors), Some(numel))
    };
    assert_eq!(
        bench(&[]),
        [
            of("", 1, 85),
            of(", bf16 params, bf16 grads, f32 masters", 2, 133),
            of(", f16 params, f16 grads, f32 masters", 2, 7),
        ]
    );
    assert_eq!(
        bench(&["--grads-dtype", "f32", "--masters", "none"]),
        [
            of("", 1, 85),
            of(", bf16 params", 2, 133),
            of(", f16 params", 2, 7)
        ]
    );
}

#[test]
fn an_older_report_shows_what_is_slower() {
    let workspace = Workspace::new();
    let bench = |args: &[&str]| {
        let mut command = wgpu_optim();
        command
            .current_dir(workspace.path(""))
            .args(QUICK)
            .args(["--device", "cpu"])
            .args(args);
        command
    };
    let mut old = report(&mut bench(&[]));
    // As if the twin had been faster by far more than a busy machine makes it slower, measured in shares, and the stream,
    // measured in time.
    for row in old["rows"].as_array_mut().unwrap() {
        if row["path"] == "cpu-twin" {
            for key in ["share_of_roof", "share_low", "share_high"] {
                row[key] = (1e6 * row[key].as_f64().unwrap()).into();
            }
        }
        if row["path"] == "stream" {
            for key in ["ms_median", "ms_low", "ms_high"] {
                row[key] = (1e-6 * row[key].as_f64().unwrap()).into();
            }
        }
        if row["path"] == "reference" {
            row["numel"] = 7.into();
        }
    }
    // As older versions described an adapter.
    let adapter = r#"[{"name":"a","backend":"gl","device_type":"Cpu","driver":"d"}]"#;
    old["adapters"] = serde_json::from_str(adapter).unwrap();
    fs::write(workspace.path("old"), old.to_string()).unwrap();
    let compared = report(&mut bench(&["--compare", "old"]));
    let comparison = &compared["comparison"];
    assert_eq!(comparison["unmatched"], 4);
    let changes = comparison["changes"].as_array().unwrap();
    assert_eq!(changes.len(), 8);
    for change in changes {
        assert_eq!(change["verdict"], "slower", "{change}");
        assert_eq!(change["by_share"], change["path"] == "cpu-twin");
    }
    let text = bench(&["--compare", "old"]).output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("8 of 8 slower"), "{text}");

    // Another format has other fields.
    old["format"] = 1.into();
    old["rows"][0].as_object_mut().unwrap().remove("rule");
    fs::write(workspace.path("old"), old.to_string()).unwrap();
    let refused = bench(&["--compare", "old"]).output().unwrap();
    let stderr = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr.contains("old has format 1"), "{stderr}");
}

#[test]
fn tables_and_pictures_are_written() {
    let workspace = Workspace::new();
    let mut bench = without_driver();
    bench
        .current_dir(workspace.path(""))
        .args(QUICK)
        .args(["--csv", "a.csv", "--plot", "a.svg"]);
    let found = report(&mut bench);
    let csv = fs::read_to_string(workspace.path("a.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + rows(&found).len());
    assert!(csv.starts_with("rule,tensors,numel,device,path,"), "{csv}");
    let svg = fs::read_to_string(workspace.path("a.svg")).unwrap();
    for text in [
        "heavy-ball, one tensor",
        "adamw, one tensor",
        "CPU twin",
        "stream",
        "elements",
    ] {
        assert!(svg.contains(text), "{text}");
    }
    let mut bench = without_driver();
    bench
        .current_dir(workspace.path(""))
        .args(QUICK)
        .args(["--plot", "a.png"]);
    assert!(bench.output().unwrap().status.success());
    let png = fs::read(workspace.path("a.png")).unwrap();
    assert!(png.starts_with(b"\x89PNG\r\n"));
    assert!(png.len() > 20_000, "text and curves take room");
}

#[test]
fn what_cannot_be_measured_is_refused_before_anything_is() {
    let workspace = Workspace::new();
    Model::new([("ids", Tensor::i64(&[1]))]).write(&workspace.path("ids"));
    fs::write(workspace.path("text"), "{}").unwrap();
    let cases: [&[&str]; 24] = [
        &["--numel", "0"],
        &["--numel", "many"],
        &["--numel", "1M,"],
        &["--numel", "-5"],
        &["--numel", "99999999G"],
        &["--tensors", "3", "--numel-each", "3", "--numel", "3"],
        &["--numel-each", "3"],
        &["--tensors", "10", "--numel", "9"],
        &["--model", "ids"],
        &["--model", "no such file"],
        &["--seconds", "-1"],
        &["--seconds", "NaN"],
        &["--form", "adam"],
        &["--rule", "nonsense"],
        &["--rule", "adamw,"],
        &["--rule", "adamw", "--momentum", "0.9"],
        &["--rule", "adamw", "--preset", "tensorflow-js"],
        &["--rule", "adamw", "--beta1", "1"],
        &["--beta1", "0.9"],
        &["--plot", "picture.pdf"],
        &["--plot", "no such directory/a.svg"],
        &["--csv", "no such directory/a.csv"],
        &["--compare", "no such file"],
        &["--compare", "text"],
    ];
    for args in cases {
        let output = workspace.command("bench").args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
        line(&output, 2);
    }
    assert_eq!(fs::read_dir(workspace.path("")).unwrap().count(), 2);
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_leaves_nothing_behind() {
    let workspace = Workspace::new();
    let bench =
        workspace.command("bench --device cpu --numel 64K --seconds 600 --csv a.csv --plot a.svg");
    let bench = Running::start(&bench, workspace.path("").as_path());
    bench.signal("INT");
    let output = bench.wait();
    assert_eq!(output.status.code(), Some(130));
    assert!(output.stdout.is_empty());
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "error: interrupted\n"
    );
    assert_eq!(workspace.snapshot().len(), 0);
}

#[test]
fn a_page_is_written_that_fetches_nothing() {
    let workspace = Workspace::new();
    let mut bench = without_driver();
    bench.current_dir(workspace.path("")).args(QUICK);
    let found = report(bench.args(["--report", "new/folder"]));
    let page = fs::read_to_string(workspace.path("new/folder/bench.html")).unwrap();
    let (page, script) = page.split_once("type=\"application/json\">").unwrap();
    let (script, _) = script.split_once("</script>").unwrap();
    assert_eq!(serde_json::from_str::<Value>(script).unwrap(), found);

    for text in [
        "<svg ",
        "heavy-ball, one tensor",
        "adamw, 4099 elements in 1 tensor; medians of",
        "--report new/folder",
        found["system"]["cpu"].as_str().unwrap(),
        found["date"].as_str().unwrap(),
    ] {
        assert!(page.contains(text), "{text}");
    }
    let lines = page.matches("<td>CPU twin</td>").count();
    let twins = rows(&found).iter().filter(|row| row["path"] == "cpu-twin");
    assert_eq!(lines, twins.count());
    let without_namespace = page.replace("http://www.w3.org/2000/svg", "");
    for fetches in ["http", "src=", "href=", "url(", "@import"] {
        assert!(!without_namespace.contains(fetches), "{fetches}");
    }
    // Nothing of its making is left beside it.
    assert_eq!(
        fs::read_dir(workspace.path("new/folder")).unwrap().count(),
        1
    );
}

#[test]
fn a_page_that_cannot_be_written_is_refused_before_anything_is_measured() {
    let workspace = Workspace::new();
    fs::write(workspace.path("file"), "precious").unwrap();
    fs::create_dir_all(workspace.path("taken/bench.html")).unwrap();
    let before = workspace.snapshot();
    for (args, words) in [
        (
            &["--report", "file"][..],
            &["cannot write into file", "exist"][..],
        ),
        (&["--report", "taken"], &["bench.html", "not a file"]),
        (
            &["--report", ".", "--csv", "bench.html"],
            &["--csv", "--report", "bench.html"],
        ),
    ] {
        let mut bench = workspace.command("bench --device cpu --numel 1G --seconds 86400");
        assert_refused(&bench.args(args).output().unwrap(), words);
    }
    assert_eq!(workspace.snapshot(), before);
}

#[test]
fn after_a_first_look_it_is_said_what_to_try_next() {
    let next = |package: Option<&str>, more: &[&str]| {
        let mut bench = without_driver();
        match package {
            Some(package) => bench.env("CARGO_MANIFEST_DIR", package),
            None => bench.env_remove("CARGO_MANIFEST_DIR"),
        };
        let output = bench.args(QUICK).args(more).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let lines = text.lines().rev();
        let next = lines.take_while(|line| line.starts_with("next: "));
        next.map(str::to_owned).collect::<Vec<_>>()
    };
    for (package, run) in [
        (None, "`wgpu-optim bench "),
        (
            Some(env!("CARGO_MANIFEST_DIR")),
            "`cargo run --release -- bench ",
        ),
    ] {
        let lines = next(package, &[]);
        assert_eq!(lines.len(), 2);
        assert!(lines.iter().all(|line| line.contains(run)), "{lines:?}");
    }
    assert!(next(None, &["--rule", "lion"]).is_empty());
    assert!(next(None, &["--json"]).is_empty());
}
