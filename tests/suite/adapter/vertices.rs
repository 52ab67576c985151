//! Parameters that are drawn right after the step that updates them, in the same encoder.

use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::{OPTIONAL_FEATURES, SgdConfig, wgpu};

use super::{Bench, adapter_of_its_own, gpu_test};
use crate::cases::values;

/// Pixels and vertices; one row of pixels is what a copy to a buffer has to be aligned to.
const WIDTH: u32 = wgpu::COPY_BYTES_PER_ROW_ALIGNMENT / 4;

/// One point per parameter, side by side, coloured with its bits.
const SHADER: &str = "
    struct Point {
        @builtin(position) position: vec4<f32>,
        @location(0) @interpolate(flat) bits: u32,
    }

    override WIDTH: f32;

    @vertex fn vertex(@builtin(vertex_index) index: u32, @location(0) theta: f32) -> Point {
        let x = (2.0 * f32(index) + 1.0) / WIDTH - 1.0;
        return Point(vec4(x, 0.0, 0.0, 1.0), bitcast<u32>(theta));
    }

    @fragment fn fragment(point: Point) -> @location(0) u32 {
        return point.bits;
    }
";

const FORMAT: wgpu::TextureFormat = wgpu::TextureFormat::R32Uint;

fn points(device: &wgpu::Device) -> wgpu::RenderPipeline {
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: None,
        source: wgpu::ShaderSource::Wgsl(SHADER.into()),
    });
    let constants = [("WIDTH", f64::from(WIDTH))];
    device.create_render_pipeline(&wgpu::RenderPipelineDescriptor {
        label: None,
        layout: None,
        vertex: wgpu::VertexState {
            module: &module,
            entry_point: None,
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &constants,
                ..Default::default()
            },
            buffers: &[Some(wgpu::VertexBufferLayout {
                array_stride: 4,
                step_mode: wgpu::VertexStepMode::Vertex,
                attributes: &wgpu::vertex_attr_array![0 => Float32],
            })],
        },
        primitive: wgpu::PrimitiveState {
            topology: wgpu::PrimitiveTopology::PointList,
            ..Default::default()
        },
        depth_stencil: None,
        multisample: wgpu::MultisampleState::default(),
        fragment: Some(wgpu::FragmentState {
            module: &module,
            entry_point: None,
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &constants,
                ..Default::default()
            },
            targets: &[Some(FORMAT.into())],
        }),
        multiview_mask: None,
        cache: None,
    })
}

#[gpu_test]
async fn updated_parameters_are_vertices_of_the_same_encoder() {
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let numel = WIDTH as usize;
    let (start, gradient) = (values(1, numel), values(2, numel));
    for features in [OPTIONAL_FEATURES, wgpu::Features::empty()] {
        // By an instance of its own: with OpenGL, all devices of an instance share a context, and where one of them is
        // dropped wgpu 30 leaves the others without the vertex array that drawing takes.
        let adapter = adapter_of_its_own().await;
        let bench = Bench::open_on(&adapter, features, adapter.limits()).await;
        let params = bench.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: 4 * numel as u64,
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::VERTEX
                | wgpu::BufferUsages::COPY_SRC
                | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        bench.upload(&params, &start);
        let grads = bench.buffer_of(&gradient);
        let mut optimizer = bench.optimizer(config, &params, &grads);
        let size = wgpu::Extent3d {
            width: WIDTH,
            height: 1,
            depth_or_array_layers: 1,
        };
        let picture = bench.device.create_texture(&wgpu::TextureDescriptor {
            label: None,
            size,
            mip_level_count: 1,
            sample_count: 1,
            dimension: wgpu::TextureDimension::D2,
            format: FORMAT,
            usage: wgpu::TextureUsages::RENDER_ATTACHMENT | wgpu::TextureUsages::COPY_SRC,
            view_formats: &[],
        });
        let view = picture.create_view(&wgpu::TextureViewDescriptor::default());
        let pipeline = points(&bench.device);

        // Twice, so that the second step has to wait for the first picture, and the picture for the step.
        let mut oracle = Oracle::new(&start, Roundoff::WGSL);
        let drawn = [(); 2].map(|()| bench.buffer(numel));
        let mut encoder = bench.encoder();
        for drawn in &drawn {
            optimizer.step(&mut encoder).unwrap();
            let mut pass = encoder.begin_render_pass(&wgpu::RenderPassDescriptor {
                color_attachments: &[Some(wgpu::RenderPassColorAttachment {
                    view: &view,
                    depth_slice: None,
                    resolve_target: None,
                    ops: wgpu::Operations::default(),
                })],
                ..Default::default()
            });
            pass.set_pipeline(&pipeline);
            pass.set_vertex_buffer(0, params.slice(..));
            pass.draw(0..WIDTH, 0..1);
            drop(pass);
            let target = wgpu::TexelCopyBufferInfo {
                buffer: drawn,
                layout: wgpu::TexelCopyBufferLayout::default(),
            };
            encoder.copy_texture_to_buffer(picture.as_image_copy(), target, size);
        }
        bench.queue.submit([encoder.finish()]);
        for drawn in &drawn {
            oracle.step(&config, &gradient);
            oracle.check_params(&bench.download(drawn).await).unwrap();
        }
    }
}
