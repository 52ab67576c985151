//! Runs the workspace member `kernel-report`.

use std::env;

use anyhow::{Context as _, Result};
use xshell::{Shell, cmd};

/// Builds it and runs one of its commands.
pub fn run(shell: &Shell, command: &str, args: &[String]) -> Result<()> {
    build(shell)?;
    let xtask = env::current_exe()?;
    let target = xtask.ancestors().nth(2);
    let target = target.with_context(|| format!("{} is in no profile", xtask.display()))?;
    let program = target.join("release/kernel-report");
    cmd!(shell, "{program} {command} {args...}").quiet().run()?;
    Ok(())
}

/// Builds it together with the command, so that both have the same features and wgpu is built once for both.
pub fn build(shell: &Shell) -> Result<()> {
    cmd!(
        shell,
        "cargo build --quiet --release --locked --package wgpu-optim-cli --package kernel-report"
    )
    .quiet()
    .run()?;
    Ok(())
}
