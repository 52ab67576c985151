//! What was measured, as a table, as rows and as a picture.

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use wgpu_optim_cli::picture::{self, Axis, Curve, Note, Picture, RGBColor, Side, Stroke, sheet};

use crate::comparison::{Comparison, Measured, least, median};

const COLORS: [RGBColor; 7] = [
    picture::INK,
    picture::BLUE,
    picture::SKY_BLUE,
    picture::GREEN,
    picture::VERMILION,
    picture::ORANGE,
    picture::PINK,
];

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

/// The training losses on the first device, as an SVG: every run thin, the median over the starts thick.
///
/// # Errors
/// If the drawing fails.
pub fn picture(comparison: &Comparison, title: String) -> Result<String> {
    let epochs = comparison
        .contenders
        .first()
        .map_or(0, |c| c.runs[0][0].losses.train.len());
    let steps = ((epochs.max(2) - 1) * comparison.steps_per_epoch) as f64;
    let at = |epoch: usize| (epoch * comparison.steps_per_epoch) as f64;
    let colors = || COLORS.iter().cycle();

    // What has diverged leaves the paper upwards.
    let (mut least_shown, most_shown) = (f64::from(comparison.target), 1.5_f64);
    let (mut thin, mut thick, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    for (contender, color) in comparison.contenders.iter().zip(colors()) {
        let losses = |epoch: usize| {
            let runs = contender.runs[0].iter();
            runs.map(move |run| f64::from(run.losses.train[epoch]))
        };
        let shown = |loss: f64| if loss < most_shown { loss } else { most_shown };
        for run in &contender.runs[0] {
            let losses = run
                .losses
                .train
                .iter()
                .map(|loss| shown(f64::from(*loss)).log10());
            let points = losses.enumerate().map(|(epoch, loss)| (at(epoch), loss));
            thin.push(Curve {
                label: String::new(),
                color: faint(*color),
                stroke: Stroke::Solid(1),
                points: points.collect(),
            });
        }
        let medians = (0..epochs).map(|epoch| shown(median(losses(epoch).map(Some))));
        let medians: Vec<_> = medians.collect();
        least_shown = medians.iter().copied().fold(least_shown, f64::min);
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
            points: (0..)
                .map(at)
                .zip(medians.iter().map(|loss| loss.log10()))
                .collect(),
        });
        if steps.is_finite() {
            notes.push(Note {
                text: String::new(),
                at: (steps, f64::from(comparison.target).log10()),
                side: Side::Below,
                color: *color,
            });
        }
    }
    let target = Curve {
        label: format!("the loss to reach, {:.3}", comparison.target),
        color: picture::GREY,
        stroke: Stroke::Dashed(2),
        points: vec![
            (0.0, f64::from(comparison.target).log10()),
            (steps, f64::from(comparison.target).log10()),
        ],
    };
    let curves = thin.into_iter().chain(thick).chain([target]).collect();
    let picture = Picture {
        title,
        x_label: "step",
        y_label: "training loss: squared error over variance",
        x: 0.0..steps,
        y: (0.8 * least_shown).log10()..most_shown.log10(),
        x_axis: Axis::Linear,
        y_axis: Axis::PowersOfTen,
        curves,
        notes,
    };
    sheet(1, &[picture])
}

/// As on paper that shines through.
fn faint(RGBColor(r, g, b): RGBColor) -> RGBColor {
    let mixed = |channel: u8| (u16::from(channel) / 4 + 191) as u8;
    RGBColor(mixed(r), mixed(g), mixed(b))
}
