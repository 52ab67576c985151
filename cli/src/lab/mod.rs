//! The laboratory (feature `lab`): commands that measure, compare with the oracle, and draw.

mod accuracy;
mod args;
mod bench;
mod experiments;
mod memory;
pub mod picture;
mod problem;
mod storage;

use anyhow::Result;
use clap::Subcommand;
use serde::Serialize;

use crate::Failure;
use crate::args::CommonArgs;
use args::{AccuracyArgs, BenchArgs, ExperimentsArgs};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Time a step on GPU and CPU beside what the memory of each allows, and the transfers between them
    Bench(BenchArgs),
    /// Compare every rule and form, or one with --rule, on every back end with the f64 oracle
    Accuracy(AccuracyArgs),
    /// Measure and draw what momentum does: rate of convergence, energy, a hill in the way
    Experiments(ExperimentsArgs),
}

impl Command {
    pub fn run(&self, common: &CommonArgs) -> Result<(), Failure> {
        match self {
            Self::Bench(args) => bench::run(common, args),
            Self::Accuracy(args) => accuracy::run(common, args),
            Self::Experiments(args) => experiments::run(common, args),
        }
    }
}

impl Failure {
    /// Returns the failure with a word before it on what it was about.
    fn context(self, what: &str) -> Self {
        let what = what.to_owned();
        match self {
            Self::Refused(error) => Self::Refused(error.context(what)),
            Self::Failed(error) => Self::Failed(error.context(what)),
            Self::Wrong(error) => Self::Wrong(error.context(what)),
            Self::Interrupted(signal) => Self::Interrupted(signal),
        }
    }
}

/// A table with one line per row, headed by the names of the fields.
fn csv(rows: impl Iterator<Item = impl Serialize>) -> Result<Vec<u8>> {
    let mut table = csv::Writer::from_writer(Vec::new());
    for row in rows {
        table.serialize(row)?;
    }
    Ok(table.into_inner().map_err(|error| error.into_error())?)
}
