//! The program: both sides and the controls beside them, in a window or on a page.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use eframe::egui::{self, ComboBox, DragValue, Slider, Ui, mutex::Mutex};
use eframe::{CreationContext, egui_wgpu};
use wgpu_optim::rules::sgd::MomentumForm;
use wgpu_optim::wgpu;

use crate::counts::Frame;
use crate::landscape::{FEATURES, Landscape};
use crate::scene::Camera;
use crate::settings::{RuleSettings, Settings};
use crate::terrain::Terrain;
use crate::view::{self, SharedLandscape};

const NUMBERS_OF_BALLS: [(u32, &str); 6] = [
    (100, "100"),
    (2_500, "2 500"),
    (100_000, "100 000"),
    (1_000_000, "1 million"),
    (4_000_000, "4 million"),
    (1 << 24, "16 million"),
];

/// Is told what each frame showed.
type Listener = Box<dyn Fn(&Frame)>;

/// The simulation and what its controls say.
pub struct App {
    landscape: SharedLandscape,
    most_balls: u32,
    device: String,
    settings: Settings,
    camera: Camera,
    is_paused: bool,
    steps_per_frame: u32,
    /// Pauses after so many steps.
    stop_after: Option<u64>,
    /// The error in the settings as they are typed, until they are right.
    problem: Option<String>,
    is_told: Option<Listener>,
}

/// egui's device, with what the kernels and the clock use where the adapter has it, and with the adapter's own limits.
/// `adapter` is text in the name of the one that is wanted.
pub fn wgpu_options(adapter: Option<String>) -> egui_wgpu::WgpuConfiguration {
    let mut setup = egui_wgpu::WgpuSetupCreateNew::without_display_handle();
    // Compute shaders: WebGL will not do.
    if cfg!(target_arch = "wasm32") {
        setup.instance_descriptor.backends = wgpu::Backends::BROWSER_WEBGPU;
    }
    if let Some(text) = adapter {
        setup.native_adapter_selector = Some(Arc::new(move |adapters, _surface| {
            let names = adapters.iter().map(|adapter| adapter.get_info().name);
            let found = names
                .clone()
                .position(|name| name.to_lowercase().contains(&text.to_lowercase()));
            let all = || names.clone().collect::<Vec<_>>().join(", ");
            found
                .map(|index| adapters[index].clone())
                .ok_or_else(|| format!("no adapter \"{text}\" among {}", all()))
        }));
    }
    setup.device_descriptor = Arc::new(|adapter| wgpu::DeviceDescriptor {
        label: Some("landscape.device"),
        required_features: adapter.features() & FEATURES,
        required_limits: adapter.limits(),
        ..Default::default()
    });
    egui_wgpu::WgpuConfiguration {
        wgpu_setup: setup.into(),
        ..Default::default()
    }
}

impl App {
    /// Makes an app whose landscape is on the device that egui draws with.
    ///
    /// # Errors
    /// No device, or settings that it cannot have.
    pub fn new(context: &CreationContext<'_>, settings: Settings) -> Result<Self> {
        let engine = context
            .wgpu_render_state
            .as_ref()
            .context("egui draws without wgpu")?;
        let egui_wgpu::RenderState {
            device,
            queue,
            target_format,
            ..
        } = engine;
        let landscape = Landscape::new(device, queue, *target_format, &settings)?;
        context.egui_ctx.set_theme(egui::Theme::Dark);
        let info = engine.adapter.get_info();
        Ok(Self {
            landscape: Arc::new(Mutex::new(landscape)),
            most_balls: Landscape::most_balls(device),
            device: format!("{} ({})", info.name, info.backend)
                .trim_start()
                .to_owned(),
            settings,
            camera: Camera::default(),
            is_paused: false,
            steps_per_frame: 1,
            stop_after: None,
            problem: None,
            is_told: None,
        })
    }

    /// Returns the app with so many steps a frame, which pauses after `stop_after` steps in all.
    #[must_use]
    pub fn with_steps(mut self, steps_per_frame: u32, stop_after: Option<u64>) -> Self {
        (self.steps_per_frame, self.stop_after) = (steps_per_frame, stop_after);
        self
    }

    /// Tells `listener` what each frame showed.
    #[must_use]
    pub fn telling(mut self, listener: impl Fn(&Frame) + 'static) -> Self {
        self.is_told = Some(Box::new(listener));
        self
    }

    fn apply(&mut self) {
        let applied = self.landscape.lock().apply(&self.settings);
        self.problem = applied.err().map(|error| format!("{error:#}"));
    }

    fn restart(&mut self) {
        let restarted = self.landscape.lock().restart();
        self.problem = restarted.err().map(|error| format!("{error:#}"));
    }
}

impl eframe::App for App {
    fn ui(&mut self, ui: &mut Ui, _frame: &mut eframe::Frame) {
        let (frame, so_far) = {
            let mut landscape = self.landscape.lock();
            if let Some(failure) = landscape.failure() {
                self.problem = Some(failure.to_owned());
            }
            (landscape.newest(), landscape.steps())
        };
        if let (Some(listener), Some(frame)) = (&self.is_told, &frame) {
            listener(frame);
        }
        let mut steps = if self.is_paused {
            0
        } else {
            self.steps_per_frame
        };
        egui::Panel::left("controls")
            .exact_size(268.0)
            .show(ui, |ui| {
                egui::ScrollArea::vertical().show(ui, |ui| {
                    steps = self.controls(ui, steps, so_far, frame.as_ref());
                });
            });
        if let Some(stop) = self.stop_after {
            steps = steps.min(u32::try_from(stop.saturating_sub(so_far)).unwrap_or(u32::MAX));
        }
        egui::CentralPanel::default()
            .frame(egui::Frame::NONE)
            .show(ui, |ui| {
                view::show(ui, &self.landscape, &mut self.camera, steps, frame.as_ref());
            });
        // Balls roll whether or not anybody moves the mouse.
        ui.ctx().request_repaint();
    }
}

impl App {
    /// The controls. Gives back how many steps this frame takes.
    fn controls(&mut self, ui: &mut Ui, mut steps: u32, so_far: u64, frame: Option<&Frame>) -> u32 {
        ui.heading("Balls on a landscape");
        ui.label("The loss is the height; the force on a ball is minus the slope.");
        ui.separator();

        ui.horizontal(|ui| {
            let pause = if self.is_paused { "Go on" } else { "Pause" };
            if ui.button(pause).clicked() {
                self.is_paused = !self.is_paused;
            }
            if ui
                .add_enabled(self.is_paused, egui::Button::new("Step"))
                .clicked()
            {
                steps = 1;
            }
            if ui.button("Reset").clicked() {
                self.restart();
            }
        });
        ui.label(format!("step {so_far}"));
        ui.add(Slider::new(&mut self.steps_per_frame, 1..=32).text("steps a frame"));
        ui.separator();

        let before = self.settings.clone();
        self.terrain(ui);
        for (side, name) in ["Left", "Right"].into_iter().enumerate() {
            ui.separator();
            ui.strong(name);
            ui.push_id(side, |ui| rule(ui, &mut self.settings.rules[side]));
        }
        if self.settings != before {
            self.apply();
        }
        if let Some(problem) = &self.problem {
            ui.colored_label(ui.visuals().error_fg_color, problem);
        }

        ui.separator();
        ui.small(&self.device);
        match frame.map(|frame| frame.times) {
            Some(Some(times)) => {
                ui.small(format!(
                    "slopes {:.2} ms, step {:.2} ms, counts {:.2} ms, drawing {:.2} ms",
                    times.slopes, times.step, times.counts, times.drawing
                ));
                ui.small(format!(
                    "the optimizer is {:.0} % of that",
                    100.0 * times.step_share()
                ));
            }
            Some(None) => {
                ui.small("This device has no timestamps that tell; --headless times the parts by the clock.");
            }
            None => {}
        }
        steps
    }

    fn terrain(&mut self, ui: &mut Ui) {
        let settings = &mut self.settings;
        let old = settings.terrain;
        ComboBox::from_label("terrain")
            .selected_text(settings.terrain.name())
            .show_ui(ui, |ui| {
                for terrain in Terrain::ALL {
                    ui.selectable_value(&mut settings.terrain, terrain, terrain.name());
                }
            });
        if settings.terrain != old {
            // A learning rate that is right for one terrain flies out of another.
            for rule in &mut settings.rules {
                if rule.rule == RuleSettings::SGD {
                    rule.lr = settings.terrain.lr();
                }
            }
        }
        ComboBox::from_label("balls on each side")
            .selected_text(settings.balls.to_string())
            .show_ui(ui, |ui| {
                for (balls, name) in NUMBERS_OF_BALLS {
                    if balls <= self.most_balls {
                        ui.selectable_value(&mut settings.balls, balls, name);
                    }
                }
            });
        ui.horizontal(|ui| {
            ui.add(DragValue::new(&mut settings.seed));
            ui.label("seed of their starts");
        });
    }
}

/// A side's rule and its numbers.
fn rule(ui: &mut Ui, rule: &mut RuleSettings) {
    ComboBox::from_label("rule")
        .selected_text(rule.rule)
        .show_ui(ui, |ui| {
            for name in RuleSettings::names() {
                ui.selectable_value(&mut rule.rule, name, name);
            }
        });
    if rule.rule == RuleSettings::SGD {
        ComboBox::from_label("form")
            .selected_text(rule.form.name())
            .show_ui(ui, |ui| {
                for form in MomentumForm::ALL {
                    ui.selectable_value(&mut rule.form, form, form.name());
                }
            });
    }
    if rule.is_particle() {
        ui.add(
            Slider::new(&mut rule.mass, 0.1..=10.0)
                .logarithmic(true)
                .text("mass"),
        );
        ui.add(Slider::new(&mut rule.friction, 0.0..=10.0).text("friction"));
        ui.add(
            Slider::new(&mut rule.time_step, 0.001..=1.0)
                .logarithmic(true)
                .text("time step"),
        );
        return;
    }
    ui.add(
        Slider::new(&mut rule.lr, 1e-5..=1.0)
            .logarithmic(true)
            .text("lr"),
    );
    if rule.rule == RuleSettings::SGD {
        ui.add(Slider::new(&mut rule.momentum, 0.0..=0.999).text("momentum"));
        ui.checkbox(&mut rule.nesterov, "Nesterov");
    }
}
