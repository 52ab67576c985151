use wgpu_optim::oracle::Roundoff;
use wgpu_optim::rules::sgd::reference::{sgd, sgd_plain};
use wgpu_optim::rules::sgd::{Coefficients, Terms};
use wgpu_optim::{CpuOptimizer, Optimizer};

use crate::golden::{all, pytorch};
use crate::test;

#[test]
fn the_oracle_is_pytorch_in_double_precision() {
    assert_eq!(pytorch().len(), 14);
    for golden in pytorch() {
        for (oracle, after) in golden.oracles(Roundoff::NEAREST).iter().zip(&golden.after) {
            let (params, velocity) = after.f64.as_ref().unwrap();
            // Six steps of about ten roundings each, of terms of magnitude 10 at most.
            let epsilon = 6.0 * 10.0 * 10.0 * f64::EPSILON;
            for (ours, theirs) in oracle.params().zip(params) {
                approx::assert_abs_diff_eq!(ours, *theirs, epsilon = epsilon);
            }
            for (ours, theirs) in oracle.velocity().zip(velocity.iter().flatten()) {
                approx::assert_abs_diff_eq!(ours, *theirs, epsilon = epsilon);
            }
        }
    }
}

#[test]
fn every_library_stays_within_the_bound_in_single_precision() {
    assert_eq!(all().len(), 24);
    for golden in all() {
        for (oracle, after) in golden.oracles(Roundoff::NEAREST).iter().zip(&golden.after) {
            oracle
                .check_params(&after.params_f32)
                .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
            if let Some(velocity) = &after.velocity_f32 {
                oracle
                    .check_velocity(velocity)
                    .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
            }
        }
    }
}

#[test]
fn the_reference_follows_every_library() {
    for golden in all() {
        let numel = golden.start.len();
        let (mut params, mut velocity) = (golden.start.clone(), vec![0.0; numel]);
        let has = Terms::of(&golden.config);
        let mut applied = 0;
        for (step, oracle) in golden.oracles(Roundoff::NEAREST).iter().enumerate() {
            if !golden.frozen_steps.contains(&step) {
                let config = golden.config.with_lr(golden.lrs[step]).unwrap();
                let k = Coefficients::new(&config, applied == 0).cast();
                if has.velocity {
                    sgd(&k, has, &mut params, &mut velocity, &golden.grads[step]);
                } else {
                    sgd_plain(&k, has, &mut params, &golden.grads[step]);
                }
                applied += 1;
            }
            oracle
                .check_params(&params)
                .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
            oracle
                .check_velocity(&velocity)
                .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
        }
    }
}

#[test]
fn the_cpu_optimizer_follows_every_library() {
    for golden in all() {
        let mut params = golden.start.clone();
        let mut optimizer = CpuOptimizer::new(golden.config, [("theta", [params.len()])]).unwrap();
        for (step, oracle) in golden.oracles(Roundoff::NEAREST).iter().enumerate() {
            optimizer
                .set_frozen("theta", golden.frozen_steps.contains(&step))
                .unwrap();
            optimizer.set_lr(golden.lrs[step]).unwrap();
            optimizer
                .step(&mut [&mut params], &[&golden.grads[step]])
                .unwrap();
            oracle
                .check_params(&params)
                .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
            if let Some(velocity) = optimizer.state().tensors[0].slot("momentum_buffer") {
                oracle
                    .check_velocity(&velocity)
                    .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
            }
        }
    }
}
