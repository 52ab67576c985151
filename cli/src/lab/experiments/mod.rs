//! `experiments`: three claims about momentum, a walk by different rules, and what sixteen bits lose, measured and drawn.
//!
//! All numbers come out of the library's own updates, in `f64` where they are of momentum alone; only what they are
//! compared with is written here.

mod convergence;
mod energy;
mod hill;
mod rules;
mod sixteen_bits;

use std::fmt::{self, Write as _};
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
        let mut text = String::new();
        add(
            &mut text,
            "convergence on a quadratic, error per step",
            &self.convergence,
        );
        add(
            &mut text,
            "energy without friction, end / start",
            &self.energy,
        );
        add(&mut text, "valley behind a hill, resting place", &self.hill);
        add(
            &mut text,
            "the same landscapes by different rules, each at its best learning rate",
            &self.rules,
        );
        add(
            &mut text,
            "a thousand steps too small for bf16, mean of the parameters",
            &self.sixteen_bits,
        );
        let files: Vec<_> = self.files.iter().map(|file| file.display()).collect();
        add(&mut text, "written", &files);
        text
    }
}

/// A paragraph of what one experiment has come to.
fn add(text: &mut String, title: &str, runs: &[impl fmt::Display]) {
    text.push_str(title);
    text.push('\n');
    for run in runs {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {run}");
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
