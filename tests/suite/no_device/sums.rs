//! Rules that take sums over tensors, on the CPU.

use wgpu_optim::oracle::Roundoff;
use wgpu_optim::{CpuOptimizer, Optimizer, Rule};

use crate::golden_tensors::all;
use crate::test;

#[test]
fn the_oracle_visits_the_points_that_the_libraries_printed() {
    for golden in all() {
        let tolerance = golden.tolerance();
        for (step, oracles) in golden.oracles(Roundoff::NEAREST).iter().enumerate() {
            for (oracle, tensor) in oracles.iter().zip(&golden.tensors) {
                let here = format!("{}, {}, step {step}", golden.name, tensor.name);
                let close = |ours: f64, theirs: f64| {
                    let off = (ours - theirs).abs();
                    assert!(
                        off <= tolerance * theirs.abs().max(1.0),
                        "{here}: {ours} {theirs}"
                    );
                };
                for (ours, theirs) in oracle.params().zip(&tensor.theta_f64[step]) {
                    close(ours, *theirs);
                }
                for (slot, values) in tensor.state_f64.get(step).into_iter().flatten() {
                    for (ours, theirs) in oracle.slot(slot).zip(values) {
                        close(ours, *theirs);
                    }
                }
            }
        }
    }
}

#[test]
fn the_cpu_optimizer_visits_them_within_the_bound() {
    for golden in all() {
        let tensors = golden.tensors.iter();
        let tensors = tensors.map(|tensor| (tensor.name.as_str(), tensor.shape.clone()));
        let mut optimizer = CpuOptimizer::new(golden.config(), tensors).unwrap();
        let start = golden.tensors.iter().map(|tensor| tensor.theta0.clone());
        let mut params: Vec<_> = start.collect();
        for (step, oracles) in golden.oracles(Roundoff::NEAREST).iter().enumerate() {
            optimizer.set_lr(golden.lr[step]).unwrap();
            let grads = golden.grads(step);
            let grads: Vec<_> = grads.iter().map(Vec::as_slice).collect();
            let mut slices: Vec<_> = params.iter_mut().map(Vec::as_mut_slice).collect();
            optimizer.step(&mut slices, &grads).unwrap();
            let state = optimizer.state();
            for (index, oracle) in oracles.iter().enumerate() {
                let here = format!("{}, tensor {index}, step {step}", golden.name);
                oracle
                    .check_params(&params[index])
                    .unwrap_or_else(|e| panic!("{here}: {e}"));
                for slot in golden.config().slots().kept() {
                    let values = state.tensors[index].slot(slot.name).unwrap();
                    oracle
                        .check_slot(slot.name, &values)
                        .unwrap_or_else(|e| panic!("{here}: {e}"));
                }
            }
        }
    }
}
