//! A tensor larger than one binding.

use wgpu_optim::SgdConfig;
use wgpu_optim::oracle::{Oracle, Rounding};

use super::Bench;
use crate::cases::values;

#[test]
fn forty_million_elements_past_one_binding() {
    let bench = Bench::best();
    let numel = 40_000_000;
    let config = SgdConfig::builder(0.1)
        .momentum(0.9)
        .nesterov(true)
        .build()
        .unwrap();
    // The prime period keeps what lies at the same place in two bindings apart.
    let period = 100_003;
    let tiled = |seed| {
        let values = values(seed, period);
        (0..numel).map(|i| values[i % period]).collect::<Vec<_>>()
    };
    let (start, gradient) = (tiled(1), tiled(2));
    let params = bench.buffer_of(&start);
    let grads = bench.buffer_of(&gradient);
    let mut optimizer = bench.optimizer(config, &params, &grads);
    let binding_elems = bench.device.limits().max_storage_buffer_binding_size / 4;
    let pieces = (numel as u64).div_ceil(binding_elems);
    assert_eq!(optimizer.plan().pieces.len() as u64, pieces);
    for lr in [0.1, 0.03] {
        optimizer.set_lr(lr).unwrap();
        bench.step(&mut optimizer);
    }

    let after = bench.download(&params);
    let velocity = bench.velocity(&optimizer, 0).unwrap();
    let chunk = 1 << 20;
    let given = start.chunks(chunk).zip(gradient.chunks(chunk));
    let results = after.chunks(chunk).zip(velocity.chunks(chunk));
    for ((start, gradient), (after, velocity)) in given.zip(results) {
        let mut oracle = Oracle::new(start, Rounding::WGSL);
        for lr in [0.1, 0.03] {
            oracle.step(&config.with_lr(lr).unwrap(), gradient);
        }
        oracle.check_params(after).unwrap();
        oracle.check_velocity(velocity).unwrap();
    }
}
