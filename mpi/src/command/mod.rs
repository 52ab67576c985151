//! The command `wgpu-optim-mpi` (feature `command`), as a library.

mod models;
mod round;
mod state;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use clap::{Args as ClapArgs, Parser, Subcommand};
use mpi::Threading;
use wgpu_optim_cli::{
    CommonArgs, Failure, RuleArgs, allow_open_files, print_help, usage_error, with_negative_numbers,
};
use wgpu_optim_files::round::WeightedSum;

use crate::error::ShardError;
use crate::ranks::Ranks;

/// Optimizer steps over models of several ranks. Run it under mpirun, on one rank for each model.
#[derive(Debug, Parser)]
#[command(name = "wgpu-optim-mpi", version, about)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a round of DiLoCo or federated averaging: the last global model moves by the mean of what it is more than
    /// each rank's local model, by an outer optimizer whose state is kept in shards: without --rule DiLoCo's,
    /// sgd --lr 0.7 --momentum 0.9 --nesterov. Each rank replaces {rank} in a path by its number
    Round(RoundArgs),
}

#[derive(Debug, ClapArgs)]
struct RoundArgs {
    /// Model that this rank has trained since the last round: a safetensors file or the .index.json of several
    #[arg(long, value_name = "FILE")]
    local: PathBuf,
    /// Global model that it started from, the same on every rank: a safetensors file or the .index.json of several
    #[arg(long, value_name = "FILE")]
    global: PathBuf,
    /// Outer state that an earlier round wrote, on a disk that all ranks see; without it, the optimizer starts afresh. Rule,
    /// hyper-parameters and learning rate that are not given are those that it was made with
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// File for each rank's copy of the new global model; may be an input. An .index.json if --global is one
    #[arg(long, value_name = "FILE")]
    out_global: PathBuf,
    /// Index of the outer state for the next round, on a disk that all ranks see; may be --state. Its name ends in
    /// .index.json, and each rank's shard lies beside it
    #[arg(long, value_name = "FILE")]
    out_state: PathBuf,
    /// Weights of the local models in their mean: a number for this rank, such as of its examples, or one for each rank,
    /// separated by commas
    #[arg(
        long,
        value_name = "X[,X..]",
        value_delimiter = ',',
        default_value = "1"
    )]
    weight: Vec<f64>,
    /// Bytes that are on their way between ranks at a time, roughly
    #[arg(long, value_name = "N", default_value_t = 16 << 20, value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    bucket_bytes: u64,
    #[command(flatten)]
    rule: RuleArgs,
}

impl RoundArgs {
    /// The arguments with paths as a rank has them.
    fn of_rank(mut self, rank: usize) -> Self {
        let own = |path: &Path| match path.to_str() {
            Some(path) => path.replace("{rank}", &rank.to_string()).into(),
            None => path.to_owned(),
        };
        for path in [
            &mut self.local,
            &mut self.global,
            &mut self.out_global,
            &mut self.out_state,
        ]
        .into_iter()
        .chain(&mut self.state)
        {
            *path = own(path);
        }
        self
    }
}

/// Runs the command with these arguments, the first of which is its name, on a rank, and returns its exit code. The first
/// rank prints to stdout and stderr. MPI must not have been initialized.
pub fn run(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> u8 {
    let args = match Args::try_parse_from(with_negative_numbers(args)) {
        Ok(args) => Ok(args),
        Err(error) if error.use_stderr() => Err(Failure::Refused(usage_error(&error))),
        Err(help_or_version) => return print_help(&help_or_version),
    };
    allow_open_files();
    let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else {
        let failure = Failure::Failed(anyhow!("MPI has been initialized already"));
        failure.report();
        return failure.code();
    };
    let ranks = Ranks::new(&universe.world());
    let outcome = ranks
        .all_well(args)
        .and_then(|Args { common, command }| match command {
            Command::Round(args) => round::run(&ranks, &common, &args.of_rank(ranks.rank())),
        });
    let code = outcome.as_ref().map_or_else(Failure::code, |()| 0);
    if let Err(failure) = outcome
        && ranks.rank() == 0
    {
        failure.report();
    }
    // All ranks fail together, whichever it was, and end with its code.
    let codes = ranks.gather([code]);
    codes.into_iter().map(|[code]| code).max().unwrap_or(code)
}

/// The failure of a rank, as the others have it: theirs is the exit code.
impl From<ShardError> for Failure {
    fn from(error: ShardError) -> Self {
        match error {
            ShardError::Build(_) | ShardError::Step(_) | ShardError::Transfer(_) => {
                Self::Failed(error.into())
            }
            error @ ShardError::Rank { .. } => Self::Failed(error.into()),
            error => Self::Refused(error.into()),
        }
    }
}

/// The weights of all ranks.
fn weights(ranks: &Ranks, weight: &[f64]) -> Result<WeightedSum, Failure> {
    let own = match weight {
        [weight] => Ok(*weight),
        weights if weights.len() == ranks.size() => Ok(weights[ranks.rank()]),
        weights => Err(anyhow!(
            "--weight has {} numbers, expected one, or one for each of {} ranks",
            weights.len(),
            ranks.size()
        )),
    };
    let own = ranks.all_well(own.map_err(Failure::from))?;
    let all = ranks.gather(own.to_le_bytes()).into_iter();
    let mean = WeightedSum::mean(all.map(f64::from_le_bytes).collect());
    mean.map_err(|error| Failure::Refused(error.into()))
}
