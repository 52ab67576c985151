//! What only the superuser can try: files of other owners, and a disk that is full. `cargo xtask test` runs these where
//! it is run by root.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::process::{Command as Process, Output};

use crate::model::{Model, Tensor, Workspace, values};
use crate::program;

fn model(numel: usize) -> Workspace {
    let workspace = Workspace::new();
    let params = Tensor::f32(&[numel], &values(1, numel));
    Model::new([("w", params)]).write(&workspace.path("params"));
    let grads = Tensor::f32(&[numel], &values(2, numel));
    Model::new([("w", grads)]).write(&workspace.path("grads"));
    workspace
}

/// Owner, group and permissions.
fn owner(workspace: &Workspace, name: &str) -> (u32, u32, u32) {
    let metadata = fs::metadata(workspace.path(name)).unwrap();
    (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777)
}

const IN_PLACE: &str = "step --device cpu --params params --grads grads \
    --out-params params --out-state state --lr 0.1";

#[test]
#[ignore = "needs root, to give files to others: cargo xtask test runs it where it is root"]
fn owner_and_group_are_kept() {
    let workspace = model(5);
    chown(workspace.path("params"), Some(1234), Some(2345)).unwrap();
    let mode = fs::Permissions::from_mode(0o4640);
    fs::set_permissions(workspace.path("params"), mode).unwrap();
    let step = |prefix: &[&str]| -> Output {
        let mut words = prefix
            .iter()
            .map(Into::into)
            .chain([program().into_os_string()]);
        let mut process = Process::new(words.next().unwrap());
        process
            .args(words)
            .args(IN_PLACE.split(' '))
            .current_dir(workspace.path(""))
            .output()
            .unwrap()
    };
    let output = step(&[]);
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    assert_eq!(owner(&workspace, "params"), (1234, 2345, 0o4640));
    assert_eq!(owner(&workspace, "state").0, 0);

    // Somebody who may not give files away, but is in the file's group; then somebody who is not.
    for path in ["", "state"] {
        fs::set_permissions(workspace.path(path), fs::Permissions::from_mode(0o777)).unwrap();
    }
    fs::set_permissions(workspace.path("params"), fs::Permissions::from_mode(0o4666)).unwrap();
    let in_group = ["setpriv", "--reuid=77", "--regid=78", "--groups=2345"];
    let stranger = ["setpriv", "--reuid=88", "--regid=88", "--clear-groups"];
    for (somebody, lost, left) in [
        (in_group, "owner 1234", (77, 2345, 0o666)),
        (stranger, "owner 77 and group 2345", (88, 88, 0o666)),
    ] {
        let output = step(&somebody);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        let warning = format!("warning: params: its {lost} could not be kept");
        assert!(stderr.contains(&warning), "{stderr}");
        assert_eq!(owner(&workspace, "params"), left);
    }
}

#[test]
#[ignore = "needs root, to mount a small file system: cargo xtask test runs it where it is root"]
fn a_full_disk_changes_nothing() {
    let workspace = model(200_000);
    // Room for the parameters' file, but not for the state's beside it. The mount ends with the shell.
    let script = r#"
        mkdir disk && mount -t tmpfs -o size=1200k tmpfs disk || exit 99
        echo precious > disk/params; echo precious > disk/state
        "$0" "$@" --out-params disk/params --out-state disk/state
        echo "exit $?"; cat disk/params disk/state; ls -A disk
        umount disk && mount -t tmpfs -o size=1700k tmpfs disk || exit 99
        "$0" "$@" --out-params disk/params --out-state disk/state > /dev/null
        echo "exit $?"; ls -A disk
    "#;
    let output = Process::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .arg(program())
        .args("step --device cpu --lr 0.1 --momentum 0.9".split(' '))
        .args(["--params", "params", "--grads", "grads"])
        .current_dir(workspace.path(""))
        .output()
        .unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert_eq!(
        stdout, "exit 2\nprecious\nprecious\nparams\nstate\nexit 0\nparams\nstate\n",
        "{stderr}"
    );
    assert!(
        stderr.contains("cannot write disk/")
            && stderr.contains("No space left")
            && stderr.lines().count() == 1,
        "{stderr}"
    );
}
