//! Parameters and gradients in one buffer.

use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::plan::PlanError;
use wgpu_optim::{
    AdamConfig, AnyRule, Arena, BuildError, GpuOptimizer, Rule as _, SgdConfig, SignumConfig,
    TensorBinding,
};

use super::{Bench, Tensors, gpu_test};
use crate::cases::values;

const CANARY: f32 = 12_345.678;

/// Two slots, one and none.
fn rules() -> [AnyRule; 3] {
    [
        AdamConfig::adamw(0.05).build().unwrap().into(),
        SgdConfig::builder(0.1)
            .momentum(0.9)
            .build()
            .unwrap()
            .into(),
        SignumConfig::sign_sgd(0.1).build().unwrap().into(),
    ]
}

/// Where a tensor's parameters and gradients start in the pool, in elements, and how many they are.
#[derive(Clone, Copy, Debug)]
struct Slice {
    params: usize,
    grads: usize,
    numel: usize,
}

/// Steps tensors in one buffer, and holds everything in it against the oracle and the canaries between.
async fn check(
    bench: &Bench,
    rule: &AnyRule,
    slices: &[Slice],
    len: usize,
) -> GpuOptimizer<AnyRule> {
    let mut host = vec![CANARY; len];
    for (index, slice) in slices.iter().enumerate() {
        let seed = index as u64;
        host[slice.params..slice.params + slice.numel].copy_from_slice(&values(seed, slice.numel));
        let gradient = values(1000 + seed, slice.numel);
        host[slice.grads..slice.grads + slice.numel].copy_from_slice(&gradient);
    }
    let pool = bench.buffer_of(&host);
    let names: Vec<_> = (0..slices.len()).map(|index| index.to_string()).collect();
    let bytes = |elems: usize| 4 * elems as u64;
    let bindings: Vec<_> = names
        .iter()
        .zip(slices)
        .map(|(name, slice)| {
            TensorBinding::new(name, &pool, &pool, [slice.numel])
                .params_at(bytes(slice.params))
                .grads_at(bytes(slice.grads))
        })
        .collect();
    let mut optimizer = GpuOptimizer::new(&bench.kernels, rule.clone(), &bindings).unwrap();
    for _ in 0..3 {
        bench.step(&mut optimizer);
    }
    let mut stepped = bench.download(&pool).await;
    let state = bench.wait(optimizer.state()).await.unwrap();
    for (slice, state) in slices.iter().zip(&state.tensors) {
        let params = slice.params..slice.params + slice.numel;
        let grads = &host[slice.grads..slice.grads + slice.numel];
        let mut oracle = Oracle::new(&host[params.clone()], Roundoff::WGSL);
        for _ in 0..3 {
            oracle.step(rule, grads);
        }
        let here = |e| panic!("{rule:?}, {slice:?}: {e}");
        oracle
            .check_params(&stepped[params.clone()])
            .unwrap_or_else(here);
        for slot in &state.slots {
            oracle
                .check_slot(&slot.name, &slot.values.to_f32())
                .unwrap_or_else(here);
        }
        stepped[params.clone()].copy_from_slice(&host[params]);
    }
    assert!(
        stepped == host,
        "{rule:?}: gradients and what lies between are as they were"
    );
    optimizer
}

#[gpu_test]
async fn an_arena_of_one_buffer_is_one_dispatch() {
    for bench in Bench::both().await {
        for rule in rules() {
            let shapes = [("a", vec![7, 11]), ("b", vec![20_001]), ("c", vec![64])];
            let tensors = Tensors::new(shapes);
            let arena = Arena::builder()
                .pooled()
                .build(&bench.device, &bench.queue, tensors.shapes.clone())
                .unwrap();
            assert_eq!(arena.params(), arena.grads());
            tensors.upload(&arena);
            arena.upload_grads("c", &tensors.grads[2]).unwrap();
            let before = bench.download(&arena.grads()[0]).await;
            let mut optimizer =
                GpuOptimizer::new(&bench.kernels, rule.clone(), &arena.bindings()).unwrap();
            let mut encoder = bench.encoder();
            optimizer.step(&mut encoder).unwrap();
            optimizer.step(&mut encoder).unwrap();
            bench.queue.submit([encoder.finish()]);
            assert_eq!(optimizer.dispatches(), 1);
            let params = bench.wait(arena.download_all_params()).await.unwrap();
            for (tensor, start) in tensors.starts.iter().enumerate() {
                let mut oracle = Oracle::new(start, Roundoff::WGSL);
                oracle.step(&rule, &tensors.grads[tensor]);
                oracle.step(&rule, &tensors.grads[tensor]);
                oracle.check_params(&params[tensor]).unwrap();
            }
            let after = bench.download(&arena.grads()[0]).await;
            let start = arena.grads_start_bytes(0) as usize / 4;
            assert!(after[start..] == before[start..]);
        }
    }
}

/// Each gradient behind its parameters or before them, at odd sizes and offsets, alone and in batches.
#[gpu_test]
async fn scattered_tensors_of_a_pool() {
    for bench in Bench::both().await {
        let alignment = bench.device.limits().min_storage_buffer_offset_alignment as usize / 4;
        for rule in rules() {
            for (numel, first) in [
                (1_usize, 0_usize),
                (5, 3),
                (64, 0),
                (1001, 0),
                (4096, 1),
                (70_001, 2),
            ] {
                let room = (numel + first).next_multiple_of(alignment);
                let slices: Vec<_> = (0..9)
                    .map(|index| {
                        let (one, other) = (2 * index * room + first, (2 * index + 1) * room);
                        let (params, grads) = match index % 2 {
                            0 => (one, other),
                            _ => (other, one),
                        };
                        Slice {
                            params,
                            grads,
                            numel,
                        }
                    })
                    .collect();
                let optimizer = check(bench, &rule, &slices, 18 * room + 7).await;
                let batched = first == 0 && numel <= 4096;
                assert_eq!(!optimizer.plan().batches.is_empty(), batched, "{numel}");
            }
        }
    }
}

/// Tensors of a pool beside ones whose gradients lie elsewhere, in the pool of the others' parameters among them.
#[gpu_test]
async fn pools_beside_other_buffers() {
    let rule = AnyRule::from(AdamConfig::adamw(0.05).build().unwrap());
    for bench in Bench::both().await {
        let host = [values(1, 4096), values(2, 4096)];
        let [x, y] = host.each_ref().map(|values| bench.buffer_of(values));
        let tensors = [
            TensorBinding::new("in x", &x, &x, [500]).grads_at(2048),
            TensorBinding::new("x by y", &x, &y, [100])
                .params_at(4096)
                .grads_at(8192),
            TensorBinding::new("y by x", &y, &x, [100])
                .params_at(4096)
                .grads_at(8192),
            TensorBinding::new("in y", &y, &y, [77]).params_at(12_288),
        ];
        let at = [
            (0, 0, 0, 512, 500),
            (0, 1024, 1, 2048, 100),
            (1, 1024, 0, 2048, 100),
            (1, 3072, 1, 0, 77),
        ];
        let mut optimizer = GpuOptimizer::new(&bench.kernels, rule.clone(), &tensors).unwrap();
        bench.step(&mut optimizer);
        let mut stepped = [bench.download(&x).await, bench.download(&y).await];
        for (buffer, params, other, grads, numel) in at {
            let mut oracle = Oracle::new(&host[buffer][params..params + numel], Roundoff::WGSL);
            oracle.step(&rule, &host[other][grads..grads + numel]);
            oracle
                .check_params(&stepped[buffer][params..params + numel])
                .unwrap();
            stepped[buffer][params..params + numel]
                .copy_from_slice(&host[buffer][params..params + numel]);
        }
        assert!(stepped == host);
    }
}

#[gpu_test]
async fn what_is_too_close_is_said_and_the_next_one_steps() {
    let bench = Bench::best().await;
    let alignment = bench.device.limits().min_storage_buffer_offset_alignment;
    let pool = bench.buffer(4096);
    let rule = rules()[1].with_lr(0.2).unwrap();
    let at = |grads: u64| {
        let theta = TensorBinding::new("theta", &pool, &pool, [3]).grads_at(grads);
        GpuOptimizer::new(&bench.kernels, rule.clone(), &[theta])
    };
    assert!(matches!(
        at(12),
        Err(BuildError::Plan(PlanError::TooClose { tensor, least_offset_bytes, .. }))
            if tensor == "theta" && least_offset_bytes == u64::from(alignment).max(16)
    ));
    assert!(matches!(at(8), Err(BuildError::Overlap { .. })));
    let mut encoder = bench.encoder();
    at(u64::from(alignment).max(16))
        .unwrap()
        .step(&mut encoder)
        .unwrap();
    bench.queue.submit([encoder.finish()]);
}
