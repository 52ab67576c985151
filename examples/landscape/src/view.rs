//! The simulation in an egui frame: here the engine's encoder meets the steps of both sides.

use std::sync::Arc;

use eframe::egui::{self, Align2, Color32, FontId, Pos2, Rect, Ui, mutex::Mutex};
use eframe::egui_wgpu::{self, CallbackResources, CallbackTrait, ScreenDescriptor};
use wgpu_optim::wgpu;

use crate::counts::{Figures, Frame};
use crate::landscape::Landscape;
use crate::scene::{COLOURS, Camera};

/// Shared between the program and the frames that egui records.
pub type SharedLandscape = Arc<Mutex<Landscape>>;

/// A frame of the simulation as a shape that egui draws.
struct FrameShape {
    landscape: SharedLandscape,
    camera: Camera,
    steps: u32,
    /// The size in pixels.
    size: [u32; 2],
}

impl CallbackTrait for FrameShape {
    /// Into egui's own encoder, before its render pass. egui submits it, with all else that it draws.
    fn prepare(
        &self,
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        _screen: &ScreenDescriptor,
        encoder: &mut wgpu::CommandEncoder,
        _resources: &mut CallbackResources,
    ) -> Vec<wgpu::CommandBuffer> {
        let mut landscape = self.landscape.lock();
        if landscape.failure().is_none()
            && let Err(error) = landscape.record_steps(encoder, self.steps)
        {
            landscape.fail(&error);
        }
        landscape.record_picture(device, queue, encoder, &self.camera, self.size);
        Vec::new()
    }

    fn paint(
        &self,
        _info: egui::PaintCallbackInfo,
        pass: &mut wgpu::RenderPass<'static>,
        _resources: &CallbackResources,
    ) {
        self.landscape.lock().paint(pass);
    }
}

/// Shows both sides over all of `ui`'s space, so many steps further on, and says of each what it is. Dragging turns
/// them, scrolling comes closer.
pub fn show(
    ui: &mut Ui,
    landscape: &SharedLandscape,
    camera: &mut Camera,
    steps: u32,
    frame: Option<&Frame>,
) {
    let (rect, response) = ui.allocate_exact_size(ui.available_size(), egui::Sense::drag());
    let turn = 0.006 * response.drag_delta();
    camera.yaw -= turn.x;
    camera.pitch = (camera.pitch + turn.y).clamp(0.1, 1.55);
    if response.hovered() {
        let scrolled = ui.input(|input| input.smooth_scroll_delta().y);
        camera.distance = (camera.distance * (-0.002 * scrolled).exp()).clamp(1.2, 6.0);
    }

    let pixels = rect.size() * ui.pixels_per_point();
    ui.painter().add(egui_wgpu::Callback::new_paint_callback(
        rect,
        FrameShape {
            landscape: Arc::clone(landscape),
            camera: *camera,
            steps,
            size: [pixels.x.round() as u32, pixels.y.round() as u32],
        },
    ));

    let middle = rect.center().x;
    let left = Rect::from_min_max(rect.min, Pos2::new(middle, rect.max.y));
    let right = Rect::from_min_max(Pos2::new(middle, rect.min.y), rect.max);
    let titles = {
        let landscape = landscape.lock();
        landscape
            .settings()
            .rules
            .each_ref()
            .map(|rule| rule.title())
    };
    for (index, (rect, title)) in [left, right].into_iter().zip(titles).enumerate() {
        label(
            ui,
            rect,
            index,
            &title,
            frame.map(|frame| &frame.sides[index]),
        );
    }
    let line = egui::Stroke::new(1.0, Color32::from_gray(70));
    ui.painter().vline(middle, rect.y_range(), line);
}

/// A side's heading and figures.
fn label(ui: &Ui, rect: Rect, side: usize, title: &str, figures: Option<&Figures>) {
    let [red, green, blue] = COLOURS[side].map(|part| (255.0 * part) as u8);
    let colour = Color32::from_rgb(red, green, blue);
    let painter = ui.painter();
    let size = (rect.width() / 26.0).clamp(11.0, 20.0);
    let line = |row: f32| rect.min + egui::vec2(0.9 * size, (0.7 + 1.35 * row) * size);
    let disc = line(0.0) + egui::vec2(0.45 * size, 0.62 * size);
    painter.circle_filled(disc, 0.38 * size, colour);
    let write = |at: Pos2, text: &str, size: f32, colour| {
        painter.text(
            at,
            Align2::LEFT_TOP,
            text,
            FontId::proportional(size),
            colour,
        );
    };
    write(
        line(0.0) + egui::vec2(1.3 * size, 0.0),
        title,
        size,
        Color32::WHITE,
    );
    let Some(figures) = figures else {
        return;
    };
    let share = format!(
        "{:.1} % in the deepest valley",
        100.0 * figures.deepest_share
    );
    write(line(1.15), &share, 1.15 * size, colour);
    let mut rest = format!(
        "mean height {}   mean speed {} a step",
        number(figures.mean_height),
        number(figures.mean_speed)
    );
    if figures.escaped_share > 0.0 {
        rest += &format!("   {:.1} % escaped", 100.0 * figures.escaped_share);
    }
    write(line(2.35), &rest, 0.8 * size, Color32::from_gray(200));
}

/// Three digits or so.
fn number(value: f64) -> String {
    if value == 0.0 || (0.001..1e4).contains(&value.abs()) {
        format!("{value:.3}")
    } else {
        format!("{value:.1e}")
    }
}
