use wgpu_optim::rules::SgdConfigBuilder;
use wgpu_optim::rules::sgd::{Coefficients, MomentumForm, Terms};
use wgpu_optim::{ConfigError, SgdConfig};

use crate::cases::configs;
use crate::test;

fn base() -> SgdConfigBuilder {
    SgdConfig::builder(0.1).momentum(0.9)
}

fn field_of(result: Result<SgdConfig, ConfigError>) -> &'static str {
    match result {
        Err(ConfigError::OutOfRange { field, .. }) => field,
        Err(ConfigError::Unsupported { fields, .. }) => fields,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[test]
fn every_field_out_of_range_is_named() {
    for bad in [-0.1, f64::NAN, f64::INFINITY, -f64::INFINITY, 1e39, -1e-50] {
        assert_eq!(field_of(SgdConfig::builder(bad).build()), "lr");
        assert_eq!(field_of(base().momentum(bad).build()), "momentum");
        assert_eq!(field_of(base().dampening(bad).build()), "dampening");
        assert_eq!(field_of(base().weight_decay(bad).build()), "weight_decay");
        assert_eq!(
            field_of(base().decoupled_weight_decay(bad).build()),
            "decoupled_weight_decay"
        );
    }
    assert_eq!(field_of(base().momentum(1.1).build()), "momentum");
    assert_eq!(field_of(base().dampening(1.1).build()), "dampening");
    assert!(base().momentum(1.0).build().is_ok());
    let particle = base().form(MomentumForm::Particle);
    for bad in [0.0, 1e-50, -1.0, f64::NAN, f64::INFINITY, 1e39] {
        assert_eq!(field_of(particle.time_step(bad).build()), "time_step");
    }
    // The velocity takes in the gradient times lr/dt.
    let steep = SgdConfig::builder(1e3).form(MomentumForm::Particle);
    assert_eq!(field_of(steep.time_step(1e-37).build()), "lr/time_step");
    assert_eq!(
        field_of(base().momentum(1.0).form(MomentumForm::Ema).build()),
        "momentum"
    );
}

#[test]
fn combinations_that_no_library_defines_are_refused() {
    let nesterov = base().nesterov(true);
    assert_eq!(
        field_of(nesterov.momentum(0.0).build()),
        "nesterov, momentum"
    );
    assert_eq!(
        field_of(nesterov.dampening(0.1).build()),
        "nesterov, dampening"
    );
    assert_eq!(
        field_of(nesterov.form(MomentumForm::Ema).build()),
        "nesterov, form"
    );
    let dampened = base().dampening(0.1);
    assert_eq!(
        field_of(dampened.momentum(0.0).build()),
        "dampening, momentum"
    );
    for form in [MomentumForm::Ema, MomentumForm::LrInside] {
        assert_eq!(field_of(dampened.form(form).build()), "dampening, form");
    }
}

#[test]
fn decay_that_would_flip_the_sign_of_theta_is_refused_also_when_lr_changes() {
    let config = base().decoupled_weight_decay(2.0).build().unwrap();
    let refused = config.with_lr(0.6);
    assert!(matches!(refused, Err(ConfigError::DecayTooLarge { .. })));
    assert_eq!(config.with_lr(0.5).unwrap().lr(), 0.5);
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("0.6") && message.contains("decoupled_weight_decay = 2.0"));
}

#[test]
fn forms_have_names() {
    for form in MomentumForm::ALL {
        assert_eq!(form.name().parse::<MomentumForm>(), Ok(form));
    }
    let unknown = "heavyball".parse::<MomentumForm>();
    assert!(
        unknown
            .unwrap_err()
            .to_string()
            .contains("heavy-ball, ema, lr-inside or particle")
    );
}

#[test]
fn an_absent_term_has_the_coefficient_that_leaves_it_out() {
    for config in configs() {
        let has = Terms::of(&config);
        for first_step in [true, false] {
            let k = Coefficients::new(&config, first_step);
            assert_eq!(has.lambda, k.lambda != 0.0, "{config:?}");
            assert_eq!(has.b, k.b != 0.0, "{config:?}");
            assert_eq!(has.rho, k.rho != 1.0, "{config:?}");
            assert_eq!(has.velocity, k.a != 0.0, "{config:?}");
            assert!(has.c || !has.velocity || k.c == 1.0, "{config:?}");
        }
        assert!(Terms::all().any(|terms| terms == has), "{config:?}");
    }
}

#[test]
fn what_is_too_small_for_f32_is_zero_and_changes_no_term() {
    for config in configs() {
        let (has, velocity) = (Terms::of(&config), config.has_velocity());
        for tiny in [1e-38, 1e-40, 1e-46, 1e-300, f64::from_bits(1), 0.0] {
            let mut small = config.with_lr(tiny).unwrap();
            if velocity {
                small = small.with_momentum(tiny).unwrap();
            }
            assert_eq!(small.lr(), tiny);
            assert_eq!(Terms::of(&small), has, "{config:?}");
            let k = Coefficients::new(&small, false).cast::<f32>();
            assert_eq!(k.alpha, 0.0, "{config:?}");
            for k in [k.lambda, k.alpha, k.c, k.a, k.b, k.rho] {
                assert!(k == 0.0 || k.is_normal(), "{config:?}");
            }
        }
    }
    let tiny = SgdConfig::builder(1e-50)
        .momentum(1e-50)
        .dampening(1e-50)
        .coupled_weight_decay(1e-50)
        .decoupled_weight_decay(1e-50)
        .build()
        .unwrap();
    let k = Coefficients::new(&tiny, false).cast::<f32>();
    assert_eq!(
        [k.lambda, k.alpha, k.c, k.a, k.b, k.rho],
        [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    );
    assert!(tiny.has_velocity());
}
