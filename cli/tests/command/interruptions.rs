//! A step that does not come to its end: whatever happens, the outputs are as they were and nothing else is left.

use std::fs::{self, OpenOptions};
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command as Process;

use wgpu_optim::files::{Dtype, Header};

use crate::model::{Model, Tensor, Workspace};
use crate::program;
use crate::refusals::assert_refused;
use crate::running::Running;

/// A workspace with a model of zeros that takes a while, but no space on the disk.
fn large() -> Workspace {
    let workspace = Workspace::new();
    let numel = 24 << 20;
    for name in ["params", "grads"] {
        let tensor = ("w".to_owned(), Dtype::F32, vec![numel]);
        let start = Header::new(Vec::new(), [tensor])
            .unwrap()
            .to_bytes()
            .unwrap();
        fs::write(workspace.path(name), &start).unwrap();
        let file = OpenOptions::new()
            .write(true)
            .open(workspace.path(name))
            .unwrap();
        file.set_len((start.len() + 4 * numel) as u64).unwrap();
    }
    fs::write(workspace.path("out_params"), "precious").unwrap();
    fs::write(workspace.path("out_state"), "precious, too").unwrap();
    workspace
}

fn start(workspace: &Workspace) -> Running {
    let mut step = workspace.step();
    step.args(["--device", "cpu", "--lr", "0.1", "--momentum", "0.9"]);
    Running::start(&step, &workspace.path(""))
}

/// Names and sizes of all files; the content of those that are precious.
fn files(workspace: &Workspace) -> Vec<(String, u64, String)> {
    let entries = fs::read_dir(workspace.path(""))
        .unwrap()
        .map(Result::unwrap);
    let mut files: Vec<_> = entries
        .map(|entry| {
            let bytes = entry.metadata().unwrap().len();
            let content = match bytes {
                ..100 => fs::read_to_string(entry.path()).unwrap_or_default(),
                _ => String::new(),
            };
            (entry.file_name().into_string().unwrap(), bytes, content)
        })
        .collect();
    files.sort();
    files
}

#[test]
fn signals_end_it_with_their_exit_code() {
    for (signal, code) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let workspace = large();
        let before = files(&workspace);
        let running = start(&workspace);
        running.signal(signal);
        let output = running.wait();
        assert_eq!(output.status.code(), Some(code), "{signal}: {output:?}");
        assert_eq!(output.stderr, b"error: interrupted\n");
        assert!(output.stdout.is_empty());
        assert_eq!(files(&workspace), before, "{signal}");
    }
}

#[test]
fn a_killed_one_leaves_nothing() {
    let workspace = large();
    let before = files(&workspace);
    let running = start(&workspace);
    running.signal("KILL");
    assert_eq!(running.wait().status.signal(), Some(9));
    assert_eq!(files(&workspace), before);
}

#[test]
fn a_file_that_changes_while_it_is_read_is_an_error() {
    for name in ["params", "grads"] {
        for longer in [false, true] {
            let workspace = large();
            let running = start(&workspace);
            let file = OpenOptions::new()
                .write(true)
                .open(workspace.path(name))
                .unwrap();
            let bytes = file.metadata().unwrap().len();
            file.set_len(if longer { bytes + 1 } else { 4096 }).unwrap();
            let before = files(&workspace);
            let output = running.wait();
            let how = if longer {
                "it was changed"
            } else {
                "it became shorter"
            };
            assert_refused(&output, &[&format!("cannot read {name}: {how}")]);
            assert_eq!(files(&workspace), before);
        }
    }
}

/// Of two that go on from one model, one would be lost.
#[test]
fn of_two_runs_in_place_the_second_is_refused() {
    let in_place = |workspace: &Workspace, out_state: &str| {
        let mut step = workspace.step_between("params", ["params", out_state]);
        step.args(["--device", "cpu", "--lr", "0.1", "--momentum", "0.9"]);
        step
    };
    let workspace = large();
    let first = Running::start_with_lock(&in_place(&workspace, "state 1"));
    let before = files(&workspace);
    let second = in_place(&workspace, "state 2").output().unwrap();
    assert_refused(&second, &["params is being replaced by another run"]);
    assert_eq!(files(&workspace), before);
    // Whoever only reads it may.
    let mut reader = workspace.step();
    reader
        .args(["--device", "cpu", "--lr", "0.1"])
        .assert()
        .success();
    let output = first.wait();
    assert!(output.status.success(), "{output:?}");
    // Nobody has it any more.
    in_place(&workspace, "state 2").assert().success();

    // Another program knows nothing of locks.
    for replaced in ["params", "state 2"] {
        let mut step = in_place(&workspace, "state 2");
        step.args(["--state", "state 2"]);
        let running = Running::start(&step, &workspace.path(""));
        fs::write(workspace.path("other"), "precious").unwrap();
        fs::rename(workspace.path(replaced), workspace.path("was")).unwrap();
        fs::rename(workspace.path("other"), workspace.path(replaced)).unwrap();
        let before = files(&workspace);
        let output = running.wait();
        // When it is read, or when it is to be replaced.
        assert_refused(&output, &[&format!("{replaced}: it was changed meanwhile")]);
        assert_eq!(files(&workspace), before);
        fs::rename(workspace.path("was"), workspace.path(replaced)).unwrap();
    }
}

/// However many steps a window still has to make.
#[test]
fn a_signal_does_not_wait_for_all_of_repeat() {
    for args in [&[][..], &["--masters", "none", "--rounding", "stochastic"]] {
        let workspace = large();
        let mut step = workspace.step();
        step.args(["--device", "cpu", "--lr", "0.1", "--repeat", "4000000000"])
            .args(args);
        let running = Running::start(&step, &workspace.path(""));
        let before = files(&workspace);
        running.signal("INT");
        let began = std::time::Instant::now();
        let output = running.wait();
        assert_eq!(output.status.code(), Some(130), "{output:?}");
        assert!(began.elapsed().as_secs() < 60);
        assert_eq!(files(&workspace), before);
    }
}

#[test]
fn an_output_that_cannot_be_replaced_takes_back_the_other() {
    for blocked in ["out_params", "out_state"] {
        let workspace = large();
        let running = start(&workspace);
        fs::remove_file(workspace.path(blocked)).unwrap();
        fs::create_dir(workspace.path(blocked)).unwrap();
        let before = files(&workspace);
        let output = running.wait();
        assert_refused(&output, &[blocked]);
        assert_eq!(files(&workspace), before);
    }
}

/// A file may become as large as so many blocks of 512 bytes: each write of both outputs fails once.
#[test]
fn a_write_that_fails_anywhere_changes_nothing() {
    let workspace = Workspace::new();
    let tensors = [
        ("a", Tensor::f32(&[700], &[1.0; 700])),
        ("frozen", Tensor::i64(&[7; 300])),
        ("b", Tensor::f32(&[900], &[1.0; 900])),
    ];
    Model::new(tensors.clone()).write(&workspace.path("params"));
    let [a, _, b] = tensors;
    Model::new([a, b]).write(&workspace.path("grads"));
    for name in ["out_params", "out_state"] {
        fs::write(workspace.path(name), "precious").unwrap();
    }
    let before = workspace.snapshot();
    let mut step = workspace.step();
    step.args(["--device", "cpu", "--lr", "0.1", "--momentum", "0.9"]);
    let with_limit = |blocks: usize| {
        let limited = format!("ulimit -f {blocks}; trap '' XFSZ; exec \"$0\" \"$@\"");
        let mut shell = Process::new("sh");
        let shell = shell.args(["-c", &limited]).arg(program());
        shell
            .args(step.get_args())
            .current_dir(workspace.path(""))
            .output()
            .unwrap()
    };
    let largest = fs::metadata(workspace.path("params")).unwrap().len();
    let blocks = (largest as usize).div_ceil(512);
    assert!(blocks > 15);
    for blocks in 0..blocks {
        let output = with_limit(blocks);
        assert_refused(&output, &["cannot write out_"]);
        assert_eq!(workspace.snapshot(), before, "{blocks}");
    }
    let output = with_limit(blocks);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        Model::read(&workspace.path("out_params")).tensors["a"].values()[0],
        0.9
    );
}
