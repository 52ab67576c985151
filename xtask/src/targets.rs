//! Checks library and command for platforms that this machine is none of.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use xshell::{Shell, cmd};

use crate::adapter::apt_get;

/// A platform, the packages that are checked for it, and the panics that its standard library has.
const TARGETS: [(&str, &[&str], &str); 3] = [
    (
        "x86_64-pc-windows-msvc",
        &["wgpu-optim", "wgpu-optim-cli"],
        "panic_unwind",
    ),
    (
        "aarch64-apple-darwin",
        &["wgpu-optim", "wgpu-optim-cli"],
        "panic_unwind",
    ),
    ("wasm32-unknown-unknown", &["wgpu-optim"], "panic_abort"),
];

/// Debian's compiler, which comes with the sources of the standard library, and so builds it for any platform.
const DEBIANS: [&str; 4] = ["rustc-web", "cargo-web", "rust-web-src", "rust-web-llvm"];

/// Checks all platforms, warnings denied: by the installed standard library where rustup has it, else by Debian's
/// compiler, which is installed if it is missing.
pub fn run(shell: &Shell) -> Result<()> {
    let _warnings = shell.push_env("RUSTFLAGS", "-D warnings");
    let _apart = shell.push_env("CARGO_TARGET_DIR", crate::root().join("target/targets"));
    for (target, packages, panics) in TARGETS {
        eprintln!("{target}: {}", packages.join(", "));
        let packages = packages.iter().flat_map(|package| ["--package", package]);
        let packages: Vec<_> = packages.collect();
        if is_installed(shell, target)? {
            cmd!(
                shell,
                "cargo check --locked --target {target} {packages...}"
            )
            .run()?;
            continue;
        }
        install_debians(shell, target)?;
        let build_std = format!("-Zbuild-std=std,{panics}");
        cmd!(
            shell,
            "env RUSTC=/usr/bin/rustc RUSTDOC=/usr/bin/rustdoc RUSTC_BOOTSTRAP=1
             /usr/bin/cargo check --locked {build_std} --target {target} {packages...}"
        )
        .run()?;
    }
    Ok(())
}

/// Whether the toolchain in use has the platform's standard library.
fn is_installed(shell: &Shell, target: &str) -> Result<bool> {
    let libraries = cmd!(shell, "rustc --print target-libdir --target {target}")
        .quiet()
        .read()?;
    Ok(Path::new(&libraries).exists())
}

fn install_debians(shell: &Shell, target: &str) -> Result<()> {
    let status = cmd!(shell, "dpkg --status {DEBIANS...}")
        .quiet()
        .ignore_stdout()
        .ignore_stderr();
    if status.run().is_ok() {
        return Ok(());
    }
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("no standard library for {target}: rustup target add {target}");
    }
    apt_get(shell, &DEBIANS).with_context(|| {
        format!("no standard library for {target}: rustup target add {target} is the other way")
    })
}
