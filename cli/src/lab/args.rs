//! The arguments of the measuring commands.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args as ClapArgs, ValueEnum};
use wgpu_optim::rules::sgd::MomentumForm;
use wgpu_optim::{AnyRule, ConfigError, SgdConfig};

use super::problem::at_its_lr;
use super::storage::StorageArgs;
use crate::args::parse_numel;
use crate::rule::{self, FieldArgs, RuleArgs};

#[derive(Debug, ClapArgs)]
pub struct AccuracyArgs {
    /// Elements of each problem; the default is enough for the worst case to show, and no multiple of four
    #[arg(long, value_name = "N", default_value = "1048579", value_parser = parse_numel)]
    pub numel: usize,
    #[command(flatten)]
    pub rule: RuleArgs,
}

#[derive(Debug, ClapArgs)]
pub struct BenchArgs {
    /// Sizes to measure, in elements of all tensors together; K, M and G are powers of 1024
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', default_values = ["1M", "16M"], value_parser = parse_numel)]
    pub numel: Vec<usize>,
    /// Numbers of tensors to measure each size in; many lie in an arena on the GPU
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', default_values = ["1"], value_parser = parse_numel)]
    pub tensors: Vec<usize>,
    /// Elements of each tensor, in place of --numel
    #[arg(long, value_name = "N", requires = "tensors", conflicts_with = "numel", value_parser = parse_numel)]
    pub numel_each: Option<usize>,
    /// Measure the tensors of a safetensors file instead, those of each dtype together (their sizes and dtypes; the
    /// values are made up)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["numel", "tensors"])]
    pub model: Option<PathBuf>,
    /// Rules to measure, with their preset's defaults and what else is given of them; without this and --form,
    /// adamw beside heavy-ball
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = PossibleValuesParser::new(rule::names()))]
    pub rule: Vec<String>,
    /// Forms of momentum to measure, before the rules
    #[arg(long, value_name = "FORM,...", value_delimiter = ',', value_enum)]
    pub form: Vec<BenchForm>,
    /// Measure every adapter of this machine, not only the best
    #[arg(long)]
    pub all_adapters: bool,
    /// Leave the data in the caches; without this, copies of it are cycled past them
    #[arg(long)]
    pub hot_caches: bool,
    /// Time steps under a control, too: the gradients' norm, clipping by it, and skipping what is not finite
    #[arg(long)]
    pub control: bool,
    /// Longest time to spend on each size and rule; less, where every median is known to 2% before
    #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = parse_seconds)]
    pub seconds: f64,
    /// Write the table as CSV, too
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Draw milliseconds against elements, too; by its name an .svg or a .png
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
    /// Write one page to send, too: bench.html in this folder, with machine, command, chart and tables, and the report of
    /// --json in it; created if missing
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
    /// Compare with a report that --json has printed before, and say what is slower
    #[arg(long, value_name = "OLD.json")]
    pub compare: Option<PathBuf>,
    #[command(flatten)]
    pub storage: StorageArgs,
    #[command(flatten)]
    pub fields: FieldArgs,
}

impl BenchArgs {
    /// The rules to measure, by their names in reports.
    pub fn rules(&self) -> anyhow::Result<Vec<(String, AnyRule)>> {
        if self.rule.is_empty() {
            self.fields.check_none()?;
        }
        let (mut forms, mut rules) = (self.form.clone(), self.rule.clone());
        if forms.is_empty() && rules.is_empty() {
            forms.push(BenchForm::HeavyBall);
            rules.push("adamw".to_owned());
        }
        let form = |form: BenchForm| Ok((form.name().to_owned(), form.config()?.into()));
        let rule = |rule: String| {
            Ok((
                self.fields.name(&rule),
                at_its_lr(&self.fields, self.fields.config(&rule, None)?)?,
            ))
        };
        let forms = forms.into_iter().map(form);
        forms.chain(rules.into_iter().map(rule)).collect()
    }
}

/// Forms of momentum that can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchForm {
    Plain,
    HeavyBall,
    Nesterov,
    Ema,
    LrInside,
    Particle,
}

impl BenchForm {
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::HeavyBall => "heavy-ball",
            Self::Nesterov => "nesterov",
            Self::Ema => "ema",
            Self::LrInside => "lr-inside",
            Self::Particle => "particle",
        }
    }

    pub fn config(self) -> Result<SgdConfig, ConfigError> {
        let momentum = |form| SgdConfig::builder(0.1).momentum(0.9).form(form);
        match self {
            Self::Plain => SgdConfig::builder(0.1),
            Self::HeavyBall => momentum(MomentumForm::HeavyBall),
            Self::Nesterov => momentum(MomentumForm::HeavyBall).nesterov(true),
            Self::Ema => momentum(MomentumForm::Ema),
            Self::LrInside => momentum(MomentumForm::LrInside),
            Self::Particle => momentum(MomentumForm::Particle).time_step(0.5),
        }
        .build()
    }
}

#[derive(Debug, ClapArgs)]
pub struct ExperimentsArgs {
    /// The folder of the pictures and their tables; created if missing
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse::<f64>().ok();
    seconds
        .filter(|seconds| (0.0..=86_400.0).contains(seconds))
        .ok_or_else(|| "expected a number of seconds from 0 to 86400".to_owned())
}
