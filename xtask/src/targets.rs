//! Checks library and command for platforms that this machine is none of.

use anyhow::Result;
use xshell::Shell;

use crate::platform::{BROWSER, MACOS, Platform, WINDOWS};

/// What is checked for each platform.
const TARGETS: [(Platform, &[&str]); 3] = [
    (WINDOWS, &["wgpu-optim", "wgpu-optim-cli"]),
    (MACOS, &["wgpu-optim", "wgpu-optim-cli"]),
    (BROWSER, &["wgpu-optim"]),
];

/// Makes sure of compilers and standard libraries.
pub fn prepare(shell: &Shell) -> Result<()> {
    TARGETS
        .iter()
        .try_for_each(|(platform, _)| platform.prepare(shell))
}

/// Checks all platforms, warnings denied.
pub fn check(shell: &Shell) -> Result<()> {
    let _warnings = shell.push_env("RUSTFLAGS", "-D warnings");
    for (platform, packages) in TARGETS {
        eprintln!("{}: {}", platform.target, packages.join(", "));
        let packages = packages.iter().flat_map(|package| ["--package", package]);
        platform.cargo(shell, "check")?.args(packages).run()?;
    }
    Ok(())
}
