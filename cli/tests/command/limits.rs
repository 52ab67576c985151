//! What the system does not grant: open files, memory, a reader to the end.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::{Command as Process, Output, Stdio};

use assert_cmd::Command;
use serde_json::{Value, json};

use crate::benchmark::{report, rows};
use crate::model::{Model, Tensor, Workspace};
use crate::refusals::line;
use crate::reports::json;
use crate::{program, wgpu_optim};

/// The command under limits of the shell's.
fn limited_to(limits: &str, args: &[&str]) -> Command {
    let mut command = Command::new("sh");
    let shell = format!("ulimit {limits} && exec \"$0\" \"$@\"");
    command.args(["-c", &shell]).arg(program()).args(args);
    command
}

/// A model of a tensor in each of so many files, `NAME.index.json`.
fn write_scattered(workspace: &Workspace, name: &str, files: usize) {
    let mut weight_map = serde_json::Map::new();
    for file in 0..files {
        let (tensor, shard) = (format!("t{file}"), format!("{name}-{file}.safetensors"));
        let model = Model::new([(&*tensor, Tensor::f32(&[2], &[file as f32, 1.0]))]);
        model.write(&workspace.path(&shard));
        weight_map.insert(tensor, shard.into());
    }
    let index = json!({"metadata": {"total_size": 8 * files}, "weight_map": weight_map});
    let path = workspace.path(&format!("{name}.index.json"));
    fs::write(path, index.to_string()).unwrap();
}

#[test]
fn a_model_of_more_files_than_the_soft_limit_is_stepped() {
    const FILES: usize = 300;
    let workspace = Workspace::new();
    write_scattered(&workspace, "params", FILES);
    write_scattered(&workspace, "grads", FILES);
    fs::create_dir(workspace.path("out")).unwrap();
    let step = |limits: &str| {
        let args = [
            "step",
            "--device",
            "cpu",
            "--params",
            "params.index.json",
            "--grads",
            "grads.index.json",
            "--out-params",
            "out/params.index.json",
            "--out-state",
            "out/state.index.json",
            "--lr",
            "0.5",
            "--momentum",
            "0.5",
        ];
        let mut step = limited_to(limits, &args);
        step.current_dir(workspace.path("")).output().unwrap()
    };
    let refused = line(&step("-n 64"), 2);
    assert!(
        refused.contains("params-") && refused.contains("may have 64 files open"),
        "{refused}"
    );
    assert_eq!(fs::read_dir(workspace.path("out")).unwrap().count(), 0);

    let stepped = step("-S -n 64");
    let stderr = String::from_utf8_lossy(&stepped.stderr);
    assert!(stepped.status.success(), "{stderr}");
    for file in [0, 1, FILES - 1] {
        let stepped = Model::read(&workspace.path(&format!("out/params-{file}.safetensors")));
        let expected = [file as f32 / 2.0, 0.5];
        assert_eq!(stepped.tensors[&format!("t{file}")].values(), expected);
    }
}

/// Elements that no machine has memory for, though some would promise it.
const TOO_MANY: &str = "512G";

fn notes(report: &Value) -> Vec<&str> {
    let notes = report["notes"].as_array().unwrap().iter();
    notes.map(|note| note.as_str().unwrap()).collect()
}

fn numels(report: &Value) -> BTreeSet<u64> {
    let rows = rows(report).iter();
    rows.map(|row| row["numel"].as_u64().unwrap()).collect()
}

const BENCH: [&str; 4] = ["bench", "--seconds", "0", "--form"];

#[test]
fn a_size_that_there_is_no_memory_for_is_left_out_and_the_others_are_reported() {
    let workspace = Workspace::new();
    for device in ["cpu", "gpu"] {
        let mut bench = wgpu_optim();
        bench
            .current_dir(workspace.path(""))
            .args(BENCH)
            .args(["plain", "--device", device, "--csv", "table.csv"])
            .args(["--numel", &format!("1K,{TOO_MANY},2K")]);
        let report = report(&mut bench);
        assert_eq!(numels(&report), BTreeSet::from([1 << 10, 2 << 10]));
        let said = format!(
            "plain of {} elements: not measured, it needs about",
            512_u64 << 30
        );
        let notes = notes(&report);
        assert!(notes.iter().any(|note| note.contains(&said)), "{notes:?}");
        let table = fs::read_to_string(workspace.path("table.csv")).unwrap();
        assert_eq!(table.lines().count(), 1 + rows(&report).len());
    }
    // So many names are too much, too.
    let mut bench = wgpu_optim();
    bench.args(BENCH).args(["plain", "--device", "cpu"]);
    let report = report(bench.args(["--tensors", &format!("3,{TOO_MANY}"), "--numel-each", "1"]));
    assert_eq!(numels(&report), BTreeSet::from([3]));

    for (command, said) in [
        ("bench", "nothing was measured"),
        ("accuracy", "nothing was compared"),
    ] {
        let mut alone = wgpu_optim();
        alone.args([command, "--device", "cpu", "--numel", TOO_MANY]);
        let refused = line(&alone.output().unwrap(), 1);
        assert!(
            refused.contains(said) && refused.contains("it needs about"),
            "{refused}"
        );
    }
}

/// Runs the command on one thread, with so many KiB of addresses.
fn with_memory(kib: u64, args: &[&str]) -> Output {
    let mut command = limited_to(&format!("-v {kib}"), args);
    command
        .env("RAYON_NUM_THREADS", "1")
        .env("MALLOC_ARENA_MAX", "1")
        .args(["--device", "cpu", "--json"]);
    command.output().unwrap()
}

/// KiB that the command takes before it has computed anything.
fn base_kib() -> u64 {
    const LIMIT_KIB: u64 = 1 << 20;
    let refused = line(
        &with_memory(
            LIMIT_KIB,
            &["accuracy", "--numel", TOO_MANY, "--rule", "sgd"],
        ),
        1,
    );
    let (_, available) = refused.split_once(" of memory, and ").unwrap();
    let (mib, _) = available.split_once(" MiB are available").unwrap();
    LIMIT_KIB - mib.parse::<u64>().unwrap() * 1024
}

/// Where there is memory for some of what is to be measured.
#[test]
fn an_allocation_that_would_fail_is_not_tried() {
    let base = base_kib();
    let bench = "bench --seconds 0 --hot-caches --form plain --rule amsgrad --numel 1K,4M,64M";
    let bench: Vec<_> = bench.split(' ').collect();
    let report = json(&with_memory(base + (300 << 10), &bench));
    let measured: BTreeSet<_> = rows(&report)
        .iter()
        .map(|row| {
            (
                row["rule"].as_str().unwrap(),
                row["numel"].as_u64().unwrap(),
            )
        })
        .collect();
    let expected = [("plain", 1 << 10), ("plain", 4 << 20), ("amsgrad", 1 << 10)];
    assert_eq!(measured, BTreeSet::from(expected));
    let notes = notes(&report);
    // The problem alone has room, but not what steps it; and not even the problem.
    for said in [
        "CPU, amsgrad of 4194304 elements",
        "all devices, plain of 67108864 elements",
        "all devices, amsgrad of 67108864 elements",
    ] {
        assert!(notes.iter().any(|note| note.starts_with(said)), "{notes:?}");
    }

    let report = json(&with_memory(
        base + (34 << 10),
        &["accuracy", "--numel", "256K"],
    ));
    let names = |of: &Value| -> Vec<String> {
        let list = of.as_array().unwrap().iter();
        list.map(|entry| entry.as_str().unwrap_or_default().to_owned())
            .collect()
    };
    let rows = report["rows"].as_array().unwrap().iter();
    let rules: Vec<_> = rows.map(|row| row["rule"].as_str().unwrap()).collect();
    assert!(
        rules.contains(&"plain") && !rules.contains(&"amsgrad"),
        "{rules:?}"
    );
    let left_out = names(&report["left_out"]);
    let amsgrad = |left_out: &String| left_out.starts_with("amsgrad: it needs about");
    assert!(left_out.iter().any(amsgrad), "{left_out:?}");
}

#[test]
fn a_reader_that_closes_the_pipe_early_has_read_enough() {
    for args in [
        &["--help"][..],
        &["--version"],
        &["step", "--help"],
        &["info"],
        &["info", "--json"],
        &["completions", "bash"],
        &["man"],
        &[
            "bench",
            "--device",
            "cpu",
            "--numel",
            "1K",
            "--seconds",
            "0",
        ],
    ] {
        // At once, and after a line.
        for lines in [0, 1] {
            let mut child = Process::new(program())
                .args(args)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let mut stdout = BufReader::new(child.stdout.take().unwrap());
            for _ in 0..lines {
                stdout.read_line(&mut String::new()).unwrap();
            }
            drop(stdout);
            let output = child.wait_with_output().unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{args:?}: {stderr}");
            assert!(!stderr.contains("pipe"), "{args:?}: {stderr}");
        }
    }
}

#[test]
fn a_disk_that_is_full_is_said() {
    for args in [&["--help"][..], &["info"]] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let mut command = Process::new(program());
        let output = command.args(args).stdout(full).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("cannot write to stdout"), "{stderr}");
    }
}
