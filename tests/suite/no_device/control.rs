//! Steps under a control in memory, and the exact ones, at the points that PyTorch printed.

use wgpu_optim::control::{GradNorm, GradNorms, StepControlBuilder};
use wgpu_optim::cpu::SliceError;
use wgpu_optim::oracle::{ControlOracle, Roundoff};
use wgpu_optim::{
    ConfigError, CpuControl, CpuOptimizer, LossScale, Optimizer, ParamGroups, SgdConfig,
    StepControl,
};

use crate::test;
use crate::{golden_control, scales};

#[test]
fn the_oracle_decides_as_pytorch_does() {
    for golden in golden_control::all() {
        for rounding in [Roundoff::NEAREST, Roundoff::WGSL] {
            for (step, expected) in golden.expected(rounding).iter().enumerate() {
                golden.check_expected(step, expected);
            }
        }
    }
}

#[test]
fn the_twin_decides_as_pytorch_does_within_the_bound() {
    for golden in golden_control::all() {
        let tensors = golden.tensors();
        let shapes = tensors.map(|(name, start)| (name, [start.len()]));
        let mut optimizer = CpuOptimizer::with_groups(&golden.groups(), shapes).unwrap();
        let mut control = CpuControl::new(golden.control());
        let mut params: Vec<_> = golden.tensors().map(|(_, start)| start.to_vec()).collect();
        for (step, expected) in golden.expected(Roundoff::NEAREST).iter().enumerate() {
            optimizer.set_lr(golden.steps[step].lr).unwrap();
            for (name, _) in golden.tensors() {
                let is_frozen = golden.is_frozen(step, name);
                optimizer.set_frozen(name, is_frozen).unwrap();
            }
            let grads = golden.grads(step);
            let grads: Vec<_> = grads.iter().map(Vec::as_slice).collect();
            let mut slices: Vec<_> = params.iter_mut().map(Vec::as_mut_slice).collect();
            let record = optimizer
                .step_with(&mut slices, &grads, &mut control)
                .unwrap();
            let (state, after) = (optimizer.state(), control.state());
            golden.check(step, expected, &params, &state, &record, after);
        }
    }
}

/// PyTorch's goes down to zero, and divides by it.
#[test]
fn a_loss_scale_never_becomes_what_it_cannot_be_divided_by() {
    for (initial, grad, last) in [
        (-124, f32::INFINITY, f32::MIN_POSITIVE),
        (124, 1.0, 1.0 / f32::MIN_POSITIVE),
    ] {
        let control = StepControl::builder()
            .loss_scale(LossScale {
                initial: 2f64.powi(initial),
                growth_interval: 1,
                ..LossScale::default()
            })
            .build()
            .unwrap();
        let mut oracle = ControlOracle::new(&control, Roundoff::NEAREST);
        let mut control = CpuControl::new(control);
        let mut norm = GradNorm::default();
        norm.add(&[grad]);
        for _ in 0..6 {
            control.decide(&[GradNorms {
                shared: vec![norm],
                tensors: Vec::new(),
            }]);
            oracle.decide(&[("default", &[grad])]);
            assert_eq!(f64::from(control.loss_scale()), oracle.scale());
        }
        assert_eq!(control.loss_scale(), last);
    }
}

/// Steps once, by a gradient of 1 that was multiplied by the scale, and says what the scale was.
fn step_by_one(control: &mut CpuControl) -> f32 {
    let config = SgdConfig::builder(1.0).build().unwrap();
    let mut optimizer = CpuOptimizer::new(config, [("theta", [1])]).unwrap();
    let (mut theta, scale) = ([0.0], control.loss_scale());
    let record = optimizer
        .step_with(&mut [&mut theta], &[&[scale]], control)
        .unwrap();
    assert_eq!((theta, record.scale), ([-1.0], scale));
    scale
}

#[test]
fn a_scale_that_is_not_dynamic_is_the_configuration_s() {
    let mut control = CpuControl::new(scales::dynamic(65536.0));
    assert_eq!(step_by_one(&mut control), 65536.0);
    for (next, expected) in scales::in_turn() {
        control.set_control(next);
        assert_eq!(step_by_one(&mut control), expected);
    }
}

#[test]
fn a_loaded_scale_goes_on_where_it_was_dynamic_and_is() {
    for before in scales::all() {
        for now in scales::all() {
            let mut saved = CpuControl::new(before.clone());
            step_by_one(&mut saved);
            let mut loaded = CpuControl::new(now.clone());
            // What the control itself remembers does not matter.
            step_by_one(&mut loaded);
            loaded.load_state(&saved.state());
            let expected = scales::resumed(&before, &now);
            assert_eq!(step_by_one(&mut loaded), expected, "{before:?}, {now:?}");
        }
    }
}

#[test]
fn what_a_control_cannot_be_is_named() {
    let control = StepControl::builder;
    type Set = fn(StepControlBuilder, f64) -> StepControlBuilder;
    let bounds: [(_, Set); 5] = [
        ("max_norm", StepControlBuilder::max_norm),
        ("max_norm", |control, value| {
            control.group_max_norm("head", value)
        }),
        ("tensor_max_norm", StepControlBuilder::tensor_max_norm),
        ("clip_value", StepControlBuilder::clip_value),
        ("clip_value", |control, value| {
            control.group_clip_value("head", value)
        }),
    ];
    for (name, set) in bounds {
        for value in [-1.0, -f64::MIN_POSITIVE, 1e39, f64::INFINITY, f64::NAN] {
            let refused = set(control(), value).build().unwrap_err();
            let ConfigError::OutOfRange {
                field,
                value: actual,
                ..
            } = refused
            else {
                panic!("{refused}");
            };
            assert_eq!((field, actual.to_bits()), (name, value.to_bits()));
        }
        for value in [0.0, 1e-300, f64::from(f32::MAX)] {
            set(control(), value).build().unwrap();
        }
    }
    // One takes the place of the other.
    let by_tensor = control()
        .max_norm(1.0)
        .tensor_max_norm(2.0)
        .build()
        .unwrap();
    assert_eq!(by_tensor, control().tensor_max_norm(2.0).build().unwrap());
    let of_all = control()
        .tensor_max_norm(2.0)
        .max_norm(1.0)
        .build()
        .unwrap();
    assert_eq!(
        (of_all.tensor_max_norm(), by_tensor.tensor_max_norm()),
        (None, Some(2.0))
    );
}

/// A group that was mistyped would be clipped by nobody.
#[test]
fn a_control_of_a_group_that_is_not_there_is_refused_and_a_right_one_steps() {
    let config = SgdConfig::builder(1.0).build().unwrap();
    let groups = ParamGroups::new(config)
        .with("head", config, |name| name.starts_with("head"))
        .unwrap();
    let mut optimizer = CpuOptimizer::with_groups(&groups, [("body", [1]), ("head", [1])]).unwrap();
    let (mut body, mut head) = ([0.0], [0.0]);
    let control = StepControl::builder;
    for wrong in [
        control().group_max_norm("heads", 1.0),
        control().group_clip_value("heads", 1.0),
    ] {
        let wrong = wrong.loss_scale(LossScale::default()).build().unwrap();
        let mut wrong = CpuControl::new(wrong);
        let before = wrong.state();
        let refused =
            optimizer.step_with(&mut [&mut body, &mut head], &[&[3.0], &[3.0]], &mut wrong);
        let expected = SliceError::UnknownGroup {
            group: "heads".into(),
        };
        assert_eq!(refused, Err(expected));
        assert_eq!((body, head, wrong.state()), ([0.0], [0.0], before));
        assert_eq!(
            (optimizer.steps(), optimizer.applied_steps("body")),
            (0, Some(0))
        );
    }
    let right = control()
        .group_clip_value("head", 1.0)
        .group_clip_value("default", 2.0);
    let mut right = CpuControl::new(right.build().unwrap());
    optimizer
        .step_with(&mut [&mut body, &mut head], &[&[3.0], &[3.0]], &mut right)
        .unwrap();
    assert_eq!((body, head), ([-2.0], [-1.0]));
}
