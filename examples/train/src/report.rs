//! What was measured, as a table, as rows and as a picture.

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use wgpu_optim_cli::picture::{self, Axis, Curve, Note, Picture, RGBColor, Side, Stroke, sheet};

use crate::comparison::{Comparison, Measured, MeasuredRun, least, median};

const COLORS: [RGBColor; 7] = [
    picture::INK,
    picture::BLUE,
    picture::VERMILION,
    picture::GREEN,
    picture::ORANGE,
    picture::SKY_BLUE,
    picture::PINK,
];
/// A prediction of the mean has a loss of 1.
const MOST_SHOWN: f64 = 1.0;

#[derive(Serialize)]
struct Row<'c> {
    device: &'c str,
    rule: &'c str,
    lr: f64,
    seed: usize,
    step: usize,
    train_loss: f32,
    held_out_loss: f32,
}

impl Measured {
    /// Median over the starts, on the first device; infinite where most never reach the target.
    fn steps(&self) -> f64 {
        median(
            self.runs[0]
                .iter()
                .map(|run| run.steps.map(|steps| steps as f64)),
        )
    }

    /// Median over the starts of what a run on the first device comes to.
    fn typical(&self, of: impl Fn(&crate::task::Losses) -> f32) -> f64 {
        median(
            self.runs[0]
                .iter()
                .map(|run| Some(f64::from(of(&run.losses)))),
        )
    }
}

/// The steps and seconds of each contender.
#[must_use]
pub fn table(comparison: &Comparison) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    let mut header: Vec<String> = ["rule", "lr"].map(str::to_owned).into();
    header.push(format!("steps to {:.3}", comparison.target));
    header.push("least to most".to_owned());
    header.push("share".to_owned());
    let devices = comparison.devices.iter();
    header.extend(devices.map(|device| format!("seconds, {}", first_word(device))));
    header.extend(["loss at the end", "least held-out loss"].map(str::to_owned));
    table.set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let first = comparison
        .contenders
        .first()
        .map_or(f64::NAN, Measured::steps);
    for contender in &comparison.contenders {
        let steps = contender.runs[0].iter().map(|run| run.steps);
        let (least_steps, most_steps) = (steps.clone().flatten().min(), steps.clone().max());
        let all = steps.clone().all(|steps| steps.is_some());
        let shown = |number: Option<usize>| number.map_or("never".to_owned(), |n| n.to_string());
        let most_steps = if all { most_steps.flatten() } else { None };
        let mut cells = vec![
            contender.label.clone(),
            format!("{:.4}", contender.lr),
            or_never(contender.steps(), 0),
            format!("{} to {}", shown(least_steps), shown(most_steps)),
            or_never(contender.steps() / first, 2),
        ];
        let devices = contender.runs.iter();
        cells.extend(devices.map(|runs| or_never(median(runs.iter().map(|run| run.seconds)), 3)));
        let last = |losses: &[f32]| losses.last().copied().unwrap_or(f32::NAN);
        cells.push(format!(
            "{:.3}",
            contender.typical(|losses| last(&losses.train))
        ));
        cells.push(format!(
            "{:.3}",
            contender.typical(|losses| least(&losses.held_out))
        ));
        table.add_row(cells);
    }
    table.to_string()
}

/// A device's name without what stands in brackets behind it.
fn first_word(device: &str) -> &str {
    device.split(" (").next().unwrap_or(device)
}

fn or_never(number: f64, digits: usize) -> String {
    if number.is_finite() {
        format!("{number:.digits$}")
    } else {
        "never".to_owned()
    }
}

/// Every loss of every run.
///
/// # Errors
/// If the table cannot be written.
pub fn csv(comparison: &Comparison, seeds: usize) -> Result<Vec<u8>> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for contender in &comparison.contenders {
        for (device, runs) in comparison.devices.iter().zip(&contender.runs) {
            for (seed, run) in (0..seeds).zip(runs) {
                let losses = run.losses.train.iter().zip(&run.losses.held_out);
                for (epoch, (train_loss, held_out_loss)) in losses.enumerate() {
                    writer.serialize(Row {
                        device,
                        rule: &contender.label,
                        lr: contender.lr,
                        seed,
                        step: epoch * comparison.steps_per_epoch,
                        train_loss: *train_loss,
                        held_out_loss: *held_out_loss,
                    })?;
                }
            }
        }
    }
    Ok(writer.into_inner()?)
}

/// The training losses on the first device, as an SVG: every run thin, and thick the median over the starts of the least
/// loss so far, which meets the target where half of the runs have.
///
/// # Errors
/// If the drawing fails.
pub fn picture(comparison: &Comparison) -> Result<String> {
    let target = f64::from(comparison.target);
    let step_of = |epoch: usize| (epoch * comparison.steps_per_epoch) as f64;
    let (mut thin, mut thick, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    let mut last_step = 1.0_f64;
    for (contender, color) in comparison.contenders.iter().zip(COLORS.iter().cycle()) {
        let losses = |run: &MeasuredRun| {
            let losses = run.losses.train.iter().copied();
            losses.map(f64::from).collect()
        };
        let runs: Vec<Vec<f64>> = contender.runs[0].iter().map(losses).collect();
        for run in &runs {
            // What jumps, or diverges, leaves the paper.
            let shown = run.iter().map(|loss| loss.min(MOST_SHOWN));
            thin.push(Curve {
                label: String::new(),
                color: faint(*color),
                stroke: Stroke::Solid(1),
                points: (0..).map(step_of).zip(shown).collect(),
            });
        }
        let so_far =
            |run: &Vec<f64>, epoch: usize| run[..=epoch].iter().copied().fold(MOST_SHOWN, f64::min);
        let epochs = runs.first().map_or(0, Vec::len);
        let medians =
            (0..epochs).map(|epoch| median(runs.iter().map(|run| Some(so_far(run, epoch)))));
        let points: Vec<_> = (0..).map(step_of).zip(medians).collect();
        last_step = points
            .last()
            .map_or(last_step, |(step, _)| step.max(last_step));
        let steps = contender.steps();
        thick.push(Curve {
            label: format!(
                "{}, lr {:.3}: {} steps",
                contender.label,
                contender.lr,
                or_never(steps, 0)
            ),
            color: *color,
            stroke: Stroke::Solid(3),
            points,
        });
        if steps.is_finite() {
            notes.push(Note {
                text: String::new(),
                at: (steps, target),
                side: Side::Below,
                color: *color,
            });
        }
    }
    let to_reach = Curve {
        label: format!("the loss to reach, {target:.3}"),
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

/// What the second rule makes of the first one's task.
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

/// As on paper that shines through.
fn faint(RGBColor(r, g, b): RGBColor) -> RGBColor {
    let mixed = |channel: u8| (u16::from(channel) / 4 + 191) as u8;
    RGBColor(mixed(r), mixed(g), mixed(b))
}
