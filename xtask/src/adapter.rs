//! Makes sure that the machine has a wgpu adapter, a software one if need be.

use std::env;

use anyhow::{Context as _, Result, ensure};
use xshell::{Shell, cmd};

const PACKAGE: &str = "mesa-vulkan-drivers";

/// Tests that need an adapter.
#[derive(Clone, Copy, Debug)]
pub struct Tests<'a> {
    /// Cargo's arguments for their packages.
    pub packages: &'a [&'a str],
    /// The test target that says whether there is one, by [`IS_THERE`].
    pub target: &'a str,
}

/// The name of the test that there is an adapter, whatever it is in.
const IS_THERE: &str = "an_adapter_is_there";

/// Leaves the machine as it is where there is an adapter; else installs Mesa's on Debian and Ubuntu.
pub fn make_sure(shell: &Shell, tests: Tests<'_>) -> Result<()> {
    // The tests themselves say whether they find one; building them all first costs nothing twice.
    let packages = tests.packages;
    cmd!(shell, "cargo test --locked {packages...} --no-run").run()?;
    if is_there(shell, tests)? {
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
        is_there(shell, tests)?,
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
pub fn test_others(shell: &Shell, tests: Tests<'_>) -> Result<()> {
    let packages = tests.packages;
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
        if is_there(shell, tests)? {
            eprintln!("adapter tests on {name}");
            cmd!(
                shell,
                "cargo test --locked {packages...} --test suite adapter::"
            )
            .run()?;
        } else {
            eprintln!("adapter tests on {name}: skipped, it is not on this machine");
        }
    }
    Ok(())
}

fn is_there(shell: &Shell, Tests { packages, target }: Tests<'_>) -> Result<bool> {
    let found = cmd!(
        shell,
        "cargo test --locked {packages...} --test {target} {IS_THERE}"
    )
    .quiet()
    .ignore_status()
    .output()?;
    Ok(found.status.success())
}
