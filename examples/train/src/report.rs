//! The measurements as a table and as rows.

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::comparison::{Comparison, least, median};
use crate::mixed::{Mixed, MixedRun};
use crate::task::{Losses, Task};
use crate::training::Gradients;

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

/// A table of the measurements, for a person.
#[must_use]
pub fn text(task: &Task, comparison: &Comparison) -> String {
    let mut text = format!(
        "{} wines to train on and {} held out, {} parameters, {} steps of {} rows\n{}\n",
        task.data.train_rows,
        task.data.rows() - task.data.train_rows,
        task.model.numel(),
        task.steps(),
        task.batch_rows,
        table(comparison),
    );
    if let [first, second] = comparison.devices.as_slice() {
        let apart = match comparison.apart() {
            0.0 => "the same bit for bit".to_owned(),
            apart => format!("at most {apart:.1e} of the loss apart"),
        };
        text += &format!("losses of {first} and {second}: {apart}\n");
    }
    text
}

/// Medians over the starts, of steps and losses those on the first device.
fn table(comparison: &Comparison) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    let mut header = vec!["rule".to_owned(), "lr".to_owned()];
    header.push(format!("steps to {:.3}", comparison.target));
    header.extend(["least to most", "share"].map(str::to_owned));
    // Without what stands in brackets behind a device's name.
    let names = comparison.devices.iter().map(|name| name.split(" ("));
    let names = names.filter_map(|mut parts| parts.next());
    header.extend(names.map(|name| format!("seconds, {name}")));
    header.extend(["loss at the end", "least held-out loss"].map(str::to_owned));
    table.set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }

    let firsts = comparison.contenders.first().map(|first| first.steps());
    for contender in &comparison.contenders {
        let steps = contender.steps();
        let (least_steps, most_steps) = contender.least_and_most_steps();
        let mut cells = vec![contender.label.clone(), short(contender.lr)];
        cells.push(or_never(steps, 0));
        cells.push(format!(
            "{} to {}",
            or_never(least_steps, 0),
            or_never(most_steps, 0)
        ));
        cells.push(or_never(steps / firsts.unwrap_or(f64::NAN), 2));
        for runs in &contender.runs {
            cells.push(or_never(median(runs.iter().map(|run| run.seconds)), 3));
        }
        let at_end = |losses: &Losses| losses.train.last().copied().unwrap_or(f32::NAN);
        cells.push(format!("{:.3}", contender.typical(at_end)));
        let held_out = |losses: &Losses| least(&losses.held_out);
        cells.push(format!("{:.3}", contender.typical(held_out)));
        table.add_row(cells);
    }
    table
}

/// A table of the runs with gradients of 16 bits, for a person; medians over the starts.
#[must_use]
pub fn mixed_text(task: &Task, mixed: &[Mixed]) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    let skipped = format!("skipped of {} steps", task.steps());
    let header = ["rule", "device", &skipped, "loss scale at the end"];
    table.set_header(
        header
            .into_iter()
            .chain(["loss at the end", "with f32", "at most apart"]),
    );
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for mixed in mixed {
        let typical = |of: fn(&MixedRun) -> f64| median(mixed.runs.iter().map(of).map(Some));
        let apart = mixed.runs.iter().map(MixedRun::apart).fold(0.0, f32::max);
        let device = mixed.device.split(" (").next().unwrap_or_default();
        table.add_row([
            mixed.label.clone(),
            device.to_owned(),
            typical(|run| run.outcome.skipped as f64).to_string(),
            typical(|run| run.outcome.scale.into()).to_string(),
            format!("{:.3}", typical(|run| run.loss.into())),
            format!("{:.3}", typical(|run| run.loss_f32.into())),
            format!("{:.2} %", 100.0 * apart),
        ]);
    }
    format!(
        "with norms clipped to {}, by f16 gradients under a dynamic loss scale, and by f32 ones\n{table}\n",
        Gradients::MAX_NORM
    )
}

/// A number, unless it is beyond all.
pub(crate) fn or_never(number: f64, digits: usize) -> String {
    if number.is_finite() {
        format!("{number:.digits$}")
    } else {
        "never".to_owned()
    }
}

/// Three digits of a number.
pub(crate) fn short(number: f64) -> String {
    let digits = format!("{number:.2e}");
    digits
        .parse::<f64>()
        .map_or(digits, |rounded| rounded.to_string())
}

/// A table of every loss of every run, as comma-separated values.
///
/// # Errors
/// If it cannot be written.
pub fn csv(comparison: &Comparison) -> Result<Vec<u8>> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for contender in &comparison.contenders {
        for (device, runs) in comparison.devices.iter().zip(&contender.runs) {
            for (seed, run) in runs.iter().enumerate() {
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
