//! `experiments`: three claims about momentum, a walk by different rules, and what sixteen bits lose, measured and drawn.
//!
//! All numbers come out of the library's own updates, in `f64` where they are of momentum alone; only what they are
//! compared with is written here.

mod convergence;
mod energy;
mod hill;
mod rules;
mod sixteen_bits;

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::Serialize;
use wgpu_optim::SgdConfig;
use wgpu_optim::rules::sgd::reference::{sgd, sgd_plain};
use wgpu_optim::rules::sgd::{Coefficients, Terms};

use crate::args::CommonArgs;
use crate::interrupt::Interrupt;
use crate::lab::args::ExperimentsArgs;
use crate::lab::csv;
use crate::lab::picture::sheet;
use crate::{Failure, print, warn};
use wgpu_optim_files::Outputs;

#[derive(Debug, Serialize)]
struct Summary {
    files: Vec<PathBuf>,
    convergence: Vec<convergence::Run>,
    energy: Vec<energy::Run>,
    hill: Vec<hill::Run>,
    rules: Vec<rules::Run>,
    sixteen_bits: Vec<sixteen_bits::Run>,
}

pub fn run(common: &CommonArgs, args: &ExperimentsArgs) -> Result<(), Failure> {
    let interrupt = Interrupt::catch()?;
    let dir = &args.out;
    fs::create_dir_all(dir).with_context(|| format!("cannot write into {}", dir.display()))?;
    let files = ["convergence", "energy", "hill", "rules", "sixteen_bits"]
        .into_iter()
        .flat_map(|name| [format!("{name}.svg"), format!("{name}.csv")])
        .map(|name| dir.join(name))
        .collect::<Vec<_>>();
    let mut outputs = Outputs::default();
    for file in &files {
        outputs.stage(file.display().to_string(), file)?;
    }

    let convergence = convergence::run().map_err(Failure::failed)?;
    interrupt.check()?;
    let energy = energy::run().map_err(Failure::failed)?;
    interrupt.check()?;
    let hill = hill::run().map_err(Failure::failed)?;
    interrupt.check()?;
    let rules = rules::run().map_err(Failure::Failed)?;
    interrupt.check()?;
    let sixteen_bits = sixteen_bits::run().map_err(Failure::Failed)?;
    let contents = [
        sheet(1, &[convergence::picture(&convergence)]).map(String::into_bytes),
        csv(convergence::rows(&convergence)),
        sheet(1, &[energy::picture(&energy)]).map(String::into_bytes),
        csv(energy::rows(&energy)),
        sheet(1, &[hill::picture(&hill)]).map(String::into_bytes),
        csv(hill::rows(&hill)),
        sheet(3, &rules::pictures(&rules)).map(String::into_bytes),
        csv(rules::rows(&rules)),
        sheet(1, &[sixteen_bits::picture(&sixteen_bits)]).map(String::into_bytes),
        csv(sixteen_bits::rows(&sixteen_bits)),
    ];
    for (output, content) in outputs.iter().zip(contents) {
        output.write_all_at(&content.map_err(Failure::Failed)?, 0)?;
    }
    interrupt.check()?;
    outputs
        .replace_targets()?
        .iter()
        .for_each(|lost| warn(lost));

    let summary = Summary {
        files,
        convergence,
        energy,
        hill,
        rules,
        sixteen_bits,
    };
    print(common, &summary, summary.to_text())
}

impl Summary {
    fn to_text(&self) -> String {
        let mut text = String::from("convergence on a quadratic, error per step\n");
        // Writing to a string cannot fail.
        for run in &self.convergence {
            let _ = writeln!(
                text,
                "  k = {:<5} {:<14} {:.6}, in theory {:.6}",
                run.condition_number,
                run.method.name(),
                run.measured_rate,
                run.theoretical_rate,
            );
        }
        text += "energy without friction, end / start\n";
        for run in &self.energy {
            let _ = writeln!(
                text,
                "  dt = {:<4} {:<20} {:.4e}, largest deviation {:.4e}",
                run.time_step,
                run.integrator.name(),
                run.growth,
                run.largest_deviation,
            );
        }
        text += "valley behind a hill, resting place\n";
        for run in &self.hill {
            let _ = writeln!(
                text,
                "  momentum {:<4} x = {:.6}, the {} valley",
                run.momentum, run.end, run.valley
            );
        }
        text += "the same landscapes by different rules, each at its best learning rate\n";
        for run in &self.rules {
            let steps = match run.steps_to_a_thousandth {
                Some(steps) => format!("a thousandth of the loss after {steps} steps"),
                None => format!("never a thousandth of the loss in {} steps", run.steps),
            };
            let _ = writeln!(
                text,
                "  {:<20} {:<13} lr {:.2e}, loss {:.1e}, {steps}",
                run.landscape.name(),
                run.rule.name(),
                run.lr,
                run.loss,
            );
        }
        text += "a thousand steps too small for bf16, mean of the parameters\n";
        for run in &self.sixteen_bits {
            let _ = writeln!(
                text,
                "  {:<12} {:.4}, exactly {:.4}, deviation {:.4}",
                run.method.name(),
                run.mean,
                run.exact,
                run.deviation,
            );
        }
        text += "written\n";
        for file in &self.files {
            let _ = writeln!(text, "  {}", file.display());
        }
        text
    }
}

/// A point that the library's update moves over a landscape, from rest.
struct Walker {
    config: SgdConfig,
    position: Vec<f64>,
    velocity: Vec<f64>,
    gradient: Vec<f64>,
    first_step: bool,
}

impl Walker {
    fn new(config: SgdConfig, start: Vec<f64>) -> Self {
        Self {
            config,
            velocity: vec![0.0; start.len()],
            gradient: vec![0.0; start.len()],
            position: start,
            first_step: true,
        }
    }

    /// One step down a landscape that is a sum over its axes: `slope(axis, position along it)`.
    fn step(&mut self, slope: impl Fn(usize, f64) -> f64) {
        for (axis, (g, x)) in self.gradient.iter_mut().zip(&self.position).enumerate() {
            *g = slope(axis, *x);
        }
        let k = Coefficients::new(&self.config, self.first_step);
        let has = Terms::of(&self.config);
        if has.velocity {
            sgd(
                &k,
                has,
                &mut self.position,
                &mut self.velocity,
                &self.gradient,
            );
        } else {
            sgd_plain(&k, has, &mut self.position, &self.gradient);
        }
        self.first_step = false;
    }
}
