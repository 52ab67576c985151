//! The simulation: balls on both sides, their slopes, steps and counts, recorded into an encoder that is not ours.

use anyhow::{Result, ensure};
use bytemuck::{Pod, Zeroable};
use wgpu_optim::wgpu::{self, BufferUsages, util::DeviceExt as _};
use wgpu_optim::{Kernels, OPTIONAL_FEATURES};

use crate::counts::{COUNT_GROUPS, Count, Frame, Pass, SPEED_SAMPLE, Telemetry};
use crate::population::{Population, starts};
use crate::scene::{Camera, Scene};
use crate::settings::Settings;
use crate::terrain::Terrain;

/// The features that an engine's device should have, where its adapter offers them.
pub const FEATURES: wgpu::Features = OPTIONAL_FEATURES.union(wgpu::Features::TIMESTAMP_QUERY);

/// A million balls and their landscape.
pub struct Landscape {
    kernels: Kernels,
    settings: Settings,
    starts: Vec<f32>,
    sides: [Side; 2],
    pipelines: Pipelines,
    telemetry: Telemetry,
    scene: Scene,
    failure: Option<String>,
}

struct Side {
    population: Population,
    before: wgpu::Buffer,
    steps: wgpu::Buffer,
    slope: wgpu::BindGroup,
    count: wgpu::BindGroup,
}

/// Words of `Steps` in `shaders/count.wgsl`.
const STEPS_WORDS: usize = 2;

/// `Size` of `shaders/count.wgsl`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Size {
    balls: u32,
    sample: u32,
    side: u32,
}

/// The pipelines that depend on the terrain alone.
struct Pipelines {
    slope: wgpu::ComputePipeline,
    partial: wgpu::ComputePipeline,
    total: wgpu::ComputePipeline,
    slope_layout: wgpu::BindGroupLayout,
    count_layout: wgpu::BindGroupLayout,
}

impl Landscape {
    /// The most balls that a side may have on this device, at most 16 million: each side's positions are bound as one.
    pub fn most_balls(device: &wgpu::Device) -> u32 {
        let limits = device.limits();
        let bytes = limits
            .max_storage_buffer_binding_size
            .min(limits.max_buffer_size);
        (bytes / 8).min(1 << 24) as u32
    }

    /// Balls at rest at their starts, on the engine's device, to be drawn in textures of this format.
    ///
    /// # Errors
    /// A rule that is out of range, or more balls than the device can bind.
    pub fn new(
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        target: wgpu::TextureFormat,
        settings: &Settings,
    ) -> Result<Self> {
        let kernels = Kernels::new(device, queue)?;
        let pipelines = Pipelines::new(device, settings.terrain);
        let telemetry = Telemetry::new(device, queue);
        let starts = starts_of(device, settings)?;
        let sides = sides(&kernels, &pipelines, &telemetry, &starts, settings)?;
        let scene = Scene::new(device, target, settings.terrain);
        Ok(Self {
            kernels,
            settings: settings.clone(),
            starts,
            sides,
            pipelines,
            telemetry,
            scene,
            failure: None,
        })
    }

    /// The settings that the landscape follows.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Steps since the start: those recorded, without those whose encoder the engine has dropped.
    pub fn steps(&self) -> u64 {
        self.sides[0].population.steps()
    }

    /// A side's positions, x and y of each ball.
    pub fn params(&self, side: usize) -> &wgpu::Buffer {
        &self.sides[side].population.params
    }

    /// Goes on with other settings. Another terrain, number of balls or seed starts anew; another rule goes on from where
    /// the balls are.
    ///
    /// # Errors
    /// As [`Landscape::new`]; then nothing has changed.
    pub fn apply(&mut self, settings: &Settings) -> Result<()> {
        let old = &self.settings;
        let is_same_run = settings.terrain == old.terrain
            && settings.balls == old.balls
            && settings.seed == old.seed;
        if is_same_run {
            let numel = self.starts.len();
            let [left, right] = &mut self.sides;
            let of_left = left
                .population
                .change(&self.kernels, numel, &settings.rules[0])?;
            let of_right = right
                .population
                .change(&self.kernels, numel, &settings.rules[1])?;
            left.population.apply(of_left)?;
            right.population.apply(of_right)?;
        } else {
            let device = self.kernels.device();
            let starts = starts_of(device, settings)?;
            let pipelines = Pipelines::new(device, settings.terrain);
            self.sides = sides(
                &self.kernels,
                &pipelines,
                &self.telemetry,
                &starts,
                settings,
            )?;
            if settings.terrain != old.terrain {
                self.scene.set_terrain(device, settings.terrain);
            }
            (self.starts, self.pipelines) = (starts, pipelines);
            self.telemetry.start_run();
        }
        self.settings = settings.clone();
        Ok(())
    }

    /// Puts the balls back to where they started, at rest.
    ///
    /// # Errors
    /// The device is lost or out of memory.
    pub fn restart(&mut self) -> Result<()> {
        for side in &mut self.sides {
            side.population.restart(&self.kernels, &self.starts)?;
            let sample = &self.starts[..self.starts.len().min(2 * SPEED_SAMPLE as usize)];
            let queue = self.kernels.queue();
            queue.write_buffer(&side.before, 0, bytemuck::cast_slice(sample));
            queue.write_buffer(&side.steps, 0, bytemuck::bytes_of(&[0; STEPS_WORDS]));
        }
        self.telemetry.start_run();
        Ok(())
    }

    /// Records `steps` steps of both sides, and the counts after them: compute passes, one after the other, in the
    /// engine's encoder. The engine submits, or drops the encoder, and then they have never been recorded. Without a step
    /// the figures stay.
    ///
    /// # Errors
    /// On a lost device; see [`wgpu_optim::GpuOptimizer::prepare`].
    pub fn record_steps(&mut self, encoder: &mut wgpu::CommandEncoder, steps: u32) -> Result<()> {
        for _ in 0..steps {
            self.record_slopes(encoder);
            self.record_update(encoder)?;
        }
        if steps > 0 || self.steps() == 0 {
            self.record_counts(encoder);
        }
        Ok(())
    }

    /// The gradients: the slope under each ball.
    pub fn record_slopes(&self, encoder: &mut wgpu::CommandEncoder) {
        let mut pass = begin(encoder, "landscape.slopes", &self.telemetry, Pass::Slopes);
        pass.set_pipeline(&self.pipelines.slope);
        for side in &self.sides {
            pass.set_bind_group(0, &side.slope, &[]);
            pass.dispatch_workgroups(self.settings.balls.div_ceil(2).div_ceil(256), 1, 1);
        }
    }

    /// The update, between what writes the gradients and what reads the parameters.
    ///
    /// # Errors
    /// As [`record_steps`](Self::record_steps).
    pub fn record_update(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        for side in &mut self.sides {
            side.population.optimizer.prepare(encoder)?;
        }
        let mut pass = begin(encoder, "landscape.step", &self.telemetry, Pass::Step);
        for side in &mut self.sides {
            side.population.optimizer.record(&mut pass)?;
        }
        Ok(())
    }

    /// The figures of both sides.
    pub fn record_counts(&self, encoder: &mut wgpu::CommandEncoder) {
        let mut pass = begin(encoder, "landscape.counts", &self.telemetry, Pass::Counts);
        for side in &self.sides {
            pass.set_bind_group(0, &side.count, &[]);
            pass.set_pipeline(&self.pipelines.partial);
            pass.dispatch_workgroups(COUNT_GROUPS, 1, 1);
            pass.set_pipeline(&self.pipelines.total);
            pass.dispatch_workgroups(1, 1, 1);
        }
    }

    /// Records the picture of both sides, and keeps what is known of the frame for [`newest`](Self::newest). The
    /// parameter buffers are the vertex buffers.
    pub fn record_picture(
        &mut self,
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        encoder: &mut wgpu::CommandEncoder,
        camera: &Camera,
        [width, height]: [u32; 2],
    ) {
        let balls = self.settings.balls;
        let [left, right] = &self.sides;
        let positions = [&left.population.params, &right.population.params];
        self.scene
            .prepare(device, queue, camera, [width, height], balls);
        self.scene
            .record(encoder, self.telemetry.drawing(), positions, balls);
        self.telemetry.keep(device, encoder, balls);
    }

    /// Draws the recorded picture into the engine's own pass, over its viewport.
    pub fn paint(&self, pass: &mut wgpu::RenderPass<'_>) {
        self.scene.paint(pass);
    }

    /// Remembers why no step could be recorded; after that there is none.
    pub fn fail(&mut self, error: &anyhow::Error) {
        log::error!("no step: {error:#}");
        self.failure = Some(format!("{error:#}"));
    }

    /// Why steps have ended, if they have.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// The figures of the newest frame that the device has finished. Waits for nothing.
    pub fn newest(&mut self) -> Option<Frame> {
        self.telemetry.newest()
    }
}

fn begin<'e>(
    encoder: &'e mut wgpu::CommandEncoder,
    label: &str,
    telemetry: &Telemetry,
    timed: Pass,
) -> wgpu::ComputePass<'e> {
    encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
        label: Some(label),
        timestamp_writes: telemetry.compute(timed),
    })
}

fn starts_of(device: &wgpu::Device, settings: &Settings) -> Result<Vec<f32>> {
    let most = Landscape::most_balls(device);
    ensure!(
        (1..=most).contains(&settings.balls),
        "{} balls on each side; this device takes 1 to {most}",
        settings.balls
    );
    Ok(starts(settings.terrain, settings.balls, settings.seed))
}

fn sides(
    kernels: &Kernels,
    pipelines: &Pipelines,
    telemetry: &Telemetry,
    starts: &[f32],
    settings: &Settings,
) -> Result<[Side; 2]> {
    let [left, right] = &settings.rules;
    let side = |index, rule| -> Result<Side> {
        let population = Population::new(kernels, starts, rule)?;
        Ok(Side::new(
            kernels.device(),
            pipelines,
            telemetry,
            population,
            starts,
            index,
        ))
    };
    Ok([side(0, left)?, side(1, right)?])
}

impl Side {
    fn new(
        device: &wgpu::Device,
        pipelines: &Pipelines,
        telemetry: &Telemetry,
        population: Population,
        starts: &[f32],
        side: u32,
    ) -> Self {
        let balls = (starts.len() / 2) as u32;
        let sample = balls.min(SPEED_SAMPLE);
        let filled = |label, contents, usage| {
            device.create_buffer_init(&wgpu::util::BufferInitDescriptor {
                label: Some(label),
                contents,
                usage: usage | BufferUsages::COPY_DST,
            })
        };
        let before = filled(
            "landscape.before",
            bytemuck::cast_slice(&starts[..2 * sample as usize]),
            BufferUsages::STORAGE,
        );
        let partials = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("landscape.partials"),
            size: u64::from(COUNT_GROUPS) * size_of::<Count>() as u64,
            usage: BufferUsages::STORAGE,
            mapped_at_creation: false,
        });
        let size = Size {
            balls,
            sample,
            side,
        };
        let size = filled(
            "landscape.size",
            bytemuck::bytes_of(&size),
            BufferUsages::UNIFORM,
        );
        let steps = filled(
            "landscape.steps",
            bytemuck::bytes_of(&[0; STEPS_WORDS]),
            BufferUsages::STORAGE,
        );
        let Population { params, grads, .. } = &population;
        Self {
            slope: bind(
                device,
                "landscape.slope",
                &pipelines.slope_layout,
                &[params, grads, &steps],
            ),
            count: bind(
                device,
                "landscape.count",
                &pipelines.count_layout,
                &[params, &before, &partials, &steps, &telemetry.record, &size],
            ),
            before,
            steps,
            population,
        }
    }
}

fn bind(
    device: &wgpu::Device,
    label: &str,
    layout: &wgpu::BindGroupLayout,
    buffers: &[&wgpu::Buffer],
) -> wgpu::BindGroup {
    let entries = (0..)
        .zip(buffers)
        .map(|(binding, buffer)| wgpu::BindGroupEntry {
            binding,
            resource: buffer.as_entire_binding(),
        });
    device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: Some(label),
        layout,
        entries: &entries.collect::<Vec<_>>(),
    })
}

impl Pipelines {
    fn new(device: &wgpu::Device, terrain: Terrain) -> Self {
        let read = wgpu::BufferBindingType::Storage { read_only: true };
        let write = wgpu::BufferBindingType::Storage { read_only: false };
        let uniform = wgpu::BufferBindingType::Uniform;
        let slope_layout = layout(device, "landscape.slope", &[read, write, write]);
        let count_layout = layout(
            device,
            "landscape.count",
            &[read, write, write, write, write, uniform],
        );
        let module = |label, source: &str| {
            device.create_shader_module(wgpu::ShaderModuleDescriptor {
                label: Some(label),
                source: wgpu::ShaderSource::Wgsl((terrain.wgsl() + source).into()),
            })
        };
        let slope = module("landscape.slope", include_str!("../shaders/slope.wgsl"));
        let count = module("landscape.count", include_str!("../shaders/count.wgsl"));
        let pipeline = |module, entry_point, layout| {
            let layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: Some(entry_point),
                bind_group_layouts: &[Some(layout)],
                immediate_size: 0,
            });
            device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(entry_point),
                layout: Some(&layout),
                module,
                entry_point: Some(entry_point),
                compilation_options: wgpu::PipelineCompilationOptions::default(),
                cache: None,
            })
        };
        Self {
            slope: pipeline(&slope, "slope", &slope_layout),
            partial: pipeline(&count, "partial", &count_layout),
            total: pipeline(&count, "total", &count_layout),
            slope_layout,
            count_layout,
        }
    }
}

fn layout(
    device: &wgpu::Device,
    label: &str,
    bindings: &[wgpu::BufferBindingType],
) -> wgpu::BindGroupLayout {
    let entries = (0..)
        .zip(bindings)
        .map(|(binding, ty)| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: *ty,
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        });
    device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: Some(label),
        entries: &entries.collect::<Vec<_>>(),
    })
}
