use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::rules::RulePreset;
use wgpu_optim::rules::sgd::MomentumForm;
use wgpu_optim::{
    AdaBeliefConfig, AdadeltaConfig, AdagradConfig, AdamConfig, AdamaxConfig, AnyRule, ConfigError,
    LambConfig, LionConfig, NAdamConfig, RAdamConfig, RmsPropConfig, RpropConfig,
    ScheduleFreeAdamWConfig, ScheduleFreeSgdConfig, SgdConfig, SignumConfig, YogiConfig,
};

use crate::cases::values;
use crate::golden::{optax_and_keras, pytorch};
use crate::test;

/// SGD as a library has it.
fn sgd_of(library: &str) -> (SgdConfig, RulePreset) {
    let preset = RulePreset::find("sgd", Some(library)).unwrap();
    (preset.config(0.1).unwrap().try_into().unwrap(), preset)
}

#[test]
fn constructors_of_sgd_are_its_presets() {
    let constructors = [
        ("pytorch", SgdConfig::builder(0.1)),
        ("optax-sgd", SgdConfig::builder(0.1)),
        ("optax-trace", SgdConfig::builder(0.1)),
        ("optax-ema", SgdConfig::optax_ema(0.1)),
        ("keras", SgdConfig::keras(0.1)),
        ("tensorflow-js", SgdConfig::builder(0.1)),
        ("sutskever-2013", SgdConfig::sutskever_2013(0.1)),
    ];
    let presets = AnyRule::presets().filter(|preset| preset.rule == "sgd");
    assert_eq!(presets.count(), constructors.len());
    for (library, builder) in constructors {
        assert_eq!(sgd_of(library).0, builder.build().unwrap(), "{library}");
    }
    let unknown = AnyRule::preset("sgd", Some("torch"), 0.1);
    assert!(matches!(unknown, Err(ConfigError::UnknownPreset { name, .. }) if name == "torch"));
}

/// The golden trajectories prove the forms; this ties the presets to the libraries' own cases.
#[test]
fn presets_choose_the_form_that_their_library_was_seen_to_compute() {
    assert!(
        pytorch()
            .iter()
            .all(|golden| golden.config.form() == sgd_of("pytorch").0.form())
    );
    for golden in optax_and_keras() {
        let (config, preset) = sgd_of(match golden.name.split(' ').next() {
            Some("optax") => "optax-sgd",
            Some("ema") => "optax-ema",
            Some("keras") => "keras",
            other => panic!("a golden of {other:?}"),
        });
        assert_eq!(golden.config.form(), config.form(), "{}", golden.name);
        if golden.config.decoupled_weight_decay() != 0.0 {
            assert!(preset.decouples_weight_decay());
        }
    }
}

/// The coupled and the decoupled weight decay of a rule.
fn decays(rule: &AnyRule) -> [f64; 2] {
    let fields = serde_json::to_value(rule).unwrap();
    ["weight_decay", "decoupled_weight_decay"].map(|field| fields[field].as_f64().unwrap())
}

/// Every builder with `weight_decay(0.25)`, and whether the library that it comes from decouples that.
fn with_weight_decay() -> Vec<(&'static str, AnyRule, bool)> {
    macro_rules! decayed {
        ($( $builder:expr => $decouples:expr, )*) => {
            vec![$( (
                stringify!($builder),
                $builder.weight_decay(0.25).build().unwrap().into(),
                $decouples,
            ), )*]
        };
    }
    decayed! {
        SgdConfig::builder(0.1) => false,
        SgdConfig::optax_ema(0.1) => false,
        SgdConfig::keras(0.1) => true,
        SgdConfig::sutskever_2013(0.1) => false,
        AdamConfig::builder(0.1) => false,
        AdamConfig::adamw(0.1) => true,
        AdamConfig::keras(0.1) => true,
        NAdamConfig::builder(0.1) => false,
        RAdamConfig::builder(0.1) => false,
        AdamaxConfig::builder(0.1) => false,
        RmsPropConfig::builder(0.1) => false,
        RmsPropConfig::optax(0.1) => false,
        RmsPropConfig::keras(0.1) => true,
        AdagradConfig::builder(0.1) => false,
        AdagradConfig::optax(0.1) => false,
        AdadeltaConfig::builder(0.1) => false,
        LambConfig::builder(0.1) => true,
        LambConfig::timm(0.1) => true,
        LionConfig::builder(0.1) => true,
        SignumConfig::builder(0.1) => false,
        SignumConfig::sign_sgd(0.1) => false,
        ScheduleFreeSgdConfig::builder(0.1) => false,
        ScheduleFreeSgdConfig::schedulefree(0.1) => false,
        ScheduleFreeAdamWConfig::builder(0.1) => true,
        ScheduleFreeAdamWConfig::schedulefree(0.1) => true,
        ScheduleFreeAdamWConfig::paper(0.1) => true,
        AdaBeliefConfig::builder(0.1) => false,
        YogiConfig::builder(0.1) => false,
        RpropConfig::builder(0.1) => false,
    }
}

/// Who comes from PyTorch writes `adamw(lr).weight_decay(0.25)` and means what `AdamW` does with it.
#[test]
fn weight_decay_is_all_the_decay_there_is_and_of_the_librarys_kind() {
    let mut names = Vec::new();
    for (builder, rule, decouples) in with_weight_decay() {
        let expected = if decouples { [0.0, 0.25] } else { [0.25, 0.0] };
        assert_eq!(decays(&rule), expected, "{builder}");
        names.push(serde_json::to_value(&rule).unwrap()["rule"].clone());
    }
    for preset in AnyRule::presets() {
        let rule = serde_json::to_value(preset.config(0.1).unwrap()).unwrap();
        assert!(names.contains(&rule["rule"]), "no builder of {rule}");
        // What a preset decays by default is of the kind that it says.
        let [coupled, decoupled] = decays(&preset.config(0.1).unwrap());
        let (other, name) = match preset.decouples_weight_decay() {
            true => (coupled, preset.rule),
            false => (decoupled, preset.rule),
        };
        assert_eq!(other, 0.0, "{name} of {}", preset.library);
    }
    // None for a group of biases is none.
    let decay = AdamConfig::adamw(0.1).weight_decay(0.5);
    let none = decay.weight_decay(0.0).build().unwrap();
    assert_eq!(decays(&none.into()), [0.0, 0.0]);
}

#[test]
fn both_weight_decays_at_once_are_both_named() {
    let adamw = || AdamConfig::adamw(0.1);
    let adam = || AdamConfig::builder(0.1);
    for (builder, coupled, decoupled, own) in [
        // The default of 0.01 was not asked for.
        (
            adamw().coupled_weight_decay(0.5),
            0.5,
            0.01,
            "decoupled_weight_decay",
        ),
        (
            adamw().weight_decay(0.25).coupled_weight_decay(0.5),
            0.5,
            0.25,
            "decoupled_weight_decay",
        ),
        (
            adam().weight_decay(0.25).decoupled_weight_decay(0.5),
            0.25,
            0.5,
            "coupled_weight_decay",
        ),
        // It looks like none and is not.
        (
            adam().decoupled_weight_decay(0.5).weight_decay(0.0),
            0.0,
            0.5,
            "coupled_weight_decay",
        ),
    ] {
        let expected = ConfigError::BothDecays {
            coupled_weight_decay: coupled,
            decoupled_weight_decay: decoupled,
            own,
        };
        assert_eq!(builder.build(), Err(expected.clone()));
        let text = expected.to_string();
        assert!(
            text.contains(&format!("coupled_weight_decay = {coupled:?}")),
            "{text}"
        );
        assert!(
            text.contains(&format!("decoupled_weight_decay = {decoupled:?}")),
            "{text}"
        );
    }
    for (builder, expected) in [
        (
            adamw()
                .coupled_weight_decay(0.5)
                .decoupled_weight_decay(0.25),
            [0.5, 0.25],
        ),
        (
            adam()
                .decoupled_weight_decay(0.25)
                .coupled_weight_decay(0.5),
            [0.5, 0.25],
        ),
        (
            adamw()
                .coupled_weight_decay(0.5)
                .decoupled_weight_decay(0.0),
            [0.5, 0.0],
        ),
        (adamw().coupled_weight_decay(0.0), [0.0, 0.01]),
        (adam().decoupled_weight_decay(0.25), [0.0, 0.25]),
        // The last word counts.
        (
            adamw().weight_decay(0.5).decoupled_weight_decay(0.25),
            [0.0, 0.25],
        ),
        (
            adamw().decoupled_weight_decay(0.5).weight_decay(0.25),
            [0.0, 0.25],
        ),
    ] {
        assert_eq!(decays(&builder.build().unwrap().into()), expected);
    }
    // A file names both.
    let both = adam()
        .coupled_weight_decay(0.5)
        .decoupled_weight_decay(0.25);
    let both = AnyRule::from(both.build().unwrap());
    let read: AnyRule = serde_json::from_value(serde_json::to_value(&both).unwrap()).unwrap();
    assert_eq!(read, both);
}

/// Sutskever et al. 2013, equations 3 and 4, in the paper's own variables: the gradient is taken at
/// `theta + mu*v`, which is the point that this crate keeps.
#[test]
fn sutskevers_nesterov_is_ours_at_the_point_where_the_gradient_is_taken() {
    let (lr, mu) = (0.1, 0.9);
    let config = SgdConfig::sutskever_2013(lr)
        .momentum(mu)
        .nesterov(true)
        .build()
        .unwrap();
    let curvature = |x: f64| 0.7 * x;
    let (mut theta, mut v) = (1.0, 0.0);
    let mut ours = Oracle::new(&[1.0], Roundoff::NEAREST);
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
    let mut oracle = Oracle::new(&values(1, 20), Roundoff::NEAREST);
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
            .coupled_weight_decay(0.02)
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
