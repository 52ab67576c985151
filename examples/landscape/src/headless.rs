//! The same frames without a window: PNGs, an animation and the figures as CSV.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result};
use eframe::egui::{self, mutex::Mutex};
use eframe::egui_wgpu::{Renderer, RendererOptions, ScreenDescriptor};
use image::codecs::gif::{GifEncoder, Repeat};
use image::{Delay, Frame as GifFrame, RgbaImage};
use indicatif::{ProgressBar, ProgressStyle};
use wgpu_optim::{AdapterRequest, Gpu, wgpu};

use crate::counts::{Frame, Times};
use crate::landscape::{FEATURES, Landscape};
use crate::scene::Camera;
use crate::settings::Settings;
use crate::view::{self, SharedLandscape};

/// What is drawn, and where it goes.
#[derive(Clone, Debug)]
pub struct Recording {
    /// After the one of the start.
    pub frames: u32,
    /// How far a frame is from the one before.
    pub steps_per_frame: u32,
    /// A PNG, and a picture of the animation, each so many frames.
    pub every: u32,
    /// In pixels.
    pub size: [u32; 2],
    /// A directory, made if it is not there.
    pub out: PathBuf,
    /// Text in the adapter's name.
    pub adapter: Option<String>,
}

const FORMAT: wgpu::TextureFormat = wgpu::TextureFormat::Rgba8Unorm;

/// An egui engine without a window: it owns device and queue, and submits once a frame.
pub struct Stage {
    /// The engine's.
    pub gpu: Gpu,
    /// What it draws.
    pub landscape: SharedLandscape,
    context: egui::Context,
    renderer: Renderer,
    target: wgpu::Texture,
    size: [u32; 2],
}

impl Stage {
    /// On the best adapter that fits, pictures of this size in pixels.
    ///
    /// # Errors
    /// No adapter, or settings that it cannot have.
    pub fn new(request: &AdapterRequest, settings: &Settings, size: [u32; 2]) -> Result<Self> {
        let request = AdapterRequest {
            features: request.features | FEATURES,
            ..request.clone()
        };
        let gpu = Gpu::open_blocking(&request)?;
        let Gpu { device, queue, .. } = &gpu;
        let landscape = Landscape::new(device, queue, FORMAT, settings)?;
        let target = device.create_texture(&wgpu::TextureDescriptor {
            label: Some("stage.target"),
            size: extent(size),
            mip_level_count: 1,
            sample_count: 1,
            dimension: wgpu::TextureDimension::D2,
            format: FORMAT,
            usage: wgpu::TextureUsages::RENDER_ATTACHMENT | wgpu::TextureUsages::COPY_SRC,
            view_formats: &[],
        });
        let context = egui::Context::default();
        context.set_theme(egui::Theme::Dark);
        Ok(Self {
            landscape: Arc::new(Mutex::new(landscape)),
            renderer: Renderer::new(device, FORMAT, RendererOptions::default()),
            context,
            target,
            size,
            gpu,
        })
    }

    /// Draws a frame that is so many steps further on, as egui does in a window, and submits it.
    pub fn draw(
        &mut self,
        camera: &mut Camera,
        steps: u32,
        frame: Option<&Frame>,
    ) -> wgpu::SubmissionIndex {
        let [width, height] = self.size;
        let screen =
            egui::Rect::from_min_size(egui::Pos2::ZERO, egui::vec2(width as f32, height as f32));
        let input = egui::RawInput {
            screen_rect: Some(screen),
            ..Default::default()
        };
        let mut output = self.context.run_ui(input, |ui| {
            egui::CentralPanel::default()
                .frame(egui::Frame::NONE)
                .show(ui, |ui| {
                    view::show(ui, &self.landscape, camera, steps, frame)
                });
        });
        let shapes = self
            .context
            .tessellate(output.shapes, output.pixels_per_point);

        let Gpu { device, queue, .. } = &self.gpu;
        for (id, deltas) in output.textures_delta.set.drain() {
            for delta in deltas {
                self.renderer.update_texture(device, queue, id, &delta);
            }
        }
        let screen = ScreenDescriptor {
            size_in_pixels: self.size,
            pixels_per_point: output.pixels_per_point,
        };
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor {
            label: Some("stage.frame"),
        });
        let others = self
            .renderer
            .update_buffers(device, queue, &mut encoder, &shapes, &screen);
        let view = self
            .target
            .create_view(&wgpu::TextureViewDescriptor::default());
        let mut pass = encoder
            .begin_render_pass(&wgpu::RenderPassDescriptor {
                label: Some("stage.frame"),
                color_attachments: &[Some(wgpu::RenderPassColorAttachment {
                    view: &view,
                    depth_slice: None,
                    resolve_target: None,
                    ops: wgpu::Operations {
                        load: wgpu::LoadOp::Clear(wgpu::Color::BLACK),
                        store: wgpu::StoreOp::Store,
                    },
                })],
                ..Default::default()
            })
            .forget_lifetime();
        self.renderer.render(&mut pass, &shapes, &screen);
        drop(pass);
        let submitted = queue.submit(others.into_iter().chain([encoder.finish()]));
        for id in output.textures_delta.free.drain() {
            self.renderer.free_texture(&id);
        }
        submitted
    }

    /// What the last frame showed.
    ///
    /// # Errors
    /// The device is lost.
    pub fn picture(&self) -> Result<RgbaImage> {
        let Gpu { device, queue, .. } = &self.gpu;
        let [width, height] = self.size;
        let row_bytes = (4 * width).next_multiple_of(wgpu::COPY_BYTES_PER_ROW_ALIGNMENT);
        let buffer = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("stage.picture"),
            size: u64::from(row_bytes) * u64::from(height),
            usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ,
            mapped_at_creation: false,
        });
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor {
            label: Some("stage.picture"),
        });
        encoder.copy_texture_to_buffer(
            self.target.as_image_copy(),
            wgpu::TexelCopyBufferInfo {
                buffer: &buffer,
                layout: wgpu::TexelCopyBufferLayout {
                    offset: 0,
                    bytes_per_row: Some(row_bytes),
                    rows_per_image: None,
                },
            },
            extent(self.size),
        );
        queue.submit([encoder.finish()]);
        buffer.map_async(wgpu::MapMode::Read, .., |_| {});
        self.wait()?;
        let rows = buffer
            .get_mapped_range(..)
            .context("the picture could not be read")?;
        let rows = rows.chunks(row_bytes as usize);
        let pixels = rows
            .flat_map(|row| &row[..4 * width as usize])
            .copied()
            .collect();
        RgbaImage::from_raw(width, height, pixels).context("the picture has another size")
    }

    /// Waits until the device has done all.
    ///
    /// # Errors
    /// The device is lost.
    pub fn wait(&self) -> Result<()> {
        self.gpu.device.poll(wgpu::PollType::wait_indefinitely())?;
        Ok(())
    }

    /// How long the parts of a frame take, each submitted and waited for by itself: medians of nine rounds. The balls move
    /// on.
    ///
    /// # Errors
    /// The device is lost.
    pub fn times(&self, camera: &Camera) -> Result<Times> {
        let mut landscape = self.landscape.lock();
        let Gpu { device, queue, .. } = &self.gpu;
        let mut rounds = [const { Vec::new() }; 4];
        for _ in 0..9 {
            for (part, times) in rounds.iter_mut().enumerate() {
                let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor {
                    label: Some("stage.times"),
                });
                match part {
                    0 => landscape.record_slopes(&mut encoder),
                    1 => landscape.record_update(&mut encoder)?,
                    2 => landscape.record_counts(&mut encoder),
                    _ => landscape.record_picture(device, queue, &mut encoder, camera, self.size),
                }
                let commands = encoder.finish();
                self.wait()?;
                let start = Instant::now();
                queue.submit([commands]);
                self.wait()?;
                times.push(1e3 * start.elapsed().as_secs_f64());
            }
        }
        let [slopes, step, counts, drawing] = rounds.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        });
        Ok(Times {
            slopes,
            step,
            counts,
            drawing,
        })
    }

    /// What is known of the last frame, waited for.
    ///
    /// # Errors
    /// The device is lost.
    pub fn last_frame(&self) -> Result<Frame> {
        let mut landscape = self.landscape.lock();
        landscape.newest();
        self.wait()?;
        landscape
            .newest()
            .context("the device told nothing of its last frame")
    }
}

fn extent([width, height]: [u32; 2]) -> wgpu::Extent3d {
    wgpu::Extent3d {
        width,
        height,
        depth_or_array_layers: 1,
    }
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
