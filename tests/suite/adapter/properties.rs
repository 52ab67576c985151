//! The random runs of tier one, on the adapter.

use pollster::block_on;
use proptest::prelude::*;
use wgpu_optim::oracle::Roundoff;
#[cfg(feature = "safetensors")]
use wgpu_optim::{Arena, GpuOptimizer, Optimizer};

use super::Bench;
use crate::cases::values;
use crate::no_device::properties::oracle_of;
use crate::random::{self, Run};
#[cfg(feature = "safetensors")]
use crate::rule_runs;

async fn the_gpu_follows_the_oracle(run: Run) -> Result<(), TestCaseError> {
    for bench in Bench::both().await {
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
        let oracle = oracle_of(&run, Roundoff::WGSL);
        let checked = oracle.check_params(&bench.download(&params).await);
        prop_assert!(checked.is_ok(), "{checked:?}");
        if let Some(velocity) = bench.velocity(&optimizer, 0).await {
            let checked = oracle.check_velocity(&velocity);
            prop_assert!(checked.is_ok(), "{checked:?}");
        }
    }
    Ok(())
}

#[cfg(feature = "safetensors")]
async fn mixed_groups_follow_their_oracles(run: rule_runs::Run) -> Result<(), TestCaseError> {
    for bench in Bench::both().await {
        let groups = run.groups();
        let (device, queue) = (&bench.device, &bench.queue);
        let arena = Arena::builder()
            .groups(&groups)
            .build(device, queue, run.named())
            .unwrap();
        arena.upload_all_params(&run.starts()).unwrap();
        let mut optimizer =
            GpuOptimizer::with_groups(&bench.kernels, &groups, &arena.bindings()).unwrap();
        for step in 0..run.steps.len() {
            run.prepare(step, &mut optimizer);
            arena.upload_all_grads(&run.grads(step)).unwrap();
            bench.step(&mut optimizer);
        }
        let params = bench.wait(arena.download_all_params()).await.unwrap();
        let state = bench.wait(optimizer.state()).await.unwrap();
        for (tensor, oracle) in run.oracles(Roundoff::WGSL).iter().enumerate() {
            let checked = oracle.check_params(&params[tensor]);
            prop_assert!(checked.is_ok(), "{:?}: {:?}", run.rule(tensor), checked);
            for slot in &state.tensors[tensor].slots {
                let checked = oracle.check_slot(&slot.name, &slot.values.to_f32());
                prop_assert!(checked.is_ok(), "{:?}: {:?}", run.rule(tensor), checked);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn momentum(run in random::runs(1500)) {
        block_on(the_gpu_follows_the_oracle(run))?;
    }
}

#[cfg(feature = "safetensors")]
proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn mixed_groups(run in rule_runs::runs(1200)) {
        block_on(mixed_groups_follow_their_oracles(run))?;
    }
}
