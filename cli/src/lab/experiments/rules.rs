//! Different rules on the same landscapes, each at its own best learning rate.
//!
//! The landscapes are `f(x, y) = floor(x) + b*(y - centre(x))^2`: a valley behind a hill (the one of `hill`, with a
//! second axis), a ravine a hundred times steeper across than along, and Rosenbrock's curved one. Every rule takes its
//! gradients in `f32` through the library's CPU optimizer. Its learning rate is the one of a grid at which the mean
//! logarithm of its loss is least.

use std::fmt;

use anyhow::{Context as _, Result};
use serde::Serialize;
use wgpu_optim::{
    AdamConfig, AnyRule, ConfigError, CpuOptimizer, LionConfig, ScheduleFreeSgdConfig, SgdConfig,
};

use super::hill;
use crate::lab::picture::{self, Axis, Curve, Note, Picture, RGBColor, Side, Stroke};

const STEPS: usize = 300;
const MOMENTUM: f64 = 0.9;
/// Learning rates are tried from 1e-4 to 1, sixteen a decade.
const LR_EXPONENTS: std::ops::RangeInclusive<i32> = -64..=0;
const LRS_PER_DECADE: f64 = 16.0;
/// Losses below this are drawn as this: `f32` knows no better.
const LEAST_LOSS_SHOWN: f64 = 1e-8;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Landscape {
    Valley,
    Ravine,
    Rosenbrock,
}

impl Landscape {
    const ALL: [Self; 3] = [Self::Valley, Self::Ravine, Self::Rosenbrock];

    pub fn name(self) -> &'static str {
        match self {
            Self::Valley => "valley behind a hill",
            Self::Ravine => "ravine",
            Self::Rosenbrock => "Rosenbrock",
        }
    }

    fn start(self) -> [f64; 2] {
        match self {
            Self::Valley => [-2.0, 1.0],
            Self::Ravine => [-1.5, 0.8],
            Self::Rosenbrock => [-1.2, 1.0],
        }
    }

    /// The point of the least loss.
    fn goal(self) -> [f64; 2] {
        match self {
            Self::Valley => [2.0, 0.0],
            Self::Ravine => [0.0, 0.0],
            Self::Rosenbrock => [1.0, 1.0],
        }
    }

    fn floor(self, x: f64) -> f64 {
        match self {
            Self::Valley => hill::height(x),
            Self::Ravine => x * x / 2.0,
            Self::Rosenbrock => (1.0 - x).powi(2),
        }
    }

    fn slope_of_floor(self, x: f64) -> f64 {
        match self {
            Self::Valley => hill::slope(x),
            Self::Ravine => x,
            Self::Rosenbrock => -2.0 * (1.0 - x),
        }
    }

    fn centre(self, x: f64) -> f64 {
        match self {
            Self::Valley | Self::Ravine => 0.0,
            Self::Rosenbrock => x * x,
        }
    }

    fn slope_of_centre(self, x: f64) -> f64 {
        match self {
            Self::Valley | Self::Ravine => 0.0,
            Self::Rosenbrock => 2.0 * x,
        }
    }

    fn steepness(self) -> f64 {
        match self {
            Self::Valley => 1.0,
            Self::Ravine => 50.0,
            Self::Rosenbrock => 100.0,
        }
    }

    fn height(self, [x, y]: [f64; 2]) -> f64 {
        self.floor(x) + self.steepness() * (y - self.centre(x)).powi(2)
    }

    fn gradient(self, [x, y]: [f64; 2]) -> [f64; 2] {
        let across = 2.0 * self.steepness() * (y - self.centre(x));
        [
            self.slope_of_floor(x) - across * self.slope_of_centre(x),
            across,
        ]
    }

    /// The height of a point above the lowest one.
    fn loss(self, point: [f64; 2]) -> f64 {
        self.height(point) - self.height(self.goal())
    }

    /// The lines of one height: `y = centre(x) +- sqrt((height - floor(x))/b)`, from left to right in as many pieces as
    /// there are valleys.
    fn contours(self, height: f64, x: &std::ops::Range<f64>) -> Vec<Vec<(f64, f64)>> {
        const POINTS: usize = 200;
        let at = |index: usize| x.start + (x.end - x.start) * index as f64 / POINTS as f64;
        let mut pieces = Vec::new();
        let (mut upper, mut lower) = (Vec::new(), Vec::new());
        for index in 0..=POINTS + 1 {
            let x = at(index);
            let squared = (height - self.floor(x)) / self.steepness();
            if squared >= 0.0 && index <= POINTS {
                upper.push((x, self.centre(x) + squared.sqrt()));
                lower.push((x, self.centre(x) - squared.sqrt()));
            } else if !upper.is_empty() {
                let mut piece = std::mem::take(&mut upper);
                piece.extend(std::mem::take(&mut lower).into_iter().rev());
                piece.push(piece[0]);
                pieces.push(piece);
            }
        }
        pieces
    }
}

/// A rule that walks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Walked {
    Momentum,
    Nesterov,
    Adam,
    Lion,
    ScheduleFree,
}

impl Walked {
    const ALL: [Self; 5] = [
        Self::Momentum,
        Self::Nesterov,
        Self::Adam,
        Self::Lion,
        Self::ScheduleFree,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Momentum => "momentum",
            Self::Nesterov => "Nesterov",
            Self::Adam => "Adam",
            Self::Lion => "Lion",
            Self::ScheduleFree => "schedule-free",
        }
    }

    fn color(self) -> RGBColor {
        match self {
            Self::Momentum => picture::BLUE,
            Self::Nesterov => picture::SKY_BLUE,
            Self::Adam => picture::VERMILION,
            Self::Lion => picture::GREEN,
            Self::ScheduleFree => picture::ORANGE,
        }
    }

    fn rule(self, lr: f64) -> Result<AnyRule, ConfigError> {
        let momentum = SgdConfig::builder(lr).momentum(MOMENTUM);
        Ok(match self {
            Self::Momentum => momentum.build()?.into(),
            Self::Nesterov => momentum.nesterov(true).build()?.into(),
            Self::Adam => AdamConfig::builder(lr).build()?.into(),
            Self::Lion => {
                let lion = LionConfig::builder(lr).decoupled_weight_decay(0.0);
                lion.build()?.into()
            }
            Self::ScheduleFree => ScheduleFreeSgdConfig::builder(lr).build()?.into(),
        })
    }
}

#[derive(Debug, Serialize)]
pub struct Run {
    pub landscape: Landscape,
    pub rule: Walked,
    /// The best of the grid.
    pub lr: f64,
    pub steps: usize,
    pub end: [f64; 2],
    pub loss: f64,
    /// Steps until the loss is below a thousandth of what it was, if it ever is.
    pub steps_to_a_thousandth: Option<usize>,
    /// The parameters to evaluate with after each step, the start first.
    #[serde(skip)]
    path: Vec<[f64; 2]>,
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (landscape, rule) = (self.landscape.name(), self.rule.name());
        let (lr, loss) = (self.lr, self.loss);
        write!(
            f,
            "{landscape:<20} {rule:<13} lr {lr:.2e}, loss {loss:.1e}, "
        )?;
        match self.steps_to_a_thousandth {
            Some(steps) => write!(f, "a thousandth of the loss after {steps} steps"),
            None => write!(f, "never a thousandth of the loss in {} steps", self.steps),
        }
    }
}

#[derive(Serialize)]
pub struct Row {
    landscape: Landscape,
    rule: Walked,
    lr: f64,
    step: usize,
    x: f64,
    y: f64,
    loss: f64,
}

pub fn run() -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    for landscape in Landscape::ALL {
        for rule in Walked::ALL {
            runs.push(best(landscape, rule)?);
        }
    }
    Ok(runs)
}

/// The run at the best learning rate of the grid.
fn best(landscape: Landscape, rule: Walked) -> Result<Run> {
    let mut best: Option<(f64, f64, Vec<[f64; 2]>)> = None;
    for exponent in LR_EXPONENTS {
        let lr = 10_f64.powf(f64::from(exponent) / LRS_PER_DECADE);
        let path = walk(landscape, &rule.rule(lr)?)?;
        if path.iter().flatten().any(|x| !x.is_finite()) {
            continue;
        }
        let loss = |point: &[f64; 2]| landscape.loss(*point).max(LEAST_LOSS_SHOWN).log10();
        let mean = path.iter().map(loss).sum::<f64>() / path.len() as f64;
        if best.as_ref().is_none_or(|(least, ..)| mean < *least) {
            best = Some((mean, lr, path));
        }
    }
    let (_, lr, path) = best.context("every learning rate diverges")?;
    let end = path[STEPS];
    let thousandth = landscape.loss(path[0]) / 1000.0;
    Ok(Run {
        landscape,
        rule,
        lr,
        steps: STEPS,
        end,
        loss: landscape.loss(end),
        steps_to_a_thousandth: path
            .iter()
            .position(|point| landscape.loss(*point) < thousandth),
        path,
    })
}

/// The points to evaluate at, the start first.
fn walk(landscape: Landscape, rule: &AnyRule) -> Result<Vec<[f64; 2]>> {
    let wide = |point: &[f32]| [f64::from(point[0]), f64::from(point[1])];
    let mut optimizer = CpuOptimizer::new(rule.clone(), [("point", [2])])?;
    let mut params = landscape.start().map(|x| x as f32);
    let mut path = vec![landscape.start()];
    for _ in 0..STEPS {
        let grads = landscape.gradient(wide(&params)).map(|g| g as f32);
        optimizer.step(&mut [&mut params], &[&grads])?;
        path.push(match rule {
            AnyRule::ScheduleFreeSgd(config) => {
                let state = optimizer.state();
                let z = state.tensors[0].slot("z").context("no z")?;
                wide(&config.averaged_params(&params, &z))
            }
            _ => wide(&params),
        });
    }
    Ok(path)
}

pub fn rows(runs: &[Run]) -> impl Iterator<Item = Row> {
    runs.iter().flat_map(|run| {
        let steps = run.path.iter().enumerate();
        steps.map(|(step, point)| Row {
            landscape: run.landscape,
            rule: run.rule,
            lr: run.lr,
            step,
            x: point[0],
            y: point[1],
            loss: run.landscape.loss(*point),
        })
    })
}

/// The paths over each landscape, and below them the losses.
pub fn pictures(runs: &[Run]) -> Vec<Picture> {
    let of = |landscape| runs.iter().filter(move |run| run.landscape == landscape);
    let maps = Landscape::ALL.map(|landscape| map(landscape, of(landscape)));
    let losses = Landscape::ALL.map(|landscape| losses(landscape, of(landscape)));
    maps.into_iter().chain(losses).collect()
}

fn map<'r>(landscape: Landscape, runs: impl Iterator<Item = &'r Run>) -> Picture {
    let (x, y) = match landscape {
        Landscape::Valley => (-2.6..3.0, -1.6..1.6),
        Landscape::Ravine => (-2.0..1.0, -1.0..1.0),
        Landscape::Rosenbrock => (-1.8..1.6, -0.7..2.0),
    };
    let least = landscape.height(landscape.goal());
    let above = landscape.loss(landscape.start());
    // Closer where the ground is low.
    let heights = (1..=9).map(|level| least + 1.8 * above * (f64::from(level) / 9.0).powi(3));
    let contours = heights.flat_map(|height| landscape.contours(height, &x));
    let mut curves: Vec<_> = contours
        .map(|points| Curve {
            label: String::new(),
            color: picture::GREY,
            stroke: Stroke::Solid(1),
            points,
        })
        .collect();
    curves.extend(runs.map(|run| Curve {
        label: String::new(),
        color: run.rule.color(),
        stroke: Stroke::Solid(3),
        points: run.path.iter().map(|[x, y]| (*x, *y)).collect(),
    }));
    let note = |text: &str, [x, y]: [f64; 2], side| Note {
        text: text.to_owned(),
        at: (x, y),
        side,
        color: picture::INK,
    };
    Picture {
        title: landscape.name().to_owned(),
        x_label: "x",
        y_label: "y",
        x,
        y,
        x_axis: Axis::Linear,
        y_axis: Axis::Linear,
        curves,
        notes: vec![
            note("start", landscape.start(), Side::Right),
            note("goal", landscape.goal(), Side::Below),
        ],
    }
}

fn losses<'r>(landscape: Landscape, runs: impl Iterator<Item = &'r Run>) -> Picture {
    let curves = runs.map(|run| Curve {
        label: format!("{}, lr {:.2e}", run.rule.name(), run.lr),
        color: run.rule.color(),
        stroke: Stroke::Solid(3),
        points: smoothed(
            &run.path
                .iter()
                .map(|at| landscape.loss(*at))
                .collect::<Vec<_>>(),
        ),
    });
    Picture {
        title: "loss at the best learning rate, mean over 11 steps".to_owned(),
        x_label: "step",
        y_label: "height above the goal",
        x: 0.0..STEPS as f64,
        y: LEAST_LOSS_SHOWN.log10()..2.0,
        x_axis: Axis::Linear,
        y_axis: Axis::PowersOfTen,
        curves: curves.collect(),
        notes: Vec::new(),
    }
}

/// The logarithm of each loss, as a mean over the steps around it: a rule that does not come to rest jumps up and down.
fn smoothed(losses: &[f64]) -> Vec<(f64, f64)> {
    const AROUND: usize = 5;
    let logarithms = losses.iter().map(|loss| loss.max(LEAST_LOSS_SHOWN).log10());
    let logarithms: Vec<_> = logarithms.collect();
    let mean = |step: usize| {
        let window = &logarithms[step.saturating_sub(AROUND)..losses.len().min(step + AROUND + 1)];
        window.iter().sum::<f64>() / window.len() as f64
    };
    (0..losses.len())
        .map(|step| (step as f64, mean(step)))
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn gradients_are_those_of_the_heights_and_vanish_at_the_goal() {
        for landscape in Landscape::ALL {
            let dx = 1e-5;
            for i in 0..100 {
                let [x, y] = [f64::from(i % 10) / 4.0 - 1.2, f64::from(i / 10) / 4.0 - 1.2];
                let difference = |dx: f64, dy: f64| {
                    let ends = [[x + dx, y + dy], [x - dx, y - dy]].map(|at| landscape.height(at));
                    ends[0] - ends[1]
                };
                let [gx, gy] = landscape.gradient([x, y]);
                // Third derivatives are below 24*100*4.
                let close = |g: f64, d: f64| (g - d / (2.0 * dx)).abs() < 1e-4;
                assert!(close(gx, difference(dx, 0.0)) && close(gy, difference(0.0, dx)));
            }
            assert_eq!(landscape.gradient(landscape.goal()), [0.0, 0.0]);
            assert_eq!(landscape.loss(landscape.goal()), 0.0);
        }
    }

    #[test]
    fn contours_are_of_one_height() {
        for landscape in Landscape::ALL {
            for height in [0.5, 3.0] {
                for (x, y) in landscape.contours(height, &(-3.0..3.0)).concat() {
                    assert!((landscape.height([x, y]) - height).abs() < 1e-9);
                }
            }
        }
    }

    #[test]
    fn every_rule_goes_down_every_landscape() {
        for run in run().unwrap() {
            let first = run.landscape.loss(run.path[0]);
            assert!(run.loss < 0.05 * first, "{run:?}");
            assert!(run.path.iter().flatten().all(|x| x.is_finite()));
        }
    }
}
