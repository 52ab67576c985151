//! GPU against the oracle: every config, awkward sizes and offsets, canaries around every slice.

use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::{GpuOptimizer, OPTIONAL_FEATURES, Optimizer, SgdConfig, TensorBinding, wgpu};

use super::{Bench, bindings_at, gpu_test};
use crate::cases::{LRS, configs, sizes, values};

const CANARY: f32 = -12_345.678;

/// Where a tensor lies in the shared buffers, in elements.
struct Place {
    params: usize,
    grads: usize,
    numel: usize,
}

/// One tensor of each size, apart by a few canaries, with the parameters and gradients at offsets that line
/// up modulo four or not, in turn.
fn places(sizes: impl Iterator<Item = usize>) -> Vec<Place> {
    let mut places = Vec::new();
    let (mut params, mut grads) = (1, 1);
    for (index, numel) in sizes.enumerate() {
        params += index % 4;
        grads += index % 3;
        places.push(Place {
            params,
            grads,
            numel,
        });
        params += numel + 1;
        grads += numel + 1;
    }
    places
}

/// Runs a few steps over all places at once and compares every element, canaries included.
async fn check(bench: &Bench, config: SgdConfig, places: &[Place]) {
    let extent = |end: fn(&Place) -> usize| places.iter().map(end).max().unwrap() + 5;
    let mut host_params = vec![CANARY; extent(|p| p.params + p.numel)];
    let mut host_grads = vec![CANARY; extent(|p| p.grads + p.numel)];
    for (index, place) in places.iter().enumerate() {
        let start = values(index as u64, place.numel);
        host_params[place.params..place.params + place.numel].copy_from_slice(&start);
    }
    let params = bench.buffer_of(&host_params);
    let grads = bench.buffer_of(&host_grads);
    let names: Vec<_> = (0..places.len()).map(|index| index.to_string()).collect();
    let of = |place: &Place| (place.numel, [place.params, place.grads]);
    let tensors = bindings_at(&names, (&params, &grads), places.iter().map(of));
    let mut optimizer = GpuOptimizer::new(&bench.kernels, config, &tensors).unwrap();
    let mut oracles: Vec<_> = places
        .iter()
        .map(|p| Oracle::new(&host_params[p.params..p.params + p.numel], Roundoff::WGSL))
        .collect();

    for (step, lr) in LRS.into_iter().enumerate() {
        optimizer.set_lr(lr).unwrap();
        for (index, (place, oracle)) in places.iter().zip(&mut oracles).enumerate() {
            let grads = values((1000 * step + index) as u64, place.numel);
            host_grads[place.grads..place.grads + place.numel].copy_from_slice(&grads);
            oracle.step(optimizer.config(), &grads);
        }
        bench.upload(&grads, &host_grads);
        bench.step(&mut optimizer);
    }

    let mut after = bench.download(&params).await;
    let state = bench.wait(optimizer.state()).await.unwrap();
    for ((place, oracle), state) in places.iter().zip(&oracles).zip(&state.tensors) {
        let here = format!(
            "{} elements at {} and {}, {config:?}",
            place.numel, place.params, place.grads
        );
        let slice = &mut after[place.params..place.params + place.numel];
        oracle
            .check_params(slice)
            .unwrap_or_else(|e| panic!("{here}: {e}"));
        slice.fill(CANARY);
        if let Some(velocity) = state.slot("momentum_buffer") {
            oracle
                .check_velocity(&velocity)
                .unwrap_or_else(|e| panic!("{here}: {e}"));
        }
        assert_eq!(
            state.slot("momentum_buffer").is_some(),
            config.has_velocity()
        );
        assert_eq!(state.applied_steps, 4);
    }
    assert!(
        after.iter().all(|x| x.to_bits() == CANARY.to_bits()),
        "a canary died: {config:?}"
    );
    let grads_after = bench.download(&grads).await;
    assert!(
        grads_after
            .iter()
            .zip(&host_grads)
            .all(|(x, y)| x.to_bits() == y.to_bits())
    );
}

#[gpu_test]
async fn every_config_at_every_awkward_size() {
    let places = places(sizes());
    for bench in Bench::both().await {
        for config in configs() {
            check(bench, config, &places).await;
        }
    }
}

#[gpu_test]
async fn every_pair_of_offsets() {
    let config = SgdConfig::builder(0.05)
        .momentum(0.9)
        .nesterov(true)
        .build()
        .unwrap();
    let plain = SgdConfig::builder(0.05).weight_decay(0.1).build().unwrap();
    let mut places = Vec::new();
    for params in 0..8 {
        for grads in 0..8 {
            for numel in [3, 4, 5, 11, 64, 301] {
                let row = places.len() * 400;
                places.push(Place {
                    params: row + params,
                    grads: row + grads,
                    numel,
                });
            }
        }
    }
    for bench in Bench::both().await {
        check(bench, config, &places).await;
        check(bench, plain, &places).await;
    }
}

#[cfg(not(target_arch = "wasm32"))]
#[gpu_test]
async fn a_device_of_small_limits_folds_and_splits() {
    let limits = wgpu::Limits {
        max_compute_workgroups_per_dimension: 3,
        max_storage_buffer_binding_size: 16 * 1024,
        max_buffer_size: 256 * 1024,
        ..wgpu::Limits::default()
    };
    let config = SgdConfig::builder(0.05)
        .momentum(0.9)
        .weight_decay(0.1)
        .build()
        .unwrap();
    // In step modulo four, so vec4 in several pieces; then out of step, so scalar in rows.
    let places = [(4, 8, 20_003), (20_013, 20_012, 21_001)].map(|(params, grads, numel)| Place {
        params,
        grads,
        numel,
    });
    for optional in [wgpu::Features::empty(), OPTIONAL_FEATURES] {
        let mut limits = limits.clone();
        if optional.contains(wgpu::Features::IMMEDIATES) {
            limits.max_immediate_size = super::gpu().await.adapter.limits().max_immediate_size;
        }
        let mut bench = Bench::open(optional, limits).await;
        check(&bench, config, &places).await;
        bench.kernels = bench.kernels.with_max_dispatch_elems(1000);
        check(&bench, config, &places).await;
    }
}

/// Neighbours without a gap share dispatches, and are still tensors of their own: each frozen at other steps, each
/// with its own first step.
#[gpu_test]
async fn neighbours_that_share_a_dispatch_keep_their_own_state() {
    let config = SgdConfig::builder(0.05)
        .momentum(0.9)
        .dampening(0.4)
        .build()
        .unwrap();
    let sizes: Vec<_> = (0..60)
        .map(|index| [1, 7, 64, 256, 3, 1000][index % 6])
        .collect();
    let total: usize = sizes.iter().sum();
    for bench in Bench::both().await {
        let host_params = values(1, total);
        let params = bench.buffer_of(&host_params);
        let grads = bench.buffer(total);
        let names: Vec<_> = (0..sizes.len()).map(|index| index.to_string()).collect();
        let mut starts = Vec::new();
        let mut next = 0;
        for numel in &sizes {
            starts.push(next);
            next += numel;
        }
        let tensors: Vec<_> = (0..sizes.len())
            .map(|i| {
                let bytes = 4 * starts[i] as u64;
                TensorBinding::new(&names[i], &params, &grads, [sizes[i]])
                    .params_at(bytes)
                    .grads_at(bytes)
            })
            .collect();
        let mut optimizer = GpuOptimizer::new(&bench.kernels, config, &tensors).unwrap();
        let slice = |i: usize| starts[i]..starts[i] + sizes[i];
        let mut oracles: Vec<_> = (0..sizes.len())
            .map(|i| Oracle::new(&host_params[slice(i)], Roundoff::WGSL))
            .collect();
        let mut rng = fastrand::Rng::with_seed(5);
        let mut counts = Vec::new();
        for step in 0..8 {
            let host_grads = values(100 + step, total);
            bench.upload(&grads, &host_grads);
            for (i, oracle) in oracles.iter_mut().enumerate() {
                // At the last two steps all go on.
                let frozen = step < 6 && rng.u8(..3) == 0;
                optimizer.set_frozen(&names[i], frozen).unwrap();
                if !frozen {
                    oracle.step(&config, &host_grads[slice(i)]);
                }
            }
            bench.step(&mut optimizer);
            counts.push(optimizer.dispatches());
        }
        // Chunks of each class by the vec4, and of what is left at the ends.
        assert!(counts.iter().all(|count| *count <= 4), "{counts:?}");
        assert_eq!(
            counts[7], 2,
            "one by the vec4, one for what is left at the end"
        );
        let after = bench.download(&params).await;
        let state = bench.wait(optimizer.state()).await.unwrap();
        for (i, oracle) in oracles.iter().enumerate() {
            oracle
                .check_params(&after[slice(i)])
                .unwrap_or_else(|e| panic!("{i}: {e}"));
            let velocity = state.tensors[i].slot("momentum_buffer").unwrap();
            oracle
                .check_velocity(&velocity)
                .unwrap_or_else(|e| panic!("{i}: {e}"));
        }
    }
}

#[gpu_test]
async fn a_repeated_run_is_the_same_bit_for_bit() {
    let config = SgdConfig::builder(0.05)
        .momentum(0.9)
        .weight_decay(0.01)
        .build()
        .unwrap();
    for bench in Bench::both().await {
        let run = async || {
            let params = bench.buffer_of(&values(1, 10_001));
            let grads = bench.buffer_of(&values(2, 10_001));
            let mut optimizer = bench.optimizer(config, &params, &grads);
            for _ in 0..5 {
                bench.step(&mut optimizer);
            }
            bench.download(&params).await
        };
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(run().await), bits(run().await));
    }
}

#[gpu_test]
async fn infinite_and_nan_gradients_stay_in_their_element() {
    for bench in Bench::both().await {
        for config in configs() {
            // At lr = 0.3 nothing overflows but what starts infinite.
            let start = values(1, 67);
            let mut bad = values(2, 67);
            (bad[5], bad[33], bad[66]) = (f32::INFINITY, f32::NAN, f32::NEG_INFINITY);
            let params = bench.buffer_of(&start);
            let grads = bench.buffer_of(&bad);
            let mut optimizer = bench.optimizer(config, &params, &grads);
            let mut oracle = Oracle::new(&start, Roundoff::WGSL);
            oracle.step(&config, &bad);
            bench.step(&mut optimizer);
            oracle
                .check_params(&bench.download(&params).await)
                .unwrap_or_else(|e| panic!("{config:?}: {e}"));
        }
    }
}

/// Learning rate and momentum become too small for f32, then for f64, and come back.
#[gpu_test]
async fn what_is_too_small_for_f32_is_zero_on_the_device_too() {
    let (start, gradient) = (values(1, 1003), values(2, 1003));
    for bench in Bench::both().await {
        let grads = bench.buffer_of(&gradient);
        for config in configs() {
            let params = bench.buffer_of(&start);
            let mut optimizer = bench.optimizer(config, &params, &grads);
            let mut oracle = Oracle::new(&start, Roundoff::WGSL);
            for (lr, momentum) in [
                (0.05, 0.9),
                (1e-38, 1e-38),
                (1e-44, 1e-44),
                (1e-300, 0.0),
                (0.02, 0.9),
            ] {
                optimizer.set_lr(lr).unwrap();
                if config.has_velocity() {
                    optimizer.set_momentum(momentum).unwrap();
                }
                let before = bench.download(&params).await;
                bench.step(&mut optimizer);
                oracle.step(optimizer.config(), &gradient);
                let after = bench.download(&params).await;
                oracle.check_params(&after).unwrap();
                assert_eq!(after == before, lr < 1e-37, "{config:?}");
            }
            if let Some(velocity) = bench.velocity(&optimizer, 0).await {
                oracle.check_velocity(&velocity).unwrap();
            }
        }
    }
}
