//! The random runs of `no_device::properties`, on the adapter.

use proptest::prelude::*;
use wgpu_optim::oracle::Rounding;

use super::Bench;
use crate::cases::values;
use crate::no_device::properties::oracle_of;
use crate::random::runs;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn the_gpu_follows_the_oracle(run in runs(1500)) {
        for bench in Bench::both() {
            let params = bench.buffer_of(&values(run.seed, run.numel));
            let grads = bench.buffer(run.numel);
            let mut optimizer = bench.optimizer(run.config, &params, &grads);
            for (step, planned) in run.steps.iter().enumerate() {
                let config = run.config_at(step);
                optimizer.set_frozen("theta", planned.frozen).unwrap();
                optimizer.set_lr(config.lr()).unwrap();
                if config.has_velocity() {
                    optimizer.set_momentum(config.momentum()).unwrap();
                }
                bench.upload(&grads, &run.grads(step));
                bench.step(&mut optimizer);
            }
            let oracle = oracle_of(&run, Rounding::WGSL);
            let checked = oracle.check_params(&bench.download(&params));
            prop_assert!(checked.is_ok(), "{checked:?}");
            if let Some(velocity) = bench.velocity(&optimizer, 0) {
                let checked = oracle.check_velocity(&velocity);
                prop_assert!(checked.is_ok(), "{checked:?}");
            }
        }
    }
}
