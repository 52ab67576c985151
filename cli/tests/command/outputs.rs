//! Where outputs go, and that the same inputs make the same bytes.

use std::fs;

use wgpu_optim::files::Header;

use crate::model::{Model, Tensor, Workspace, values};
use crate::{DEVICES, wgpu_optim};

/// Parameters with metadata in an order of their own, and gradients for all but one tensor.
fn model() -> Workspace {
    let workspace = Workspace::new();
    let tensors = [
        ("a", Tensor::f32(&[3, 5], &values(1, 15))),
        ("b", Tensor::f32(&[64], &values(2, 64))),
        ("frozen", Tensor::f32(&[2], &values(3, 2))),
        ("ids", Tensor::i64(&[1, 2, 3])),
    ];
    Model::new(tensors).write(&workspace.path("plain"));
    let metadata = [
        "z",
        "format",
        "sshs_model_hash",
        "a",
        "modelspec.hash_sha256",
        "m",
    ];
    let metadata = metadata.map(|key| (key.to_owned(), format!("value of {key}")));
    let plain = fs::read(workspace.path("plain")).unwrap();
    let mut header = Header::of(&plain).unwrap();
    header.metadata = metadata.into();
    let mut params = header.to_bytes().unwrap();
    params.extend(&plain[header.data_start() as usize..]);
    fs::write(workspace.path("params"), params).unwrap();
    fs::remove_file(workspace.path("plain")).unwrap();
    let grads = [
        ("a", Tensor::f32(&[3, 5], &values(4, 15))),
        ("b", Tensor::f32(&[64], &values(5, 64))),
    ];
    Model::new(grads).write(&workspace.path("grads"));
    workspace
}

fn step(workspace: &Workspace, device: &str, args: &[&str]) -> std::process::Output {
    let mut step = workspace.step();
    step.args(["--device", device, "--lr", "0.1", "--momentum", "0.9"]);
    step.args(args).output().unwrap()
}

#[test]
fn the_same_inputs_make_the_same_bytes() {
    for device in DEVICES {
        let workspace = model();
        let outputs = || {
            let output = step(&workspace, device, &[]);
            assert!(output.status.success(), "{output:?}");
            ["out_params", "out_state"].map(|name| fs::read(workspace.path(name)).unwrap())
        };
        let first = outputs();
        for _ in 0..5 {
            assert!(outputs() == first, "{device}");
        }
        let keys = |file: &[u8]| {
            let metadata = Header::of(file).unwrap().metadata;
            metadata.into_iter().map(|(key, _)| key).collect::<Vec<_>>()
        };
        // Hashes of what has changed are left out.
        assert_eq!(keys(&first[0]), ["z", "format", "a", "m"]);
        let state = ["format_version", "rule", "steps", "applied_steps"];
        assert_eq!(keys(&first[1]), state);
    }
}

#[test]
fn what_is_left_out_is_said() {
    let workspace = model();
    let output = step(&workspace, "cpu", &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("sshs_model_hash, modelspec.hash_sha256: hashes of what has changed"),
        "{text}"
    );
    let output = step(&workspace, "cpu", &["--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let dropped = serde_json::json!(["sshs_model_hash", "modelspec.hash_sha256"]);
    assert_eq!(report["dropped_metadata"], dropped);
}

/// A parser that is off by one in the last place read back a decay that is too large for its learning rate.
#[test]
fn every_number_of_a_state_reads_back_as_itself() {
    let workspace = model();
    let args = [
        "--lr",
        "0.073",
        "--weight-decay",
        "13.698630136986303",
        "--decoupled",
        "--momentum",
        "0.9",
    ];
    workspace
        .step()
        .args(["--device", "cpu"])
        .args(args)
        .assert()
        .success();
    fs::rename(workspace.path("out_state"), workspace.path("state")).unwrap();
    workspace
        .step()
        .args(["--device", "cpu"])
        .args(args)
        .args(["--state", "state"])
        .assert()
        .success();
}

/// Two outputs are never one file, however they are spelled.
#[cfg(unix)]
#[test]
fn one_file_under_two_names_is_refused() {
    use std::os::unix::fs::symlink;

    let workspace = model();
    let absolute = |name: &str| workspace.path(name).to_str().unwrap().to_owned();
    let directory = workspace.path("");
    let directory = directory.file_name().unwrap().to_str().unwrap();
    fs::write(workspace.path("old"), "precious").unwrap();
    fs::hard_link(workspace.path("old"), workspace.path("old too")).unwrap();
    symlink("new", workspace.path("link to new")).unwrap();
    symlink("link to new", workspace.path("link to link")).unwrap();
    symlink(".", workspace.path("here")).unwrap();
    symlink("circle", workspace.path("circle")).unwrap();
    let before = workspace.snapshot();
    let refused = |out_params: &str, out_state: &str, word: &str| {
        let output = wgpu_optim()
            .current_dir(workspace.path(""))
            .args([
                "step", "--device", "cpu", "--params", "params", "--grads", "grads", "--lr", "0.1",
            ])
            .args(["--out-params", out_params, "--out-state", out_state])
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            output.status.code(),
            Some(2),
            "{out_params} {out_state}: {stderr}"
        );
        assert!(
            stderr.contains(word) && stderr.lines().count() == 1,
            "{stderr}"
        );
        assert!(workspace.snapshot() == before, "{out_params} {out_state}");
    };
    let same = "--out-params and --out-state are the same file";
    for state in [
        "new".to_owned(),
        "./new".to_owned(),
        absolute("new"),
        format!("../{directory}/new"),
        "here/here/new".to_owned(),
        "link to new".to_owned(),
        "link to link".to_owned(),
    ] {
        refused("new", &state, same);
        refused(&state, "new", same);
    }
    refused("old", "old too", same);
    refused("out", "circle", "too many links");
    refused("out", "..", "not a file");

    let bench = |csv: &str, plot: &str| {
        let mut bench = wgpu_optim();
        bench
            .current_dir(workspace.path(""))
            .args(["bench", "--device", "cpu", "--numel", "1K"]);
        let output = bench.args(["--csv", csv, "--plot", plot]).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(
            stderr.contains("--csv and --plot are the same file"),
            "{stderr}"
        );
        assert!(workspace.snapshot() == before);
    };
    bench("a.svg", "./a.svg");
    bench("here/a.svg", "a.svg");
}

#[cfg(unix)]
#[test]
fn a_link_to_a_file_that_does_not_exist_yet_stays_a_link() {
    use std::os::unix::fs::symlink;

    let workspace = model();
    fs::create_dir(workspace.path("elsewhere")).unwrap();
    symlink("elsewhere/params", workspace.path("out_params")).unwrap();
    symlink("another link", workspace.path("out_state")).unwrap();
    symlink(
        workspace.path("elsewhere/state"),
        workspace.path("another link"),
    )
    .unwrap();
    let output = step(&workspace, "cpu", &[]);
    assert!(output.status.success(), "{output:?}");
    for (link, file) in [
        ("out_params", "elsewhere/params"),
        ("out_state", "elsewhere/state"),
    ] {
        let linked = fs::symlink_metadata(workspace.path(link)).unwrap();
        assert!(linked.is_symlink(), "{link}");
        let written = fs::symlink_metadata(workspace.path(file)).unwrap();
        assert!(written.is_file(), "{file}");
    }
    assert_eq!(
        Model::read(&workspace.path("elsewhere/params"))
            .tensors
            .len(),
        4
    );
}
