use wgpu_optim::Optimizer;
use wgpu_optim::oracle::Roundoff;

use super::{Bench, gpu_test};
use crate::golden::all;

#[gpu_test]
async fn the_gpu_follows_every_library() {
    for bench in Bench::both().await {
        for golden in all() {
            let params = bench.buffer_of(&golden.start);
            let grads = bench.buffer(golden.start.len());
            let mut optimizer = bench.optimizer(golden.config, &params, &grads);
            for (step, oracle) in golden.oracles(Roundoff::WGSL).iter().enumerate() {
                bench.upload(&grads, &golden.grads[step]);
                optimizer
                    .set_frozen("theta", golden.frozen_steps.contains(&step))
                    .unwrap();
                optimizer.set_lr(golden.lrs[step]).unwrap();
                bench.step(&mut optimizer);
                oracle
                    .check_params(&bench.download(&params).await)
                    .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
                if let Some(velocity) = bench.velocity(&optimizer, 0).await {
                    oracle
                        .check_velocity(&velocity)
                        .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
                }
            }
        }
    }
}
