use wgpu_optim::oracle::Rounding;

use super::Bench;
use crate::golden::all;

#[test]
fn the_gpu_follows_every_library() {
    for bench in Bench::both() {
        for golden in all() {
            let params = bench.buffer_of(&golden.start);
            let grads = bench.buffer(golden.start.len());
            let mut optimizer = bench.optimizer(golden.config, &params, &grads);
            for (step, oracle) in golden.oracles(Rounding::WGSL).iter().enumerate() {
                bench.upload(&grads, &golden.grads[step]);
                optimizer
                    .set_frozen("theta", golden.frozen_steps.contains(&step))
                    .unwrap();
                optimizer.set_lr(golden.lrs[step]).unwrap();
                bench.step(&mut optimizer);
                oracle
                    .check_params(&bench.download(&params))
                    .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
                if let Some(velocity) = bench.velocity(&optimizer, 0) {
                    oracle
                        .check_velocity(&velocity)
                        .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
                }
            }
        }
    }
}
