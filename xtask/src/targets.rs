//! Checks library and command for platforms that this machine is none of.

use anyhow::{Result, ensure};
use xshell::{Cmd, Shell};

use crate::platform::{BROWSER, DENY_WARNINGS, MACOS, Platform, WINDOWS};

/// A platform, and cargo's arguments for what is checked for it.
pub type Target = (Platform, &'static [&'static str]);

/// Library and command on computers.
const ON_DESKTOPS: &[&str] = &["--package=wgpu-optim", "--package=wgpu-optim-cli"];

/// The targets that no other check builds anything for.
pub const DESKTOPS: [Target; 2] = [(WINDOWS, ON_DESKTOPS), (MACOS, ON_DESKTOPS)];

/// The library in a browser, which `cargo xtask web-test` builds too.
pub const IN_BROWSERS: Target = (BROWSER, &["--package=wgpu-optim"]);

/// The library without wgpu.
pub const WITHOUT_GPU: Target = (
    BROWSER,
    &[
        "--package=wgpu-optim",
        "--no-default-features",
        "--features=safetensors",
    ],
);

/// Makes sure of compilers and standard libraries.
pub fn prepare(shell: &Shell, targets: &[Target]) -> Result<()> {
    targets
        .iter()
        .try_for_each(|(platform, _)| platform.prepare(shell))
}

/// Checks packages for their platforms, warnings denied: at once where that can be, as each is a chain of packages that wait
/// for one another.
pub fn check(shell: &Shell, targets: &[Target]) -> Result<()> {
    checks(shell, targets)?
        .into_iter()
        .try_for_each(|cargo| Ok(cargo.run()?))
}

/// Checks in silence, for when something else has the terminal; what there is to say comes with the failure.
pub fn check_silently(shell: &Shell, targets: &[Target]) -> Result<()> {
    for cargo in checks(shell, targets)? {
        let output = cargo.quiet().ignore_status().output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{said}");
    }
    Ok(())
}

fn checks<'s>(shell: &'s Shell, targets: &[Target]) -> Result<Vec<Cmd<'s>>> {
    let go_together =
        |(a, of_a): &Target, (b, of_b): &Target| of_a == of_b && a.goes_with(*b, shell);
    let mut checks = Vec::new();
    for together in targets.chunk_by(go_together) {
        let [(platform, what), others @ ..] = together else {
            continue;
        };
        let names: Vec<_> = together.iter().map(|(of, _)| of.target).collect();
        eprintln!("{}: {}", names.join(", "), what.join(" "));
        let others = others.iter().flat_map(|(of, _)| ["--target", of.target]);
        let cargo = platform.cargo(shell, "check")?.args(others).args(*what);
        checks.push(cargo.env("RUSTFLAGS", DENY_WARNINGS));
    }
    Ok(checks)
}
