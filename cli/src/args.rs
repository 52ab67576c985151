//! The arguments of the command line.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{anyhow, bail, ensure};
use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use serde::Serialize;
use wgpu_optim::control::StepControlBuilder;
use wgpu_optim::storage::Rounding;
use wgpu_optim::{ConfigError, Masters, Precision, StepControl};

use crate::groups::GroupArgs;
use crate::rule::RuleArgs;

/// Optimizer steps on GPU and CPU: momentum and its family, Adam and others.
#[derive(Debug, Parser)]
#[command(name = "wgpu-optim", version, about, arg_required_else_help = true)]
pub struct Args {
    #[command(flatten)]
    pub common: CommonArgs,
    #[command(subcommand)]
    pub command: Command,
}

/// Options that every command takes.
#[derive(Debug, ClapArgs)]
pub struct CommonArgs {
    /// Device to compute on: auto is a hardware GPU, else the CPU twin; gpu is any adapter, a software one included
    #[arg(long, global = true, value_enum, default_value_t)]
    pub(crate) device: DeviceArg,
    /// Use this adapter only: its number in `info`, or else text in its name
    #[arg(long, global = true, value_name = "NUMBER|TEXT")]
    pub adapter: Option<String>,
    /// Print one JSON document on stdout and nothing else there
    #[arg(long, global = true)]
    pub json: bool,
}

impl CommonArgs {
    /// Whether a GPU was asked for by kind or by name, so that the CPU will not do.
    pub fn insists_on_gpu(&self) -> bool {
        self.device == DeviceArg::Gpu || self.adapter.is_some()
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DeviceArg {
    #[default]
    Auto,
    Gpu,
    Cpu,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Apply the update to a model held in safetensors files
    Step(StepArgs),
    /// Make a round of DiLoCo or federated averaging: the global model moves by the mean of what it is more than each
    /// worker's local model, by an outer optimizer: without --rule DiLoCo's, sgd --lr 0.7 --momentum 0.9 --nesterov
    Round(RoundArgs),
    #[cfg(feature = "lab")]
    #[command(flatten)]
    Lab(crate::lab::Command),
    /// Say where this machine computes steps, list its adapters and what the kernels would use on each
    Info(InfoArgs),
    /// Print a script by which a shell completes commands and options
    Completions(CompletionsArgs),
    /// Print the manual page, in roff: of one command, or of all together
    Man(ManArgs),
}

#[derive(Debug, ClapArgs)]
pub struct StepArgs {
    /// Parameters to update, a safetensors file or the .index.json of several
    #[arg(long, value_name = "FILE")]
    pub params: PathBuf,
    /// Gradients, a safetensors file or the .index.json of several; a parameter without a gradient is frozen. A
    /// pseudo-gradient is old minus new parameters: where yours is new minus old, add --maximize
    #[arg(long, value_name = "FILE")]
    pub grads: PathBuf,
    /// State that an earlier step wrote; without it, the optimizer starts afresh. Rule, hyper-parameters, learning rate and
    /// groups that are not given are those that it was made with
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// File for the updated parameters; may be --params itself. An .index.json if --params is one
    #[arg(long, value_name = "FILE")]
    pub out_params: PathBuf,
    /// File for the state of the next step; may be --state itself. For an .index.json, in as many files as --params
    #[arg(long, value_name = "FILE")]
    pub out_state: PathBuf,
    /// Start afresh without --state even if --out-state holds a state already, which is then lost
    #[arg(long)]
    pub overwrite_state: bool,
    /// Number of times that the gradient is applied
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeat: u32,
    /// Factor that the gradients were multiplied by, as by the loss scale of mixed precision: they are divided by it
    /// first
    #[arg(long, value_name = "S")]
    pub grad_scale: Option<f64>,
    /// Clip by the norm of all gradients together, which are read twice: where it is larger than X, they are scaled down
    /// to it
    #[arg(long, value_name = "X")]
    pub clip_norm: Option<f64>,
    /// Clip each tensor by the norm of its own gradients: where it is larger than X, they are scaled down to it; in place of
    /// --clip-norm
    #[arg(long, value_name = "X", conflicts_with = "clip_norm")]
    pub clip_tensor_norm: Option<f64>,
    /// Cut every gradient off at the magnitude X, after --grad-scale and the clipping by a norm
    #[arg(long, value_name = "X")]
    pub clip_value: Option<f64>,
    /// Answer to a gradient that is infinite or NaN, or to a step that would leave such a parameter or state: refuse
    /// the step, skip it (the outputs are the inputs), or apply it
    #[arg(long, value_name = "WHAT", value_enum, default_value_t)]
    pub nonfinite: NonFinite,
    /// Leave tensors whose gradient holds integers or booleans as they are, instead of refusing the step
    #[arg(long)]
    pub skip_non_float: bool,
    /// Memory of BF16 and F16 parameters between steps: f32 keeps masters in the state, which are what is stepped; none
    /// keeps the parameters as they are rounded
    #[arg(long, value_name = "WHAT", value_enum, default_value_t)]
    pub masters: MastersArg,
    /// Rounding of parameters with --masters none [default: nearest]
    #[arg(long, value_name = "HOW", value_enum)]
    pub rounding: Option<RoundingArg>,
    /// Seed of the random bits of --rounding stochastic [default: 0]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    #[command(flatten)]
    pub groups: GroupArgs,
    #[command(flatten)]
    pub rule: RuleArgs,
}

#[derive(Debug, ClapArgs)]
pub struct RoundArgs {
    /// Model that a worker has trained since the last round: a safetensors file or the .index.json of several. Given once
    /// for each worker; their mean is summed in this order
    #[arg(long, value_name = "FILE", required = true)]
    pub local: Vec<PathBuf>,
    /// Global model that all of them started from: a safetensors file or the .index.json of several
    #[arg(long, value_name = "FILE")]
    pub global: PathBuf,
    /// Outer state that an earlier round wrote, over MPI or not; without it, the optimizer starts afresh. Rule,
    /// hyper-parameters, learning rate and groups that are not given are those that it was made with
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// File for the new global model; may be --global itself, the default. An .index.json if --global is one
    #[arg(long, value_name = "FILE")]
    pub out_global: Option<PathBuf>,
    /// File for the outer state of the next round; may be --state itself, the default. For an .index.json, in as many
    /// files as --global
    #[arg(long, value_name = "FILE", required_unless_present = "state")]
    pub out_state: Option<PathBuf>,
    /// Start afresh without --state even if --out-state holds a state already, which is then lost
    #[arg(long)]
    pub overwrite_state: bool,
    /// Weights of the local models in their mean, such as of their examples: a number for each, separated by commas
    /// [default: all alike]
    #[arg(long, value_name = "X,X,..", value_delimiter = ',')]
    pub weights: Vec<f64>,
    #[command(flatten)]
    pub groups: GroupArgs,
    #[command(flatten)]
    pub rule: RuleArgs,
}

impl StepArgs {
    /// The treatment of gradients before they are applied.
    pub fn control(&self) -> anyhow::Result<StepControl> {
        let mut control = StepControl::builder();
        type Set = fn(StepControlBuilder, f64) -> StepControlBuilder;
        for (flag, value, set) in [
            (
                "--grad-scale",
                self.grad_scale,
                StepControlBuilder::grad_scale as Set,
            ),
            ("--clip-norm", self.clip_norm, StepControlBuilder::max_norm),
            (
                "--clip-tensor-norm",
                self.clip_tensor_norm,
                StepControlBuilder::tensor_max_norm,
            ),
            (
                "--clip-value",
                self.clip_value,
                StepControlBuilder::clip_value,
            ),
        ] {
            let Some(value) = value else { continue };
            control = set(control, value);
            match control.clone().build() {
                Err(ConfigError::OutOfRange {
                    value, expected, ..
                }) => bail!("{flag} {value:?} is out of range: expected {expected}"),
                checked => drop(checked?),
            }
        }
        Ok(control.build()?)
    }

    /// The precision with which 16-bit parameters are remembered and rounded.
    pub fn precision(&self) -> anyhow::Result<Precision> {
        let masters = match self.masters {
            MastersArg::F32 => Masters::F32,
            MastersArg::None => Masters::None,
        };
        if masters == Masters::F32 {
            for (flag, is_given) in [
                ("--rounding", self.rounding.is_some()),
                ("--seed", self.seed.is_some()),
            ] {
                ensure!(
                    !is_given,
                    "{flag} is for parameters without masters, and needs --masters none; those that have some are \
                     rounded to the nearest"
                );
            }
        }
        let rounding = match (self.rounding, self.seed) {
            (Some(RoundingArg::Stochastic), seed) => Rounding::Stochastic {
                seed: seed.unwrap_or(0),
            },
            (_, Some(_)) => {
                bail!("--seed is for random bits, and needs --rounding stochastic")
            }
            (_, None) => Rounding::Nearest,
        };
        Ok(Precision {
            masters,
            rounding,
            ..Precision::default()
        })
    }
}

/// The memory of 16-bit parameters beside themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum MastersArg {
    #[default]
    F32,
    None,
}

/// The rounding of a parameter to 16 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum RoundingArg {
    #[default]
    Nearest,
    Stochastic,
}

/// The answer to a gradient that is infinite or NaN, and to a step that would leave such a parameter or state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum NonFinite {
    #[default]
    Refuse,
    Skip,
    Apply,
}

#[derive(Debug, ClapArgs)]
pub struct InfoArgs {
    /// Plan a step by --rule, too: over the tensors of this safetensors file, in an arena for each dtype, or of --numel.
    /// Without a rule it is momentum
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    pub plan: Option<Option<PathBuf>>,
    /// Plan it over F32 tensors of these sizes, in elements; K, M and G are powers of 1024
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', value_parser = parse_numel)]
    pub numel: Vec<usize>,
    #[command(flatten)]
    pub rule: RuleArgs,
}

#[derive(Debug, ClapArgs)]
pub struct CompletionsArgs {
    /// Shell to complete in
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

#[derive(Debug, ClapArgs)]
pub struct ManArgs {
    /// Command to print the page of, such as step [default: the page of the program, which lists its commands]
    pub command: Option<String>,
}

/// A number of elements.
pub fn parse_numel(text: &str) -> Result<usize, String> {
    let (digits, shift) = match text.to_ascii_uppercase().strip_suffix(['K', 'M', 'G']) {
        Some(digits) => {
            let shift = match text.chars().last() {
                Some('k' | 'K') => 10,
                Some('m' | 'M') => 20,
                _ => 30,
            };
            (digits.to_owned(), shift)
        }
        None => (text.to_owned(), 0),
    };
    digits
        .parse::<usize>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|numel| (1..=1 << 40).contains(numel))
        .ok_or_else(|| "expected a number of elements such as 1000, 64K, 16M or 1G".to_owned())
}

/// Negative numbers that follow an option become one with it, `--lr -1e-3` becomes `--lr=-1e-3`: they start as options do,
/// and so somebody who mistypes a number would hear of an option that is not there.
pub fn with_negative_numbers(args: impl IntoIterator<Item = impl Into<OsString>>) -> Vec<OsString> {
    let is_negative = |arg: &str| {
        let number = arg.strip_prefix('-');
        number.is_some_and(|number| {
            number.starts_with(|first: char| first.is_ascii_digit() || first == '.')
                || number.parse::<f64>().is_ok()
        })
    };
    let is_option = |arg: &str| arg.len() > 2 && arg.starts_with("--") && !arg.contains('=');
    let mut joined: Vec<OsString> = Vec::new();
    for arg in args {
        let arg = arg.into();
        match joined.last_mut() {
            Some(option)
                if option.to_str().is_some_and(is_option)
                    && arg.to_str().is_some_and(is_negative) =>
            {
                option.push("=");
                option.push(arg);
            }
            _ => joined.push(arg),
        }
    }
    joined
}

/// Clap's message without the usage that follows it.
#[must_use]
pub fn usage_error(error: &clap::Error) -> anyhow::Error {
    let text = error.to_string();
    let message = text.split("\n\nUsage:").next().unwrap_or(&text);
    let message = message
        .split("\n\nFor more information")
        .next()
        .unwrap_or(message);
    anyhow!("{}", message.trim_start_matches("error: "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn negative_numbers_belong_to_the_option_before_them() {
        for (typed, joined) in [
            ("x --lr -0.1 --eps -1e-3", "x --lr=-0.1 --eps=-1e-3"),
            ("x --lr -.5 --rho -inf -nan", "x --lr=-.5 --rho=-inf -nan"),
            ("x --numel -5,3 -5", "x --numel=-5,3 -5"),
            ("x --lr=1 -1 -- -1", "x --lr=1 -1 -- -1"),
            (
                "x --lr --eps 1 -h --params -file",
                "x --lr --eps 1 -h --params -file",
            ),
        ] {
            let typed = with_negative_numbers(typed.split(' '));
            assert_eq!(typed, joined.split(' ').collect::<Vec<_>>());
        }
    }
}
