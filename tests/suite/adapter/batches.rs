//! Small tensors in different places share dispatches, and stay tensors of their own.

use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::{GpuOptimizer, OPTIONAL_FEATURES, Optimizer, TensorBinding, wgpu};

use super::{Bench, gpu_test};
use crate::cases::{LRS, sizes, values};
use crate::no_device::groups::{group_of, groups};

const CANARY: f32 = -12_345.678;

/// A tensor in one of several buffers, in elements.
struct Slot {
    name: String,
    numel: usize,
    buffer: usize,
    start: usize,
}

impl Slot {
    fn elems(&self) -> std::ops::Range<usize> {
        self.start..self.start + self.numel
    }
}

/// Tensors of awkward sizes in four groups, by turns in a buffer of its own, where a binding may start in a buffer
/// that several share (the first), and one element further on there. Canaries end each.
fn slots(alignment_bytes: usize) -> (Vec<Slot>, Vec<usize>) {
    let (mut slots, mut buffers) = (Vec::new(), vec![0]);
    let names = ["weight", "bias", "norm", "embed", "weight"];
    for (index, numel) in sizes().chain(sizes()).chain([8192, 8193]).enumerate() {
        let name = format!("{index}.{}", names[index % names.len()]);
        let (buffer, start) = if index % 3 == 0 {
            buffers.push(numel + 2);
            (buffers.len() - 1, 0)
        } else {
            let start = buffers[0] + usize::from(index % 9 == 1);
            buffers[0] = (start + numel + 2).next_multiple_of(alignment_bytes / 4);
            (0, start)
        };
        slots.push(Slot {
            name,
            numel,
            buffer,
            start,
        });
    }
    (slots, buffers)
}

/// Steps all tensors with a random few frozen, compares every element, and returns the dispatches of the last step, in
/// which none is frozen.
async fn check(bench: &Bench, seed: u64) -> usize {
    let alignment = bench.device.limits().min_storage_buffer_offset_alignment;
    let (slots, sizes) = slots(alignment as usize);
    let mut host_params: Vec<_> = sizes.iter().map(|numel| vec![CANARY; *numel]).collect();
    let mut host_grads = host_params.clone();
    for (index, slot) in slots.iter().enumerate() {
        let start = values(seed + index as u64, slot.numel);
        host_params[slot.buffer][slot.elems()].copy_from_slice(&start);
    }
    let buffers =
        |host: &[Vec<f32>]| -> Vec<_> { host.iter().map(|h| bench.buffer_of(h)).collect() };
    let (params, grads) = (buffers(&host_params), buffers(&host_grads));
    let tensors: Vec<_> = slots
        .iter()
        .map(|slot| {
            let (params, grads) = (&params[slot.buffer], &grads[slot.buffer]);
            let offset_bytes = 4 * slot.start as u64;
            TensorBinding::new(&slot.name, params, grads, [slot.numel])
                .params_at(offset_bytes)
                .grads_at(offset_bytes)
        })
        .collect();
    let mut optimizer = GpuOptimizer::with_groups(&bench.kernels, &groups(), &tensors).unwrap();
    let mut oracles: Vec<_> = slots
        .iter()
        .map(|slot| Oracle::new(&host_params[slot.buffer][slot.elems()], Roundoff::WGSL))
        .collect();

    let mut rng = fastrand::Rng::with_seed(seed);
    for (step, lr) in LRS.into_iter().enumerate() {
        optimizer.set_lr(lr).unwrap();
        for (index, (slot, oracle)) in slots.iter().zip(&mut oracles).enumerate() {
            let grads = values(seed + (1000 * step + index) as u64, slot.numel);
            host_grads[slot.buffer][slot.elems()].copy_from_slice(&grads);
            // At the last two steps all go on, so that some have their first step beside later ones of others.
            let frozen = step < 2 && rng.u8(..3) == 0;
            optimizer.set_frozen(&slot.name, frozen).unwrap();
            if !frozen {
                let config = optimizer.group_config(group_of(&slot.name)).unwrap();
                oracle.step(config, &grads);
            }
        }
        for (buffer, host) in grads.iter().zip(&host_grads) {
            bench.upload(buffer, host);
        }
        bench.step(&mut optimizer);
    }

    let mut after = Vec::new();
    for buffer in &params {
        after.push(bench.download(buffer).await);
    }
    let state = bench.wait(optimizer.state()).await.unwrap();
    for ((slot, oracle), state) in slots.iter().zip(&oracles).zip(&state.tensors) {
        let here = format!("{} of {} elements", slot.name, slot.numel);
        let slice = &mut after[slot.buffer][slot.elems()];
        oracle
            .check_params(slice)
            .unwrap_or_else(|e| panic!("{here}: {e}"));
        slice.fill(CANARY);
        match state.slot("momentum_buffer") {
            Some(velocity) => drop(
                oracle
                    .check_velocity(velocity)
                    .unwrap_or_else(|e| panic!("{here}: {e}")),
            ),
            None => assert_eq!(group_of(&slot.name), "embeddings"),
        }
    }
    for (buffer, host) in grads.iter().zip(&host_grads) {
        let same = |(x, y): (&f32, &f32)| x.to_bits() == y.to_bits();
        assert!(bench.download(buffer).await.iter().zip(host).all(same));
    }
    let is_canary = |x: &f32| x.to_bits() == CANARY.to_bits();
    assert!(after.iter().flatten().all(is_canary), "a canary died");
    optimizer.dispatches()
}

#[gpu_test]
async fn scattered_tensors_keep_their_own_group_state_and_ends() {
    let mut counts = Vec::new();
    for bench in Bench::both().await {
        counts.push(check(bench, 1).await);
    }
    assert!(counts.iter().all(|count| *count == counts[0]), "{counts:?}");

    // WebGPU's own limits: eight buffers, so two tensors with momentum in a dispatch and four without.
    for optional in [wgpu::Features::empty(), OPTIONAL_FEATURES] {
        let adapter = &super::gpu().await.adapter;
        let optional = optional & adapter.features();
        let mut limits = wgpu::Limits::default();
        if optional.contains(wgpu::Features::IMMEDIATES) {
            limits.max_immediate_size = adapter.limits().max_immediate_size;
        }
        let bench = Bench::open(optional, limits.or_worse_values_from(&adapter.limits())).await;
        assert!(check(&bench, 2).await >= counts[0]);
    }
}

/// As many tensors as the models that this is for have, in buffers of their own.
#[gpu_test]
async fn a_thousand_scattered_tensors_take_a_dispatch_for_every_few() {
    for bench in Bench::both().await {
        let buffers: Vec<_> = (0..1000)
            .map(|index| {
                let name = index.to_string();
                let params = bench.buffer_of(&values(index, 1000));
                (name, params, bench.buffer_of(&values(7, 1000)))
            })
            .collect();
        let tensors: Vec<_> = buffers
            .iter()
            .map(|(name, params, grads)| TensorBinding::new(name, params, grads, [1000]))
            .collect();
        let config = wgpu_optim::SgdConfig::builder(0.1).momentum(0.9).build();
        let config = config.unwrap();
        let mut optimizer = GpuOptimizer::new(&bench.kernels, config, &tensors).unwrap();
        for _ in 0..2 {
            bench.step(&mut optimizer);
        }
        let bound = bench.device.limits().max_storage_buffers_per_shader_stage as usize;
        assert_eq!(
            optimizer.dispatches(),
            1000usize.div_ceil((bound / 3).min(10))
        );
        for (index, (name, params, _)) in buffers.iter().enumerate() {
            let mut oracle = Oracle::new(&values(index as u64, 1000), Roundoff::WGSL);
            for _ in 0..2 {
                oracle.step(&config, &values(7, 1000));
            }
            oracle
                .check_params(&bench.download(params).await)
                .unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }
}
