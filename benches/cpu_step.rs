//! The parallel CPU optimizer beside hand-written loops over the same tensors, in turn.
//!
//! `cargo bench --bench cpu_step`. Prints the median of the ratios of rounds, because the speed of a shared machine
//! drifts; `cargo run --release -- bench` sets the optimizer beside a stream past the caches in the same way.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::time::Instant;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use wgpu_optim::{CpuOptimizer, SgdConfig};

/// Where arrays happen to lie in physical memory matters, so they are made anew a few times.
const ALLOCATIONS: usize = 7;
const ROUNDS: usize = 40;
const LR: f32 = 0.1;
const MOMENTUM: f32 = 0.9;

struct Tensor {
    params: Vec<f32>,
    velocity: Vec<f32>,
    grads: Vec<f32>,
}

impl Tensor {
    fn new(numel: usize) -> Self {
        Self {
            params: vec![1.0; numel],
            velocity: vec![0.0; numel],
            grads: vec![0.01; numel],
        }
    }
}

/// The heavy-ball step in the vectors of the machine, four at a time, by hand.
struct Unrolled<'a> {
    params: &'a mut [f32],
    velocity: &'a mut [f32],
    grads: &'a [f32],
}

impl WithSimd for Unrolled<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (lr, momentum) = (simd.splat_f32s(LR), simd.splat_f32s(MOMENTUM));
        let (params, params_end) = S::as_mut_simd_f32s(self.params);
        let (velocity, velocity_end) = S::as_mut_simd_f32s(self.velocity);
        let (grads, grads_end) = S::as_simd_f32s(self.grads);
        let next_velocity = |v, g| simd.add_f32s(simd.mul_f32s(momentum, v), g);
        let next_params = |theta, v| simd.sub_f32s(theta, simd.mul_f32s(lr, v));

        let (params, params_rest) = params.as_chunks_mut::<4>();
        let (velocity, velocity_rest) = velocity.as_chunks_mut::<4>();
        let (grads, grads_rest) = grads.as_chunks::<4>();
        for ((params, velocity), grads) in params.iter_mut().zip(velocity).zip(grads) {
            let [t0, t1, t2, t3] = *params;
            let [v0, v1, v2, v3] = *velocity;
            let [g0, g1, g2, g3] = *grads;
            let v0 = next_velocity(v0, g0);
            let v1 = next_velocity(v1, g1);
            let v2 = next_velocity(v2, g2);
            let v3 = next_velocity(v3, g3);
            *velocity = [v0, v1, v2, v3];
            *params = [
                next_params(t0, v0),
                next_params(t1, v1),
                next_params(t2, v2),
                next_params(t3, v3),
            ];
        }
        let rest = params_rest.iter_mut().zip(velocity_rest).zip(grads_rest);
        for ((theta, v), g) in rest {
            *v = next_velocity(*v, *g);
            *theta = next_params(*theta, *v);
        }
        plain_loop(params_end, velocity_end, grads_end);
    }
}

/// As anybody would write it.
fn plain_loop(params: &mut [f32], velocity: &mut [f32], grads: &[f32]) {
    for ((theta, v), g) in params.iter_mut().zip(velocity).zip(grads) {
        *v = MOMENTUM * *v + g;
        *theta -= LR * *v;
    }
}

/// One stretch of a tensor per thread, each in the unrolled loop.
fn step_unrolled(tensor: &mut Tensor) {
    let share = tensor.grads.len().div_ceil(rayon::current_num_threads());
    let params = tensor.params.par_chunks_mut(share);
    let velocity = tensor.velocity.par_chunks_mut(share);
    let slices = params.zip(velocity).zip(tensor.grads.par_chunks(share));
    slices.for_each(|((params, velocity), grads)| {
        Arch::new().dispatch(Unrolled {
            params,
            velocity,
            grads,
        });
    });
}

/// One stretch of the list per thread, each tensor in the plain loop.
fn step_plain(tensors: &mut [Tensor]) {
    let share = tensors.len().div_ceil(rayon::current_num_threads());
    tensors.par_chunks_mut(share).for_each(|tensors| {
        for tensor in tensors {
            plain_loop(&mut tensor.params, &mut tensor.velocity, &tensor.grads);
        }
    });
}

/// Times both in turn over the same parameters and gradients, the second of two runs of each, and prints medians.
fn compare(name: &str, sizes: &[usize], against: &str, mut baseline: impl FnMut(&mut [Tensor])) {
    let config = SgdConfig::builder(LR.into()).momentum(MOMENTUM.into());
    let config = config.build().unwrap();
    let (mut our_times, mut their_times, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    // Kept, or the next ones would lie in the same places.
    let mut kept = Vec::new();
    for _ in 0..ALLOCATIONS {
        let names = sizes.iter().enumerate().map(|(i, n)| (i.to_string(), [*n]));
        let mut optimizer = CpuOptimizer::new(config, names).unwrap();
        let mut tensors: Vec<_> = sizes.iter().map(|numel| Tensor::new(*numel)).collect();
        for _ in 0..ROUNDS {
            let slices = tensors.iter_mut();
            let slices = slices.map(|t| (t.params.as_mut_slice(), t.grads.as_slice()));
            let (mut params, grads): (Vec<_>, Vec<_>) = slices.unzip();
            let mut step = || millis(|| optimizer.step(&mut params, &grads).unwrap());
            step();
            let ours = step();
            let mut step = || millis(|| baseline(&mut tensors));
            step();
            let theirs = step();
            our_times.push(ours);
            their_times.push(theirs);
            ratios.push(ours / theirs);
        }
        kept.push((optimizer, tensors));
    }
    let [ours, theirs, ratio] = [our_times, their_times, ratios].map(median);
    println!("{name}: {ours:.4} ms, {against} {theirs:.4} ms: {ratio:.2} times its time");
}

fn millis(run: impl FnOnce()) -> f64 {
    let started = Instant::now();
    run();
    started.elapsed().as_secs_f64() * 1e3
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let unrolled = |tensors: &mut [Tensor]| tensors.iter_mut().for_each(step_unrolled);
    // On the pool's own threads, so that no baseline waits for one to wake.
    rayon::scope(|_| {
        compare("64K", &[1 << 16], "unrolled loop", unrolled);
        compare("1M", &[1 << 20], "unrolled loop", unrolled);
        compare("16M", &[1 << 24], "unrolled loop", unrolled);
        compare("1000 x 1000", &[1000; 1000], "plain loop", step_plain);
    });
}
