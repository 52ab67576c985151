//! The measurements as a picture.

use anyhow::Result;
use wgpu_optim_cli::picture::{self, Axis, Curve, Note, Picture, RGBColor, Side, Stroke, sheet};

use crate::comparison::{Comparison, MeasuredRun, median};
use crate::report::{or_never, short};

/// A prediction of the mean has a loss of 1.
const MOST_SHOWN: f64 = 1.0;

/// The training losses on the first device, as an SVG: every run thin, and thick the median over the starts of the least
/// loss so far, which meets the target where half of the runs have.
///
/// # Errors
/// If the drawing fails.
pub fn svg(comparison: &Comparison) -> Result<String> {
    let target = f64::from(comparison.target);
    let step_of = |epoch: usize| (epoch * comparison.steps_per_epoch) as f64;
    let (mut thin, mut thick, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    let mut last_step = 1.0_f64;
    // What the others are held against is in ink.
    let colors = [picture::INK].into_iter().chain(picture::COLORS).cycle();
    for (contender, color) in comparison.contenders.iter().zip(colors) {
        let runs = &contender.runs[0];
        for run in runs {
            // What jumps, or diverges, leaves the paper.
            let shown = losses(run).map(|loss| loss.min(MOST_SHOWN));
            thin.push(Curve {
                label: String::new(),
                color: faint(color),
                stroke: Stroke::Solid(1),
                points: (0..).map(step_of).zip(shown).collect(),
            });
        }
        let mut least = vec![MOST_SHOWN; runs.len()];
        let mut points = Vec::new();
        for epoch in 0..runs.first().map_or(0, |run| run.losses.train.len()) {
            for (least, run) in least.iter_mut().zip(runs) {
                *least = least.min(f64::from(run.losses.train[epoch]));
            }
            points.push((step_of(epoch), median(least.iter().copied().map(Some))));
        }
        last_step = points
            .iter()
            .map(|(step, _)| *step)
            .fold(last_step, f64::max);
        let steps = contender.steps();
        thick.push(Curve {
            label: format!(
                "{}, lr {}: {} steps",
                contender.label,
                short(contender.lr),
                or_never(steps, 0)
            ),
            color,
            stroke: Stroke::Solid(3),
            points,
        });
        if steps.is_finite() {
            notes.push(Note {
                text: String::new(),
                at: (steps, target),
                side: Side::Below,
                color,
            });
        }
    }
    let to_reach = Curve {
        label: match comparison.contenders.first() {
            Some(first) => format!("what {} reaches from every seed: {target:.3}", first.label),
            None => String::new(),
        },
        color: picture::GREY,
        stroke: Stroke::Dashed(2),
        points: vec![(0.0, target), (last_step, target)],
    };
    let picture = Picture {
        title: title(comparison),
        x_label: "step",
        y_label: "training loss; thick: the least so far, median of seeds",
        x: 0.0..last_step,
        y: 0.0..MOST_SHOWN,
        x_axis: Axis::Linear,
        y_axis: Axis::Linear,
        curves: thin.into_iter().chain(thick).chain([to_reach]).collect(),
        notes,
    };
    sheet(1, &[picture])
}

/// Over all rows to train on, at the start and after each epoch.
fn losses(run: &MeasuredRun) -> impl Iterator<Item = f64> {
    run.losses.train.iter().copied().map(f64::from)
}

/// The title: the steps and seconds of the second rule beside those of the first.
fn title(comparison: &Comparison) -> String {
    match comparison.contenders.as_slice() {
        [first, second, ..] if second.steps().is_finite() => format!(
            "Scoring red wines: {} takes {:.0} steps to the loss that takes {} {:.0}",
            second.label,
            second.steps(),
            first.label,
            first.steps()
        ),
        _ => "Scoring red wines".to_owned(),
    }
}

/// A colour as on paper that shines through.
fn faint(RGBColor(r, g, b): RGBColor) -> RGBColor {
    let mixed = |channel: u8| (u16::from(channel) / 4 + 191) as u8;
    RGBColor(mixed(r), mixed(g), mixed(b))
}
