//! What the schedule-free rules have in common (Defazio et al. 2024, <https://arxiv.org/abs/2405.15682>).

/// The learning rate of step `t`, which counts from one, over that after the warm-up.
fn warmed_up(warmup_steps: u64, t: u64) -> f64 {
    match warmup_steps {
        0 => 1.0,
        steps => (t as f64 / steps as f64).min(1.0),
    }
}

/// The learning rate of step `t`, which counts from one, and the share of its point in the average of all points so far,
/// in which each weighs as the square of its learning rate.
pub(super) fn rate_and_share(lr: f64, warmup_steps: u64, t: u64) -> (f64, f64) {
    let rate = warmed_up(warmup_steps, t);
    // Over the square of the learning rate after the warm-up: so far as it lasts the sum of (i/steps)^2, then of ones.
    let (risen, steps) = (t.min(warmup_steps) as f64, warmup_steps as f64);
    let weights = match warmup_steps {
        0 => t as f64,
        _ => {
            let of_rise = risen * (risen + 1.0) * (2.0 * risen + 1.0) / (6.0 * steps * steps);
            of_rise + t.saturating_sub(warmup_steps) as f64
        }
    };
    (lr * rate, rate * rate / weights)
}

/// The average, from the point `y` where gradients are taken and the point `z` that moves.
pub(super) fn averaged(beta1: f64, params: &[f32], z: &[f32]) -> Vec<f32> {
    let x = |(y, z): (&f32, &f32)| (f64::from(*y) - (1.0 - beta1) * f64::from(*z)) / beta1;
    params.iter().zip(z).map(|point| x(point) as f32).collect()
}

/// The range of `beta1`, which the average is divided by.
pub(super) fn check_beta1(beta1: f64) -> Result<(), super::ConfigError> {
    if beta1 > 0.0 && beta1 <= 1.0 {
        return Ok(());
    }
    Err(super::ConfigError::OutOfRange {
        field: "beta1",
        value: beta1,
        expected: "0 < x <= 1",
    })
}
