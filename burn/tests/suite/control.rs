//! Steps under a control, against exact arithmetic.

use std::time::Duration;

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, FloatDType, Tensor};
use wgpu_optim_burn::wgpu_optim::control::{ControlRecord, NonFinite};
use wgpu_optim_burn::wgpu_optim::oracle::{ControlOracle, Oracle, Roundoff};
use wgpu_optim_burn::wgpu_optim::{AdamConfig, LossScale, ParamGroups, StepControl};
use wgpu_optim_burn::{Control, Copied, Init as _, ModuleOptimizer, SharedDevice, StepError};

use crate::errors::{other_device, other_handles};
use crate::{Odd, Oracles, gpu, host, momentum, rules, runs, subtraction, tensor};

fn control(control: StepControl) -> Control {
    Control::new(&gpu().1, control).unwrap()
}

/// The records of all steps so far.
fn outcomes(control: &Control) -> Vec<ControlRecord> {
    gpu().0.sync().unwrap();
    let mut records = control.read();
    while control.unread() > 0 {
        std::thread::sleep(Duration::from_millis(2));
        records.extend(control.read());
    }
    records
}

fn controls() -> Vec<StepControl> {
    let loss_scale = LossScale {
        initial: 8.0,
        growth_interval: 2,
        ..LossScale::default()
    };
    let builder = StepControl::builder;
    [
        builder().max_norm(10.0),
        builder().tensor_max_norm(2.0),
        builder().tensor_max_norm(2.0).loss_scale(loss_scale),
        builder().max_norm(5.0).clip_value(0.125).grad_scale(4.0),
        builder()
            .loss_scale(loss_scale)
            .group_max_norm("default", 3.0),
    ]
    .map(|builder| builder.build().unwrap())
    .into()
}

#[test]
fn every_element_is_within_the_bound_whatever_is_clipped_skipped_and_left_out() {
    for settings in controls() {
        for (rule, optimizer, mut module, mut oracles) in runs() {
            let control = control(settings.clone());
            let mut optimizer = optimizer.with_control(&control);
            let mut decisions = ControlOracle::new(&settings, Roundoff::WGSL);
            let mut expected = Vec::new();
            for step in 0..6 {
                let (mut grads, mut on_host) = module.grads(1000 * step);
                match step {
                    // The cube's gradients overflow.
                    2 | 4 => {
                        on_host[1][7] = [f32::INFINITY, f32::NAN][step as usize / 2 - 1];
                        let grad = tensor(&on_host[1], crate::CUBE, &gpu().0.clone().inner());
                        grads.register(module.cube.id, grad);
                    }
                    // The matrix sits out: it is in no norm.
                    3 => {
                        grads.remove::<2>(module.matrix.id);
                        on_host[0].clear();
                    }
                    _ => {}
                }
                let of_groups: Vec<_> = on_host.iter().map(|grads| ("default", &**grads)).collect();
                let decision = decisions.decide(&of_groups);
                module = optimizer.step(0.1, module, grads).unwrap();
                assert_eq!(optimizer.copied(), Copied::default(), "step {step}");
                if !decision.is_skipped {
                    for (index, (oracle, grads)) in oracles.0.iter_mut().zip(&on_host).enumerate() {
                        if !grads.is_empty() {
                            oracle.step_by(&rule, grads, &decision.of_tensor(index, "default"));
                        }
                    }
                }
                oracles.check(&module);
                expected.push(decision);
            }
            let records = outcomes(&control);
            assert_eq!(records.len(), expected.len());
            for (record, decision) in records.iter().zip(&expected) {
                assert_eq!(record.is_skipped, decision.is_skipped);
                assert_eq!(record.found_nonfinite, decision.found_nonfinite);
                let norm = f64::from(record.norm);
                let is_within = decision.norm.low <= norm && norm <= decision.norm.high;
                assert!(is_within || decision.found_nonfinite, "{record:?}");
            }
            let record = optimizer.to_record().unwrap().unwrap();
            for entry in &record.tensors {
                let missed = 2 + u64::from(entry.name == "matrix");
                assert_eq!(entry.applied_steps, 6 - missed, "{}", entry.name);
            }
            let state = record.control.unwrap();
            assert_eq!(f64::from(state.scale), decisions.scale());
        }
    }
}

#[derive(Module, Debug)]
struct Line {
    slope: Param<Tensor<1>>,
}

/// A loss whose gradient are these values, and the gradients of it, multiplied by the control's scale.
fn backward(line: &Line, values: &[f32], control: &Control) -> (f32, GradientsParams) {
    let x = tensor(values, [values.len()], &gpu().0);
    let loss = control.scale_loss((line.slope.val() * x).sum()).unwrap();
    let value = loss.clone().into_scalar::<f32>();
    (value, GradientsParams::from_grads(loss.backward(), line))
}

#[test]
fn losses_are_scaled_by_what_gradients_are_divided_by_before_and_after_a_resume() {
    let (device, shared, _) = gpu();
    let settings = StepControl::builder().loss_scale(LossScale {
        initial: 1024.0,
        growth_interval: 2,
        ..LossScale::default()
    });
    let settings = settings.build().unwrap();
    let start = [1.0, 2.0, -4.0];
    let line = || Line {
        slope: Param::from_tensor(tensor(&start, [3], device)),
    };
    let mut decisions = ControlOracle::new(&settings, Roundoff::WGSL);
    let mut of_run = control(settings.clone());
    let mut optimizer = subtraction().init(shared).with_control(&of_run);
    let mut module = line();
    let mut expected = start;
    for step in 0..9 {
        if [4, 7].contains(&step) {
            // Another process goes on.
            let record = optimizer.to_record().unwrap().unwrap();
            of_run = control(settings.clone());
            optimizer = subtraction()
                .init(shared)
                .with_control(&of_run)
                .load_record(record);
        }
        // At the third step and the one after the first resume the scaled gradients overflow.
        let overflows = [2, 4].contains(&step);
        let x: [f32; 3] = if overflows {
            [3e38, 1.0, 1.0]
        } else {
            [0.5, -0.25, 2.0]
        };
        let scale = decisions.scale() as f32;
        let (loss, grads) = backward(&module, &x, &of_run);
        if !overflows {
            let dot: f32 = expected.iter().zip(x).map(|(slope, x)| slope * x).sum();
            assert_eq!(loss, dot * scale, "step {step}: powers of two");
        }
        let on_host = x.map(|x| x * scale);
        let decision = decisions.decide(&[("default", &on_host)]);
        assert_eq!(decision.is_skipped, overflows);
        module = optimizer.step(1.0, module, grads).unwrap();
        if !overflows {
            for (slope, x) in expected.iter_mut().zip(x) {
                *slope -= x;
            }
        }
        assert_eq!(host(module.slope.val()), expected, "step {step}");
    }
    assert_eq!(of_run.state().unwrap().scale, decisions.scale() as f32);
    assert_ne!(decisions.scale(), 1024.0);
}

#[test]
fn groups_are_clipped_by_norms_of_their_own() {
    let (device, shared, _) = gpu();
    let settings = StepControl::builder()
        .group_max_norm("vectors", 1.0)
        .nonfinite(NonFinite::Apply)
        .build()
        .unwrap();
    let control = control(settings.clone());
    let frozen = momentum();
    let groups = ParamGroups::new(momentum())
        .with("vectors", frozen, |path| path.starts_with("vectors."))
        .unwrap();
    let mut optimizer = ModuleOptimizer::with_groups(shared, groups).with_control(&control);
    let module = Odd::new(device);
    let mut oracles = Oracles::new(&module);
    let (grads, on_host) = module.grads(0);
    let names = Odd::names();
    let group = |index: usize| match names[index].starts_with("vectors.") {
        true => "vectors",
        false => "default",
    };
    let of_groups: Vec<_> = (0..)
        .zip(&on_host)
        .map(|(index, grads)| (group(index), &**grads))
        .collect();
    let decision = ControlOracle::new(&settings, Roundoff::WGSL).decide(&of_groups);
    let module = optimizer.step(0.1, module, grads).unwrap();
    for (index, (oracle, grads)) in oracles.0.iter_mut().zip(&on_host).enumerate() {
        oracle.step_by(&momentum().into(), grads, &decision.of_group(group(index)));
    }
    oracles.check(&module);
}

#[test]
fn mistakes_are_named() {
    let (device, shared, setup) = gpu();
    let settings = StepControl::builder().build().unwrap();
    let ours = control(settings.clone());
    let other: Device = other_device(setup);
    let elsewhere = ours.scale_loss(Tensor::zeros([1], &other)).unwrap_err();
    assert!(
        matches!(&elsewhere, StepError::Device { param, .. } if param == "loss"),
        "{elsewhere}"
    );
    let half = Tensor::<1>::zeros([1], device).cast(FloatDType::F16);
    let half = ours.scale_loss(half).unwrap_err();
    assert!(
        matches!(&half, StepError::DType { param, .. } if param == "loss"),
        "{half}"
    );

    // A control of other handles, and a group that there is not: the next step works.
    let module = Odd::new(device);
    let other_handles = SharedDevice::new(device, &other_handles(setup)).unwrap();
    let elsewhere = Control::new(&other_handles, settings).unwrap();
    let unknown = StepControl::builder().group_max_norm("embeddings", 1.0);
    let unknown = control(unknown.build().unwrap());
    let rule = AdamConfig::adamw(0.1).build().unwrap();
    let mut optimizer = rule.init(shared);
    for (wrong, says) in [(elsewhere, "kernels"), (unknown, "embeddings")] {
        optimizer = optimizer.with_control(&wrong);
        let (grads, _) = module.grads(0);
        let error = optimizer.step(0.1, module.clone(), grads).unwrap_err();
        assert!(matches!(error, StepError::Record(_)), "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
    let mut optimizer = optimizer.with_control(&ours);
    let (grads, on_host) = module.grads(0);
    let before = Oracles::new(&module);
    let module = optimizer.step(0.1, module, grads).unwrap();
    let mut oracles: Vec<Oracle<_>> = before.0;
    for (oracle, grads) in oracles.iter_mut().zip(&on_host) {
        oracle.step(&rules()[0], grads);
    }
    Oracles(oracles).check(&module);
}
