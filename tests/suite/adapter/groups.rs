use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::{Arena, GpuOptimizer, Optimizer};

use super::{Bench, gpu_test};
use crate::cases::values;
use crate::no_device::groups::{TENSORS, group_of, groups, groups_without_a_ratio, shapes};

/// Steps an arena of tensors in four groups, one of them dampened and one without momentum, with a tensor frozen at
/// first, and resumes half-way; returns the dispatches of the last step.
async fn check(bench: &Bench, arena: &Arena) -> usize {
    let mut oracles = Vec::new();
    for (name, numel) in TENSORS {
        let start = values(numel as u64, numel);
        arena.upload_params(name, &start).unwrap();
        oracles.push(Oracle::new(&start, Roundoff::WGSL));
    }
    let mut optimizer =
        GpuOptimizer::with_groups(&bench.kernels, &groups(), &arena.bindings()).unwrap();
    for (step, lr) in [0.1, 0.03, 0.2, 0.07].into_iter().enumerate() {
        optimizer.set_lr(lr).unwrap();
        optimizer
            .set_group_lr("norms", 0.5 - 0.1 * step as f64)
            .unwrap();
        optimizer.set_frozen("norm.bias", step == 0).unwrap();
        for ((name, numel), oracle) in TENSORS.into_iter().zip(&mut oracles) {
            let grads = values((numel + step) as u64, numel);
            arena.upload_grads(name, &grads).unwrap();
            if !(name == "norm.bias" && step == 0) {
                oracle.step(optimizer.group_config(group_of(name)).unwrap(), &grads);
            }
        }
        bench.step(&mut optimizer);
        if step == 1 {
            let state = bench.wait(optimizer.state()).await.unwrap();
            let lr = optimizer.config().lr();
            optimizer =
                GpuOptimizer::with_groups(&bench.kernels, &groups(), &arena.bindings()).unwrap();
            optimizer.load_state(&state).unwrap();
            optimizer.set_lr(lr).unwrap();
        }
    }
    let has_momentum = |(name, _): &(&str, usize)| group_of(name) != "embeddings";
    let with_momentum = TENSORS.into_iter().filter(has_momentum);
    let alignment = bench.device.limits().min_storage_buffer_offset_alignment as usize;
    let velocity_bytes = with_momentum.map(|(_, numel)| (4 * numel).next_multiple_of(alignment));
    assert!(optimizer.plan().state_bytes() <= velocity_bytes.sum::<usize>() as u64);
    let params = bench.wait(arena.download_all_params()).await.unwrap();
    let state = bench.wait(optimizer.state()).await.unwrap();
    for (i, oracle) in oracles.iter().enumerate() {
        oracle
            .check_params(&params[i])
            .unwrap_or_else(|e| panic!("{}: {e}", TENSORS[i].0));
        match state.tensors[i].slot("momentum_buffer") {
            Some(velocity) => drop(oracle.check_velocity(&velocity).unwrap()),
            None => assert_eq!(group_of(TENSORS[i].0), "embeddings"),
        }
    }
    optimizer.dispatches()
}

#[gpu_test]
async fn every_tensor_of_an_arena_follows_its_own_group() {
    let layout = shapes();
    for bench in Bench::both().await {
        let (device, queue) = (&bench.device, &bench.queue);
        // In the order given the groups alternate: default, embeddings, biases, norms, biases, default. A group's
        // tensors that lie apart share a batch.
        let arena = Arena::new(device, queue, layout).unwrap();
        assert_eq!(check(bench, &arena).await, 4);
        let arena = Arena::builder()
            .groups(&groups())
            .build(device, queue, layout)
            .unwrap();
        assert_eq!(check(bench, &arena).await, 4);
        assert!(
            arena
                .tensors()
                .iter()
                .map(|t| t.name.as_str())
                .eq(TENSORS.map(|(name, _)| name))
        );
    }
}

#[gpu_test]
async fn a_group_without_a_ratio_steps_at_its_own_learning_rate() {
    let layout = shapes();
    for bench in Bench::both().await {
        let arena = Arena::new(&bench.device, &bench.queue, layout).unwrap();
        let start = TENSORS.map(|(_, numel)| values(numel as u64, numel));
        let grads = TENSORS.map(|(_, numel)| values(1 + numel as u64, numel));
        arena.upload_all_params(&start).unwrap();
        arena.upload_all_grads(&grads).unwrap();
        let groups = groups_without_a_ratio(0.0);
        let mut optimizer =
            GpuOptimizer::with_groups(&bench.kernels, &groups, &arena.bindings()).unwrap();
        let mut oracles = start.each_ref().map(|s| Oracle::new(s, Roundoff::WGSL));
        for (lr, of_biases) in [(0.0, 1.6e-4), (0.1, 1.6e-4), (0.2, 0.3)] {
            optimizer.set_group_lr("biases", of_biases).unwrap();
            optimizer.set_lr(lr).unwrap();
            bench.step(&mut optimizer);
            for (((name, _), oracle), grads) in TENSORS.iter().zip(&mut oracles).zip(&grads) {
                let lr = if name.ends_with("bias") {
                    of_biases
                } else {
                    lr
                };
                oracle.step(&optimizer.config().with_lr(lr).unwrap(), grads);
            }
        }
        let params = bench.wait(arena.download_all_params()).await.unwrap();
        for (oracle, params) in oracles.iter().zip(&params) {
            oracle.check_params(params).unwrap();
        }
    }
}
