//! Runs without a window: the same frames as PNGs, an animation, and the figures as CSV.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use image::codecs::gif::{GifEncoder, Repeat};
use image::{Delay, Frame as GifFrame, RgbaImage};
use indicatif::{ProgressBar, ProgressStyle};
use wgpu_optim::AdapterRequest;

use crate::counts::{Frame, Times};
use crate::scene::Camera;
use crate::settings::Settings;
use crate::stage::Stage;

/// The content of a recording, and its place.
#[derive(Clone, Debug)]
pub struct Recording {
    /// The number of frames after that of the start.
    pub frames: u32,
    /// The number of steps from one frame to the next.
    pub steps_per_frame: u32,
    /// A PNG, and a picture of the animation, each so many frames.
    pub every: u32,
    /// The size of a picture in pixels.
    pub size: [u32; 2],
    /// A directory, made if it is not there.
    pub out: PathBuf,
    /// Text in the adapter's name.
    pub adapter: Option<String>,
}

/// Draws all frames, and gives back what is known of the last.
///
/// # Errors
/// No adapter, settings that it cannot have, or files that cannot be written.
pub fn record(settings: &Settings, recording: &Recording) -> Result<Frame> {
    let request = AdapterRequest {
        name: recording.adapter.clone(),
        ..Default::default()
    };
    let mut stage = Stage::new(&request, settings, recording.size)?;
    let info = stage.gpu.adapter.get_info();
    println!(
        "{} balls on each side, {}, {} ({})",
        settings.balls,
        settings.terrain.name(),
        info.name,
        info.backend
    );
    std::fs::create_dir_all(&recording.out)
        .with_context(|| format!("cannot make {}", recording.out.display()))?;
    let mut figures = csv::Writer::from_path(recording.out.join("figures.csv"))?;
    figures.write_record([
        "step",
        "side",
        "rule",
        "mean_height",
        "mean_speed",
        "deepest_share",
        "escaped_share",
    ])?;
    let mut animation = animation(&recording.out.join("landscape.gif"))?;

    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} frames, {eta} to go")?;
    let bar = ProgressBar::new(u64::from(recording.frames)).with_style(style);
    let mut camera = Camera::default();
    let mut frame = None;
    // The first picture is of the start.
    for index in 0..=recording.frames {
        let steps = if index == 0 {
            0
        } else {
            recording.steps_per_frame
        };
        stage.draw(&mut camera, steps, frame.as_ref());
        let newest = stage.last_frame()?;
        for (side, (rule, of_side)) in settings.rules.iter().zip(newest.sides).enumerate() {
            figures.write_record([
                newest.steps.to_string(),
                ["left", "right"][side].to_owned(),
                rule.title(),
                of_side.mean_height.to_string(),
                of_side.mean_speed.to_string(),
                of_side.deepest_share.to_string(),
                of_side.escaped_share.to_string(),
            ])?;
        }
        frame = Some(newest);
        if index % recording.every == 0 || index == recording.frames {
            // Once more at rest, so that the picture shows its own figures.
            stage.draw(&mut camera, 0, frame.as_ref());
            let picture = stage.picture()?;
            let name = format!("frame-{:05}.png", newest.steps);
            picture.save(recording.out.join(name))?;
            animation.encode_frame(GifFrame::from_parts(
                half(&picture),
                0,
                0,
                Delay::from_numer_denom_ms(80, 1),
            ))?;
        }
        bar.set_position(u64::from(index));
    }
    bar.finish_and_clear();
    figures.flush()?;
    let frame = frame.context("no frame was drawn")?;
    let times = stage.times(&camera)?;
    report(settings, &frame, times);
    println!("wrote {}", recording.out.display());
    Ok(frame)
}

fn animation(path: &Path) -> Result<GifEncoder<File>> {
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    // From 1, the slowest and best, to 30.
    let mut encoder = GifEncoder::new_with_speed(file, 10);
    encoder.set_repeat(Repeat::Infinite)?;
    Ok(encoder)
}

/// The animation is half as wide and high as the pictures.
fn half(picture: &RgbaImage) -> RgbaImage {
    let (width, height) = picture.dimensions();
    image::imageops::resize(
        picture,
        width / 2,
        height / 2,
        image::imageops::FilterType::Triangle,
    )
}

fn report(settings: &Settings, frame: &Frame, times: Times) {
    println!("after {} steps:", frame.steps);
    for (rule, figures) in settings.rules.iter().zip(frame.sides) {
        println!(
            "  {:<44} {:5.1} % in the deepest valley, mean height {:.4}, mean speed {:.5}",
            rule.title(),
            100.0 * figures.deepest_share,
            figures.mean_height,
            figures.mean_speed
        );
    }
    println!(
        "a frame, by the clock: slopes {:.1} ms, step {:.1} ms, counts {:.1} ms, drawing {:.1} ms; the optimizer is {:.0} % of it",
        times.slopes,
        times.step,
        times.counts,
        times.drawing,
        100.0 * times.step_share(),
    );
}
