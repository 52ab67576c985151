//! One step on the default adapter, from recording to completion.
//!
//! `cargo bench --bench gpu_step`. `cargo run --release -- bench` sets the same figure beside a copy kernel and
//! the CPU paths, measured in turn.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a benchmark fails by panicking"
)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use wgpu_optim::rules::sgd::Terms;
use wgpu_optim::wgsl::ScalarPath;
use wgpu_optim::{
    AdapterRequest, Arena, Gpu, GpuOptimizer, Kernels, Optimizer as _, SgdConfig, StorageType,
    TensorBinding, readback, wgpu,
};

fn gpu_step(criterion: &mut Criterion) {
    let Gpu {
        adapter,
        device,
        queue,
    } = Gpu::open_blocking(&AdapterRequest::default())
        .expect("a wgpu adapter, a software one will do");
    let kernels = Kernels::new(&device, &queue).unwrap();
    let mut group = criterion.benchmark_group(format!("gpu_step/{}", adapter.get_info().name));
    for (name, momentum) in [("momentum", 0.9), ("plain", 0.0)] {
        let config = SgdConfig::builder(0.1).momentum(momentum).build().unwrap();
        for numel in [1 << 20, 1 << 24] {
            let bytes = numel as u64 * Terms::of(&config).bytes_per_elem();
            group.throughput(Throughput::Bytes(bytes));
            let data = vec![0.01; numel];
            let params = readback::storage_buffer(&device, &queue, "params", &data).unwrap();
            let grads = readback::storage_buffer(&device, &queue, "grads", &data).unwrap();
            let tensor = TensorBinding::new("bench", &params, &grads, [numel]);
            let mut optimizer = GpuOptimizer::new(&kernels, config, &[tensor]).unwrap();
            group.bench_function(BenchmarkId::new(name, numel), |bencher| {
                bencher.iter(|| {
                    let mut encoder = device.create_command_encoder(&Default::default());
                    optimizer.step(&mut encoder).unwrap();
                    queue.submit([encoder.finish()]);
                    device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
                });
            });
        }
    }
    group.finish();
}

/// 1000 tensors of 1000 elements: one tensor of a million, an arena, and buffers of their own, in batches and, on a
/// device that binds too few buffers for them, each alone; beside as many dispatches of an empty kernel. In bf16, with
/// masters in f32, one element more, so that none fills its last word. And the arena with every other tensor frozen, in
/// chunks and split.
fn many_tensors(criterion: &mut Criterion) {
    const TENSORS: usize = 1000;
    const NUMEL: usize = 1000;
    let gpu = Gpu::open_blocking(&AdapterRequest::default())
        .expect("a wgpu adapter, a software one will do");
    let adapter = &gpu.adapter;
    let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
        required_features: gpu.device.features(),
        required_limits: wgpu::Limits {
            max_storage_buffers_per_shader_stage: 5,
            ..adapter.limits()
        },
        ..Default::default()
    }))
    .unwrap();
    let gpu_of_few_bindings = Gpu {
        adapter: adapter.clone(),
        device,
        queue,
    };
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let mut group = criterion.benchmark_group(format!("many_tensors/{}", adapter.get_info().name));
    let mut bench = |name: &str, gpu: &Gpu, bindings: &[TensorBinding<'_>]| {
        let Gpu { device, queue, .. } = gpu;
        let kernels = Kernels::new(device, queue).unwrap();
        let mut optimizer = GpuOptimizer::new(&kernels, config, bindings).unwrap();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let mut encoder = device.create_command_encoder(&Default::default());
                optimizer.step(&mut encoder).unwrap();
                queue.submit([encoder.finish()]);
                device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
            });
        });
    };

    let (device, queue) = (&gpu.device, &gpu.queue);
    let one = Arena::new(device, queue, [("one", vec![TENSORS * NUMEL])]).unwrap();
    bench("one", &gpu, &one.bindings());
    let names: Vec<_> = (0..TENSORS).map(|index| index.to_string()).collect();
    let layout = names.iter().map(|name| (name.as_str(), vec![NUMEL]));
    let arena = Arena::new(device, queue, layout).unwrap();
    bench("arena", &gpu, &arena.bindings());
    let alone = &gpu_of_few_bindings;
    for (case, gpu, of, numel) in [
        ("scattered", &gpu, StorageType::F32, NUMEL),
        ("scattered_alone", alone, StorageType::F32, NUMEL),
        ("scattered_bf16", &gpu, StorageType::Bf16, NUMEL + 1),
        ("scattered_bf16_alone", alone, StorageType::Bf16, NUMEL + 1),
    ] {
        // About a hundredth, as an f32 and as two bf16.
        let data = vec![f32::from_bits(0x3c23_3c23); numel];
        let words = (numel * of.bytes() as usize).div_ceil(4);
        let data = &data[..words];
        let buffer = || readback::storage_buffer(&gpu.device, &gpu.queue, "scattered", data);
        let buffers: Vec<_> = names
            .iter()
            .map(|name| (name, buffer().unwrap(), buffer().unwrap()))
            .collect();
        let scattered: Vec<_> = buffers
            .iter()
            .map(|(name, params, grads)| {
                TensorBinding::new(name, params, grads, [numel])
                    .params_type(of)
                    .grads_type(of)
            })
            .collect();
        bench(case, gpu, &scattered);
    }
    // With immediates nobody has to prepare what goes into a pass, and nobody sends chunks.
    let kernels = Kernels::new(device, queue).unwrap();
    let mut frozen = GpuOptimizer::new(&kernels, config, &arena.bindings()).unwrap();
    for name in names.iter().step_by(2) {
        frozen.set_frozen(name, true).unwrap();
    }
    let immediates = kernels.scalar_path() == ScalarPath::Immediates;
    for (case, in_pass) in [("half_frozen", false), ("half_frozen_split", true)] {
        if in_pass && !immediates {
            continue;
        }
        group.bench_function(case, |bencher| {
            bencher.iter(|| {
                let mut encoder = device.create_command_encoder(&Default::default());
                if in_pass {
                    let mut pass = encoder.begin_compute_pass(&Default::default());
                    frozen.record(&mut pass).unwrap();
                } else {
                    frozen.step(&mut encoder).unwrap();
                }
                queue.submit([encoder.finish()]);
                device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
            });
        });
    }
    group.bench_function("empty_dispatches", |bencher| {
        let pipeline = empty_kernel(device);
        bencher.iter(|| {
            let mut encoder = device.create_command_encoder(&Default::default());
            let mut pass = encoder.begin_compute_pass(&Default::default());
            pass.set_pipeline(&pipeline);
            (0..TENSORS).for_each(|_| pass.dispatch_workgroups(1, 1, 1));
            drop(pass);
            queue.submit([encoder.finish()]);
            device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
        });
    });
    group.finish();
}

/// What a dispatch costs that does nothing.
fn empty_kernel(device: &wgpu::Device) -> wgpu::ComputePipeline {
    let source = "@compute @workgroup_size(256) fn main() {}";
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: None,
        source: wgpu::ShaderSource::Wgsl(source.into()),
    });
    device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: None,
        layout: None,
        module: &module,
        entry_point: None,
        compilation_options: wgpu::PipelineCompilationOptions::default(),
        cache: None,
    })
}

criterion_group!(benches, gpu_step, many_tensors);
criterion_main!(benches);
