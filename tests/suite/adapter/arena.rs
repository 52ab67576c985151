use wgpu_optim::gpu::ArenaError;
use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::state::DuplicateName;
use wgpu_optim::{Arena, GpuOptimizer, OPTIONAL_FEATURES, Optimizer, SgdConfig};

use super::{Bench, gpu_test};
use crate::cases::{LRS, sizes, values};

fn config() -> SgdConfig {
    SgdConfig::builder(0.05)
        .momentum(0.9)
        .nesterov(true)
        .weight_decay(0.01)
        .build()
        .unwrap()
}

/// Steps an arena of these sizes and compares every element.
async fn check(bench: &Bench, sizes: &[usize]) -> (Arena, GpuOptimizer) {
    let layout = sizes
        .iter()
        .enumerate()
        .map(|(i, numel)| (i.to_string(), vec![*numel]));
    let arena = Arena::new(&bench.device, &bench.queue, layout).unwrap();
    let values_of = |(i, numel): (usize, &usize)| values(i as u64, *numel);
    let start: Vec<_> = sizes.iter().enumerate().map(values_of).collect();
    arena.upload_all_params(&start).unwrap();
    let oracle = |start: &Vec<f32>| Oracle::new(start, Roundoff::WGSL);
    let mut oracles: Vec<_> = start.iter().map(oracle).collect();
    let mut optimizer = GpuOptimizer::new(&bench.kernels, config(), &arena.bindings()).unwrap();
    for (step, lr) in LRS.into_iter().enumerate() {
        optimizer.set_lr(lr).unwrap();
        let seed = |i: usize| (1000 * (step + 1) + i) as u64;
        let values_of = |(i, numel): (usize, &usize)| values(seed(i), *numel);
        let grads: Vec<_> = sizes.iter().enumerate().map(values_of).collect();
        // Each tensor on its own, or all at once.
        if step == 0 {
            for (i, grads) in grads.iter().enumerate() {
                arena.upload_grads(&i.to_string(), grads).unwrap();
            }
        } else {
            arena.upload_all_grads(&grads).unwrap();
        }
        for (oracle, grads) in oracles.iter_mut().zip(&grads) {
            oracle.step(optimizer.config(), grads);
        }
        bench.step(&mut optimizer);
    }
    let all = bench.wait(arena.download_all_params()).await.unwrap();
    let state = bench.wait(optimizer.state()).await.unwrap();
    for (i, oracle) in oracles.iter().enumerate() {
        oracle
            .check_params(&all[i])
            .unwrap_or_else(|e| panic!("tensor {i}: {e}"));
        oracle
            .check_velocity(&state.tensors[i].slot("momentum_buffer").unwrap())
            .unwrap();
    }
    (arena, optimizer)
}

#[gpu_test]
async fn every_size_in_one_dispatch() {
    let sizes: Vec<_> = sizes().collect();
    for bench in Bench::both().await {
        let (arena, optimizer) = check(bench, &sizes).await;
        assert_eq!(optimizer.dispatches(), 1);
        let alignment = bench.device.limits().min_storage_buffer_offset_alignment;
        for tensor in arena.tensors() {
            assert_eq!(
                tensor.offset_bytes % u64::from(alignment),
                0,
                "{}",
                tensor.name
            );
        }
        let one = bench.wait(arena.download_params("20")).await.unwrap();
        let all = bench.wait(arena.download_all_params()).await.unwrap();
        assert_eq!(one, all[20]);
    }
}

/// Buffers of 64 KiB and bindings of 16: the arena takes several buffers, and each several pieces.
#[cfg(not(target_arch = "wasm32"))]
#[gpu_test]
async fn an_arena_past_a_buffer_and_past_a_binding() {
    use wgpu_optim::wgpu;

    let limits = wgpu::Limits {
        max_storage_buffer_binding_size: 16 * 1024,
        max_buffer_size: 64 * 1024,
        ..wgpu::Limits::default()
    };
    let bench = Bench::open(wgpu::Features::empty(), limits).await;
    let (arena, optimizer) = check(&bench, &[10_000, 3, 5_000, 9_999, 1, 12_000, 700]).await;
    assert!(arena.params().len() >= 3);
    assert!(optimizer.dispatches() > arena.params().len());
}

#[gpu_test]
async fn mistakes_are_named_and_the_arena_goes_on() {
    let bench = Bench::with(OPTIONAL_FEATURES).await;
    let new = |tensors: &[(&str, Vec<usize>)]| {
        Arena::new(&bench.device, &bench.queue, tensors.iter().cloned())
    };
    let twice = new(&[("a", vec![1]), ("a", vec![2])]);
    assert_eq!(
        twice.unwrap_err(),
        ArenaError::DuplicateName(DuplicateName { tensor: "a".into() })
    );
    for shape in [vec![1 << 30, 1 << 10], vec![usize::MAX, usize::MAX]] {
        let large = new(&[("a", vec![1]), ("b", shape)]);
        assert!(matches!(large, Err(ArenaError::TooLarge { tensor, .. }) if tensor == "b"));
    }
    let arena = new(&[("a", vec![2, 3]), ("none", vec![0, 9]), ("scalar", vec![])]).unwrap();
    assert_eq!(arena.tensors()[0].numel, 6);
    let unknown = arena.upload_params("b", &[1.0]);
    assert_eq!(
        unknown,
        Err(ArenaError::UnknownTensor { tensor: "b".into() })
    );
    let short = arena.upload_grads("a", &[1.0]);
    let expected = ArenaError::Length {
        tensor: "a".into(),
        expected: 6,
        actual: 1,
    };
    assert_eq!(short, Err(expected));
    arena.upload_params("scalar", &[7.0]).unwrap();
    let too_few = arena.upload_all_params(&[vec![1.0; 6], vec![]]);
    let expected = ArenaError::TensorCount {
        expected: 3,
        actual: 2,
    };
    assert_eq!(too_few, Err(expected));
    let too_long = arena.upload_all_params(&[vec![1.0; 6], vec![], vec![1.0; 2]]);
    let expected = ArenaError::Length {
        tensor: "scalar".into(),
        expected: 1,
        actual: 2,
    };
    assert_eq!(too_long, Err(expected));
    let all = bench.wait(arena.download_all_params()).await.unwrap();
    assert_eq!(
        all,
        [vec![0.0; 6], vec![], vec![7.0]],
        "nothing was written"
    );
    let other: [&[f32]; 3] = [&[1.0; 6], &[], &[2.0]];
    arena.upload_all_params(&other).unwrap();
    let all = bench.wait(arena.download_all_params()).await.unwrap();
    assert_eq!(all, other);

    let empty = new(&[]).unwrap();
    assert!(empty.bindings().is_empty());
    empty.upload_all_params(&[[0.0; 0]; 0]).unwrap();
    assert!(
        bench
            .wait(empty.download_all_params())
            .await
            .unwrap()
            .is_empty()
    );
}

/// In a browser nobody knows before the next transfer down.
#[cfg(not(target_arch = "wasm32"))]
#[gpu_test]
async fn an_upload_to_a_lost_device_is_an_error() {
    let bench = Bench::with(OPTIONAL_FEATURES).await;
    let arena = Arena::new(&bench.device, &bench.queue, [("a", vec![2])]).unwrap();
    bench.device.destroy();
    let lost = arena.upload_all_params(&[[1.0; 2]]);
    assert!(matches!(lost, Err(ArenaError::Transfer(_))), "{lost:?}");
}
