use serde_json::Value;
use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::rules::sgd::MomentumForm;
use wgpu_optim::schedule::{
    OneCycle, constant, cosine_decay, exponential, linear_decay, one_cycle, step_decay,
    sutskever_momentum, warmup_cosine, with_warmup,
};
use wgpu_optim::{CpuOptimizer, Optimizer, SgdConfig};

use crate::cases::{configs, in_form, values};
use crate::test;

/// Compares a schedule with what PyTorch's scheduler sets.
fn check(name: &str, schedule: impl Fn(u64) -> (f64, f64)) {
    let golden: Value = serde_json::from_str(include_str!("../../golden/schedules.json")).unwrap();
    let rows = golden[name].as_array().unwrap();
    assert!(rows.len() >= 30);
    for (step, row) in rows.iter().enumerate() {
        let (lr, momentum) = schedule(step as u64);
        // PyTorch multiplies its way along, one rounding a step.
        let epsilon = rows.len() as f64 * 4.0 * f64::EPSILON;
        approx::assert_relative_eq!(lr, row[0].as_f64().unwrap(), max_relative = epsilon);
        approx::assert_relative_eq!(momentum, row[1].as_f64().unwrap(), max_relative = epsilon);
    }
}

#[test]
fn schedules_are_pytorchs() {
    check("step_lr_7_0.3", |step| (step_decay(step, 7, 0.1, 0.3), 0.9));
    check("exponential_lr_0.9", |step| {
        (exponential(step, 0.1, 0.9), 0.9)
    });
    check("cosine_40_0.001", |step| {
        (warmup_cosine(step, 0, 40, 0.1, 0.001), 0.9)
    });
    check("cosine_40_0.001", |step| {
        (cosine_decay(step, 40, 0.1, 0.001), 0.9)
    });
    let cycle = OneCycle {
        max_lr: 0.5,
        ..OneCycle::default()
    };
    check("one_cycle_50", |step| one_cycle(step, 50, &cycle));
}

#[test]
fn warm_up_is_linear_and_what_lies_past_the_end_stays() {
    let lr = |step| warmup_cosine(step, 4, 10, 0.8, 0.1);
    assert_eq!(
        [lr(0), lr(1), lr(2), lr(3), lr(4)],
        [0.2, 0.4, 0.6000000000000001, 0.8, 0.8]
    );
    approx::assert_relative_eq!(lr(7), 0.45, max_relative = 1e-14);
    assert_eq!((lr(10), lr(1000)), (0.1, 0.1));
    assert_eq!(warmup_cosine(0, 0, 0, 0.8, 0.1), 0.1);
    assert_eq!(constant(7, 0.3), 0.3);
    let cycle = OneCycle::default();
    assert_eq!(one_cycle(49, 50, &cycle), one_cycle(1000, 50, &cycle));
    assert_eq!(step_decay(3, 0, 1.0, 0.5), 0.125);
}

#[test]
fn a_warm_up_goes_around_any_schedule_and_another_around_that() {
    let inner = |step| exponential(step, 0.8, 0.5);
    let lr = |step| with_warmup(step, 4, inner);
    assert_eq!([0, 1, 2, 3].map(lr), [0.2, 0.4, 0.8 * 3.0 / 4.0, 0.8]);
    for step in 0..100 {
        assert_eq!(lr(step + 4), inner(step));
        assert_eq!(with_warmup(step, 0, inner), inner(step));
        assert_eq!(with_warmup(step + 2, 2, lr), lr(step));
        assert_eq!(
            warmup_cosine(step, 7, 60, 0.3, 0.01),
            with_warmup(step, 7, |step| cosine_decay(step, 53, 0.3, 0.01))
        );
    }
    assert_eq!(with_warmup(0, 2, lr), 0.1);
    // A warm-up that no step comes to the end of.
    assert_eq!(with_warmup(9, u64::MAX, |_| 1.0), 10.0 / u64::MAX as f64);
}

#[test]
fn a_line_goes_down_and_stays_there() {
    let lr = |step| linear_decay(step, 4, 1.0, 0.5);
    assert_eq!(
        [0, 1, 2, 3, 4, 5].map(lr),
        [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]
    );
    assert_eq!(linear_decay(0, 0, 1.0, 0.25), 0.25);
    assert_eq!(linear_decay(u64::MAX, u64::MAX, 1.0, 0.25), 0.25);
}

#[test]
fn momentum_grows_as_in_sutskever_2013() {
    let momentum = |step| sutskever_momentum(step, 0.99);
    assert_eq!((momentum(0), momentum(249)), (0.5, 0.5));
    assert_eq!((momentum(250), momentum(750)), (0.75, 0.875));
    assert_eq!(momentum(1_000_000), 0.99);
}

/// Learning rate and momentum change at every step, and a run that is resumed half-way ends at the same bits.
#[test]
fn a_scheduled_run_resumes_in_every_form() {
    for form in MomentumForm::ALL {
        let config = in_form(form, 0.1, 0.85);
        let cycle = OneCycle {
            max_lr: 0.05,
            ..OneCycle::default()
        };
        let run = |optimizer: &mut CpuOptimizer, params: &mut [f32], until: u64| {
            while optimizer.steps() < until {
                let step = optimizer.steps();
                let (lr, momentum) = one_cycle(step, 20, &cycle);
                optimizer.set_lr(lr).unwrap();
                optimizer.set_momentum(momentum).unwrap();
                optimizer.step(&mut [params], &[&values(step, 33)]).unwrap();
            }
        };
        let fresh = || CpuOptimizer::new(config, [("theta", [33])]).unwrap();
        let (mut whole, mut params) = (fresh(), values(99, 33));
        run(&mut whole, &mut params, 20);

        let (mut first, mut resumed_params) = (fresh(), values(99, 33));
        run(&mut first, &mut resumed_params, 9);
        let mut second = fresh();
        second.load_state(&first.state()).unwrap();
        assert_eq!(second.steps(), 9);
        run(&mut second, &mut resumed_params, 20);
        assert_eq!(params, resumed_params, "{form}");
        assert_eq!(whole.state(), second.state(), "{form}");
    }
}

#[test]
fn momentum_goes_down_to_zero_and_the_velocity_stays() {
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let mut optimizer = CpuOptimizer::new(config, [("theta", [1])]).unwrap();
    assert!(optimizer.set_momentum(1.5).is_err());
    assert_eq!(optimizer.config().momentum(), 0.9);
    optimizer.set_momentum(0.0).unwrap();
    assert!(optimizer.config().has_velocity());
    optimizer.set_momentum(0.9).unwrap();
    let plain = SgdConfig::builder(0.1).build().unwrap();
    for momentum in [0.5, 1e-50] {
        assert!(plain.with_momentum(momentum).is_err(), "it would come");
    }
    assert_eq!(plain.with_momentum(0.0), Ok(plain));
}

/// Learning rate and momentum decay until f32 cannot hold them, and on until f64 cannot.
#[test]
fn a_schedule_may_decay_for_ever() {
    for config in configs() {
        let mut optimizer = CpuOptimizer::new(config, [("theta", [33])]).unwrap();
        let mut params = values(1, 33);
        let mut oracle = Oracle::new(&params, Roundoff::NEAREST);
        let mut before = Vec::new();
        for step in 0..1100 {
            optimizer.set_lr(exponential(step, 0.1, 0.9)).unwrap();
            if config.has_velocity() {
                optimizer.set_momentum(exponential(step, 0.9, 0.5)).unwrap();
            }
            before.clone_from(&params);
            let grads = values(step, 33);
            optimizer.step(&mut [&mut params], &[&grads]).unwrap();
            oracle.step(optimizer.config(), &grads);
            oracle.check_params(&params).unwrap();
        }
        assert_eq!(params, before, "{config:?}");
        let state = optimizer.state();
        assert_eq!(!state.tensors[0].slots.is_empty(), config.has_velocity());
        if let Some(velocity) = state.tensors[0].slot("momentum_buffer") {
            oracle.check_velocity(&velocity).unwrap();
        }
    }
}
