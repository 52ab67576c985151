//! The energy of a particle without friction, by the order of two assignments.
//!
//! In the bowl `U = k*x^2/2` with `k = m = 1` the particle form of the update is semi-implicit Euler,
//!
//! ```text
//! v <- v - dt*x;  x <- x + dt*v
//! ```
//!
//! and conserves not `H = (v^2 + x^2)/2` but `H - dt/2*x*v`: inserting the step leaves it as it was. Since
//! `|x*v| <= H`, a particle that starts at rest with energy `E` stays between `E/(1 + dt/2)` and `E/(1 - dt/2)` for
//! ever. Explicit Euler, which moves `x` with the old `v`, multiplies the energy by `1 + dt^2*k/m` at every step
//! (Hairer, Lubich and Wanner, *Geometric Numerical Integration*, section I.1).

use std::fmt;

use serde::Serialize;
use wgpu_optim::ConfigError;
use wgpu_optim::rules::sgd::physics::Particle;

use super::Walker;
use crate::lab::picture::{self, Axis, Curve, Picture, Stroke};

const TIME_STEPS: [f64; 2] = [0.04, 0.02];
const STEPS: usize = 10_000;
/// The picture and the table show every tenth step: eight to a period of the energy at the longer time step.
const STRIDE: usize = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Integrator {
    SemiImplicitEuler,
    ExplicitEuler,
}

impl Integrator {
    pub fn name(self) -> &'static str {
        match self {
            Self::SemiImplicitEuler => "semi-implicit Euler",
            Self::ExplicitEuler => "explicit Euler",
        }
    }

    /// The states that a particle of mass 1 runs through from rest at `x = 1`.
    fn states(self, time_step: f64) -> Result<Vec<State>, ConfigError> {
        let start = State { x: 1.0, v: 0.0 };
        let mut states = vec![start];
        match self {
            Self::SemiImplicitEuler => {
                let config = Particle {
                    mass: 1.0,
                    friction: 0.0,
                    time_step,
                    force_scale: 1.0,
                }
                .config()?;
                let mut walker = Walker::new(config, vec![start.x]);
                states.extend((0..STEPS).map(|_| {
                    walker.step(|_, x| x);
                    State {
                        x: walker.position[0],
                        v: walker.velocity[0],
                    }
                }));
            }
            Self::ExplicitEuler => {
                let mut state = start;
                states.extend((0..STEPS).map(|_| {
                    state = State {
                        x: state.x + time_step * state.v,
                        v: state.v - time_step * state.x,
                    };
                    state
                }));
            }
        }
        Ok(states)
    }
}

#[derive(Clone, Copy, Debug)]
struct State {
    x: f64,
    v: f64,
}

impl State {
    fn energy(self) -> f64 {
        0.5 * (self.v * self.v + self.x * self.x)
    }
}

#[derive(Debug, Serialize)]
pub struct Run {
    pub integrator: Integrator,
    pub time_step: f64,
    pub steps: usize,
    /// Energy at the end over energy at the start.
    pub growth: f64,
    /// The farthest that the energy was ever from the start's, as a fraction of it.
    pub largest_deviation: f64,
    /// Energy over that at the start, for each step.
    #[serde(skip)]
    energies: Vec<f64>,
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (dt, integrator) = (self.time_step, self.integrator.name());
        let (growth, most) = (self.growth, self.largest_deviation);
        write!(
            f,
            "dt = {dt:<4} {integrator:<20} {growth:.4e}, largest deviation {most:.4e}"
        )
    }
}

#[derive(Serialize)]
pub struct Row {
    integrator: Integrator,
    time_step: f64,
    step: usize,
    time: f64,
    relative_energy: f64,
}

pub fn run() -> Result<Vec<Run>, ConfigError> {
    let mut runs = Vec::new();
    for integrator in [Integrator::ExplicitEuler, Integrator::SemiImplicitEuler] {
        for time_step in TIME_STEPS {
            runs.push(measure(integrator, time_step)?);
        }
    }
    Ok(runs)
}

fn measure(integrator: Integrator, time_step: f64) -> Result<Run, ConfigError> {
    let states = integrator.states(time_step)?;
    let start = states[0].energy();
    let energies = states
        .iter()
        .map(|state| state.energy() / start)
        .collect::<Vec<_>>();
    Ok(Run {
        integrator,
        time_step,
        steps: STEPS,
        growth: energies[STEPS],
        largest_deviation: energies
            .iter()
            .fold(0.0, |most, energy| (energy - 1.0).abs().max(most)),
        energies,
    })
}

pub fn rows(runs: &[Run]) -> impl Iterator<Item = Row> {
    runs.iter().flat_map(|run| {
        let shown = run.energies.iter().enumerate().step_by(STRIDE);
        shown.map(|(step, energy)| Row {
            integrator: run.integrator,
            time_step: run.time_step,
            step,
            time: step as f64 * run.time_step,
            relative_energy: *energy,
        })
    })
}

pub fn picture(runs: &[Run]) -> Picture {
    let curve = |run: &Run| {
        let name = run.integrator.name();
        let dt = run.time_step;
        let (label, stroke) = match run.integrator {
            Integrator::ExplicitEuler => (
                format!("{name}, dt = {dt}: grows {:.0} times", run.growth),
                Stroke::Dashed(2),
            ),
            Integrator::SemiImplicitEuler => (
                format!(
                    "{name}, dt = {dt}: within {:.2} %",
                    100.0 * run.largest_deviation
                ),
                Stroke::Solid(3),
            ),
        };
        Curve {
            label,
            color: match (run.integrator, dt > TIME_STEPS[1]) {
                (Integrator::ExplicitEuler, true) => picture::VERMILION,
                (Integrator::ExplicitEuler, false) => picture::ORANGE,
                (Integrator::SemiImplicitEuler, true) => picture::SKY_BLUE,
                (Integrator::SemiImplicitEuler, false) => picture::BLUE,
            },
            stroke,
            points: rows(std::slice::from_ref(run))
                .map(|row| (row.time, row.relative_energy.log10()))
                .collect(),
        }
    };
    Picture {
        title: "Energy of a particle without friction in a bowl, over 10,000 steps".to_owned(),
        x_label: "time, in units of sqrt(mass / stiffness)",
        y_label: "energy, relative to the start",
        x: 0.0..STEPS as f64 * TIME_STEPS[0],
        y: -1.0..7.0,
        x_axis: Axis::Linear,
        y_axis: Axis::PowersOfTen,
        curves: runs.iter().map(curve).collect(),
        notes: Vec::new(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    /// A step rounds at most eight times (for `x` and for `v` a product of constants, two products and a sum), each
    /// time by half an epsilon of the state, which is one epsilon of its energy.
    const ROUNDING: f64 = 8.0 * STEPS as f64 * f64::EPSILON;

    #[test]
    fn semi_implicit_euler_conserves_the_modified_energy() {
        for dt in TIME_STEPS {
            let states = Integrator::SemiImplicitEuler.states(dt).unwrap();
            let modified = |state: &State| state.energy() - 0.5 * dt * state.x * state.v;
            let start = modified(&states[0]);
            for state in &states {
                let off = (modified(state) / start - 1.0).abs();
                assert!(off <= ROUNDING, "{off:e} at {state:?}, dt = {dt}");
            }
        }
    }

    #[test]
    fn semi_implicit_euler_keeps_the_energy_within_its_bound() {
        for dt in TIME_STEPS {
            let deviation = measure(Integrator::SemiImplicitEuler, dt)
                .unwrap()
                .largest_deviation;
            let bound = 1.0 / (1.0 - dt / 2.0) - 1.0;
            assert!(deviation <= bound + ROUNDING, "{deviation} of {bound}");
        }
    }

    #[test]
    fn half_the_time_step_halves_the_deviation() {
        let [long, short] = TIME_STEPS.map(|dt| {
            measure(Integrator::SemiImplicitEuler, dt)
                .unwrap()
                .largest_deviation
        });
        assert!((1.8..2.2).contains(&(long / short)), "{long} {short}");
    }

    #[test]
    fn explicit_euler_multiplies_the_energy_at_every_step() {
        for dt in TIME_STEPS {
            let run = measure(Integrator::ExplicitEuler, dt).unwrap();
            for (step, energy) in run.energies.iter().enumerate() {
                let expected = (step as f64 * (dt * dt).ln_1p()).exp();
                let off = (energy / expected - 1.0).abs();
                assert!(off <= ROUNDING, "{off:e} at step {step}, dt = {dt}");
            }
        }
    }
}
