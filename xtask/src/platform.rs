//! Builds for platforms that this machine is none of.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use xshell::{Cmd, Shell, cmd};

use crate::adapter::apt_get;

/// A platform, and the panics that its standard library has.
#[derive(Clone, Copy, Debug)]
pub struct Platform {
    pub target: &'static str,
    panics: &'static str,
}

pub const WINDOWS: Platform = Platform {
    target: "x86_64-pc-windows-msvc",
    panics: "panic_unwind",
};
pub const MACOS: Platform = Platform {
    target: "aarch64-apple-darwin",
    panics: "panic_unwind",
};
pub const BROWSER: Platform = Platform {
    target: "wasm32-unknown-unknown",
    panics: "panic_abort",
};

/// Flags of the compiler with which a warning fails a build.
pub const DENY_WARNINGS: &str = "-D warnings";

/// Debian's compiler, which comes with the sources of the standard library, and so builds it for any platform.
const DEBIANS: [&str; 4] = ["rustc-web", "cargo-web", "rust-web-src", "rust-web-llvm"];

/// Where these builds go, all of them, so that they share what they run on this machine.
pub fn target_dir() -> PathBuf {
    crate::root().join("target/targets")
}

impl Platform {
    /// Makes sure of a compiler and a standard library: those of rustup, if it has that of the platform, else Debian's,
    /// which are installed if they are missing.
    pub fn prepare(self, shell: &Shell) -> Result<()> {
        if self.is_installed(shell) || are_debians_there(shell) {
            return Ok(());
        }
        let target = self.target;
        if !Path::new("/usr/bin/apt-get").exists() {
            bail!("no standard library for {target}: rustup target add {target}");
        }
        apt_get(shell, &DEBIANS).with_context(|| {
            format!("no standard library for {target}: rustup target add {target} is the other way")
        })
    }

    /// One of cargo's commands for the platform, after [`prepare`](Self::prepare).
    pub fn cargo<'s>(self, shell: &'s Shell, command: &str) -> Result<Cmd<'s>> {
        let Self { target, panics } = self;
        let cargo = if self.is_installed(shell) {
            cmd!(shell, "cargo {command} --locked --target {target}")
        } else {
            let cargo = cmd!(
                shell,
                "/usr/bin/cargo {command} --locked -Zbuild-std=std,{panics} --target {target}"
            );
            let cargo = cargo
                .env("RUSTC", "/usr/bin/rustc")
                .env("RUSTDOC", "/usr/bin/rustdoc")
                .env("RUSTC_BOOTSTRAP", "1");
            // Debian's has a linker for this platform alone.
            cargo.env(
                "CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER",
                rust_lld(shell)?,
            )
        };
        Ok(cargo.env("CARGO_TARGET_DIR", target_dir()))
    }

    /// Whether one command builds for both.
    pub fn goes_with(self, other: Self, shell: &Shell) -> bool {
        self.panics == other.panics && self.is_installed(shell) == other.is_installed(shell)
    }

    /// Whether the toolchain in use has the platform's standard library.
    fn is_installed(self, shell: &Shell) -> bool {
        let target = self.target;
        let libraries = cmd!(shell, "rustc --print target-libdir --target {target}").quiet();
        libraries.read().is_ok_and(|path| Path::new(&path).exists())
    }
}

fn are_debians_there(shell: &Shell) -> bool {
    let status = cmd!(shell, "dpkg --status {DEBIANS...}").quiet();
    status.ignore_stdout().ignore_stderr().run().is_ok()
}

/// The linker of the toolchain in use, which links for any platform.
fn rust_lld(shell: &Shell) -> Result<PathBuf> {
    let libraries = cmd!(shell, "rustc --print target-libdir").quiet().read()?;
    Ok(Path::new(&libraries).with_file_name("bin").join("rust-lld"))
}
