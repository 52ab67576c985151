//! What is known of momentum, as tests, each with its source.

use wgpu_optim::SgdConfig;
use wgpu_optim::rules::sgd::reference::{sgd, sgd_plain};
use wgpu_optim::rules::sgd::{Coefficients, MomentumForm, Terms};

use crate::cases::in_form;
use crate::test;

/// Positions of one coordinate in double precision, the start first.
fn run(config: &SgdConfig, start: f64, steps: usize, slope: impl Fn(f64) -> f64) -> Vec<f64> {
    let has = Terms::of(config);
    let (mut theta, mut v) = ([start], [0.0]);
    let mut positions = vec![start];
    for step in 0..steps {
        let k = Coefficients::new(config, step == 0);
        let g = [slope(theta[0])];
        if has.velocity {
            sgd(&k, has, &mut theta, &mut v, &g);
        } else {
            sgd_plain(&k, has, &mut theta, &g);
        }
        positions.push(theta[0]);
    }
    positions
}

/// Without friction a constant gradient accelerates: after N steps the sum of 1 to N single steps.
/// Sutskever et al. 2013, section 2: velocity accumulates in directions of persistent descent.
#[test]
fn undamped_steps_travel_a_quadratic_distance() {
    for form in [
        MomentumForm::HeavyBall,
        MomentumForm::LrInside,
        MomentumForm::Particle,
    ] {
        let config = in_form(form, 0.25, 1.0);
        let positions = run(&config, 0.0, 100, |_| -1.0);
        for (n, position) in positions.iter().enumerate() {
            // All terms are multiples of a quarter, so there is no rounding.
            assert_eq!(*position, 0.25 * (n * (n + 1) / 2) as f64, "{form}");
        }
    }
}

/// Under a constant gradient the velocity tends to g/(1-alpha) as alpha^n.
/// Goodfellow, Bengio and Courville 2016, Deep Learning, section 8.3.2.
#[test]
fn terminal_velocity_is_a_geometric_sum() {
    for alpha in [0.5, 0.9, 0.99] {
        let config = SgdConfig::builder(1.0).momentum(alpha).build().unwrap();
        let positions = run(&config, 0.0, 3000, |_| -2.0);
        let terminal = 2.0 / (1.0 - alpha);
        for n in [1, 2, 10, 100, 3000] {
            let velocity = positions[n] - positions[n - 1];
            let expected = terminal * (1.0 - alpha.powi(n as i32));
            // Differences of positions up to 3000*terminal.
            let epsilon = 3000.0 * terminal * 4.0 * f64::EPSILON;
            approx::assert_abs_diff_eq!(velocity, expected, epsilon = epsilon);
        }
    }
}

/// The averaged form forgets its start: under a constant gradient its steps become those of plain descent.
/// optax documentation of `ema`; follows from the geometric sum above times 1-alpha.
#[test]
fn the_averaged_form_settles_to_plain_descent() {
    let averaged = SgdConfig::builder(0.1)
        .momentum(0.9)
        .form(MomentumForm::Ema)
        .build()
        .unwrap();
    let positions = run(&averaged, 0.0, 500, |_| 3.0);
    let plain = run(&SgdConfig::builder(0.1).build().unwrap(), 0.0, 1, |_| 3.0);
    let last_step = positions[500] - positions[499];
    approx::assert_relative_eq!(last_step, plain[1], max_relative = 1e-10);
}

/// Nesterov's accelerated gradient with constant momentum on a strongly convex quadratic: with lr = 1/L and
/// mu = (sqrt(L)-sqrt(m))/(sqrt(L)+sqrt(m)), f(x_n) - f* <= (1-sqrt(m/L))^n * (f(x_0) - f* + m/2*|x_0 - x*|^2).
/// Nesterov 2004, Introductory Lectures on Convex Optimization, theorem 2.2.3.
#[test]
fn nesterovs_bound_holds_on_a_quadratic() {
    for condition in [10.0_f64, 100.0, 1000.0] {
        let root = condition.sqrt();
        let config = SgdConfig::builder(1.0 / condition)
            .momentum((root - 1.0) / (root + 1.0))
            .nesterov(true)
            .build()
            .unwrap();
        // Every eigenvalue is a problem of its own; f and the distance are sums over them.
        let eigenvalues: Vec<_> = (0..20)
            .map(|i| condition.powf(f64::from(i) / 19.0))
            .collect();
        let paths: Vec<_> = eigenvalues
            .iter()
            .map(|h| run(&config, 1.0, 400, |x| h * x))
            .collect();
        // What this crate keeps is the point ahead; the bound is on the point behind it, x_n = y_n + mu-step
        // undone, where y_0 = x_0 and x_{n+1} = y_n - grad(y_n)/L.
        let value = |n: usize| -> f64 {
            let term = |(h, path): (&f64, &Vec<f64>)| {
                let behind = if n == 0 {
                    path[0]
                } else {
                    path[n - 1] * (1.0 - h / condition)
                };
                0.5 * h * behind * behind
            };
            eigenvalues.iter().zip(&paths).map(term).sum()
        };
        let start = value(0) + 0.5 * eigenvalues.len() as f64;
        let rate = 1.0 - 1.0 / root;
        for n in 0..400 {
            let bound = rate.powi(n as i32) * start;
            assert!(
                value(n) <= bound * (1.0 + 1e-9),
                "k = {condition}, step {n}"
            );
        }
        // Plain descent does not keep that bound where it is worth having.
        if condition >= 100.0 {
            let plain = SgdConfig::builder(1.0 / condition).build().unwrap();
            let slowest = run(&plain, 1.0, 400, |x| x)[400];
            assert!(0.5 * slowest * slowest > rate.powi(400) * start);
        }
    }
}

/// What is not finite goes where the formula takes it, and neighbours are untouched; on the GPU,
/// `adapter::parity` asks the same.
#[test]
fn infinite_and_nan_gradients_stay_in_their_element() {
    use crate::cases::{configs, values};
    use wgpu_optim::CpuOptimizer;
    use wgpu_optim::oracle::{Oracle, Roundoff};

    for config in configs() {
        let start = values(1, 67);
        let mut bad = values(2, 67);
        (bad[5], bad[33], bad[66]) = (f32::INFINITY, f32::NAN, f32::NEG_INFINITY);
        let mut params = start.clone();
        let mut optimizer = CpuOptimizer::new(config, [("theta", [67])]).unwrap();
        let mut oracle = Oracle::new(&start, Roundoff::NEAREST);
        for _ in 0..2 {
            optimizer.step(&mut [&mut params], &[&bad]).unwrap();
            oracle.step(&config, &bad);
            oracle
                .check_params(&params)
                .unwrap_or_else(|e| panic!("{config:?}: {e}"));
        }
        assert_eq!(params.iter().filter(|x| !x.is_finite()).count(), 3);
    }
}
