//! The loss by sixteen bits: a thousand steps, each below half of what a bf16 can tell from one.
//!
//! All parameters start at one and are pushed down by `lr*g = 5e-4` at each step, where the next bf16 below one is
//! `2^-8 = 3.9e-3` away. Rounded to the nearest, they stand still; masters add up what the parameters cannot show, and
//! rounding by random bits is right in the mean.

use std::fmt;

use anyhow::Result;
use serde::Serialize;
use wgpu_optim::half::bf16;
use wgpu_optim::storage::Rounding;
use wgpu_optim::{
    CpuOptimizer, Masters, ParamGroups, Precision, SgdConfig, StorageType, TensorSlice,
    TensorSliceMut, TensorSpec,
};

use crate::lab::picture::{self, Axis, Curve, Picture, RGBColor, Stroke};

const LR: f64 = 1e-2;
const GRADIENT: f32 = 0.05;
const STEPS: usize = 1000;
/// Over as many the mean of what random bits make of a step is taken.
const PARAMS: usize = 4096;

/// A way to remember parameters and to round them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    Nearest,
    Stochastic,
    MastersF32,
    MastersRest,
}

impl Method {
    const ALL: [Self; 4] = [
        Self::Nearest,
        Self::Stochastic,
        Self::MastersF32,
        Self::MastersRest,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Nearest => "nearest",
            Self::Stochastic => "stochastic",
            Self::MastersF32 => "f32 masters",
            Self::MastersRest => "exact rests",
        }
    }

    fn precision(self) -> Precision {
        let (masters, rounding) = match self {
            Self::Nearest => (Masters::None, Rounding::Nearest),
            Self::Stochastic => (Masters::None, Rounding::Stochastic { seed: 0 }),
            Self::MastersF32 => (Masters::F32, Rounding::Nearest),
            Self::MastersRest => (Masters::LowBits, Rounding::Nearest),
        };
        Precision {
            masters,
            rounding,
            ..Precision::default()
        }
    }

    const fn drawn(self) -> (RGBColor, Stroke) {
        match self {
            Self::Nearest => (picture::VERMILION, Stroke::Solid(3)),
            Self::Stochastic => (picture::BLUE, Stroke::Solid(3)),
            Self::MastersF32 => (picture::GREEN, Stroke::Solid(3)),
            Self::MastersRest => (picture::INK, Stroke::Dashed(2)),
        }
    }
}

#[derive(Debug, Serialize)]
pub struct Run {
    pub method: Method,
    pub lr: f64,
    pub gradient: f32,
    pub steps: usize,
    /// The parameter that exact arithmetic ends at.
    pub exact: f64,
    /// The mean of the parameters at the end.
    pub mean: f64,
    /// The distance of the parameters from that, root of the mean square.
    pub deviation: f64,
    /// The mean, the start first.
    #[serde(skip)]
    means: Vec<f64>,
    /// The first of the parameters.
    #[serde(skip)]
    firsts: Vec<f64>,
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (method, mean) = (self.method.name(), self.mean);
        let (exact, deviation) = (self.exact, self.deviation);
        write!(
            f,
            "{method:<12} {mean:.4}, exactly {exact:.4}, deviation {deviation:.4}"
        )
    }
}

#[derive(Serialize)]
pub struct Row {
    method: Method,
    step: usize,
    mean: f64,
    first: f64,
    exact: f64,
}

fn exact(step: usize) -> f64 {
    1.0 - LR * f64::from(GRADIENT) * step as f64
}

pub fn run() -> Result<Vec<Run>> {
    Method::ALL.into_iter().map(walk).collect()
}

fn walk(method: Method) -> Result<Run> {
    let config = SgdConfig::builder(LR).build()?;
    let groups = ParamGroups::new(config).with_precision(method.precision());
    let tensor = TensorSpec::new("params", [PARAMS]);
    let tensor = tensor.params_type(StorageType::Bf16);
    let mut optimizer = CpuOptimizer::with_groups(&groups, [tensor])?;
    let mut params = vec![bf16::ONE; PARAMS];
    let grads = vec![GRADIENT; PARAMS];
    let mean = |params: &[bf16]| params.iter().map(|x| x.to_f64()).sum::<f64>() / PARAMS as f64;
    let (mut means, mut firsts) = (vec![1.0], vec![1.0]);
    for _ in 0..STEPS {
        let params = &mut params[..];
        optimizer.step_mixed(
            &mut [TensorSliceMut::Bf16(params)],
            &[TensorSlice::F32(&grads)],
        )?;
        means.push(mean(params));
        firsts.push(params[0].to_f64());
    }
    let end = means[STEPS];
    let squares = params.iter().map(|x| (x.to_f64() - end).powi(2));
    Ok(Run {
        method,
        lr: LR,
        gradient: GRADIENT,
        steps: STEPS,
        exact: exact(STEPS),
        mean: end,
        deviation: (squares.sum::<f64>() / PARAMS as f64).sqrt(),
        means,
        firsts,
    })
}

pub fn rows(runs: &[Run]) -> impl Iterator<Item = Row> {
    runs.iter().flat_map(|run| {
        let steps = run.means.iter().zip(&run.firsts).enumerate();
        steps.map(|(step, (mean, first))| Row {
            method: run.method,
            step,
            mean: *mean,
            first: *first,
            exact: exact(step),
        })
    })
}

/// So few steps that single ones can be seen.
const DRAWN: usize = 120;

pub fn picture(runs: &[Run]) -> Picture {
    let steps = |values: &[f64]| -> Vec<(f64, f64)> {
        let steps = (0..).zip(&values[..=DRAWN]);
        steps.map(|(step, x)| (f64::from(step), *x)).collect()
    };
    let mut curves = vec![Curve {
        label: "exact".to_owned(),
        color: picture::GREY,
        stroke: Stroke::Solid(2),
        points: [0, DRAWN].map(|step| (step as f64, exact(step))).to_vec(),
    }];
    for run in runs {
        let (color, stroke) = run.method.drawn();
        let name = run.method.name();
        if run.method == Method::Stochastic {
            curves.push(Curve {
                label: format!("{name}, one of them"),
                color: picture::SKY_BLUE,
                stroke: Stroke::Solid(1),
                points: steps(&run.firsts),
            });
        }
        curves.push(Curve {
            label: format!("{name}: ends at {:.4} after {STEPS} steps", run.mean),
            color,
            stroke,
            points: steps(&run.means),
        });
    }
    Picture {
        title: "Steps below half of what bf16 can tell apart: lost, or remembered".to_owned(),
        x_label: "steps",
        y_label: "mean of 4096 bf16 parameters (no unit)",
        x: 0.0..DRAWN as f64,
        y: 0.93..1.01,
        x_axis: Axis::Linear,
        y_axis: Axis::Linear,
        curves,
        notes: Vec::new(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_stands_still_and_the_others_arrive() {
        // Half of what a bf16 tells from one, and of what it tells apart where the exact one ends.
        let half_ulp = f64::from(bf16::EPSILON) / 4.0;
        assert!(LR * f64::from(GRADIENT) < half_ulp);
        let [nearest, stochastic, masters, rests] = Method::ALL.map(|m| walk(m).unwrap());
        assert!(nearest.means.iter().all(|mean| *mean == 1.0));
        // A thousand roundings of the f32, each of half an ULP of one.
        let drift = STEPS as f64 * f64::from(f32::EPSILON) / 2.0;
        for run in [&masters, &rests] {
            for (step, mean) in run.means.iter().enumerate() {
                assert!(
                    (mean - exact(step)).abs() <= half_ulp + drift,
                    "{run:?} at {step}"
                );
            }
        }
        assert_eq!(masters.means, rests.means);
        // Each parameter is a sum of independent errors of at most one unit, and the mean is over all of them; six standard
        // deviations are never seen.
        let unit = f64::from(bf16::EPSILON) / 2.0;
        let sigma = unit / 2.0 * (STEPS as f64).sqrt() / (PARAMS as f64).sqrt();
        assert!((stochastic.mean - stochastic.exact).abs() < 6.0 * sigma + drift);
        assert!(stochastic.deviation > unit);
    }
}
