//! Packing of 16-bit values in shaders of the caller's.

use wgpu_optim::storage::round;
use wgpu_optim::wgsl::packing;
use wgpu_optim::{StorageType, wgpu};

use super::{Bench, gpu_test};

/// Packs its input, and unpacks that again.
fn shader(of: StorageType) -> String {
    let name = of.name();
    let body = "
@group(0) @binding(0) var<storage, read> values: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> packed: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read_write> unpacked: array<vec4<f32>>;

@compute @workgroup_size(64)
fn pack(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < arrayLength(&packed) {
        packed[id.x] = wo_pack_NAME(values[id.x]);
        unpacked[id.x] = wo_values_NAME(packed[id.x]);
    }
}
";
    packing(of) + &body.replace("NAME", name)
}

/// Ties, neighbours of ties, subnormals, the largest and beyond, infinities, and ordinary numbers of every magnitude.
fn inputs() -> Vec<f32> {
    let around = [
        0x3f80_8000_u32,
        0x3f81_8000,
        0x3f80_1000,
        0x3f80_3000,
        0x477f_e000,
        0x477f_f000,
        0x7f7f_8000,
        0x3880_0000,
        0x3300_0000,
        0x387f_f000,
    ];
    let near = around
        .iter()
        .flat_map(|bits| [bits - 1, *bits, bits + 1].map(f32::from_bits));
    let mut rng = fastrand::Rng::with_seed(7);
    let random = std::iter::repeat_with(|| f32::from_bits(rng.u32(..))).filter(|x| x.is_normal());
    let mut all: Vec<f32> = [0.0, f32::INFINITY, 65504.0, 1.0, 3.0, 1e-7]
        .into_iter()
        .chain(near)
        .chain(random.take(4000))
        .flat_map(|x| [x, -x])
        .collect();
    all.truncate(all.len() / 4 * 4);
    all
}

#[gpu_test]
async fn packed_in_a_callers_shader_are_the_bits_of_the_twins() {
    let (bench, values) = (Bench::best().await, inputs());
    for of in [StorageType::Bf16, StorageType::F16] {
        let module = bench
            .device
            .create_shader_module(wgpu::ShaderModuleDescriptor {
                label: None,
                source: wgpu::ShaderSource::Wgsl(shader(of).into()),
            });
        let pipeline = bench
            .device
            .create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: None,
                layout: None,
                module: &module,
                entry_point: None,
                compilation_options: wgpu::PipelineCompilationOptions::default(),
                cache: None,
            });
        let buffers = [
            bench.buffer_of(&values),
            bench.buffer(values.len() / 2),
            bench.buffer(values.len()),
        ];
        let entries: Vec<_> = (0..)
            .zip(&buffers)
            .map(|(binding, buffer)| wgpu::BindGroupEntry {
                binding,
                resource: buffer.as_entire_binding(),
            })
            .collect();
        let bind_group = bench.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries,
        });
        let mut encoder = bench.encoder();
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &bind_group, &[]);
        pass.dispatch_workgroups((values.len() as u32).div_ceil(256), 1, 1);
        drop(pass);
        bench.queue.submit([encoder.finish()]);
        let mut expected = vec![0; values.len()];
        round(of, &values, None, &mut expected);
        let packed: Vec<u16> = bytemuck::pod_collect_to_vec(&bench.bytes(&buffers[1]).await);
        for ((value, expected), packed) in values.iter().zip(&expected).zip(&packed) {
            assert_eq!(packed, expected, "{value:e} as {}", of.name());
        }
        for (value, unpacked) in values.iter().zip(bench.download(&buffers[2]).await) {
            let rounded = of.rounded(*value);
            assert_eq!(
                unpacked.to_bits(),
                rounded.to_bits(),
                "{value:e} as {}",
                of.name()
            );
        }
    }
    assert_eq!(packing(StorageType::F32), "");
}
