//! The package that needs an MPI.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use xshell::{Shell, cmd};

use crate::adapter::{self, Tests, apt_get};

const PACKAGE: &str = "wgpu-optim-mpi";

/// The Debian packages that it is built with and runs on.
const DEBIANS: [&str; 3] = ["openmpi-bin", "libopenmpi-dev", "libclang-dev"];

/// Installs an MPI, its headers and libclang, which reads these, where they are missing.
pub fn prepare(shell: &Shell) -> Result<()> {
    if is_there(shell) {
        return Ok(());
    }
    ensure!(
        Path::new("/usr/bin/apt-get").exists(),
        "no MPI: {PACKAGE} needs mpirun, mpicc and libclang"
    );
    apt_get(shell, &DEBIANS)?;
    ensure!(
        is_there(shell),
        "{} are installed, and still there is no MPI",
        DEBIANS.join(", ")
    );
    Ok(())
}

fn is_there(shell: &Shell) -> bool {
    let are_there = ["mpirun", "mpicc"].into_iter().all(|program| {
        let version = cmd!(shell, "{program} --version").quiet();
        version.ignore_stdout().ignore_stderr().run().is_ok()
    });
    let libclang = cmd!(shell, "dpkg --status libclang-dev").quiet();
    // Elsewhere it comes as a part of something else, and the build says so if it is missing.
    let is_debian = Path::new("/usr/bin/dpkg").exists();
    are_there && (!is_debian || libclang.ignore_stdout().ignore_stderr().run().is_ok())
}

/// Cargo's arguments for every package that can be built here.
pub fn all_packages(shell: &Shell) -> Vec<&'static str> {
    match is_there(shell) {
        true => vec!["--workspace"],
        false => vec!["--workspace", "--exclude", PACKAGE],
    }
}

/// Runs the tests of the package, which run themselves on several ranks.
pub fn test(shell: &Shell) -> Result<()> {
    prepare(shell).with_context(|| format!("{PACKAGE} cannot be tested"))?;
    let packages = &["--package", PACKAGE];
    adapter::make_sure(
        shell,
        Tests {
            packages,
            target: "ranks",
        },
    )?;
    cmd!(shell, "cargo test --locked {packages...}").run()?;
    Ok(())
}
