//! Past one binding: one large tensor, and an arena of many.

use wgpu_optim::oracle::{Oracle, Rounding};
use wgpu_optim::readback::block_on;
use wgpu_optim::{Arena, GpuOptimizer, SgdConfig, wgpu};

use super::Bench;
use crate::cases::values;

#[test]
fn forty_million_elements_past_one_binding() {
    let bench = Bench::best();
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

    let after = bench.download(&params);
    let velocity = bench.velocity(&optimizer, 0).unwrap();
    let chunk = 1 << 20;
    let given = start.chunks(chunk).zip(gradient.chunks(chunk));
    let results = after.chunks(chunk).zip(velocity.chunks(chunk));
    for ((start, gradient), (after, velocity)) in given.zip(results) {
        let mut oracle = Oracle::new(start, Rounding::WGSL);
        for lr in [0.1, 0.03] {
            oracle.step(&config.with_lr(lr).unwrap(), gradient);
        }
        oracle.check_params(after).unwrap();
        oracle.check_velocity(velocity).unwrap();
    }
}

/// More than nine of lavapipe's bindings per array. Takes 3.6 GB on the device, and less than one on the host.
#[test]
fn an_arena_of_three_hundred_million_elements() {
    const TENSORS: usize = 30;
    const NUMEL: usize = 10_000_000;
    let bench = Bench::best();
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let names: Vec<_> = (0..TENSORS).map(|index| index.to_string()).collect();
    let layout = names.iter().map(|name| (name.as_str(), vec![NUMEL]));
    let arena = Arena::new(&bench.device, &bench.queue, layout).unwrap();
    let mut optimizer = GpuOptimizer::new(&bench.kernels, config, &arena.bindings()).unwrap();

    let elems = (TENSORS * NUMEL) as u64;
    let allocated: u64 = arena
        .params()
        .iter()
        .chain(arena.grads())
        .map(wgpu::Buffer::size)
        .sum();
    assert!(allocated + optimizer.plan().velocity_bytes() <= 3 * 4 * elems * 105 / 100);

    let period = 100_003;
    let (start, gradient) = (values(1, period), values(2, period));
    // Each tensor starts elsewhere in the pattern.
    let tiled = |pattern: &[f32], tensor: usize| -> Vec<f32> {
        (0..NUMEL)
            .map(|i| pattern[(i + 7 * tensor) % period])
            .collect()
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
    for (tensor, name) in names.iter().enumerate() {
        let params = block_on(&bench.device, arena.download_params(name)).unwrap();
        let (start, gradient) = (tiled(&start, tensor), tiled(&gradient, tensor));
        let given = start.chunks(1 << 20).zip(gradient.chunks(1 << 20));
        for ((start, gradient), params) in given.zip(params.chunks(1 << 20)) {
            let mut oracle = Oracle::new(start, Rounding::WGSL);
            for lr in [0.1, 0.03] {
                oracle.step(&config.with_lr(lr).unwrap(), gradient);
            }
            oracle
                .check_params(params)
                .unwrap_or_else(|e| panic!("tensor {tensor}: {e}"));
        }
    }
}
