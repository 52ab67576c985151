//! `accuracy`: every rule and form on every back end against the oracle, as the table in the documentation.

use anyhow::anyhow;
use serde::Serialize;
use wgpu_optim::oracle::Roundoff;
use wgpu_optim::rules::sgd::MomentumForm;
use wgpu_optim::{AnyRule, ConfigError, SgdConfig};

use super::args::AccuracyArgs;
use crate::args::CommonArgs;
use crate::backend::{Backend, Choice};
use crate::lab::memory::check_memory;
use crate::lab::problem::{OnCpu, OnGpu, OnReference, Problem, Stepper, at_a_gentle_lr, at_its_lr};
use crate::{Failure, print, rule};

#[derive(Debug, Serialize)]
struct Report {
    /// The adapter, if there is one.
    adapter: Option<String>,
    /// Why this one, or why none, or none to the end.
    reason: String,
    rows: Vec<Row>,
    /// Rules that were not compared, and why.
    left_out: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Row {
    rule: String,
    reference: Accuracy,
    cpu: Accuracy,
    gpu: Option<Accuracy>,
}

#[derive(Debug, Serialize)]
struct Accuracy {
    worst_ulp: f64,
    worst_share_of_bound: f64,
}

/// Every row of the documentation's table: the forms of momentum, and every other rule by the defaults of the first
/// library that has it.
fn all() -> Result<Vec<(String, AnyRule)>, ConfigError> {
    let momentum = |form| SgdConfig::builder(0.1).momentum(0.9).form(form);
    let heavy_ball = momentum(MomentumForm::HeavyBall);
    let lr_inside = momentum(MomentumForm::LrInside);
    let particle = momentum(MomentumForm::Particle);
    let forms = [
        ("plain", SgdConfig::builder(0.1)),
        ("heavy-ball", heavy_ball),
        ("heavy-ball, dampened", heavy_ball.dampening(0.3)),
        ("heavy-ball, Nesterov", heavy_ball.nesterov(true)),
        ("ema", momentum(MomentumForm::Ema)),
        ("lr-inside", lr_inside),
        ("lr-inside, Nesterov", lr_inside.nesterov(true)),
        ("particle", particle.time_step(0.7)),
        ("heavy-ball, weight decay", heavy_ball.weight_decay(0.01)),
        (
            "heavy-ball, decoupled decay",
            heavy_ball.decoupled_weight_decay(0.01),
        ),
        ("heavy-ball, maximize", heavy_ball.maximize(true)),
    ];
    let mut all: Vec<(String, AnyRule)> = Vec::new();
    for (name, builder) in forms {
        all.push((name.to_owned(), builder.build()?.into()));
    }
    for name in rule::names() {
        let config = at_a_gentle_lr(&AnyRule::preset(name, None, 0.1)?)?;
        if all.iter().all(|(_, other)| *other != config) {
            all.push((name.to_owned(), config));
        }
    }
    Ok(all)
}

pub fn run(common: &CommonArgs, args: &AccuracyArgs) -> Result<(), Failure> {
    args.rule.check_named()?;
    let rules = match args.rule.rule {
        Some(_) => vec![(
            args.rule.name(),
            at_its_lr(&args.rule.fields, args.rule.config()?)?,
        )],
        None => all().map_err(Failure::failed)?,
    };
    let mut choice = Choice::for_measurements(common)?;
    let adapter = match &choice.backend {
        Backend::Gpu(open) => Some(open.name()),
        Backend::Cpu => None,
    };
    let (mut rows, mut left_out) = (Vec::new(), Vec::new());
    let mut failure = None;
    for (rule, config) in rules {
        match Row::new(&rule, config, args.numel, &mut choice, common) {
            Ok(row) => rows.push(row),
            Err(Failure::Refused(shortage)) => left_out.push(format!("{rule}: {shortage:#}")),
            // What has been compared so far is reported before it.
            Err(end) => {
                failure = Some(end.context(&rule));
                break;
            }
        }
    }
    if rows.is_empty() {
        let nothing = || Failure::Failed(anyhow!("nothing was compared: {}", left_out.join("; ")));
        return Err(failure.unwrap_or_else(nothing));
    }
    let report = Report {
        adapter,
        reason: choice.reason,
        rows,
        left_out,
    };
    print(common, &report, report.to_text())?;
    failure.map_or(Ok(()), Err)
}

impl Row {
    /// Refused where there is not the memory for it.
    fn new(
        rule: &str,
        config: AnyRule,
        numel: usize,
        choice: &mut Choice,
        common: &CommonArgs,
    ) -> Result<Self, Failure> {
        check_memory(Problem::bytes(1, numel))?;
        let problem = Problem::new(config, vec![numel]);
        let steppers = OnReference::bytes(&problem).max(OnCpu::bytes(&problem));
        check_memory(steppers + problem.check_bytes())?;
        let check = |stepper: &mut dyn Stepper, rounding| {
            problem.check(stepper, rounding).map(|agreement| Accuracy {
                worst_ulp: agreement.worst_ulp,
                worst_share_of_bound: agreement.worst_share_of_bound,
            })
        };
        let gpu = match &choice.backend {
            Backend::Gpu(open) => {
                let in_transit = problem.stored_bytes();
                let needed = OnGpu::bytes(open, &problem) + problem.check_bytes() + in_transit;
                check_memory(needed)?;
                OnGpu::new(open, &problem)
                    .and_then(|mut stepper| check(&mut stepper, Roundoff::WGSL))
                    .map(Some)
            }
            Backend::Cpu => Ok(None),
        };
        let gpu = match gpu {
            Ok(gpu) => gpu,
            Err(failure) => {
                choice.fall_back_on_cpu(common, failure)?;
                None
            }
        };
        let reference = check(&mut OnReference::new(&problem), Roundoff::NEAREST)?;
        let cpu = check(&mut OnCpu::new(&problem)?, Roundoff::NEAREST)?;
        Ok(Self {
            rule: rule.to_owned(),
            reference,
            cpu,
            gpu,
        })
    }
}

impl Report {
    /// A table in Markdown.
    fn to_text(&self) -> String {
        let gpu = self.adapter.as_deref().unwrap_or("no adapter");
        let mut text = format!("| worst ULP | reference | CPU twin | {gpu} |\n|---|---|---|---|\n");
        for row in &self.rows {
            let gpu = row
                .gpu
                .as_ref()
                .map_or_else(String::new, |a| format!("{:.2}", a.worst_ulp));
            text += &format!(
                "| {} | {:.2} | {:.2} | {gpu} |\n",
                row.rule, row.reference.worst_ulp, row.cpu.worst_ulp
            );
        }
        text += &format!("\n({})\n", self.reason);
        for left_out in &self.left_out {
            text += &format!("note: not compared, {left_out}\n");
        }
        text
    }
}
