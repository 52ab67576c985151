//! The limits of the mechanical picture. The energy of a ball without friction is among the experiments of the
//! command.

use wgpu_optim::rules::sgd::physics::Particle;
use wgpu_optim::rules::sgd::reference::sgd;
use wgpu_optim::rules::sgd::{Coefficients, MomentumForm, Terms};
use wgpu_optim::{ConfigError, SgdConfig};

use crate::cases::in_form;
use crate::test;

const PARTICLE: Particle = Particle {
    mass: 2.0,
    friction: 0.5,
    time_step: 0.3,
    force_scale: 1.5,
};

/// Position and velocity after one step from `(theta, v)` on a slope `g`.
fn step(config: &SgdConfig, theta: f64, v: f64, g: f64) -> (f64, f64) {
    let (mut theta, mut v) = ([theta], [v]);
    let k = Coefficients::new(config, false);
    sgd(&k, Terms::of(config), &mut theta, &mut v, &[g]);
    (theta[0], v[0])
}

#[test]
fn one_step_is_semi_implicit_euler() {
    let config = PARTICLE.config().unwrap();
    let (theta, v, g) = (0.7, -0.4, 1.1);
    let Particle {
        mass,
        friction,
        time_step: dt,
        force_scale,
    } = PARTICLE;
    let acceleration = (-force_scale * g - friction * v) / mass;
    let new_v = v + dt * acceleration;
    let new_theta = theta + dt * new_v;
    let (stepped_theta, stepped_v) = step(&config, theta, v, g);
    approx::assert_relative_eq!(stepped_v, new_v, max_relative = 1e-14);
    approx::assert_relative_eq!(stepped_theta, new_theta, max_relative = 1e-14);
    // With the old velocity the particle would be elsewhere.
    assert!((stepped_theta - (theta + dt * v)).abs() > 0.05);
}

#[test]
fn a_massless_particle_that_stops_at_each_step_is_plain_gradient_descent() {
    for mass in [1.0, 1e-3, 1e-6] {
        let dt = 0.1;
        let friction = mass / dt;
        let particle = Particle {
            mass,
            friction,
            time_step: dt,
            force_scale: 2.0,
        };
        let config = particle.config().unwrap();
        assert!(!config.has_velocity());
        approx::assert_relative_eq!(config.lr(), 2.0 * dt / friction, max_relative = 1e-12);
    }
}

#[test]
fn a_heavy_particle_keeps_its_velocity() {
    let mut last = f64::INFINITY;
    for mass in [1e2, 1e4, 1e6, 1e8] {
        let config = Particle { mass, ..PARTICLE }.config().unwrap();
        let (_, v) = step(&config, 0.0, 3.0, 5.0);
        let change = (v - 3.0).abs();
        assert!(change < last / 50.0, "{mass}: {change}");
        last = change;
    }
}

#[test]
fn without_friction_the_momentum_is_one() {
    let config = Particle {
        friction: 0.0,
        ..PARTICLE
    }
    .config()
    .unwrap();
    assert_eq!(config.momentum(), 1.0);
    // On a plain it never comes to rest.
    let (mut theta, mut v) = (0.0, 1.0);
    for _ in 0..1000 {
        (theta, v) = step(&config, theta, v, 0.0);
    }
    assert_eq!(v, 1.0);
    approx::assert_relative_eq!(theta, 300.0, max_relative = 1e-10);
}

#[test]
fn there_and_back() {
    let config = PARTICLE.config().unwrap();
    let back = Particle::of(&config, PARTICLE.mass, PARTICLE.time_step);
    approx::assert_relative_eq!(back.friction, PARTICLE.friction, max_relative = 1e-12);
    approx::assert_relative_eq!(back.force_scale, PARTICLE.force_scale, max_relative = 1e-12);

    // Every form is some particle, and that particle visits the same points.
    for form in MomentumForm::ALL {
        let config = in_form(form, 0.2, 0.7);
        let particle = Particle::of(&config, 3.0, 0.5).config().unwrap();
        let converted = config.convert(MomentumForm::Particle, 0.5).unwrap().config;
        approx::assert_relative_eq!(particle.lr(), converted.lr(), max_relative = 1e-12);
        approx::assert_relative_eq!(
            particle.momentum(),
            converted.momentum(),
            max_relative = 1e-12
        );
    }
}

#[test]
fn impossible_particles_are_refused_by_name() {
    let field = |particle: Particle| match particle.config() {
        Err(ConfigError::OutOfRange { field, .. }) => field,
        other => panic!("expected a refusal, got {other:?}"),
    };
    let (mass, force_scale) = (1e-10, 1e30);
    let pushed = Particle {
        mass,
        force_scale,
        friction: 0.0,
        ..PARTICLE
    };
    assert_eq!(field(pushed), "lr");
    assert_eq!(
        field(Particle {
            time_step: 1e-3,
            force_scale: 1e32,
            ..pushed
        }),
        "lr/time_step"
    );
    assert_eq!(
        field(Particle {
            time_step: 1e-50,
            ..PARTICLE
        }),
        "time_step"
    );
    // Hardly pushed is not pushed.
    let at_rest = Particle {
        force_scale: 1e-50,
        ..PARTICLE
    };
    let k = Coefficients::new(&at_rest.config().unwrap(), false);
    assert_eq!(k.cast::<f32>().c, 0.0);
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert_eq!(
            field(Particle {
                mass: bad,
                ..PARTICLE
            }),
            "mass"
        );
        assert_eq!(
            field(Particle {
                time_step: bad,
                ..PARTICLE
            }),
            "time_step"
        );
    }
    for bad in [-1.0, f64::NAN, f64::INFINITY] {
        assert_eq!(
            field(Particle {
                friction: bad,
                ..PARTICLE
            }),
            "friction"
        );
        assert_eq!(
            field(Particle {
                force_scale: bad,
                ..PARTICLE
            }),
            "force_scale"
        );
    }
    // A step would turn the velocity around.
    assert_eq!(
        field(Particle {
            friction: 7.0,
            ..PARTICLE
        }),
        "friction"
    );
}
