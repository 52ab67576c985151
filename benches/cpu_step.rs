//! Throughput of the CPU paths: the one-thread reference and the parallel optimizer.
//!
//! `cargo bench --bench cpu_step`. Bytes are those that a momentum step moves: 20 per element.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use wgpu_optim::{Coefficients, CpuOptimizer, SgdConfig, Terms, reference};

fn cpu_step(criterion: &mut Criterion) {
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let has = Terms::of(&config);
    let k = Coefficients::new(&config, false).cast();
    let mut group = criterion.benchmark_group("cpu_step");
    for numel in [1 << 10, 1 << 20, 1 << 24] {
        group.throughput(Throughput::Bytes(numel as u64 * has.bytes_per_elem()));
        let grads = vec![0.01; numel];
        let mut params = vec![1.0; numel];
        let mut velocity = vec![0.0; numel];
        group.bench_function(BenchmarkId::new("reference", numel), |bencher| {
            bencher.iter(|| reference::sgd(&k, has, &mut params, &mut velocity, black_box(&grads)));
        });
        let mut optimizer = CpuOptimizer::new(config, [("bench", numel)]).unwrap();
        group.bench_function(BenchmarkId::new("parallel", numel), |bencher| {
            bencher.iter(|| {
                optimizer
                    .step(&mut [&mut params], &[black_box(&grads)])
                    .unwrap()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, cpu_step);
criterion_main!(benches);
