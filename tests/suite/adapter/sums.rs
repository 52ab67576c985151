//! Rules that take sums over tensors, on a device.

use wgpu_optim::oracle::Roundoff;
use wgpu_optim::wgsl::KernelError;
use wgpu_optim::{
    AnyRule, Arena, BuildError, GpuOptimizer, LambConfig, Optimizer, StepError, wgpu,
};

use super::{Bench, Tensors, gpu_test, whole};
use crate::cases::values;
use crate::golden_tensors::all;

#[gpu_test]
async fn the_points_that_the_libraries_printed_are_visited() {
    for bench in Bench::both().await {
        for golden in all() {
            let buffers: Vec<_> = golden
                .tensors
                .iter()
                .map(|tensor| {
                    let grads = bench.buffer(tensor.theta0.len());
                    (bench.buffer_of(&tensor.theta0), grads)
                })
                .collect();
            let tensors = golden.tensors.iter().zip(&buffers);
            let tensors =
                tensors.map(|(tensor, (params, grads))| whole(&tensor.name, params, grads));
            let tensors: Vec<_> = tensors.collect();
            let mut optimizer =
                GpuOptimizer::new(&bench.kernels, golden.config(), &tensors).unwrap();
            for (step, oracles) in golden.oracles(Roundoff::WGSL).iter().enumerate() {
                for ((_, buffer), grads) in buffers.iter().zip(golden.grads(step)) {
                    bench.upload(buffer, &grads);
                }
                optimizer.set_lr(golden.lr[step]).unwrap();
                bench.step(&mut optimizer);
                let state = bench.wait(optimizer.state()).await.unwrap();
                for (index, oracle) in oracles.iter().enumerate() {
                    let here = format!("{}, tensor {index}, step {step}", golden.name);
                    let params = bench.download(&buffers[index].0).await;
                    oracle
                        .check_params(&params)
                        .unwrap_or_else(|e| panic!("{here}: {e}"));
                    for state in &state.tensors[index].slots {
                        oracle
                            .check_slot(&state.name, &state.values.to_f32())
                            .unwrap_or_else(|e| panic!("{here}: {e}"));
                    }
                }
            }
        }
    }
}

/// However many tensors an arena has: by vectors and by elements, once to take the sums and once to update, and the sums.
#[gpu_test]
async fn an_arena_takes_five_dispatches_and_the_same_bits_twice() {
    let config = LambConfig::builder(0.05).build().unwrap();
    for bench in Bench::both().await {
        let tensors = Tensors::new([("a", vec![7, 11]), ("b", vec![200_001]), ("c", vec![64])]);
        let run = async || {
            let arena = Arena::new(&bench.device, &bench.queue, tensors.shapes.clone()).unwrap();
            tensors.upload(&arena);
            let mut optimizer =
                GpuOptimizer::new(&bench.kernels, config, &arena.bindings()).unwrap();
            for _ in 0..3 {
                bench.step(&mut optimizer);
            }
            let state = bench.wait(optimizer.state()).await.unwrap();
            (optimizer.dispatches(), state)
        };
        let (dispatches, state) = run().await;
        assert_eq!(dispatches, 5);
        assert_eq!(run().await.1, state);
    }
}

/// A step whose chunks have not been sent is refused, not made without them.
#[gpu_test]
async fn a_step_into_a_pass_has_to_be_prepared() {
    let bench = Bench::best().await;
    let (params, grads) = (
        bench.buffer_of(&values(1, 9)),
        bench.buffer_of(&values(2, 9)),
    );
    let config = LambConfig::builder(0.05).build().unwrap();
    let mut optimizer = bench.optimizer(config, &params, &grads);
    let mut encoder = bench.encoder();
    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
    let refused = optimizer.record(&mut pass);
    assert!(
        matches!(refused, Err(StepError::NotPrepared)),
        "{refused:?}"
    );
    drop(pass);
    optimizer.prepare(&mut encoder).unwrap();
    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
    optimizer.record(&mut pass).unwrap();
    drop(pass);
    bench.queue.submit([encoder.finish()]);
    assert_ne!(bench.download(&params).await, values(1, 9));
    assert_eq!(optimizer.steps(), 1);
}

/// No browser binds so few buffers.
#[cfg(not(target_arch = "wasm32"))]
#[gpu_test]
async fn a_device_that_binds_too_few_buffers_is_refused() {
    let limits = wgpu::Limits {
        max_storage_buffers_per_shader_stage: 4,
        ..wgpu::Limits::default()
    };
    let bench = Bench::open(wgpu::Features::empty(), limits).await;
    let (params, grads) = (bench.buffer(9), bench.buffer(9));
    let tensors = [whole("theta", &params, &grads)];
    let rule = |name| AnyRule::preset(name, None, 0.05).unwrap();
    let refused = GpuOptimizer::new(&bench.kernels, rule("lamb"), &tensors).map(drop);
    let expected = BuildError::Kernel(KernelError::LimitTooLow {
        limit: "max_storage_buffers_per_shader_stage",
        required: 5,
        actual: 4,
    });
    assert_eq!(refused.unwrap_err().to_string(), expected.to_string());
    GpuOptimizer::new(&bench.kernels, rule("adam"), &tensors).unwrap();
}
