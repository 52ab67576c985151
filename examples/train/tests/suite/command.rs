//! The program as a person runs it.

use std::path::Path;
use std::process::{Command, Output};

fn run(out: &Path, args: &[&str], with_driver: bool) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_train"));
    command.args(["--epochs", "3", "--seeds", "2", "--hidden", "4", "--out"]);
    command.arg(out).args(args);
    if !with_driver {
        for variable in ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"] {
            command.env(variable, "/nonexistent.json");
        }
    }
    command.output().unwrap()
}

#[test]
fn table_picture_and_rows_are_written() {
    let out = tempfile::tempdir().unwrap();
    let args = [
        "--device",
        "cpu",
        "--rules",
        "plain@0.1,momentum@same,lion:optax@0.01234",
    ];
    let output = run(out.path(), &args, true);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    for expected in [
        "plain descent",
        "momentum 0.9",
        "lion of optax",
        " 0.1 ",
        " 0.0123 ",
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
    let read = |name: &str| std::fs::read(out.path().join(name)).unwrap();
    assert!(read("train.png").starts_with(b"\x89PNG"));
    let svg = String::from_utf8(read("train.svg")).unwrap();
    assert!(svg.contains("#FFFFFF") && svg.len() < 150_000);
    let rows = String::from_utf8(read("train.csv")).unwrap();
    // A header, and of three rules and two seeds the start and three epochs.
    assert_eq!(rows.lines().count(), 1 + 3 * 2 * 4);
    assert!(rows.starts_with("device,rule,lr,seed,step,train_loss,held_out_loss\n"));
}

/// The command trains on the twin where there is no adapter. Only Vulkan's drivers can be hidden.
#[cfg(target_os = "linux")]
#[test]
fn without_an_adapter_the_twin_does() {
    let out = tempfile::tempdir().unwrap();
    let auto = run(out.path(), &["--rules", "plain@0.1"], false);
    assert!(auto.status.success());
    assert!(String::from_utf8(auto.stdout).unwrap().contains("CPU twin"));
    let gpu = run(
        out.path(),
        &["--rules", "plain@0.1", "--device", "gpu"],
        false,
    );
    assert!(!gpu.status.success());
    assert!(String::from_utf8(gpu.stderr).unwrap().contains("adapter"));
}

#[test]
fn mistakes_are_said() {
    let out = tempfile::tempdir().unwrap();
    for (args, says) in [
        (["--rules", "sgdd"], "sgdd"),
        (["--rules", "plain@same"], "it is the first"),
        (["--batch", "0"], "--batch"),
    ] {
        let output = run(out.path(), &args, true);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(
            !output.status.success() && error.contains(says),
            "{args:?}: {error}"
        );
    }
}
