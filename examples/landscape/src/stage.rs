//! An egui engine without a window, for pictures and tests.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result};
use eframe::egui::{self, mutex::Mutex};
use eframe::egui_wgpu::{Renderer, RendererOptions, ScreenDescriptor};
use image::RgbaImage;
use wgpu_optim::{AdapterRequest, Gpu, wgpu};

use crate::counts::{Frame, Times};
use crate::landscape::{FEATURES, Landscape};
use crate::scene::Camera;
use crate::settings::Settings;
use crate::view::{self, SharedLandscape};

const FORMAT: wgpu::TextureFormat = wgpu::TextureFormat::Rgba8Unorm;

/// An engine without a window: it owns device and queue, and submits once a frame, as egui does in a window.
pub struct Stage {
    /// The engine's device.
    pub gpu: Gpu,
    /// The landscape that it draws.
    pub landscape: SharedLandscape,
    context: egui::Context,
    renderer: Renderer,
    target: wgpu::Texture,
    size: [u32; 2],
    /// egui's textures that no later frame draws.
    unused: Vec<egui::TextureId>,
}

/// A frame as far as egui has recorded it when it asks its window for a texture to draw in.
///
/// Where there is none (the window is being resized, or hidden), egui drops it and submits nothing.
pub struct Recorded {
    /// The engine's encoder, with what the simulation has recorded.
    pub encoder: wgpu::CommandEncoder,
    others: Vec<wgpu::CommandBuffer>,
    shapes: Vec<egui::ClippedPrimitive>,
    screen: ScreenDescriptor,
}

impl Stage {
    /// Makes a stage on the best adapter that fits, whose pictures have this size in pixels.
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
        let context = egui::Context::default();
        context.set_theme(egui::Theme::Dark);
        Ok(Self {
            landscape: Arc::new(Mutex::new(landscape)),
            renderer: Renderer::new(device, FORMAT, RendererOptions::default()),
            context,
            target: target(device, size),
            size,
            unused: Vec::new(),
            gpu,
        })
    }

    /// Draws pictures of another size from now on.
    pub fn resize(&mut self, size: [u32; 2]) {
        (self.target, self.size) = (target(&self.gpu.device, size), size);
    }

    /// Draws a frame that is so many steps further on, as egui does in a window, and submits it.
    pub fn draw(
        &mut self,
        camera: &mut Camera,
        steps: u32,
        frame: Option<&Frame>,
    ) -> wgpu::SubmissionIndex {
        let recorded = self.record(camera, steps, frame);
        self.present(recorded)
    }

    /// The first half of [`draw`](Self::draw): what egui has recorded when it asks for a texture.
    pub fn record(&mut self, camera: &mut Camera, steps: u32, frame: Option<&Frame>) -> Recorded {
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
        self.unused.extend(output.textures_delta.free.drain());
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
        Recorded {
            encoder,
            others,
            shapes,
            screen,
        }
    }

    /// The second half of [`draw`](Self::draw): egui's own pass, and the submission.
    pub fn present(&mut self, recorded: Recorded) -> wgpu::SubmissionIndex {
        let Recorded {
            mut encoder,
            others,
            shapes,
            screen,
        } = recorded;
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
        let commands = others.into_iter().chain([encoder.finish()]);
        let submitted = self.gpu.queue.submit(commands);
        for id in self.unused.drain(..) {
            self.renderer.free_texture(&id);
        }
        submitted
    }

    /// The picture of the last frame.
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

    /// The time that the parts of a frame take, each submitted and waited for by itself: medians of nine rounds. The
    /// balls move on.
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

    /// Waits for the figures of the last frame.
    ///
    /// # Errors
    /// The device is lost.
    pub fn last_frame(&self) -> Result<Frame> {
        self.wait()?;
        let newest = self.landscape.lock().newest();
        newest.context("the device told nothing of its last frame")
    }
}

fn target(device: &wgpu::Device, size: [u32; 2]) -> wgpu::Texture {
    device.create_texture(&wgpu::TextureDescriptor {
        label: Some("stage.target"),
        size: extent(size),
        mip_level_count: 1,
        sample_count: 1,
        dimension: wgpu::TextureDimension::D2,
        format: FORMAT,
        usage: wgpu::TextureUsages::RENDER_ATTACHMENT | wgpu::TextureUsages::COPY_SRC,
        view_formats: &[],
    })
}

fn extent([width, height]: [u32; 2]) -> wgpu::Extent3d {
    wgpu::Extent3d {
        width,
        height,
        depth_or_array_layers: 1,
    }
}
