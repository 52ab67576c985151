//! The rate at which momentum forgets where it started, against the theory.
//!
//! On `f(x) = 1/2 sum h_i*x_i^2` with `m <= h_i <= L` and condition number `k = L/m`, the best constant choices are
//!
//! ```text
//! plain descent   lr = 2/(L + m)                                                      rate (k-1)/(k+1)
//! heavy ball      lr = 4/(sqrt L + sqrt m)^2, mu = ((sqrt k - 1)/(sqrt k + 1))^2      rate (sqrt k - 1)/(sqrt k + 1)
//! ```
//!
//! where the rate is what a step leaves of the error in the long run (Polyak, *Some methods of speeding up the
//! convergence of iteration methods*, 1964; Sutskever et al., *On the importance of initialization and momentum in
//! deep learning*, 2013, section 2).

use std::fmt;

use serde::Serialize;
use wgpu_optim::{ConfigError, SgdConfig};

use super::Walker;
use crate::lab::picture::{self, Axis, Curve, Picture, Stroke};

const CONDITION_NUMBERS: [f64; 3] = [10.0, 100.0, 1000.0];
const DIMENSIONS: usize = 50;
/// Steps that picture and table show.
const STEPS_SHOWN: usize = 500;
const LEAST_ERROR_SHOWN: f64 = 1e-12;
/// Between these errors the rate is measured: late, when the slowest components are all that is left, and far above
/// 1e-154, whose square `f64` cannot hold.
const WINDOW: (f64, f64) = (1e-70, 1e-140);

/// Six times what the slowest run takes, so that an update that does not converge is found, not waited for.
const MOST_STEPS: usize = 1_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    HeavyBall,
    PlainDescent,
}

impl Method {
    pub fn name(self) -> &'static str {
        match self {
            Self::HeavyBall => "heavy ball",
            Self::PlainDescent => "plain descent",
        }
    }

    /// The best constants for eigenvalues from 1 to `k`.
    fn config(self, k: f64) -> Result<SgdConfig, ConfigError> {
        match self {
            Self::HeavyBall => SgdConfig::builder(4.0 / (k.sqrt() + 1.0).powi(2))
                .momentum(self.rate(k).powi(2))
                .build(),
            Self::PlainDescent => SgdConfig::builder(2.0 / (k + 1.0)).build(),
        }
    }

    fn rate(self, k: f64) -> f64 {
        match self {
            Self::HeavyBall => (k.sqrt() - 1.0) / (k.sqrt() + 1.0),
            Self::PlainDescent => (k - 1.0) / (k + 1.0),
        }
    }

    /// The growth of the error beside the geometric decay.
    ///
    /// The best heavy ball is critically damped along both extreme axes: `z^2 - (1 + mu - lr*h)*z + mu` has the
    /// double root `z = rate` at `h = m` and `z = -rate` at `h = L`. From rest at `x_0`, a double root leaves
    /// `x_t = (1 + (1-z)*t)*z^t*x_0`, which is `t*rate^t` in the long run. All other axes decay without the `t`.
    fn growth(self, step: usize) -> f64 {
        match self {
            Self::HeavyBall => step as f64,
            Self::PlainDescent => 1.0,
        }
    }
}

#[derive(Debug, Serialize)]
pub struct Run {
    pub method: Method,
    pub condition_number: f64,
    pub lr: f64,
    pub momentum: f64,
    pub measured_rate: f64,
    pub theoretical_rate: f64,
    /// Length of the error vector over that of the first, for each step that is shown.
    #[serde(skip)]
    errors: Vec<f64>,
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (k, method) = (self.condition_number, self.method.name());
        let (measured, theoretical) = (self.measured_rate, self.theoretical_rate);
        write!(
            f,
            "k = {k:<5} {method:<14} {measured:.6}, in theory {theoretical:.6}"
        )
    }
}

#[derive(Serialize)]
pub struct Row {
    condition_number: f64,
    method: Method,
    step: usize,
    error: f64,
}

pub fn run() -> Result<Vec<Run>, ConfigError> {
    let mut runs = Vec::new();
    for k in CONDITION_NUMBERS {
        for method in [Method::HeavyBall, Method::PlainDescent] {
            runs.push(measure(method, k)?);
        }
    }
    Ok(runs)
}

fn measure(method: Method, k: f64) -> Result<Run, ConfigError> {
    let config = method.config(k)?;
    let mut errors = errors(config, k);
    let late = errors
        .iter()
        .enumerate()
        .skip_while(|(_, error)| **error > WINDOW.0)
        .map(|(step, error)| (step as f64, (error / method.growth(step)).ln()))
        .collect::<Vec<_>>();
    let measured_rate = slope(&late).exp();
    errors.truncate(STEPS_SHOWN + 1);
    Ok(Run {
        method,
        condition_number: k,
        lr: config.lr(),
        momentum: config.momentum(),
        measured_rate,
        theoretical_rate: method.rate(k),
        errors,
    })
}

/// The relative error at each step, down to the end of the window.
fn errors(config: SgdConfig, k: f64) -> Vec<f64> {
    // Evenly spread on a log scale, with 1 and k among them.
    let eigenvalues = (0..DIMENSIONS)
        .map(|axis| k.powf(axis as f64 / (DIMENSIONS - 1) as f64))
        .collect::<Vec<_>>();
    let mut walker = Walker::new(config, vec![1.0; DIMENSIONS]);
    let mut errors = vec![1.0];
    let mut error = 1.0;
    while error > WINDOW.1 && errors.len() < MOST_STEPS {
        walker.step(|axis, x| eigenvalues[axis] * x);
        let squares = walker.position.iter().map(|x| x * x).sum::<f64>();
        error = (squares / DIMENSIONS as f64).sqrt();
        errors.push(error);
    }
    errors
}

/// The slope of the straight line with the least squared distance from the points.
fn slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let mean_x = points.iter().map(|(x, _)| x).sum::<f64>() / n;
    let mean_y = points.iter().map(|(_, y)| y).sum::<f64>() / n;
    let covariance = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y));
    let variance = points.iter().map(|(x, _)| (x - mean_x).powi(2));
    covariance.sum::<f64>() / variance.sum::<f64>()
}

impl Run {
    fn shown(&self) -> impl Iterator<Item = (usize, f64)> {
        let above = |(_, error): &(usize, f64)| *error >= LEAST_ERROR_SHOWN;
        self.errors.iter().copied().enumerate().take_while(above)
    }
}

pub fn rows(runs: &[Run]) -> impl Iterator<Item = Row> {
    runs.iter().flat_map(|run| {
        run.shown().map(|(step, error)| Row {
            condition_number: run.condition_number,
            method: run.method,
            step,
            error,
        })
    })
}

pub fn picture(runs: &[Run]) -> Picture {
    let curve = |run: &Run| Curve {
        label: format!(
            "{}, k = {}: rate {:.4} (theory {:.4})",
            run.method.name(),
            run.condition_number,
            run.measured_rate,
            run.theoretical_rate,
        ),
        color: match run.condition_number {
            k if k <= 10.0 => picture::GREEN,
            k if k <= 100.0 => picture::BLUE,
            _ => picture::VERMILION,
        },
        stroke: match run.method {
            Method::HeavyBall => Stroke::Solid(3),
            Method::PlainDescent => Stroke::Dashed(2),
        },
        points: run
            .shown()
            .map(|(step, error)| (step as f64, error.log10()))
            .collect(),
    };
    // The legend fills its columns in turn: one for each method.
    let of = |method| runs.iter().filter(move |run| run.method == method);
    Picture {
        title:
            "Momentum turns k into its square root: error on a quadratic with condition number k"
                .to_owned(),
        x_label: "step",
        y_label: "error, relative to the start",
        x: 0.0..STEPS_SHOWN as f64,
        y: LEAST_ERROR_SHOWN.log10()..1.0,
        x_axis: Axis::Linear,
        y_axis: Axis::PowersOfTen,
        curves: of(Method::HeavyBall)
            .chain(of(Method::PlainDescent))
            .map(curve)
            .collect(),
        notes: Vec::new(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    /// The remainder in the window beside the fitted form is of the order `1/t` for the heavy ball (at least 240
    /// steps, over as many again) and `(second slowest rate / rate)^(2*t)`, below 1e-7, for plain descent. Either
    /// moves the slope by far less than a thousandth.
    #[test]
    fn measured_rates_are_those_of_the_theory() {
        let runs = run().unwrap();
        assert_eq!(runs.len(), 6);
        for run in runs {
            let ratio = run.measured_rate.ln() / run.theoretical_rate.ln();
            assert!((ratio - 1.0).abs() < 1e-3, "{ratio} in {run:?}");
        }
    }

    /// Polyak's constants are the best ones: a step to either side of each is slower.
    #[test]
    fn other_constants_are_slower() {
        let k = 100.0;
        let best = Method::HeavyBall.config(k).unwrap();
        let steps = |config| errors(config, k).len();
        for factor in [0.95, 1.02] {
            let other = best.with_momentum(best.momentum() * factor).unwrap();
            assert!(steps(other) > steps(best), "momentum times {factor}");
        }
        for factor in [0.95, 1.02] {
            let other = best.with_lr(best.lr() * factor).unwrap();
            assert!(steps(other) > steps(best), "lr times {factor}");
        }
    }

    #[test]
    fn slope_of_a_line() {
        let line = (0..7).map(|x| (f64::from(x), 3.0 - 2.0 * f64::from(x)));
        assert_eq!(slope(&line.collect::<Vec<_>>()), -2.0);
    }
}
