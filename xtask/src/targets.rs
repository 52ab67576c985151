//! Checks library and command for platforms that this machine is none of.

use anyhow::Result;
use xshell::Shell;

use crate::platform::{BROWSER, DENY_WARNINGS, MACOS, Platform, WINDOWS};

/// A platform, and the packages that are checked for it.
pub type Target = (Platform, &'static [&'static str]);

/// Those of computers.
pub const DESKTOPS: [Target; 2] = [
    (WINDOWS, &["wgpu-optim", "wgpu-optim-cli"]),
    (MACOS, &["wgpu-optim", "wgpu-optim-cli"]),
];

/// What runs in a browser, which `cargo xtask web-test` builds too.
pub const IN_BROWSERS: Target = (BROWSER, &["wgpu-optim"]);

/// Makes sure of compilers and standard libraries.
pub fn prepare(shell: &Shell, targets: &[Target]) -> Result<()> {
    targets
        .iter()
        .try_for_each(|(platform, _)| platform.prepare(shell))
}

/// Checks packages for their platforms, warnings denied: at once where that can be, as each is a chain of packages that wait
/// for one another.
pub fn check(shell: &Shell, targets: &[Target]) -> Result<()> {
    let go_together =
        |(a, of_a): &Target, (b, of_b): &Target| of_a == of_b && a.goes_with(*b, shell);
    for together in targets.chunk_by(go_together) {
        let [(platform, packages), others @ ..] = together else {
            continue;
        };
        let names: Vec<_> = together.iter().map(|(of, _)| of.target).collect();
        eprintln!("{}: {}", names.join(", "), packages.join(", "));
        let others = others.iter().flat_map(|(of, _)| ["--target", of.target]);
        let packages = packages.iter().flat_map(|package| ["--package", package]);
        let cargo = platform.cargo(shell, "check")?.args(others).args(packages);
        cargo.env("RUSTFLAGS", DENY_WARNINGS).run()?;
    }
    Ok(())
}
