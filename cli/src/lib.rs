//! `wgpu-optim`: applies optimizer steps to safetensors models and benchmarks GPU against CPU.
//!
//! The command as a library, so that it can be run in a process of somebody else's, a fuzzer's for one: [`run`] is all
//! there is to it. The rest is what the project's other programs share with it: arguments, devices and failures of
//! commands and, with feature `lab`, the look of its pictures in `picture`.

mod args;
mod backend;
mod groups;
mod info;
mod interrupt;
#[cfg(feature = "lab")]
mod lab;
mod manual;
mod progress;
mod rule;
mod step;
mod system;

use std::ffi::OsString;
use std::fmt;
use std::io::{self, Write as _};

use clap::Parser as _;
use clap::error::ErrorKind;
use serde::Serialize;
use wgpu_optim_files::{EngineError, FileError};

use args::{Args, Command};
pub use args::{CommonArgs, usage_error, with_negative_numbers};
pub use backend::Choice;
pub use groups::check_none as check_no_groups;
pub use interrupt::Interrupt;
#[cfg(feature = "lab")]
pub use lab::picture;
pub use progress::Progress;
pub use rule::{FieldArgs, Resumed, RuleArgs};
pub use step::round::{Over, RoundReport, outer_rule};
pub use system::{allow_open_files, peak_memory_bytes};

/// Why a command did not succeed.
#[derive(Debug)]
pub enum Failure {
    /// Something is wrong with the arguments or the files: exit code 2, and nothing has been written.
    Refused(anyhow::Error),
    /// The device failed: exit code 1.
    Failed(anyhow::Error),
    /// The device computed something wrong: exit code 1, whatever else would do.
    Wrong(anyhow::Error),
    /// A signal asked the program to end: exit code 128 and its number, as of one that it has ended (130 for Ctrl-C),
    /// and nothing has been written.
    Interrupted(u8),
}

impl Failure {
    fn failed(error: impl Into<anyhow::Error>) -> Self {
        Self::Failed(error.into())
    }

    /// The exit code.
    #[must_use]
    pub const fn code(&self) -> u8 {
        match self {
            Self::Refused(_) => 2,
            Self::Failed(_) | Self::Wrong(_) => 1,
            Self::Interrupted(signal) => 128 + *signal,
        }
    }

    /// Says it in one line on stderr.
    pub fn report(&self) {
        // Where stderr is closed there is nobody left to tell.
        let _ = writeln!(io::stderr(), "error: {self}");
    }
}

/// In one line, whatever the error holds.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&one_line(&match self {
            Self::Refused(error) | Self::Failed(error) | Self::Wrong(error) => with_causes(error),
            Self::Interrupted(_) => "interrupted".to_owned(),
        }))
    }
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Self {
        Self::Refused(error.into())
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        Self::Failed(error.into())
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Refused(error)
    }
}

/// Makes `bench` of arguments without a command where `cargo run` has started this package's own program, as in the first
/// line of the README: then it says so first, on stderr. Elsewhere they stay as they are, and ask for help.
pub fn with_bench_under_cargo(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut args: Vec<_> = args.into_iter().collect();
    if cfg!(feature = "lab") && is_run_by_cargo() && args.len() == 1 {
        let _ = writeln!(
            io::stderr(),
            "cargo run without a command: bench, a minute of measuring this machine. Others are step, round, accuracy, \
             experiments and info; `cargo run --release -- --help` lists them"
        );
        args.push("bench".into());
    }
    args
}

/// Whether `cargo run` has started this package's own program.
fn is_run_by_cargo() -> bool {
    // Cargo names the package of the program that it runs; one that is installed was built from another folder, or is not
    // run by cargo.
    let package = std::env::var_os("CARGO_MANIFEST_DIR");
    package.is_some_and(|package| package == env!("CARGO_MANIFEST_DIR"))
}

/// The words that start this program once more, to be followed by a command.
#[cfg(feature = "lab")]
fn to_run_again() -> &'static str {
    match is_run_by_cargo() {
        true => "cargo run --release --",
        false => "wgpu-optim",
    }
}

/// Runs the command with these arguments, the first of which is its name, and returns its exit code. Prints to stdout
/// and stderr.
pub fn run(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> u8 {
    let args = match Args::try_parse_from(with_negative_numbers(args)) {
        Ok(args) => args,
        // It has nothing wrong with it to be said in a line.
        Err(help) if help.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            print_help(&help);
            return help.exit_code().clamp(0, 255) as u8;
        }
        Err(error) if error.use_stderr() => {
            return exit_code(Err(Failure::Refused(usage_error(&error))));
        }
        Err(help_or_version) => return print_help(&help_or_version),
    };
    allow_open_files();
    let outcome = match &args.command {
        Command::Step(step) => step::run(&args.common, step),
        Command::Round(round) => step::round::run(&args.common, round),
        Command::Info(info) => info::run(&args.common, info),
        Command::Completions(completions) => manual::completions(&args.common, completions),
        Command::Man(man) => manual::man(&args.common, man),
        #[cfg(feature = "lab")]
        Command::Lab(lab) => lab.run(&args.common),
    };
    exit_code(outcome)
}

/// Says what has failed, if something has.
fn exit_code(outcome: Result<(), Failure>) -> u8 {
    match outcome {
        Ok(()) => 0,
        Err(failure) => {
            failure.report();
            failure.code()
        }
    }
}

/// An error and what caused it; many a message ends with that of its cause already.
fn with_causes(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    match system::open_files_hint(error) {
        Some(hint) => format!("{text}; {hint}"),
        None => text,
    }
}

/// One line on stderr about something that did not keep the command from its work.
pub fn warn(message: &str) {
    let _ = writeln!(io::stderr(), "warning: {}", one_line(message));
}

/// A message may hold what stands in a file, and a terminal obeys control characters.
fn one_line(message: &str) -> String {
    let words = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut line = String::with_capacity(words.len());
    for char in words.chars() {
        match char.is_control() {
            true => line.extend(char.escape_default()),
            false => line.push(char),
        }
    }
    line
}

/// Prints what `--help` or `--version` asks for, and returns the exit code.
pub fn print_help(help_or_version: &clap::Error) -> u8 {
    exit_code(unless_closed(help_or_version.print()))
}

/// Prints the one document of a command: with `--json` the report itself, else its text.
///
/// # Errors
/// [`Failure::Failed`] if it cannot be written.
pub fn print(common: &CommonArgs, report: &impl Serialize, text: String) -> Result<(), Failure> {
    let document = if common.json {
        serde_json::to_string_pretty(report).map_err(Failure::failed)?
    } else {
        text
    };
    print_text(format!("{}\n", document.trim_end()).as_bytes())
}

/// Prints what is no report to stdout, as it is.
fn print_text(text: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    unless_closed(stdout.write_all(text).and_then(|()| stdout.flush()))
}

/// A reader that closes the pipe early has read enough.
fn unless_closed(written: io::Result<()>) -> Result<(), Failure> {
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            let error = anyhow::Error::from(error);
            Err(Failure::Failed(error.context("cannot write to stdout")))
        }
        _ => Ok(()),
    }
}
