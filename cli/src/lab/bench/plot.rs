//! A report as a picture: time against size, a panel for each rule, with the roof of each device drawn in.

use std::path::Path;

use anyhow::{Result, bail};

use super::paths::Kind;
use super::report::{Report, Row};
use crate::lab::picture::{self, Axis, Curve, Picture, RGBColor, Stroke};

#[derive(Clone, Copy)]
enum Format {
    Svg,
    Png,
}

fn format_of(path: &Path) -> Result<Format> {
    let extension = path.extension().and_then(|extension| extension.to_str());
    match extension.map(str::to_ascii_lowercase).as_deref() {
        Some("svg") => Ok(Format::Svg),
        Some("png") => Ok(Format::Png),
        _ => bail!(
            "cannot plot into {}: it ends neither in .svg nor in .png",
            path.display()
        ),
    }
}

/// Whether a picture can be made for a file of this name.
pub fn check_extension(path: &Path) -> Result<()> {
    format_of(path).map(drop)
}

/// The picture in the format that the file's name asks for.
pub fn draw(report: &Report, path: &Path) -> Result<Vec<u8>> {
    let svg = svg(report)?;
    match format_of(path)? {
        Format::Svg => Ok(svg.into_bytes()),
        Format::Png => picture::to_png(&svg),
    }
}

/// The picture as an SVG.
pub fn svg(report: &Report) -> Result<String> {
    picture::sheet(1, &panels(report))
}

/// A panel for each rule and number of tensors.
fn panels(report: &Report) -> Vec<Picture> {
    let mut panels: Vec<(&str, usize)> = Vec::new();
    for row in &report.rows {
        let panel = (row.rule.as_str(), row.tensors);
        if !panels.contains(&panel) {
            panels.push(panel);
        }
    }
    let steps = colored_steps(report);
    let panel = |(rule, tensors): &(&str, usize)| {
        let rows = report.rows.iter();
        let rows: Vec<_> = rows
            .filter(|r| (r.rule.as_str(), r.tensors) == (*rule, *tensors))
            .collect();
        let caches = if report.hot_caches { "hot" } else { "cold" };
        let tensors = match tensors {
            1 => "one tensor".to_owned(),
            _ => format!("{tensors} tensors"),
        };
        picture(
            format!("{rule}, {tensors}, {caches} caches: time of a step"),
            &rows,
            &steps,
        )
    };
    panels.iter().map(panel).collect()
}

/// Every way to make a step on a device, with the colour that it has in all panels.
fn colored_steps(report: &Report) -> Vec<(&str, Kind, RGBColor)> {
    // One for each device and way to step.
    let mut colors = picture::COLORS.iter().cycle();
    let mut steps: Vec<(&str, Kind, RGBColor)> = Vec::new();
    for row in report.rows.iter().filter(|row| row.path.is_step()) {
        let (device, kind) = (row.device.as_str(), row.path);
        if !steps.iter().any(|(d, k, _)| (*d, *k) == (device, kind)) {
            let color = colors.next().copied().unwrap_or(picture::INK);
            steps.push((device, kind, color));
        }
    }
    steps
}

fn picture(title: String, rows: &[&Row], steps: &[(&str, Kind, RGBColor)]) -> Picture {
    let mut lines: Vec<(&str, Kind)> = Vec::new();
    for row in rows {
        let line = (row.device.as_str(), row.path);
        if (row.path.is_step() || roofs(row.path)) && !lines.contains(&line) {
            lines.push(line);
        }
    }
    let curve = |(device, kind): &(&str, Kind)| {
        let own = steps.iter().find(|(d, k, _)| d == device && k == kind);
        // A roof has the colour of the step that it limits.
        let limited = || {
            steps
                .iter()
                .find(|(d, k, _)| d == device && k.roof() == Some(*kind))
        };
        let color = own
            .or_else(limited)
            .map_or(picture::GREY, |(_, _, color)| *color);
        let mine = rows
            .iter()
            .filter(|row| (row.device.as_str(), row.path) == (*device, *kind));
        let mut points: Vec<_> = mine
            .map(|row| ((row.numel as f64).log2(), row.ms_median.log10()))
            .collect();
        points.sort_by(|x, y| x.0.total_cmp(&y.0));
        Curve {
            label: format!("{kind}, {device}"),
            color,
            stroke: match kind.is_step() {
                true => Stroke::Dotted(2),
                false => Stroke::Dashed(2),
            },
            points,
        }
    };
    let curves: Vec<_> = lines.iter().map(curve).collect();
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let span = |values: &mut dyn Iterator<Item = f64>, margin: f64| {
        let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), value| {
            (low.min(value), high.max(value))
        });
        low - margin..high + margin
    };
    Picture {
        title,
        x_label: "elements",
        y_label: "ms",
        x: span(&mut points().map(|point| point.0), 0.5),
        y: span(&mut points().map(|point| point.1), 0.2),
        x_axis: Axis::PowersOfTwo,
        y_axis: Axis::PowersOfTen,
        curves,
        notes: Vec::new(),
    }
}

fn roofs(kind: Kind) -> bool {
    matches!(kind, Kind::Copy | Kind::Stream)
}
