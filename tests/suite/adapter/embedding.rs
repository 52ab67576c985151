//! Inside somebody else's encoder.

use wgpu_optim::gpu::{ArenaError, LoadError};
use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::state::{SlotState, TensorState};
use wgpu_optim::wgsl::{KernelError, ScalarPath};
use wgpu_optim::{
    Arena, BuildError, GpuOptimizer, Kernels, OPTIONAL_FEATURES, Optimizer, SgdConfig, StateError,
    StepError, TransferError, wgpu,
};

use super::{Bench, gpu, gpu_test, whole};
use crate::cases::values;

fn config() -> SgdConfig {
    SgdConfig::builder(0.1)
        .momentum(0.9)
        .dampening(0.2)
        .build()
        .unwrap()
}

#[gpu_test]
async fn steps_recorded_into_one_encoder_each_see_their_own_lr() {
    for bench in Bench::both().await {
        for lrs in [vec![0.1, 0.01], vec![0.3, 0.0, 0.02, 0.1, 0.5, 0.07]] {
            let mut theta = bench.follow(config(), 1003);
            let mut encoder = bench.encoder();
            for lr in lrs {
                theta.optimizer.set_lr(lr).unwrap();
                theta.optimizer.step(&mut encoder).unwrap();
                theta.expect_step();
            }
            bench.queue.submit([encoder.finish()]);
            theta.check().await;
        }
    }
}

#[gpu_test]
async fn steps_in_encoders_submitted_together_each_see_their_own_lr() {
    for bench in Bench::both().await {
        let mut theta = bench.follow(config(), 1003);
        let mut recorded = Vec::new();
        for lr in [0.1, 0.01, 0.3] {
            let mut encoder = bench.encoder();
            theta.optimizer.set_lr(lr).unwrap();
            theta.optimizer.step(&mut encoder).unwrap();
            theta.expect_step();
            recorded.push(encoder.finish());
        }
        bench.queue.submit(recorded);
        theta.check().await;
    }
}

#[gpu_test]
async fn what_the_caller_records_around_a_step_sees_the_right_values() {
    for bench in Bench::both().await {
        let (start, gradient) = (values(1, 64), values(2, 64));
        let params = bench.buffer_of(&start);
        let fresh_grads = bench.buffer_of(&gradient);
        let grads = bench.buffer(64);
        let after = bench.buffer(64);
        let mut optimizer = bench.optimizer(config(), &params, &grads);
        let mut encoder = bench.encoder();
        encoder.copy_buffer_to_buffer(&fresh_grads, 0, &grads, 0, grads.size());
        optimizer.step(&mut encoder).unwrap();
        encoder.copy_buffer_to_buffer(&params, 0, &after, 0, after.size());
        encoder.clear_buffer(&params, 0, None);
        bench.queue.submit([encoder.finish()]);

        let mut oracle = Oracle::new(&start, Roundoff::WGSL);
        oracle.step(&config(), &gradient);
        oracle.check_params(&bench.download(&after).await).unwrap();
        assert_eq!(bench.download(&params).await, vec![0.0; 64]);
    }
}

#[gpu_test]
async fn a_frozen_tensor_is_left_alone_and_starts_undampened() {
    for bench in Bench::both().await {
        let start = values(1, 50);
        let gradient = values(2, 50);
        let buffers = [(); 2].map(|()| (bench.buffer_of(&start), bench.buffer_of(&gradient)));
        let tensors = [
            whole("a", &buffers[0].0, &buffers[0].1),
            whole("b", &buffers[1].0, &buffers[1].1),
        ];
        let mut optimizer = GpuOptimizer::new(&bench.kernels, config(), &tensors).unwrap();
        let mut oracles = [(); 2].map(|()| Oracle::new(&start, Roundoff::WGSL));
        for frozen in [true, false, true, false] {
            optimizer.set_frozen("b", frozen).unwrap();
            bench.step(&mut optimizer);
            oracles[0].step(&config(), &gradient);
            if !frozen {
                oracles[1].step(&config(), &gradient);
            }
            for (oracle, (params, _)) in oracles.iter().zip(&buffers) {
                oracle.check_params(&bench.download(params).await).unwrap();
            }
        }
        assert_eq!(optimizer.applied_steps("a"), Some(4));
        assert_eq!(optimizer.applied_steps("b"), Some(2));
    }
}

#[gpu_test]
async fn state_carries_on_bit_for_bit_and_a_foreign_state_is_refused() {
    for bench in Bench::both().await {
        let mut theta = bench.follow(config(), 1003);
        bench.step(&mut theta.optimizer);
        let state = bench.wait(theta.optimizer.state()).await.unwrap();
        let half_way = bench.download(&theta.params).await;
        bench.step(&mut theta.optimizer);
        let expected = bench.download(&theta.params).await;

        let mut resumed = bench.optimizer(config(), &theta.params, &theta.grads);
        let mut foreign = state.clone();
        foreign.tensors[0].state_kind = "ema".into();
        let refused = resumed.load_state(&foreign);
        assert!(matches!(
            refused,
            Err(LoadError::State(StateError::StateKind { .. }))
        ));
        assert_eq!(resumed.applied_steps("theta"), Some(0));

        bench.upload(&theta.params, &half_way);
        resumed.load_state(&state).unwrap();
        bench.step(&mut resumed);
        assert_eq!(bench.download(&theta.params).await, expected);

        // A state without velocity starts afresh, also where a velocity was before.
        let mut fresh = state.clone();
        fresh.tensors[0].slots.clear();
        resumed.load_state(&fresh).unwrap();
        bench.upload(&theta.params, &theta.start);
        bench.step(&mut resumed);
        assert_eq!(bench.download(&theta.params).await, half_way);
    }
}

#[gpu_test]
async fn a_step_goes_into_a_pass_that_the_caller_has_open() {
    for bench in Bench::both().await {
        let mut theta = bench.follow(config(), 1003);
        for lr in [0.1, 0.02] {
            let mut encoder = bench.encoder();
            theta.optimizer.set_lr(lr).unwrap();
            theta.optimizer.prepare(&mut encoder).unwrap();
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            theta.optimizer.record(&mut pass).unwrap();
            theta.expect_step();

            // A second one, at another rate, without having been prepared.
            theta.optimizer.set_lr(0.5).unwrap();
            let second = theta.optimizer.record(&mut pass);
            match bench.kernels.scalar_path() {
                ScalarPath::Immediates => {
                    second.unwrap();
                    theta.expect_step();
                }
                ScalarPath::Uniforms => assert_eq!(second, Err(StepError::NotPrepared)),
            }
            drop(pass);
            bench.queue.submit([encoder.finish()]);
        }
        theta.check().await;
    }
}

#[gpu_test]
async fn two_optimizers_share_pipelines_and_do_not_meet() {
    let bench = Bench::best().await;
    let gradient = values(2, 100);
    let grads = bench.buffer_of(&gradient);
    let buffers = [values(3, 100), values(4, 100)].map(|start| (bench.buffer_of(&start), start));
    let mut optimizers: Vec<_> = buffers
        .iter()
        .map(|(params, _)| bench.optimizer(config(), params, &grads))
        .collect();
    let mut encoder = bench.encoder();
    for optimizer in &mut optimizers {
        optimizer.step(&mut encoder).unwrap();
    }
    bench.queue.submit([encoder.finish()]);
    for (params, start) in &buffers {
        let mut oracle = Oracle::new(start, Roundoff::WGSL);
        oracle.step(&config(), &gradient);
        oracle.check_params(&bench.download(params).await).unwrap();
    }
}

#[gpu_test]
async fn a_step_on_a_lost_device_does_not_panic_and_other_devices_go_on() {
    for features in [OPTIONAL_FEATURES, wgpu::Features::empty()] {
        let bench = Bench::with(features).await;
        let (params, grads) = (bench.buffer(100), bench.buffer(100));
        let mut optimizer = bench.optimizer(config(), &params, &grads);
        bench.step(&mut optimizer);
        bench.device.destroy();
        let mut encoder = bench.encoder();
        let recorded = optimizer.step(&mut encoder);
        match bench.kernels.scalar_path() {
            ScalarPath::Uniforms if cfg!(not(target_arch = "wasm32")) => {
                assert!(matches!(recorded, Err(StepError::Scalars { .. })));
            }
            // A browser takes everything that is recorded for a lost device.
            _ => assert_eq!(recorded, Ok(())),
        }
        bench.queue.submit([encoder.finish()]);
        let state = bench.wait(optimizer.state()).await;
        assert_eq!(state, Err(TransferError::DeviceLost));
        // By now a browser has told, too.
        let recorded = optimizer.step(&mut bench.encoder());
        match bench.kernels.scalar_path() {
            ScalarPath::Immediates => assert_eq!(recorded, Ok(())),
            ScalarPath::Uniforms => assert!(matches!(recorded, Err(StepError::Scalars { .. }))),
        }

        // Nothing new can be built on it.
        let another = GpuOptimizer::new(&bench.kernels, config(), &[whole("a", &params, &grads)]);
        assert!(
            matches!(another, Err(BuildError::Device { .. })),
            "{another:?}"
        );
        let kernels = Kernels::new(&bench.device, &bench.queue);
        let arena = Arena::new(&bench.device, &bench.queue, [("a", vec![10])]);
        if cfg!(target_arch = "wasm32") {
            // Those who ask for the first time a browser tells later.
            kernels.unwrap();
            arena.unwrap().upload_all_params(&[[1.0; 10]]).unwrap();
            continue;
        }
        assert!(
            matches!(kernels, Err(KernelError::Device { .. })),
            "{kernels:?}"
        );
        assert!(matches!(arena, Err(ArenaError::Device { .. })), "{arena:?}");
    }
    let bench = Bench::best().await;
    let (params, grads) = (bench.buffer(100), bench.buffer(100));
    bench_still_works(bench, &params, &grads).await;
}

/// A browser tells its console, later.
#[cfg(not(target_arch = "wasm32"))]
#[gpu_test]
async fn a_buffer_of_another_device_is_an_error_and_no_panic() {
    let (ours, theirs) = (
        Bench::best().await,
        Bench::with(wgpu::Features::empty()).await,
    );
    let (params, grads, foreign) = (ours.buffer(100), ours.buffer(100), theirs.buffer(100));
    let refused = GpuOptimizer::new(&ours.kernels, config(), &[whole("a", &params, &foreign)]);
    let Err(BuildError::Device { message }) = refused else {
        panic!("a foreign buffer went unseen");
    };
    assert!(message.to_lowercase().contains("device"), "{message}");
    bench_still_works(ours, &params, &grads).await;
}

async fn bench_still_works(bench: &Bench, params: &wgpu::Buffer, grads: &wgpu::Buffer) {
    let (start, gradient) = (values(5, 100), values(6, 100));
    bench.upload(params, &start);
    bench.upload(grads, &gradient);
    bench.step(&mut bench.optimizer(config(), params, grads));
    let mut oracle = Oracle::new(&start, Roundoff::WGSL);
    oracle.step(&config(), &gradient);
    oracle.check_params(&bench.download(params).await).unwrap();
}

/// A program that keeps the velocity itself: saved in its own encoder, replaced, and the next step is what it would
/// have been. One tensor is cut into several pieces.
#[gpu_test]
async fn velocities_are_saved_and_replaced_in_an_encoder_of_the_callers() {
    for (optional, max_immediate_size) in [(OPTIONAL_FEATURES, 64), (wgpu::Features::empty(), 0)] {
        let limits = wgpu::Limits {
            max_storage_buffer_binding_size: 1 << 16,
            max_uniform_buffer_binding_size: 1 << 16,
            max_immediate_size: gpu()
                .await
                .adapter
                .limits()
                .max_immediate_size
                .min(max_immediate_size),
            ..wgpu::Limits::default()
        };
        let bench = Bench::open(optional, limits).await;
        let numels = [40_003, 5];
        let starts = numels.map(|numel| values(1, numel));
        let gradients = numels.map(|numel| values(2, numel));
        let arena = Arena::new(
            &bench.device,
            &bench.queue,
            [("a", vec![numels[0]]), ("b", vec![numels[1]])],
        )
        .unwrap();
        arena.upload_all_params(&starts).unwrap();
        arena.upload_all_grads(&gradients).unwrap();
        let mut optimizer = GpuOptimizer::new(&bench.kernels, config(), &arena.bindings()).unwrap();
        // No browser has bindings as small as that.
        let pieces = optimizer.state_slices("a", "momentum_buffer").count();
        assert_eq!(pieces > 1, cfg!(not(target_arch = "wasm32")));
        assert_eq!(
            optimizer
                .state_slices("stranger", "momentum_buffer")
                .count(),
            0
        );
        assert!(optimizer.set_applied_steps("stranger", 1).is_err());

        let saved = numels.map(|numel| bench.buffer_of(&vec![f32::NAN; numel]));
        let mut encoder = bench.encoder();
        optimizer.step(&mut encoder).unwrap();
        for (name, saved) in ["a", "b"].into_iter().zip(&saved) {
            for slice in optimizer.state_slices(name, "momentum_buffer") {
                let usages = wgpu::BufferUsages::STORAGE
                    | wgpu::BufferUsages::COPY_SRC
                    | wgpu::BufferUsages::COPY_DST;
                assert!(slice.buffer.usage().contains(usages));
                let (start, len) = (
                    4 * slice.elems.start,
                    4 * (slice.elems.end - slice.elems.start),
                );
                encoder.copy_buffer_to_buffer(slice.buffer, slice.offset_bytes, saved, start, len);
            }
        }
        bench.queue.submit([encoder.finish()]);
        for (tensor, saved) in saved.iter().enumerate() {
            assert_eq!(
                Some(bench.download(saved).await),
                bench.velocity(&optimizer, tensor).await
            );
        }

        // On goes the first tensor from what was saved, the second as if for the first time.
        optimizer.set_applied_steps("b", 0).unwrap();
        bench.queue.write_buffer(&saved[1], 0, &[0; 20]);
        let before = bench.wait(arena.download_all_params()).await.unwrap();
        let mut fresh = GpuOptimizer::new(&bench.kernels, config(), &arena.bindings()).unwrap();
        fresh.set_applied_steps("a", 1).unwrap();
        let mut encoder = bench.encoder();
        for optimizer in [&optimizer, &fresh] {
            for (name, saved) in ["a", "b"].into_iter().zip(&saved) {
                for slice in optimizer.state_slices(name, "momentum_buffer") {
                    let (start, len) = (
                        4 * slice.elems.start,
                        4 * (slice.elems.end - slice.elems.start),
                    );
                    encoder.copy_buffer_to_buffer(
                        saved,
                        start,
                        slice.buffer,
                        slice.offset_bytes,
                        len,
                    );
                }
            }
        }
        bench.queue.submit([encoder.finish()]);
        let mut stepped = Vec::new();
        for optimizer in [&mut optimizer, &mut fresh] {
            arena.upload_all_params(&before).unwrap();
            bench.step(optimizer);
            stepped.push(bench.wait(arena.download_all_params()).await.unwrap());
        }
        assert!(stepped[0] == stepped[1]);
        let state = bench.wait(optimizer.state()).await.unwrap();
        let first = |tensor: usize, velocity: Vec<f32>, applied_steps| {
            let state = TensorState {
                applied_steps,
                slots: vec![SlotState {
                    name: "momentum_buffer".into(),
                    values: velocity.into(),
                }],
                ..state.tensors[tensor].clone()
            };
            let mut oracle = Oracle::resume(&config(), &before[tensor], &state, Roundoff::WGSL);
            oracle.step(&config(), &gradients[tensor]);
            oracle.check_params(&stepped[0][tensor]).unwrap();
        };
        first(0, bench.download(&saved[0]).await, 1);
        first(1, vec![0.0; 5], 0);
    }
}
