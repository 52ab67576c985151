//! What is computed, against the oracle.

use burn::grad_clipping::GradientClipping;
use burn::optim::GradientsParams;
use wgpu_optim_burn::wgpu_optim::{ParamGroups, Rule as _};
use wgpu_optim_burn::{Copied, Init as _, ModuleOptimizer};

use crate::{Odd, gpu, host, momentum, runs, subtraction, values};

#[test]
fn every_element_is_within_the_bound_and_nothing_is_copied() {
    for (rule, mut optimizer, mut module, mut oracles) in runs() {
        for step in 0..4 {
            let lr = [0.1, 0.03, 0.0, 0.2][step];
            let (grads, on_host) = module.grads(1000 * step as u64);
            module = optimizer.step(lr, module, grads).unwrap();
            // Reading shares nothing that the next step could meet.
            oracles.step(&rule.with_lr(lr).unwrap(), &on_host);
            oracles.check(&module);
            assert_eq!(optimizer.copied(), Copied::default(), "step {step}");
        }
        let record = optimizer.to_record().unwrap().unwrap();
        assert_eq!((record.steps, record.tensors.len()), (4, 14));
        for (oracle, name) in oracles.0.iter().zip(Odd::names()) {
            let mut entries = record.tensors.iter();
            let entry = entries.find(|entry| entry.name == name).unwrap();
            assert_eq!(entry.applied_steps, 4);
            for slot in &entry.slots {
                oracle
                    .check_slot(&slot.name, &slot.values.to_f32())
                    .unwrap();
            }
        }
    }
}

#[test]
fn small_tensors_share_dispatches() {
    let (device, shared, setup) = gpu();
    let module = Odd::new(device);
    let mut optimizer = momentum().init(shared);
    let (grads, _) = module.grads(0);
    optimizer.step(0.1, module, grads).unwrap();
    if setup.device.limits().max_storage_buffers_per_shader_stage >= 30 {
        assert!(optimizer.dispatches() < 14, "{}", optimizer.dispatches());
    }
}

#[test]
fn a_parameter_without_a_gradient_is_left_as_it_is() {
    for (rule, mut optimizer, mut module, mut oracles) in runs() {
        // The matrix joins at the second step, the vectors sit out the third.
        for step in 0..5 {
            let (mut grads, mut on_host) = module.grads(step);
            if step == 0 {
                grads.remove::<2>(module.matrix.id);
                on_host[0].clear();
            }
            if step == 2 {
                for (vector, on_host) in module.vectors.iter().zip(&mut on_host[2..]) {
                    grads.remove::<1>(vector.id);
                    on_host.clear();
                }
            }
            module = optimizer.step(0.1, module, grads).unwrap();
            for (oracle, grads) in oracles.0.iter_mut().zip(&on_host) {
                if !grads.is_empty() {
                    oracle.step(&rule, grads);
                }
            }
            oracles.check(&module);
        }
        let record = optimizer.to_record().unwrap().unwrap();
        assert_eq!(record.steps, 5);
        for entry in &record.tensors {
            let missed = if entry.name == "cube" { 0 } else { 1 };
            assert_eq!(entry.applied_steps, 5 - missed, "{}", entry.name);
        }
    }
}

#[test]
fn without_any_gradient_there_is_no_step() {
    let (device, shared, _) = gpu();
    let module = Odd::new(device);
    let before = module.host();
    let mut optimizer = momentum().init(shared);
    let module = optimizer.step(0.1, module, GradientsParams::new()).unwrap();
    assert_eq!(module.host(), before);
    assert!(optimizer.to_record().unwrap().is_none());
}

#[test]
fn groups_are_chosen_by_path() {
    let (device, shared, _) = gpu();
    let frozen = momentum().with_lr(0.0).unwrap();
    let groups = ParamGroups::new(momentum());
    let groups = groups.with("vectors", frozen, |path| path.starts_with("vectors."));
    let mut optimizer = ModuleOptimizer::with_groups(shared, groups.unwrap());
    let module = Odd::new(device);
    let before = module.host();
    let (grads, _) = module.grads(0);
    let after = optimizer.step(0.1, module, grads).unwrap().host();
    for ((before, after), name) in before.iter().zip(after).zip(Odd::names()) {
        let is_same = before
            .iter()
            .zip(&after)
            .all(|(before, after)| before == after);
        assert_eq!(is_same, name.starts_with("vectors."), "{name}");
    }
}

#[test]
fn gradients_are_clipped_as_burn_clips_them() {
    let (device, shared, _) = gpu();
    let module = Odd::new(device);
    let before = host(module.cube.val());
    let (grads, on_host) = module.grads(0);
    let mut optimizer = subtraction()
        .init(shared)
        .with_grad_clipping(GradientClipping::Value(0.25));
    let after = host(optimizer.step(1.0, module, grads).unwrap().cube.val());
    for ((before, after), grad) in before.iter().zip(after).zip(&on_host[1]) {
        assert_eq!(after, before - grad.clamp(-0.25, 0.25));
    }
    assert!(values(1, 8).iter().any(|value| value.abs() > 0.125));
}
