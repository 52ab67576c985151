//! Random configurations, sizes, learning rates, momenta and freezes; proptest prints the seed of a failure.

use proptest::prelude::*;
use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::rules::sgd::reference::{sgd, sgd_plain};
use wgpu_optim::rules::sgd::{Coefficients, Terms};
use wgpu_optim::{CpuOptimizer, Optimizer};

#[cfg(feature = "safetensors")]
use super::rules::{Reference, bits};
use crate::cases::values;
use crate::random::{Run, runs};
#[cfg(feature = "safetensors")]
use crate::rule_runs;

/// The oracle after the run, in steps that were not frozen.
pub fn oracle_of(run: &Run, rounding: Roundoff) -> Oracle {
    let mut oracle = Oracle::new(&values(run.seed, run.numel), rounding);
    for (step, planned) in run.steps.iter().enumerate() {
        if !planned.frozen {
            oracle.step(&run.config_at(step), &run.grads(step));
        }
    }
    oracle
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn reference_follows_the_oracle_and_the_parallel_path_is_the_reference(run in runs(300)) {
        let has = Terms::of(&run.config);
        let mut params = values(run.seed, run.numel);
        let mut velocity = vec![0.0; run.numel];
        let mut parallel = params.clone();
        let mut optimizer = CpuOptimizer::new(run.config, [("theta", [run.numel])]).unwrap();
        let mut applied = 0;
        for (step, planned) in run.steps.iter().enumerate() {
            let config = run.config_at(step);
            let grads = run.grads(step);
            optimizer.set_frozen("theta", planned.frozen).unwrap();
            optimizer.set_lr(config.lr()).unwrap();
            if has.velocity {
                optimizer.set_momentum(config.momentum()).unwrap();
            }
            optimizer.step(&mut [&mut parallel], &[&grads]).unwrap();
            if planned.frozen {
                continue;
            }
            let k = Coefficients::new(&config, applied == 0).cast();
            if has.velocity {
                sgd(&k, has, &mut params, &mut velocity, &grads);
            } else {
                sgd_plain(&k, has, &mut params, &grads);
            }
            applied += 1;
        }
        let oracle = oracle_of(&run, Roundoff::NEAREST);
        prop_assert!(oracle.check_params(&params).is_ok(), "{:?}", oracle.check_params(&params));
        prop_assert!(oracle.check_velocity(&velocity).is_ok());
        prop_assert_eq!(optimizer.applied_steps("theta"), Some(applied));
        prop_assert!(parallel.iter().zip(&params).all(|(x, y)| x.to_bits() == y.to_bits()));
    }
}

#[cfg(feature = "safetensors")]
proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Any rules, mixed in groups, with freezes, learning rates and momenta that change.
    #[test]
    fn mixed_groups_follow_their_oracles_and_are_the_reference(run in rule_runs::runs(120)) {
        let groups = run.groups();
        let mut optimizer = CpuOptimizer::with_groups(&groups, run.named()).unwrap();
        let mut params = run.starts();
        let mut references: Vec<_> = (0..run.tensors.len())
            .map(|tensor| Reference::new(run.rule(tensor), &params[tensor]))
            .collect();
        for (step, planned) in run.steps.iter().enumerate() {
            run.prepare(step, &mut optimizer);
            let grads = run.grads(step);
            let slices: Vec<_> = grads.iter().map(Vec::as_slice).collect();
            let mut params: Vec<_> = params.iter_mut().map(Vec::as_mut_slice).collect();
            optimizer.step(&mut params, &slices).unwrap();
            for (tensor, reference) in references.iter_mut().enumerate() {
                if !planned.frozen[tensor] {
                    let rule = optimizer.group_config(&run.group(tensor)).unwrap();
                    reference.step(rule, &grads[tensor]);
                }
            }
        }
        let state = optimizer.state();
        let oracles = run.oracles(Roundoff::NEAREST);
        for (tensor, (oracle, reference)) in oracles.iter().zip(&references).enumerate() {
            prop_assert_eq!(bits(&params[tensor]), bits(&reference.params));
            prop_assert_eq!(state.tensors[tensor].applied_steps, reference.applied_steps);
            let checked = oracle.check_params(&params[tensor]);
            prop_assert!(checked.is_ok(), "{:?}", checked);
            for (slot, expected) in state.tensors[tensor].slots.iter().zip(&reference.slots) {
                prop_assert_eq!(bits(&slot.values.to_f32()), bits(expected));
                let checked = oracle.check_slot(&slot.name, &slot.values.to_f32());
                prop_assert!(checked.is_ok(), "{:?}", checked);
            }
        }
        // The state carries on in a fresh optimizer.
        let mut resumed = CpuOptimizer::with_groups(&groups, run.named()).unwrap();
        resumed.load_state(&state).unwrap();
        prop_assert_eq!(resumed.state().tensors, state.tensors);
    }
}
