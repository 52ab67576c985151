//! The use of momentum: a ball with some of it passes a hill that plain descent stops in front of.
//!
//! The landscape is the quartic whose slope `U' = (x + 1)*x*(x - 2)` can be read off: a shallow valley at -1, the top of
//! the hill at 0, the deep valley at 2. Momentum 0.9 at learning rate `lr` is a particle of mass 1 with friction
//! `(1 - 0.9)/sqrt(lr)` in steps of `sqrt(lr)`, see [`wgpu_optim::rules::sgd::physics`]: it starts higher than the hill, and
//! does not lose the difference on the way. (Polyak 1964 explains the method by such a ball.)

use std::fmt;

use serde::Serialize;
use wgpu_optim::{ConfigError, SgdConfig};

use super::Walker;
use crate::lab::picture::{self, Axis, Curve, Note, Picture, Side, Stroke};

const SHALLOW_VALLEY: f64 = -1.0;
const HILL: f64 = 0.0;
const DEEP_VALLEY: f64 = 2.0;
const START: f64 = -2.0;
const LR: f64 = 0.05;
const MOMENTA: [f64; 2] = [0.0, 0.9];
const STEPS: usize = 500;

pub fn slope(x: f64) -> f64 {
    (x - SHALLOW_VALLEY) * (x - HILL) * (x - DEEP_VALLEY)
}

/// The integral of the slope, zero on the hill.
pub fn height(x: f64) -> f64 {
    x * x * (x * x / 4.0 - x / 3.0 - 1.0)
}

#[derive(Debug, Serialize)]
pub struct Run {
    pub momentum: f64,
    pub lr: f64,
    pub steps: usize,
    pub start: f64,
    pub end: f64,
    /// The valley that the end lies in.
    pub valley: &'static str,
    /// The positions of the ball, the start first.
    #[serde(skip)]
    positions: Vec<f64>,
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (momentum, end, valley) = (self.momentum, self.end, self.valley);
        write!(
            f,
            "momentum {momentum:<4} x = {end:.6}, the {valley} valley"
        )
    }
}

#[derive(Serialize)]
pub struct Row {
    momentum: f64,
    step: usize,
    position: f64,
    height: f64,
}

pub fn run() -> Result<Vec<Run>, ConfigError> {
    MOMENTA.into_iter().map(roll).collect()
}

fn roll(momentum: f64) -> Result<Run, ConfigError> {
    let config = SgdConfig::builder(LR).momentum(momentum).build()?;
    let mut walker = Walker::new(config, vec![START]);
    let mut positions = vec![START];
    positions.extend((0..STEPS).map(|_| {
        walker.step(|_, x| slope(x));
        walker.position[0]
    }));
    let end = positions[STEPS];
    Ok(Run {
        momentum,
        lr: LR,
        steps: STEPS,
        start: START,
        end,
        valley: if end < HILL { "shallow" } else { "deep" },
        positions,
    })
}

pub fn rows(runs: &[Run]) -> impl Iterator<Item = Row> {
    runs.iter().flat_map(|run| {
        let steps = run.positions.iter().enumerate();
        steps.map(|(step, x)| Row {
            momentum: run.momentum,
            step,
            position: *x,
            height: height(*x),
        })
    })
}

pub fn picture(runs: &[Run]) -> Picture {
    let x = -2.2..3.15;
    let landscape = Curve {
        label: "landscape U, with slope (x + 1) x (x - 2)".to_owned(),
        color: picture::GREY,
        stroke: Stroke::Solid(3),
        points: (0..=400)
            .map(|i| x.start + (x.end - x.start) * f64::from(i) / 400.0)
            .map(|x| (x, height(x)))
            .collect(),
    };
    let mut curves = vec![landscape];
    let mut notes = vec![Note {
        text: "start".to_owned(),
        at: (START, height(START)),
        side: Side::Right,
        color: picture::INK,
    }];
    // The ball that goes farther lies underneath.
    for run in runs.iter().rev() {
        let (name, color, radius) = if run.momentum == 0.0 {
            ("plain descent", picture::VERMILION, 3)
        } else {
            ("heavy ball", picture::BLUE, 5)
        };
        curves.push(Curve {
            label: format!("{name}: lr {}, momentum {}", run.lr, run.momentum),
            color,
            stroke: Stroke::Dots(radius),
            points: run.positions.iter().map(|x| (*x, height(*x))).collect(),
        });
        notes.push(Note {
            text: format!("{name} ends at x = {:.3}", run.end),
            at: (run.end, height(run.end)),
            side: Side::Below,
            color,
        });
    }
    Picture {
        title: "From one start, at one learning rate: momentum passes the hill".to_owned(),
        x_label: "position x (no unit)",
        y_label: "height U(x) (no unit)",
        x,
        y: -4.0..5.0,
        x_axis: Axis::Linear,
        y_axis: Axis::Linear,
        curves,
        notes,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_hill_lies_between_a_shallow_and_a_deep_valley() {
        assert!(height(START) > height(HILL));
        assert!(height(HILL) > height(SHALLOW_VALLEY));
        assert!(height(SHALLOW_VALLEY) > height(DEEP_VALLEY));
        // The height is the integral of the slope: a central difference is off by U'''/6*dx^2, below 4*dx^2 here.
        let dx = 1e-4;
        for i in -20..=30 {
            let x = f64::from(i) / 10.0;
            let difference = (height(x + dx) - height(x - dx)) / (2.0 * dx);
            assert!((difference - slope(x)).abs() < 4.0 * dx * dx, "at {x}");
        }
    }

    /// Near its valley the error shrinks by `sqrt(0.9)` at every step of the heavy ball and by `1 - lr*U''(-1) = 0.85`
    /// at every step of plain descent, so after 400 steps the slower one is below `10*0.9^200 < 1e-8`.
    #[test]
    fn each_ball_comes_to_rest_in_its_own_valley() {
        for (run, valley) in run().unwrap().iter().zip([SHALLOW_VALLEY, DEEP_VALLEY]) {
            assert!((run.end - valley).abs() < 1e-8, "{run:?}");
            assert!(slope(run.end).abs() < 1e-7, "{run:?}");
            let last_move = run.positions[STEPS] - run.positions[STEPS - 1];
            assert!(last_move.abs() < 1e-8, "{run:?}");
        }
    }

    #[test]
    fn only_the_heavy_ball_crosses_the_hill() {
        let [plain, heavy] = MOMENTA.map(|momentum| roll(momentum).unwrap());
        assert_eq!((plain.valley, heavy.valley), ("shallow", "deep"));
        assert!(plain.positions.iter().all(|x| *x < HILL));
    }
}
