//! The pictures and tables that the command writes.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::refusals::assert_refused;
use crate::wgpu_optim;

const NAMES: [&str; 5] = ["convergence", "energy", "hill", "rules", "sixteen_bits"];

fn experiments(out: &Path) -> assert_cmd::Command {
    let mut command = wgpu_optim();
    command.arg("experiments").arg("--out").arg(out);
    command
}

/// The values under `name` in a table whose lines are all as long as its first.
fn column(table: &str, name: &str) -> Vec<String> {
    let mut lines = table
        .lines()
        .map(|line| line.split(',').collect::<Vec<_>>());
    let names = lines.next().unwrap();
    let index = names.iter().position(|other| *other == name).unwrap();
    let values = lines.map(|line| {
        assert_eq!(line.len(), names.len(), "{line:?}");
        line[index].to_owned()
    });
    values.collect()
}

#[test]
fn pictures_tables_and_summary() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("new/folder");
    let output = experiments(&out).arg("--json").output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{stderr}");

    for (name, value, rows) in [
        ("convergence", "error", 1000),
        ("energy", "relative_energy", 4 * 1001),
        ("hill", "position", 2 * 501),
        ("rules", "loss", 15 * 301),
        ("sixteen_bits", "mean", 4 * 1001),
    ] {
        let svg = fs::read_to_string(out.join(name).with_extension("svg")).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        let table = fs::read_to_string(out.join(name).with_extension("csv")).unwrap();
        let values = column(&table, value);
        assert!(values.len() >= rows, "{name}: {}", values.len());
        for value in values {
            assert!(value.parse::<f64>().unwrap().is_finite(), "{name}: {value}");
        }
    }
    assert_eq!(fs::read_dir(&out).unwrap().count(), 2 * NAMES.len());

    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(summary["files"].as_array().unwrap().len(), 10);
    let count = |name: &str| summary[name].as_array().unwrap().len();
    assert_eq!(NAMES.map(count), [6, 4, 2, 15, 4]);
    for run in summary["convergence"].as_array().unwrap() {
        let rate = |name: &str| run[name].as_f64().unwrap();
        assert!((rate("measured_rate") - rate("theoretical_rate")).abs() < 1e-3);
    }
    assert_eq!(summary["hill"][0]["valley"], "shallow");
    assert_eq!(summary["hill"][1]["valley"], "deep");
}

#[test]
fn a_second_run_replaces_the_files_of_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let hill = dir.path().join("hill.csv");
    fs::write(&hill, "old").unwrap();
    let output = experiments(dir.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("the deep valley"), "{text}");
    let first = fs::read(&hill).unwrap();
    assert_ne!(first, b"old");
    experiments(dir.path()).assert().success();
    assert_eq!(fs::read(&hill).unwrap(), first, "the numbers do not vary");
}

#[test]
fn an_unusable_folder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "precious").unwrap();
    let taken = dir.path().join("taken");
    fs::create_dir_all(taken.join("energy.svg")).unwrap();
    for (out, word) in [
        (file.as_path(), "file"),
        (&file.join("below"), "below"),
        (&taken, "energy.svg"),
    ] {
        let output = experiments(out).output().unwrap();
        assert!(output.stdout.is_empty());
        assert_refused(&output, &[word]);
    }
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    assert_eq!(fs::read_dir(&taken).unwrap().count(), 1);
}
