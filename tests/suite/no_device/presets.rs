use wgpu_optim::oracle::{Oracle, Rounding};
use wgpu_optim::{ConfigError, MomentumForm, Preset, SgdConfig};

use crate::cases::values;
use crate::golden::{optax_and_keras, pytorch};
use crate::test;

#[test]
fn presets_have_names() {
    for preset in Preset::ALL {
        assert_eq!(preset.name().parse::<Preset>(), Ok(preset));
        assert_eq!(preset.builder(0.1).build().unwrap().form(), preset.form());
    }
    let unknown = "torch".parse::<Preset>();
    assert!(matches!(unknown, Err(ConfigError::UnknownPreset { name, .. }) if name == "torch"));
}

/// The golden trajectories prove the forms; this ties the presets to the libraries' own cases.
#[test]
fn presets_choose_the_form_that_their_library_was_seen_to_compute() {
    assert!(
        pytorch()
            .iter()
            .all(|golden| golden.config.form() == Preset::PyTorch.form())
    );
    for golden in optax_and_keras() {
        let preset = match golden.name.split(' ').next() {
            Some("optax") => Preset::OptaxSgd,
            Some("ema") => Preset::OptaxEma,
            Some("keras") => Preset::Keras,
            other => panic!("a golden of {other:?}"),
        };
        assert_eq!(golden.config.form(), preset.form(), "{}", golden.name);
        if golden.config.decoupled_weight_decay() != 0.0 {
            assert!(preset.decouples_weight_decay());
        }
    }
}

/// Sutskever et al. 2013, equations 3 and 4, in the paper's own variables: the gradient is taken at
/// `theta + mu*v`, which is the point that this crate keeps.
#[test]
fn sutskevers_nesterov_is_ours_at_the_point_where_the_gradient_is_taken() {
    let (lr, mu) = (0.1, 0.9);
    let config = Preset::Sutskever2013
        .builder(lr)
        .momentum(mu)
        .nesterov(true)
        .build()
        .unwrap();
    let curvature = |x: f64| 0.7 * x;
    let (mut theta, mut v) = (1.0, 0.0);
    let mut ours = Oracle::new(&[1.0], Rounding::NEAREST);
    for _ in 0..50 {
        let ahead: f64 = theta + mu * v;
        approx::assert_abs_diff_eq!(ours.params().next().unwrap(), ahead, epsilon = 1e-6);
        v = mu * v - lr * curvature(ahead);
        theta += v;
        let gradient = curvature(ours.params().next().unwrap());
        ours.step(&config, &[gradient as f32]);
    }
}

/// Ten steps in double precision under a constant configuration.
fn trajectory(config: &SgdConfig) -> (Vec<f64>, Vec<f64>) {
    let mut oracle = Oracle::new(&values(1, 20), Rounding::NEAREST);
    for step in 0..10 {
        oracle.step(config, &values(2 + step, 20));
    }
    (oracle.params().collect(), oracle.velocity().collect())
}

#[test]
fn a_converted_config_visits_the_same_points() {
    let build = |form, nesterov| {
        SgdConfig::builder(0.05)
            .momentum(0.8)
            .nesterov(nesterov)
            .weight_decay(0.02)
            .decoupled_weight_decay(0.3)
            .form(form)
            .time_step(if form == MomentumForm::Particle {
                0.3
            } else {
                1.0
            })
            .build()
    };
    let mut pairs = 0;
    for nesterov in [false, true] {
        for from in MomentumForm::ALL {
            let Ok(config) = build(from, nesterov) else {
                continue;
            };
            for to in MomentumForm::ALL {
                let Ok(conversion) = config.convert(to, 0.6) else {
                    assert!(nesterov && build(to, true).is_err(), "{from} to {to}");
                    continue;
                };
                assert_eq!(conversion.config.form(), to);
                let (ours, our_velocity) = trajectory(&config);
                let (theirs, their_velocity) = trajectory(&conversion.config);
                for (x, y) in ours.iter().zip(&theirs) {
                    approx::assert_relative_eq!(x, y, max_relative = 1e-12, epsilon = 1e-14);
                }
                for (x, y) in our_velocity.iter().zip(&their_velocity) {
                    let scaled = x * conversion.velocity_scale;
                    approx::assert_relative_eq!(scaled, *y, max_relative = 1e-12, epsilon = 1e-14);
                }
                pairs += 1;
            }
        }
    }
    // All sixteen without Nesterov, and with it the four between heavy ball and lr inside.
    assert_eq!(pairs, 20);
}

#[test]
fn what_has_no_exact_conversion_is_refused() {
    let heavy_ball = SgdConfig::builder(0.1).momentum(0.9);
    let dampened = heavy_ball.dampening(0.1).build().unwrap();
    let refused = dampened.convert(MomentumForm::LrInside, 1.0).unwrap_err();
    assert_eq!(
        (refused.from, refused.to),
        (MomentumForm::HeavyBall, MomentumForm::LrInside)
    );
    assert!(refused.to_string().contains("undampened"));
    let nesterov = heavy_ball.nesterov(true).build().unwrap();
    assert!(nesterov.convert(MomentumForm::Ema, 1.0).is_err());
    let frictionless = heavy_ball.momentum(1.0).build().unwrap();
    assert!(frictionless.convert(MomentumForm::Ema, 1.0).is_err());
    assert!(frictionless.convert(MomentumForm::LrInside, 1.0).is_ok());
    for zero_in_f32 in [0.0, 1e-50] {
        let at_rest = SgdConfig::builder(zero_in_f32).momentum(0.9);
        let at_rest = at_rest.build().unwrap();
        let refused = at_rest.convert(MomentumForm::LrInside, 1.0).unwrap_err();
        assert!(refused.to_string().contains("learning rate of zero"));
    }
    // The heavy ball's learning rate would be a twentieth.
    let average = SgdConfig::builder(1e-37)
        .momentum(0.95)
        .form(MomentumForm::Ema);
    let average = average.build().unwrap();
    assert!(average.convert(MomentumForm::HeavyBall, 1.0).is_err());
    assert!(average.convert(MomentumForm::Ema, 1.0).is_ok());
    let no_time = heavy_ball
        .build()
        .unwrap()
        .convert(MomentumForm::Particle, 0.0);
    assert!(no_time.is_err());
}
