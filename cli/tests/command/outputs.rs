//! Where outputs go, and that the same inputs make the same bytes.

use std::fs;

use wgpu_optim::files::Header;

use crate::model::{Model, Tensor, Workspace, values};
#[cfg(unix)]
use crate::refusals::assert_refused;
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

#[cfg(target_os = "linux")]
const IN_PLACE: &str = "step --device cpu --lr 0.1 --params params --grads grads --out-params params --out-state state";

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
        let state = [
            "format_version",
            "rule",
            "steps",
            "applied_steps",
            "params_crc32",
        ];
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
        let mut step = workspace.step_between("params", [out_params, out_state]);
        step.args(["--device", "cpu", "--lr", "0.1"]);
        assert_refused(&step.output().unwrap(), &[word]);
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
        let mut bench = workspace.command("bench --device cpu --numel 1K");
        bench.args(["--csv", csv, "--plot", plot]);
        let words = "--csv and --plot are the same file";
        assert_refused(&bench.output().unwrap(), &[words]);
        assert!(workspace.snapshot() == before);
    };
    bench("a.svg", "./a.svg");
    bench("here/a.svg", "a.svg");
}

/// An output may replace the input that it goes on from, and no other, however that is spelled.
#[cfg(unix)]
#[test]
fn an_output_in_place_of_another_input_is_refused() {
    use std::os::unix::fs::symlink;

    let workspace = model();
    let output = step(&workspace, "cpu", &[]);
    assert!(output.status.success(), "{output:?}");
    fs::rename(workspace.path("out_state"), workspace.path("state")).unwrap();
    fs::remove_file(workspace.path("out_params")).unwrap();
    let directory = workspace.path("");
    let directory = directory.file_name().unwrap().to_str().unwrap();
    symlink(".", workspace.path("here")).unwrap();
    for name in ["params", "grads", "state"] {
        symlink(name, workspace.path(&format!("link to {name}"))).unwrap();
        let second_name = workspace.path(&format!("second name of {name}"));
        fs::hard_link(workspace.path(name), second_name).unwrap();
    }
    let before = workspace.snapshot();
    for (out, input) in [
        ("out-params", "grads"),
        ("out-params", "state"),
        ("out-state", "params"),
        ("out-state", "grads"),
    ] {
        for target in [
            input.to_owned(),
            format!("./{input}"),
            format!("../{directory}/{input}"),
            format!("here/{input}"),
            format!("link to {input}"),
            format!("second name of {input}"),
            workspace.path(input).to_str().unwrap().to_owned(),
        ] {
            for read in [input.to_owned(), format!("link to {input}")] {
                let mut files = vec![
                    ("params", "params"),
                    ("grads", "grads"),
                    ("state", "state"),
                    ("out-params", "out_params"),
                    ("out-state", "out_state"),
                ];
                files.retain(|(option, _)| *option != out && *option != input);
                files.extend([(out, target.as_str()), (input, &read)]);
                let mut step = workspace.command("step --device cpu --lr 0.1 --momentum 0.9");
                for (option, file) in files {
                    step.args([&format!("--{option}"), file]);
                }
                let words = format!("--{out} and --{input} are the same file, ");
                assert_refused(&step.output().unwrap(), &[&words]);
                assert!(workspace.snapshot() == before, "{out} {target}");
            }
        }
    }
}

/// A file of a cache is named by its content, and snapshots of several revisions are links to it.
#[cfg(unix)]
#[test]
fn a_file_of_the_hugging_face_cache_is_not_replaced() {
    use std::os::unix::fs::symlink;

    let workspace = model();
    let cache = workspace.path("models--some--model");
    for folder in ["blobs", "snapshots/one", "snapshots/two"] {
        fs::create_dir_all(cache.join(folder)).unwrap();
    }
    let blob = cache.join("blobs/0123abcd");
    fs::copy(workspace.path("params"), &blob).unwrap();
    let links = ["one", "two"].map(|revision| {
        let link = cache
            .join("snapshots")
            .join(revision)
            .join("model.safetensors");
        symlink("../../blobs/0123abcd", &link).unwrap();
        link
    });
    symlink(&links[0], workspace.path("link")).unwrap();
    let before = fs::read(&blob).unwrap();
    for path in [&links[0], &links[1], &blob, &workspace.path("link")] {
        let path = path.to_str().unwrap();
        let mut step = workspace.command("step --device cpu --lr 0.1 --grads grads");
        step.args(["--params", path, "--out-state", "state", "--out-params"]);
        let mut elsewhere = step_like(&step);
        let refused = step.arg(path).output().unwrap();
        let words = format!("cannot write {path}: it is a file of the Hugging Face cache");
        assert_refused(&refused, &[&words, "write to a file outside of the cache"]);
        assert!(fs::read(&blob).unwrap() == before);
        assert!(links.iter().all(|link| link.is_symlink()));
        elsewhere.arg("out_params").assert().success();
    }
}

/// The same command once more.
#[cfg(unix)]
fn step_like(command: &assert_cmd::Command) -> assert_cmd::Command {
    let mut other = wgpu_optim();
    other
        .current_dir(command.get_current_dir().unwrap())
        .args(command.get_args());
    other
}

#[cfg(target_os = "linux")]
#[test]
fn what_is_no_file_is_no_output() {
    let workspace = model();
    let before = workspace.snapshot();
    let open = fs::File::open(workspace.path("grads")).unwrap();
    let open = {
        use std::os::fd::AsRawFd as _;
        format!("/proc/{}/fd/{}", std::process::id(), open.as_raw_fd())
    };
    for (target, words) in [
        ("/dev/stdout", "but a device, a pipe or a socket"),
        ("/dev/fd/1", "but a device, a pipe or a socket"),
        (&open, "it leads to what a process has open"),
        ("/dev/null", "but a device, a pipe or a socket"),
        (".", "not a file"),
    ] {
        let mut step = workspace.step_between("params", [target, "state"]);
        step.args(["--device", "cpu", "--lr", "0.1"]);
        let output = step.output().unwrap();
        assert_refused(&output, &[&format!("cannot write {target}"), words]);
        assert!(
            output.stdout.is_empty() && workspace.snapshot() == before,
            "{target}"
        );
    }
}

/// Whoever takes it for a failure makes the step again.
#[cfg(target_os = "linux")]
#[test]
fn a_step_that_is_made_succeeds_even_if_its_report_cannot_be_printed() {
    for json in [&[][..], &["--json"]] {
        let workspace = model();
        let full = fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap();
        let output = std::process::Command::new(crate::program())
            .current_dir(workspace.path(""))
            .args(IN_PLACE.split(' '))
            .args(json)
            .stdout(full)
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{stderr}");
        assert!(
            stderr.starts_with("warning: the step is made and its outputs are in place")
                && stderr.contains("No space left")
                && stderr.lines().count() == 1,
            "{stderr}"
        );
        assert!(workspace.path("state").exists());
    }
}

/// An access control list as Linux keeps it: kind, permissions, and who, where that is somebody by number. The owner, a
/// user and the mask may write, the group may read, and others have these permissions.
#[cfg(target_os = "linux")]
fn acl(user: u32, others: u16) -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (kind, permissions, who) in [
        (0x01_u16, 6_u16, NOBODY),
        (0x02, 6, user),
        (0x04, 4, NOBODY),
        (0x10, 6, NOBODY),
        (0x20, others, NOBODY),
    ] {
        acl.extend(kind.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(who.to_le_bytes());
    }
    acl
}

#[cfg(target_os = "linux")]
#[test]
fn access_control_lists_and_attributes_are_kept() {
    use std::os::unix::fs::PermissionsExt as _;

    const ACL: &str = "system.posix_acl_access";
    let workspace = model();
    let path = workspace.path("params");
    // One user may write and the group may not, which the group's bits of the mode do not say.
    let list = acl(1234, 0);
    xattr::set(&path, ACL, &list).unwrap();
    xattr::set(&path, "user.origin", b"a run").unwrap();
    // In this folder every new file gets a list that lets another user in.
    let inherited = acl(4321, 4);
    fs::write(workspace.path("state"), "of nobody else's").unwrap();
    fs::set_permissions(workspace.path("state"), fs::Permissions::from_mode(0o640)).unwrap();
    xattr::set(workspace.path(""), "system.posix_acl_default", &inherited).unwrap();
    for _ in 0..2 {
        let output = workspace.command(IN_PLACE).output().unwrap();
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{output:?}"
        );
        assert_eq!(xattr::get(&path, ACL).unwrap(), Some(list.clone()));
        assert_eq!(
            xattr::get(&path, "user.origin").unwrap(),
            Some(b"a run".to_vec())
        );
        let mode = |name: &str| {
            fs::metadata(workspace.path(name))
                .unwrap()
                .permissions()
                .mode()
        };
        assert_eq!(mode("params") & 0o777, 0o660);
        assert_eq!(xattr::get(workspace.path("state"), ACL).unwrap(), None);
        assert_eq!(mode("state") & 0o777, 0o640);
    }
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
