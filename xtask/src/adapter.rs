//! Makes sure that the machine has a wgpu adapter, a software one if need be.

use std::env;

use anyhow::{Context as _, Result, ensure};
use xshell::{Shell, cmd};

const PACKAGE: &str = "mesa-vulkan-drivers";

/// Leaves the machine as it is where there is an adapter; else installs Mesa's on Debian and Ubuntu.
pub fn make_sure(shell: &Shell) -> Result<()> {
    // The tests themselves say whether they find one; building them all first costs nothing twice.
    cmd!(shell, "cargo test --workspace --locked --no-run").run()?;
    if is_there(shell)? {
        return Ok(());
    }
    ensure!(
        cmd!(shell, "apt-get --version")
            .quiet()
            .ignore_stdout()
            .ignore_stderr()
            .run()
            .is_ok(),
        "no wgpu adapter on this machine. A software one will do: Mesa's lavapipe, in the package \
         {PACKAGE} on Debian and Ubuntu, vulkan-swrast on Arch, mesa-vulkan-drivers on Fedora"
    );
    eprintln!("no wgpu adapter on this machine: installing {PACKAGE}");
    apt_get(shell, &[PACKAGE])?;
    ensure!(
        is_there(shell)?,
        "{PACKAGE} is installed, and still there is no wgpu adapter (VK_DRIVER_FILES is {:?})",
        env::var_os("VK_DRIVER_FILES")
    );
    Ok(())
}

/// Installs packages of Debian and Ubuntu, by `sudo` where that is needed.
pub fn apt_get(shell: &Shell, packages: &[&str]) -> Result<()> {
    let (program, args): (_, &[&str]) = match cmd!(shell, "id -u").quiet().read()?.as_str() {
        "0" => ("env", &[]),
        _ => ("sudo", &["env"]),
    };
    let install = ["apt-get", "install", "--yes"];
    for apt_get in [vec!["apt-get", "update"], [&install, packages].concat()] {
        cmd!(
            shell,
            "{program} {args...} DEBIAN_FRONTEND=noninteractive {apt_get...}"
        )
        .run()
        .with_context(|| format!("{} could not be installed", packages.join(", ")))?;
    }
    Ok(())
}

/// Where Debian's chromium package puts SwiftShader's description for the Vulkan loader.
pub const SWIFTSHADER: &str = "/usr/lib/chromium/vk_swiftshader_icd.json";

/// Runs the adapter tests on the other software adapters, and says which are not there.
pub fn test_others(shell: &Shell) -> Result<()> {
    let others = [
        ("Mesa through GL", vec![("WGPU_BACKEND", "gl")]),
        (
            "SwiftShader",
            vec![
                ("VK_DRIVER_FILES", SWIFTSHADER),
                ("VK_ICD_FILENAMES", SWIFTSHADER),
            ],
        ),
    ];
    for (name, variables) in others {
        let _variables: Vec<_> = variables
            .into_iter()
            .map(|(key, value)| shell.push_env(key, value))
            .collect();
        if is_there(shell)? {
            eprintln!("adapter tests on {name}");
            cmd!(
                shell,
                "cargo test --workspace --locked --test suite adapter::"
            )
            .run()?;
        } else {
            eprintln!("adapter tests on {name}: skipped, it is not on this machine");
        }
    }
    Ok(())
}

fn is_there(shell: &Shell) -> Result<bool> {
    let test = "adapter::an_adapter_is_there";
    let found = cmd!(
        shell,
        "cargo test --workspace --locked --test suite {test} -- --exact"
    )
    .quiet()
    .ignore_status()
    .output()?;
    Ok(found.status.success())
}
