//! The picture: terrain and balls of both sides, side by side, in a texture of its own; then into the engine's pass.

use bytemuck::{Pod, Zeroable};
use glam::{Mat4, Vec3};
use wgpu_optim::wgpu;
use wgpu_optim::wgpu::PrimitiveTopology::{PointList, TriangleStrip};
use wgpu_optim::wgpu::VertexStepMode::{Instance, Vertex};

use crate::terrain::Terrain;

/// The point from which both sides are seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Camera {
    /// Around the vertical, in radians.
    pub yaw: f32,
    /// Above the horizon, in radians.
    pub pitch: f32,
    /// The terrain is two wide.
    pub distance: f32,
}

impl Default for Camera {
    fn default() -> Self {
        Self {
            yaw: -0.38,
            pitch: 0.85,
            distance: 3.8,
        }
    }
}

impl Camera {
    fn projection(self, aspect: f32) -> Mat4 {
        let (sin_yaw, cos_yaw) = self.yaw.sin_cos();
        let (sin_pitch, cos_pitch) = self.pitch.sin_cos();
        let eye = self.distance * Vec3::new(sin_yaw * cos_pitch, -cos_yaw * cos_pitch, sin_pitch);
        // Below the terrain, which leaves room for headings above it.
        let target = Vec3::new(0.0, 0.0, 0.26);
        // A narrow picture is as wide as a broad one.
        let height = 0.88 / aspect.min(1.0);
        Mat4::perspective_rh(2.0 * (0.5 * height).atan(), aspect, 0.1, 20.0)
            * Mat4::look_at_rh(eye, target, Vec3::Z)
    }
}

/// Left and right, apart also for those who see fewer colours (Okabe and Ito).
pub const COLOURS: [[f32; 3]; 2] = [[0.90, 0.62, 0.0], [0.34, 0.71, 0.91]];

const PAPER: wgpu::Color = wgpu::Color {
    r: 0.063,
    g: 0.075,
    b: 0.095,
    a: 1.0,
};

const FORMAT: wgpu::TextureFormat = wgpu::TextureFormat::Rgba8Unorm;
const DEPTH: wgpu::TextureFormat = wgpu::TextureFormat::Depth32Float;
/// Cells along a side of the terrain's grid, as in `shaders/scene.wgsl`.
const CELLS: u32 = 192;

/// More balls than that are drawn as points.
const MOST_DISCS: u32 = 100_000;

/// `View` of `shaders/scene.wgsl`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct View {
    projection: [[f32; 4]; 4],
    ball_colour: [f32; 4],
    viewport: [f32; 2],
    ball_radius: f32,
    padding: f32,
}

/// Pipelines, and the picture in its size.
pub struct Scene {
    views: [(wgpu::Buffer, wgpu::BindGroup); 2],
    layout: wgpu::BindGroupLayout,
    draws: Draws,
    painting: Painting,
    picture: Option<Picture>,
    balls_are_points: bool,
}

struct Draws {
    surface: wgpu::RenderPipeline,
    points: wgpu::RenderPipeline,
    discs: wgpu::RenderPipeline,
}

struct Painting {
    layout: wgpu::BindGroupLayout,
    sampler: wgpu::Sampler,
    pipeline: wgpu::RenderPipeline,
}

struct Picture {
    size: [u32; 2],
    colours: wgpu::TextureView,
    depth: wgpu::TextureView,
    bind_group: wgpu::BindGroup,
}

impl Scene {
    /// Makes a scene that is painted into textures of this format.
    pub fn new(device: &wgpu::Device, target: wgpu::TextureFormat, terrain: Terrain) -> Self {
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some("landscape.view"),
            entries: &[wgpu::BindGroupLayoutEntry {
                binding: 0,
                visibility: wgpu::ShaderStages::VERTEX_FRAGMENT,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Uniform,
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            }],
        });
        let view = |label| {
            let buffer = device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size: size_of::<View>() as u64,
                usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            });
            let bind_group = device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(label),
                layout: &layout,
                entries: &[wgpu::BindGroupEntry {
                    binding: 0,
                    resource: buffer.as_entire_binding(),
                }],
            });
            (buffer, bind_group)
        };
        Self {
            views: [view("landscape.view.left"), view("landscape.view.right")],
            draws: Draws::new(device, &layout, terrain),
            painting: Painting::new(device, target),
            layout,
            picture: None,
            balls_are_points: true,
        }
    }

    /// Draws another terrain from now on.
    pub fn set_terrain(&mut self, device: &wgpu::Device, terrain: Terrain) {
        self.draws = Draws::new(device, &self.layout, terrain);
    }

    /// Makes ready for a picture of this size, both sides together.
    pub fn prepare(
        &mut self,
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        camera: &Camera,
        [width, height]: [u32; 2],
        balls: u32,
    ) {
        let size = [width.max(2), height.max(1)];
        if self
            .picture
            .as_ref()
            .is_none_or(|picture| picture.size != size)
        {
            self.picture = Some(Picture::new(device, &self.painting, size));
        }
        let viewport = [size[0] as f32 / 2.0, size[1] as f32];
        // Balls as large as leaves half the terrain to be seen; where that is less than a pixel and there are many, points
        // that are the fainter the more there are.
        let pixels_per_ball = 0.4 * viewport[0] * viewport[1] / balls as f32;
        let ball_radius = (0.25 * pixels_per_ball)
            .sqrt()
            .clamp(1.2, 0.008 * viewport[1].max(150.0));
        self.balls_are_points = balls > MOST_DISCS;
        let alpha = if self.balls_are_points {
            (0.4 * pixels_per_ball).clamp(0.04, 1.0)
        } else {
            1.0
        };
        for ((buffer, _), [red, green, blue]) in self.views.iter().zip(COLOURS) {
            let view = View {
                projection: camera
                    .projection(viewport[0] / viewport[1])
                    .to_cols_array_2d(),
                ball_colour: [red, green, blue, alpha],
                viewport,
                ball_radius,
                padding: 0.0,
            };
            // Once a frame, and the same for the whole of it: the order in the encoder does not matter.
            queue.write_buffer(buffer, 0, bytemuck::bytes_of(&view));
        }
    }

    /// Records the picture. `positions` are the vertex buffers.
    pub fn record(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        timestamp_writes: Option<wgpu::RenderPassTimestampWrites<'_>>,
        positions: [&wgpu::Buffer; 2],
        balls: u32,
    ) {
        let Some(picture) = &self.picture else {
            return;
        };
        let mut pass = encoder.begin_render_pass(&wgpu::RenderPassDescriptor {
            label: Some("landscape.picture"),
            color_attachments: &[Some(wgpu::RenderPassColorAttachment {
                view: &picture.colours,
                depth_slice: None,
                resolve_target: None,
                ops: wgpu::Operations {
                    load: wgpu::LoadOp::Clear(PAPER),
                    store: wgpu::StoreOp::Store,
                },
            })],
            depth_stencil_attachment: Some(wgpu::RenderPassDepthStencilAttachment {
                view: &picture.depth,
                depth_ops: Some(wgpu::Operations {
                    load: wgpu::LoadOp::Clear(1.0),
                    store: wgpu::StoreOp::Discard,
                }),
                stencil_ops: None,
            }),
            timestamp_writes,
            ..Default::default()
        });
        let [width, height] = picture.size.map(|pixels| pixels as f32);
        for (index, ((_, view), positions)) in self.views.iter().zip(positions).enumerate() {
            let half = width / 2.0;
            pass.set_viewport(index as f32 * half, 0.0, half, height, 0.0, 1.0);
            pass.set_bind_group(0, view, &[]);
            pass.set_pipeline(&self.draws.surface);
            pass.draw(0..2 * (CELLS + 1), 0..CELLS);
            pass.set_vertex_buffer(0, positions.slice(..8 * u64::from(balls)));
            if self.balls_are_points {
                pass.set_pipeline(&self.draws.points);
                pass.draw(0..balls, 0..1);
            } else {
                pass.set_pipeline(&self.draws.discs);
                pass.draw(0..4, 0..balls);
            }
        }
    }

    /// Draws the recorded picture into a pass of the engine.
    pub fn paint(&self, pass: &mut wgpu::RenderPass<'_>) {
        if let Some(picture) = &self.picture {
            pass.set_pipeline(&self.painting.pipeline);
            pass.set_bind_group(0, &picture.bind_group, &[]);
            pass.draw(0..3, 0..1);
        }
    }
}

impl Draws {
    fn new(device: &wgpu::Device, layout: &wgpu::BindGroupLayout, terrain: Terrain) -> Self {
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some("landscape.scene"),
            source: wgpu::ShaderSource::Wgsl(
                (terrain.wgsl() + include_str!("../shaders/scene.wgsl")).into(),
            ),
        });
        let layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some("landscape.scene"),
            bind_group_layouts: &[Some(layout)],
            immediate_size: 0,
        });
        let pipeline = |vertex, fragment, topology, step_mode: Option<wgpu::VertexStepMode>| {
            let positions = step_mode.map(|step_mode| wgpu::VertexBufferLayout {
                array_stride: 8,
                step_mode,
                attributes: &wgpu::vertex_attr_array![0 => Float32x2],
            });
            let is_surface = positions.is_none();
            device.create_render_pipeline(&wgpu::RenderPipelineDescriptor {
                label: Some(vertex),
                layout: Some(&layout),
                vertex: wgpu::VertexState {
                    module: &module,
                    entry_point: Some(vertex),
                    compilation_options: wgpu::PipelineCompilationOptions::default(),
                    buffers: if is_surface {
                        &[]
                    } else {
                        std::slice::from_ref(&positions)
                    },
                },
                primitive: wgpu::PrimitiveState {
                    topology,
                    ..Default::default()
                },
                depth_stencil: Some(wgpu::DepthStencilState {
                    format: DEPTH,
                    // Faint points add up, also behind each other.
                    depth_write_enabled: Some(topology != PointList),
                    depth_compare: Some(wgpu::CompareFunction::LessEqual),
                    stencil: wgpu::StencilState::default(),
                    bias: wgpu::DepthBiasState::default(),
                }),
                // Edges are smoothed by the shaders: a sample a pixel leaves time for the balls.
                multisample: wgpu::MultisampleState::default(),
                fragment: Some(wgpu::FragmentState {
                    module: &module,
                    entry_point: Some(fragment),
                    compilation_options: wgpu::PipelineCompilationOptions::default(),
                    targets: &[Some(wgpu::ColorTargetState {
                        format: FORMAT,
                        blend: Some(wgpu::BlendState::ALPHA_BLENDING),
                        write_mask: wgpu::ColorWrites::ALL,
                    })],
                }),
                multiview_mask: None,
                cache: None,
            })
        };
        Self {
            surface: pipeline("surface_vertex", "surface_fragment", TriangleStrip, None),
            points: pipeline("point_vertex", "point_fragment", PointList, Some(Vertex)),
            discs: pipeline(
                "disc_vertex",
                "disc_fragment",
                TriangleStrip,
                Some(Instance),
            ),
        }
    }
}

impl Painting {
    fn new(device: &wgpu::Device, target: wgpu::TextureFormat) -> Self {
        let module = device.create_shader_module(wgpu::include_wgsl!("../shaders/paint.wgsl"));
        let entry = |binding, ty| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::FRAGMENT,
            ty,
            count: None,
        };
        let texture = wgpu::BindingType::Texture {
            sample_type: wgpu::TextureSampleType::Float { filterable: true },
            view_dimension: wgpu::TextureViewDimension::D2,
            multisampled: false,
        };
        let sampler = wgpu::BindingType::Sampler(wgpu::SamplerBindingType::Filtering);
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some("landscape.paint"),
            entries: &[entry(0, texture), entry(1, sampler)],
        });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some("landscape.paint"),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let constants = [("IS_LINEAR", f64::from(u8::from(target.is_srgb())))];
        let compilation_options = wgpu::PipelineCompilationOptions {
            constants: &constants,
            ..Default::default()
        };
        let pipeline = device.create_render_pipeline(&wgpu::RenderPipelineDescriptor {
            label: Some("landscape.paint"),
            layout: Some(&pipeline_layout),
            vertex: wgpu::VertexState {
                module: &module,
                entry_point: Some("paint_vertex"),
                compilation_options: compilation_options.clone(),
                buffers: &[],
            },
            primitive: wgpu::PrimitiveState::default(),
            depth_stencil: None,
            multisample: wgpu::MultisampleState::default(),
            fragment: Some(wgpu::FragmentState {
                module: &module,
                entry_point: Some("paint_fragment"),
                compilation_options,
                targets: &[Some(target.into())],
            }),
            multiview_mask: None,
            cache: None,
        });
        Self {
            sampler: device.create_sampler(&wgpu::SamplerDescriptor {
                label: Some("landscape.paint"),
                ..Default::default()
            }),
            layout,
            pipeline,
        }
    }
}

impl Picture {
    fn new(device: &wgpu::Device, painting: &Painting, [width, height]: [u32; 2]) -> Self {
        let texture = |label, format, usage| {
            let texture = device.create_texture(&wgpu::TextureDescriptor {
                label: Some(label),
                size: wgpu::Extent3d {
                    width,
                    height,
                    depth_or_array_layers: 1,
                },
                mip_level_count: 1,
                sample_count: 1,
                dimension: wgpu::TextureDimension::D2,
                format,
                usage: usage | wgpu::TextureUsages::RENDER_ATTACHMENT,
                view_formats: &[],
            });
            texture.create_view(&wgpu::TextureViewDescriptor::default())
        };
        let none = wgpu::TextureUsages::empty();
        let sampled = wgpu::TextureUsages::TEXTURE_BINDING;
        let colours = texture("landscape.colours", FORMAT, sampled);
        Self {
            size: [width, height],
            depth: texture("landscape.depth", DEPTH, none),
            bind_group: device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some("landscape.paint"),
                layout: &painting.layout,
                entries: &[
                    wgpu::BindGroupEntry {
                        binding: 0,
                        resource: wgpu::BindingResource::TextureView(&colours),
                    },
                    wgpu::BindGroupEntry {
                        binding: 1,
                        resource: wgpu::BindingResource::Sampler(&painting.sampler),
                    },
                ],
            }),
            colours,
        }
    }
}
