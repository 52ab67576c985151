//! Planning two million tensors, which needs no device.
//!
//! `cargo bench --bench planning`. `contiguous` follow each other in two buffers, as in an arena; `scattered` lie in
//! buffers of their own, given in random order.

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use wgpu_optim::plan::{DeviceLimits, Place, Plan, TensorLayout};
use wgpu_optim::storage::{Codec, Storage};
use wgpu_optim::wgpu;

const TENSORS: usize = 2_000_000;

/// From the start of one tensor to that of the next: 1 to 32 elements, and padding up to the usual alignment.
const EXTENT: u64 = 64;

fn tensor(index: usize, buffers: [usize; 2], offset_bytes: u64) -> TensorLayout {
    let numel = 1 + index as u64 % 32;
    let place = |buffer| Place {
        buffer,
        offset_bytes,
    };
    TensorLayout {
        numel,
        params: place(buffers[0]),
        grads: place(buffers[1]),
        padding_elems: EXTENT - numel,
        storage: Storage {
            state: [Codec::F32].into_iter().collect(),
            ..Storage::default()
        },
        ..TensorLayout::default()
    }
}

fn planning(criterion: &mut Criterion) {
    let contiguous = |index| tensor(index, [0, 1], 4 * EXTENT * index as u64);
    let contiguous: Vec<_> = (0..TENSORS).map(contiguous).collect();
    let scattered = |index| tensor(index, [2 * index, 2 * index + 1], 0);
    let mut scattered: Vec<_> = (0..TENSORS).map(scattered).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut scattered);

    let limits = DeviceLimits::from(&wgpu::Limits::default());
    let mut group = criterion.benchmark_group("planning");
    group.throughput(Throughput::Elements(TENSORS as u64));
    group.sample_size(10);
    for (name, tensors) in [("contiguous", contiguous), ("scattered", scattered)] {
        group.bench_function(BenchmarkId::new("pieces", name), |bencher| {
            bencher.iter_with_large_drop(|| Plan::new(&tensors, &limits));
        });
        let plan = Plan::new(&tensors, &limits).unwrap();
        group.bench_function(BenchmarkId::new("dispatches", name), |bencher| {
            bencher.iter_with_large_drop(|| plan.dispatches(|_| Some(())));
        });
    }
    group.finish();
}

criterion_group!(benches, planning);
criterion_main!(benches);
