//! `wgpu-optim`: applies the momentum update to safetensors models and benchmarks GPU against CPU.

mod accuracy;
mod args;
mod backend;
mod bench;
mod experiments;
mod files;
mod info;
mod interrupt;
mod picture;
mod problem;
mod progress;
mod step;

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::Parser as _;
use serde::Serialize;

use args::{Args, BenchArgs, Command, CommonArgs};

/// Why a command did not succeed.
#[derive(Debug)]
enum Failure {
    /// Something is wrong with the arguments or the files: exit code 2, and nothing has been written.
    Refused(anyhow::Error),
    /// The device failed: exit code 1.
    Failed(anyhow::Error),
    /// The device computed something wrong: exit code 1, whatever else would do.
    Wrong(anyhow::Error),
    /// Ctrl-C: exit code 130, and nothing has been written.
    Interrupted,
}

impl Failure {
    /// Exit code after Ctrl-C, as of a program that the signal has ended.
    const INTERRUPTED: u8 = 130;

    fn failed(error: impl Into<anyhow::Error>) -> Self {
        Self::Failed(error.into())
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Refused(error)
    }
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("error")).init();
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) if error.use_stderr() => {
            return report(&Failure::Refused(args::one_line(&error)));
        }
        Err(help_or_version) => {
            let printed = help_or_version.print();
            return printed.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
        }
    };
    let outcome = match &args.command {
        Some(Command::Step(step)) => step::run(&args.common, step),
        Some(Command::Bench(bench)) => bench::run(&args.common, bench),
        Some(Command::Accuracy) => accuracy::run(&args.common),
        Some(Command::Info(info)) => info::run(&args.common, info),
        Some(Command::Experiments(experiments)) => experiments::run(&args.common, experiments),
        None => bench::run(&args.common, &BenchArgs::default()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&failure),
    }
}

/// One line on stderr, whatever the error holds.
fn report(failure: &Failure) -> ExitCode {
    let (error, code) = match failure {
        Failure::Refused(error) => (format!("{error:#}"), 2),
        Failure::Failed(error) | Failure::Wrong(error) => (format!("{error:#}"), 1),
        Failure::Interrupted => ("interrupted".to_owned(), Failure::INTERRUPTED),
    };
    let line = error.split_whitespace().collect::<Vec<_>>().join(" ");
    // Where stderr is closed there is nobody left to tell.
    let _ = writeln!(io::stderr(), "error: {line}");
    ExitCode::from(code)
}

/// Prints the one document of a command: with `--json` the report itself, else its text. A reader that closes the pipe
/// early has read enough.
fn print(common: &CommonArgs, report: &impl Serialize, text: String) -> Result<(), Failure> {
    let document = if common.json {
        serde_json::to_string_pretty(report).map_err(Failure::failed)?
    } else {
        text
    };
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{}", document.trim_end()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::failed(error)),
        _ => Ok(()),
    }
}
