//! Past one binding: one large tensor, and an arena of many.

use rayon::prelude::*;
use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::plan::DeviceLimits;
use wgpu_optim::{Arena, GpuOptimizer, OPTIONAL_FEATURES, Optimizer, SgdConfig, wgpu};

use super::{Bench, gpu, gpu_test};
use crate::cases::values;

/// Every how many elements parameters and gradients repeat. A prime keeps apart what lies at the same place in two bindings.
const PERIOD: usize = 100_003;

const LRS: [f64; 2] = [0.1, 0.03];

/// A pattern from one of its elements on, again and again.
fn tiled(pattern: &[f32], first: usize, numel: usize) -> Vec<f32> {
    let pattern = pattern.iter().cycle().skip(first);
    pattern.take(numel).copied().collect()
}

/// Steps of repeating parameters and gradients, and one period of them in the oracle.
struct Repeating {
    config: SgdConfig,
    start: Vec<f32>,
    gradient: Vec<f32>,
    period: Oracle,
}

impl Repeating {
    fn new(config: SgdConfig) -> Self {
        let (start, gradient) = (values(1, PERIOD), values(2, PERIOD));
        Self {
            period: oracle(&config, &start, &gradient),
            config,
            start,
            gradient,
        }
    }

    /// Compares every element of a tensor that starts at an element of the pattern.
    fn check(&self, first: usize, params: &[f32], velocity: &[f32]) {
        let check = |oracle: &Oracle, (params, velocity): (&[f32], &[f32])| {
            oracle.check_params(params).unwrap();
            oracle.check_velocity(velocity).unwrap();
        };
        let first = first % PERIOD;
        let head = (PERIOD - first).min(params.len());
        let ((params_head, params), (velocity_head, velocity)) =
            (params.split_at(head), velocity.split_at(head));
        let pattern = first..first + head;
        let of_head = oracle(
            &self.config,
            &self.start[pattern.clone()],
            &self.gradient[pattern],
        );
        check(&of_head, (params_head, velocity_head));
        let periods = params.par_chunks(PERIOD).zip(velocity.par_chunks(PERIOD));
        periods.for_each(|(params, velocity)| match params.len() {
            PERIOD => check(&self.period, (params, velocity)),
            tail => {
                let (start, gradient) = (&self.start[..tail], &self.gradient[..tail]);
                check(&oracle(&self.config, start, gradient), (params, velocity));
            }
        });
    }
}

fn oracle(config: &SgdConfig, start: &[f32], gradient: &[f32]) -> Oracle {
    let mut oracle = Oracle::new(start, Roundoff::WGSL);
    for lr in LRS {
        oracle.step(&config.with_lr(lr).unwrap(), gradient);
    }
    oracle
}

#[gpu_test]
async fn forty_million_elements_past_one_binding() {
    let bench = Bench::best().await;
    let numel = 40_000_000;
    let config = SgdConfig::builder(0.1)
        .momentum(0.9)
        .nesterov(true)
        .build()
        .unwrap();
    let repeating = Repeating::new(config);
    let [start, gradient] =
        [&repeating.start, &repeating.gradient].map(|pattern| tiled(pattern, 0, numel));
    let params = bench.buffer_of(&start);
    let grads = bench.buffer_of(&gradient);
    let mut optimizer = bench.optimizer(config, &params, &grads);
    let binding_elems = bench.device.limits().max_storage_buffer_binding_size / 4;
    let pieces = (numel as u64).div_ceil(binding_elems);
    assert_eq!(optimizer.plan().pieces.len() as u64, pieces);
    for lr in LRS {
        optimizer.set_lr(lr).unwrap();
        bench.step(&mut optimizer);
    }

    let after = bench.download(&params).await;
    let velocity = bench.velocity(&optimizer, 0).await.unwrap();
    repeating.check(0, &after, &velocity);
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

    let repeating = Repeating::new(config);
    // Each tensor starts elsewhere in the pattern.
    let tiled = |pattern: &[f32], tensor: usize| tiled(pattern, 7 * tensor, NUMEL);
    for (tensor, name) in names.iter().enumerate() {
        let [start, gradient] =
            [&repeating.start, &repeating.gradient].map(|pattern| tiled(pattern, tensor));
        arena.upload_params(name, &start).unwrap();
        arena.upload_grads(name, &gradient).unwrap();
        // Staging memory goes back with each submission.
        bench.queue.submit([]);
        bench
            .device
            .poll(wgpu::PollType::wait_indefinitely())
            .unwrap();
    }
    for lr in LRS {
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
        repeating.check(7 * tensor, &params, &velocity);
    }
}

#[gpu_test]
async fn kernels_plan_with_what_can_be_known_of_their_adapter() {
    let adapter = &gpu().await.adapter;
    let of_adapter = DeviceLimits::of(&adapter.limits(), adapter.get_info().device_type);
    assert_eq!(*Bench::best().await.kernels.device_limits(), of_adapter);
}
