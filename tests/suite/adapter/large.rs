//! Past one binding: one large tensor, and an arena of many.

use rayon::prelude::*;
use wgpu_optim::oracle::{Oracle, Rounding};
use wgpu_optim::plan::DeviceLimits;
use wgpu_optim::{Arena, GpuOptimizer, OPTIONAL_FEATURES, SgdConfig, wgpu};

use super::{Bench, gpu, gpu_test};
use crate::cases::values;

/// Elements that are compared at a time.
const CHUNK: usize = 1 << 20;

#[gpu_test]
async fn forty_million_elements_past_one_binding() {
    let bench = Bench::best().await;
    let numel = 40_000_000;
    let config = SgdConfig::builder(0.1)
        .momentum(0.9)
        .nesterov(true)
        .build()
        .unwrap();
    // The prime period keeps what lies at the same place in two bindings apart.
    let period = 100_003;
    let tiled = |seed| {
        let values = values(seed, period);
        (0..numel).map(|i| values[i % period]).collect::<Vec<_>>()
    };
    let (start, gradient) = (tiled(1), tiled(2));
    let params = bench.buffer_of(&start);
    let grads = bench.buffer_of(&gradient);
    let mut optimizer = bench.optimizer(config, &params, &grads);
    let binding_elems = bench.device.limits().max_storage_buffer_binding_size / 4;
    let pieces = (numel as u64).div_ceil(binding_elems);
    assert_eq!(optimizer.plan().pieces.len() as u64, pieces);
    for lr in [0.1, 0.03] {
        optimizer.set_lr(lr).unwrap();
        bench.step(&mut optimizer);
    }

    let after = bench.download(&params).await;
    let velocity = bench.velocity(&optimizer, 0).await.unwrap();
    let given = start.chunks(CHUNK).zip(gradient.chunks(CHUNK));
    let results = after.chunks(CHUNK).zip(velocity.chunks(CHUNK));
    for ((start, gradient), (after, velocity)) in given.zip(results) {
        let mut oracle = Oracle::new(start, Rounding::WGSL);
        for lr in [0.1, 0.03] {
            oracle.step(&config.with_lr(lr).unwrap(), gradient);
        }
        oracle.check_params(after).unwrap();
        oracle.check_velocity(velocity).unwrap();
    }
}

/// More than nine of lavapipe's bindings per array. Takes 3.6 GB on the device, and 2.4 on the host, but not all of
/// both at a time.
#[gpu_test]
async fn an_arena_of_three_hundred_million_elements() {
    const TENSORS: usize = 30;
    const NUMEL: usize = 10_000_000;
    // Of its own, so that all its memory is what is counted here.
    let bench = Bench::with(OPTIONAL_FEATURES).await;
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let names: Vec<_> = (0..TENSORS).map(|index| index.to_string()).collect();
    let layout = names.iter().map(|name| (name.as_str(), vec![NUMEL]));
    let arena = Arena::new(&bench.device, &bench.queue, layout).unwrap();
    let mut optimizer = GpuOptimizer::new(&bench.kernels, config, &arena.bindings()).unwrap();

    let needed = 3 * 4 * (TENSORS * NUMEL) as u64;
    let buffers = arena.params().iter().chain(arena.grads());
    let planned = buffers.map(wgpu::Buffer::size).sum::<u64>() + optimizer.plan().state_bytes();
    // What the device has really given away, where wgpu knows; with OpenGL it does not.
    let report = bench.device.generate_allocator_report();
    let allocated = report.map_or(planned, |report| report.total_allocated_bytes);
    assert!(planned >= needed && allocated >= planned);
    assert!(allocated <= needed * 105 / 100, "{allocated} bytes");

    let period = 100_003;
    let (start, gradient) = (values(1, period), values(2, period));
    // Each tensor starts elsewhere in the pattern.
    let tiled = |pattern: &[f32], tensor: usize| -> Vec<f32> {
        let pattern = pattern.iter().cycle().skip(7 * tensor);
        pattern.take(NUMEL).copied().collect()
    };
    for (tensor, name) in names.iter().enumerate() {
        arena.upload_params(name, &tiled(&start, tensor)).unwrap();
        arena.upload_grads(name, &tiled(&gradient, tensor)).unwrap();
        // Staging memory goes back with each submission.
        bench.queue.submit([]);
        bench
            .device
            .poll(wgpu::PollType::wait_indefinitely())
            .unwrap();
    }
    for lr in [0.1, 0.03] {
        optimizer.set_lr(lr).unwrap();
        bench.step(&mut optimizer);
    }
    // Gives way to the state, which is as large on the host as all the velocity on the device.
    bench
        .device
        .poll(wgpu::PollType::wait_indefinitely())
        .unwrap();
    arena.grads().iter().for_each(wgpu::Buffer::destroy);
    let state = bench.wait(optimizer.state()).await.unwrap();
    for (tensor, (name, state)) in names.iter().zip(state.tensors).enumerate() {
        let params = bench.wait(arena.download_params(name)).await.unwrap();
        let velocity = state.slot("momentum_buffer").unwrap();
        let (start, gradient) = (tiled(&start, tensor), tiled(&gradient, tensor));
        let given = start.par_chunks(CHUNK).zip(gradient.par_chunks(CHUNK));
        let results = params.par_chunks(CHUNK).zip(velocity.par_chunks(CHUNK));
        given
            .zip(results)
            .for_each(|((start, gradient), (params, velocity))| {
                let mut oracle = Oracle::new(start, Rounding::WGSL);
                for lr in [0.1, 0.03] {
                    oracle.step(&config.with_lr(lr).unwrap(), gradient);
                }
                let checked = oracle.check_params(params);
                checked.unwrap_or_else(|e| panic!("tensor {tensor}: {e}"));
                let checked = oracle.check_velocity(velocity);
                checked.unwrap_or_else(|e| panic!("tensor {tensor}: {e}"));
            });
    }
}

#[gpu_test]
async fn kernels_plan_with_what_can_be_known_of_their_adapter() {
    let adapter = &gpu().await.adapter;
    let of_adapter = DeviceLimits::of(&adapter.limits(), adapter.get_info().device_type);
    assert_eq!(*Bench::best().await.kernels.device_limits(), of_adapter);
}
