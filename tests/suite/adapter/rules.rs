//! Every rule on a real adapter: all slots of a piece in one buffer, whatever the tensors.

use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::rules::AmsGrad;
use wgpu_optim::{
    AdamConfig, AnyRule, Arena, GpuOptimizer, OPTIONAL_FEATURES, Optimizer, Rule, TensorBinding,
    wgpu,
};

use super::{Bench, Tensors, gpu_test, whole};
use crate::cases::{LRS, sizes, values};
use crate::golden_rules;
use crate::rule_cases::rules;

const CANARY: f32 = 12_345.678;

/// Compares parameters and every slot of one tensor.
async fn check(
    bench: &Bench,
    optimizer: &GpuOptimizer<AnyRule>,
    tensor: usize,
    oracle: &Oracle<AnyRule>,
    params: &[f32],
    here: &str,
) {
    let state = bench.wait(optimizer.state()).await.unwrap();
    oracle
        .check_params(params)
        .unwrap_or_else(|e| panic!("{here}: {e}"));
    let slots = optimizer.config().slots();
    let kept = slots.kept();
    let state = &state.tensors[tensor].slots;
    assert_eq!(kept.clone().count(), state.len());
    for (slot, state) in kept.zip(state) {
        assert_eq!(slot.name, state.name);
        oracle
            .check_slot(&state.name, &state.values.to_f32())
            .unwrap_or_else(|e| panic!("{here}: {e}"));
    }
}

#[gpu_test]
async fn the_points_that_the_libraries_printed_are_visited() {
    let mut averaged = 0;
    for bench in Bench::both().await {
        for golden in golden_rules::all() {
            let params = bench.buffer_of(&golden.theta0);
            let grads = bench.buffer(golden.theta0.len());
            let config = golden.config();
            let theta = whole("theta", &params, &grads);
            let mut optimizer = GpuOptimizer::new(&bench.kernels, config, &[theta]).unwrap();
            for (step, oracle) in golden.oracles(Roundoff::WGSL).iter().enumerate() {
                let gradient = bytemuck::cast_slice(&golden.grads[step]);
                bench.queue.write_buffer(&grads, 0, gradient);
                optimizer.set_lr(golden.lr[step]).unwrap();
                let frozen = golden.frozen_steps.contains(&step);
                optimizer.set_frozen("theta", frozen).unwrap();
                bench.step(&mut optimizer);
                let params = bench.download(&params).await;
                if optimizer.applied_steps("theta") > Some(0) {
                    check(bench, &optimizer, 0, oracle, &params, &golden.name).await;
                    let state = bench.wait(optimizer.state()).await.unwrap();
                    if let Some(z) = state.tensors[0].slot("z") {
                        averaged += golden.check_averaged(step, oracle, &params, &z);
                    }
                }
            }
        }
    }
    assert!(averaged > 0);
}

/// Every config over every size, scattered with canaries between, at offsets that line up and that do not.
#[gpu_test]
async fn every_config_over_every_size_and_offset() {
    for bench in Bench::both().await {
        for (index, config) in rules().into_iter().enumerate() {
            let numels: Vec<_> = sizes().chain([70_001]).collect();
            // Parameters and gradients start alike modulo four elements, or not.
            let shift = [0, 4, 1][index % 3];
            let mut next = index % 5;
            let starts: Vec<_> = numels
                .iter()
                .map(|numel| {
                    let start = next;
                    next += numel + 3;
                    start
                })
                .collect();
            let mut host_params = vec![CANARY; next + 8];
            let mut host_grads = vec![CANARY; next + 8];
            for (start, numel) in starts.iter().zip(&numels) {
                host_params[*start..start + numel].copy_from_slice(&values(*numel as u64, *numel));
                let gradient = values(77 + *numel as u64, *numel);
                host_grads[start + shift..start + shift + numel].copy_from_slice(&gradient);
            }
            let params = bench.buffer_of(&host_params);
            let grads = bench.buffer_of(&host_grads);
            let names: Vec<_> = (0..numels.len()).map(|index| index.to_string()).collect();
            let tensors: Vec<_> = names
                .iter()
                .zip(starts.iter().zip(&numels))
                .map(|(name, (start, numel))| {
                    let [params_bytes, grads_bytes] =
                        [*start, start + shift].map(|at| 4 * at as u64);
                    TensorBinding::new(name, &params, &grads, [*numel])
                        .params_at(params_bytes)
                        .grads_at(grads_bytes)
                })
                .collect();
            let mut optimizer =
                GpuOptimizer::new(&bench.kernels, config.clone(), &tensors).unwrap();
            let mut oracles: Vec<_> = starts
                .iter()
                .zip(&numels)
                .map(|(start, numel)| {
                    Oracle::new(&host_params[*start..start + numel], Roundoff::WGSL)
                })
                .collect();
            for (step, lr) in LRS.into_iter().enumerate() {
                // The seventh tensor misses a step: its corrections then differ from its neighbours'.
                optimizer.set_frozen("7", step == 1).unwrap();
                optimizer.set_lr(lr).unwrap();
                bench.step(&mut optimizer);
                for (tensor, oracle) in oracles.iter_mut().enumerate() {
                    if tensor != 7 || step != 1 {
                        let start = starts[tensor] + shift;
                        let grads = &host_grads[start..start + numels[tensor]];
                        oracle.step(optimizer.config(), grads);
                    }
                }
            }
            let mut stepped = bench.download(&params).await;
            let state = bench.wait(optimizer.state()).await.unwrap();
            for (tensor, oracle) in oracles.iter().enumerate() {
                let here = format!("{config:?}, {} elements", numels[tensor]);
                let slice = &mut stepped[starts[tensor]..starts[tensor] + numels[tensor]];
                oracle
                    .check_params(slice)
                    .unwrap_or_else(|e| panic!("{here}: {e}"));
                slice.fill(CANARY);
                for state in &state.tensors[tensor].slots {
                    oracle
                        .check_slot(&state.name, &state.values.to_f32())
                        .unwrap_or_else(|e| panic!("{here}: {e}"));
                }
            }
            assert!(stepped.iter().all(|x| *x == CANARY), "{config:?}");
            assert_eq!(bench.download(&grads).await, host_grads);
        }
    }
}

/// Small tensors with buffers of their own share dispatches, odd ones by the element.
#[gpu_test]
async fn batches_of_three_slots() {
    let config = AdamConfig::adamw(0.05)
        .eps(1e-6)
        .amsgrad(AmsGrad::OfAverage)
        .build()
        .unwrap();
    let config = AnyRule::from(config);
    for bench in Bench::both().await {
        for numel in [64, 1001, 4096] {
            let buffers: Vec<_> = (0..25_u64)
                .map(|index| {
                    let (start, gradient) = (values(index, numel), values(100 + index, numel));
                    (
                        bench.buffer_of(&start),
                        bench.buffer_of(&gradient),
                        start,
                        gradient,
                    )
                })
                .collect();
            let names: Vec<_> = (0..25).map(|index| index.to_string()).collect();
            let tensors: Vec<_> = names
                .iter()
                .zip(&buffers)
                .map(|(name, (params, grads, ..))| TensorBinding::new(name, params, grads, [numel]))
                .collect();
            let mut optimizer =
                GpuOptimizer::new(&bench.kernels, config.clone(), &tensors).unwrap();
            assert!(!optimizer.plan().batches.is_empty());
            let mut oracles: Vec<_> = buffers
                .iter()
                .map(|(.., start, _)| Oracle::new(start, Roundoff::WGSL))
                .collect();
            for step in 0..3 {
                optimizer.set_frozen("3", step == 1).unwrap();
                bench.step(&mut optimizer);
                for (tensor, (oracle, (.., gradient))) in
                    oracles.iter_mut().zip(&buffers).enumerate()
                {
                    if tensor != 3 || step != 1 {
                        oracle.step(&config, gradient);
                    }
                }
            }
            for (tensor, (oracle, (params, ..))) in oracles.iter().zip(&buffers).enumerate() {
                let params = bench.download(params).await;
                check(
                    bench,
                    &optimizer,
                    tensor,
                    oracle,
                    &params,
                    &format!("{tensor} of {numel}"),
                )
                .await;
            }
        }
    }
}

/// One dispatch for an arena, cut where three slots do not fit a binding, and a state that goes on from what was saved.
#[gpu_test]
async fn an_arena_is_one_dispatch_of_any_rule_and_its_state_carries_on() {
    let small = wgpu::Limits {
        max_storage_buffer_binding_size: 1 << 16,
        max_uniform_buffer_binding_size: 1 << 16,
        ..wgpu::Limits::default()
    };
    let mut benches = vec![
        Bench::with(OPTIONAL_FEATURES).await,
        Bench::with(wgpu::Features::empty()).await,
    ];
    // No browser has bindings as small as that.
    if cfg!(not(target_arch = "wasm32")) {
        benches.push(Bench::open(wgpu::Features::empty(), small).await);
    }
    let presets = AnyRule::presets().map(|preset| preset.config(0.05).unwrap());
    let configs: Vec<_> = presets.collect();
    let all = |(index, bench)| configs.iter().map(move |config| (index, bench, config));
    for (index, bench, config) in benches.iter().enumerate().flat_map(all) {
        let shapes = [("a", vec![7, 11]), ("b", vec![20_001]), ("c", vec![64])];
        let tensors = Tensors::new(shapes);
        let arena = Arena::new(&bench.device, &bench.queue, tensors.shapes.clone()).unwrap();
        tensors.upload(&arena);
        let fresh =
            || GpuOptimizer::new(&bench.kernels, config.clone(), &arena.bindings()).unwrap();
        let mut optimizer = fresh();
        let mut oracles = tensors
            .starts
            .each_ref()
            .map(|start| Oracle::new(start, Roundoff::WGSL));
        for step in 0..4 {
            if step == 2 {
                let state = bench.wait(optimizer.state()).await.unwrap();
                optimizer = fresh();
                optimizer.load_state(&state).unwrap();
                assert_eq!(bench.wait(optimizer.state()).await.unwrap(), state);
            }
            bench.step(&mut optimizer);
            for (oracle, grads) in oracles.iter_mut().zip(&tensors.grads) {
                oracle.step(config, grads);
            }
        }
        match index {
            // Both passes of each access, and the sums between.
            0 | 1 if !config.sums().is_empty() => assert_eq!(optimizer.dispatches(), 5),
            // The ends of what does not fill a vec4 lie within the padding.
            0 | 1 => assert_eq!(optimizer.dispatches(), 1),
            _ => assert!(optimizer.plan().pieces.len() >= 2),
        }
        let params = bench.wait(arena.download_all_params()).await.unwrap();
        for (tensor, oracle) in oracles.iter().enumerate() {
            check(
                bench,
                &optimizer,
                tensor,
                oracle,
                &params[tensor],
                &tensor.to_string(),
            )
            .await;
        }
    }
}
