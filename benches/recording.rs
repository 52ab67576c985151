//! What recording a step costs the CPU, on a device that executes nothing.
//!
//! `cargo bench --bench recording`. `Device::noop` validates and tracks as any device does, so this is the
//! price that an engine pays in its frame, on both paths of the scalars.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use wgpu_optim::wgsl::ScalarPath;
use wgpu_optim::{GpuOptimizer, Kernels, SgdConfig, TensorBinding, wgpu};

fn recording(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("recording");
    for features in [wgpu::Features::IMMEDIATES, wgpu::Features::empty()] {
        let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor {
            required_features: features,
            required_limits: wgpu::Limits {
                max_immediate_size: if features.is_empty() { 0 } else { 128 },
                ..wgpu::Limits::default()
            },
            ..Default::default()
        });
        let kernels = Kernels::new(&device, &queue).unwrap();
        let path = match kernels.scalar_path() {
            ScalarPath::Immediates => "immediates",
            ScalarPath::Uniforms => "uniforms",
        };
        for count in [1, 100, 1000] {
            let buffer = || {
                device.create_buffer(&wgpu::BufferDescriptor {
                    label: None,
                    size: 4096,
                    usage: wgpu::BufferUsages::STORAGE,
                    mapped_at_creation: false,
                })
            };
            let buffers: Vec<_> = (0..count)
                .map(|i| (i.to_string(), buffer(), buffer()))
                .collect();
            let tensors: Vec<_> = buffers
                .iter()
                .map(|(name, params, grads)| TensorBinding::new(name, params, grads, [1024]))
                .collect();
            let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
            let mut optimizer = GpuOptimizer::new(&kernels, config, &tensors).unwrap();
            group.bench_function(BenchmarkId::new(path, count), |bencher| {
                bencher.iter(|| {
                    let mut encoder = device.create_command_encoder(&Default::default());
                    optimizer.step(&mut encoder).unwrap();
                    queue.submit([encoder.finish()]);
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, recording);
criterion_main!(benches);
