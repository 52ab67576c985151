//! Coefficients that the schedule-free rules have in common (Defazio et al. 2024, <https://arxiv.org/abs/2405.15682>).

use super::elementwise::started;

/// The rise of the learning rate, and with it of what each step weighs in the average.
#[derive(Clone, Copy)]
pub(super) struct Rise {
    /// Steps over which it rises.
    pub(super) warmup_steps: u64,
    /// Whether the step itself is made with the learning rate of the step before, as in optax.
    pub(super) from_zero: bool,
    /// The decay of an average of squares whose bias correction is in the learning rate; zero without one.
    pub(super) beta2: f64,
}

impl Rise {
    /// The learning rate of step `t`, which counts from one, over that after the warm-up.
    fn warmed_up(&self, t: u64) -> f64 {
        match self.warmup_steps {
            0 => 1.0,
            steps => (t as f64 / steps as f64).min(1.0),
        }
    }

    /// The factor of the learning rate at step `t`, which counts from one, and the share of the step's point in the average
    /// of all points so far, in which each weighs as the square of its learning rate, the bias correction included.
    pub(super) fn at(&self, t: u64) -> (f64, f64) {
        let warmup = self.warmup_steps;
        let each = Corrections::of_step(self.beta2);
        let [rise, rest] = [t.min(warmup), t.saturating_sub(warmup)].map(|steps| each.over(steps));
        let last = rise.then(rest).last;
        // Over the square of a step of the warm-up: i^2 so far as that lasts, then warmup^2.
        let top = warmup.max(1) as f64;
        let weight = (t as f64).min(top).powi(2) * last;
        let all = rise.times_powers[2] + top * top * rise.behind(&rest)[0];
        let rate = self.warmed_up(if self.from_zero { t - 1 } else { t });
        (rate * last.sqrt(), weight / all)
    }
}

/// The bias corrections `1 - beta^i` of steps `1..=n`.
#[derive(Clone, Copy)]
struct Corrections {
    n: f64,
    /// The correction of step `n`.
    last: f64,
    /// Their sums: of each as it is, times `i`, and times `i^2`. All is positive, so nothing cancels.
    times_powers: [f64; 3],
}

impl Corrections {
    const NONE: Self = Self {
        n: 0.0,
        last: 0.0,
        times_powers: [0.0; 3],
    };

    fn of_step(beta: f64) -> Self {
        Self {
            n: 1.0,
            last: 1.0 - beta,
            times_powers: [1.0 - beta; 3],
        }
    }

    /// The corrections of so many steps, where these are of one: by doubling, because every dispatch asks for them.
    fn over(self, steps: u64) -> Self {
        if self.last == 1.0 && steps > 0 {
            let (n, times_powers) = (steps as f64, powers(steps as f64));
            return Self {
                n,
                times_powers,
                ..self
            };
        }
        let (mut all, mut doubled, mut left) = (Self::NONE, self, steps);
        while left > 0 {
            if left % 2 == 1 {
                all = all.then(doubled);
            }
            doubled = doubled.then(doubled);
            left /= 2;
        }
        all
    }

    /// The sums over the steps behind these, as many as `next` has: `1 - beta^(n + j) = last + (1 - last)*(1 - beta^j)`, as
    /// it is, times `j`, and times `j^2`.
    fn behind(&self, next: &Self) -> [f64; 3] {
        let powers = powers(next.n);
        let sum = |p: usize| self.last * powers[p] + (1.0 - self.last) * next.times_powers[p];
        [sum(0), sum(1), sum(2)]
    }

    fn then(self, next: Self) -> Self {
        let ([zeroth, first, second], n) = (self.behind(&next), self.n);
        let [of_zeroth, of_first, of_second] = self.times_powers;
        Self {
            n: n + next.n,
            last: self.last + (1.0 - self.last) * next.last,
            times_powers: [
                of_zeroth + zeroth,
                of_first + n * zeroth + first,
                of_second + n * n * zeroth + 2.0 * n * first + second,
            ],
        }
    }
}

/// The sums of `1`, `i` and `i^2` over `i = 1..=n`.
fn powers(n: f64) -> [f64; 3] {
    let first = n * (n + 1.0) / 2.0;
    [n, first, first * (2.0 * n + 1.0) / 3.0]
}

/// The average, from the point `y` where gradients are taken and the point `z` that moves; `z` may not have started.
pub(super) fn averaged(beta1: f64, params: &[f32], z: &[f32]) -> Vec<f32> {
    let x = |(y, z): (&f32, &f32)| {
        let (y, z) = (f64::from(*y), f64::from(started(*z, *y)));
        (y - (1.0 - beta1) * z) / beta1
    };
    params.iter().zip(z).map(|point| x(point) as f32).collect()
}

/// The range of `beta1`, which the average is divided by.
pub(super) fn check_beta1(beta1: f64) -> Result<(), super::ConfigError> {
    if beta1 > 0.0 && beta1 <= 1.0 {
        return super::error::check_held("beta1", beta1, 1.0);
    }
    Err(super::ConfigError::OutOfRange {
        field: "beta1",
        value: beta1,
        expected: "0 < x <= 1",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The weights added up one after the other.
    #[test]
    fn shares_are_those_of_all_weights_added_up_however_long_a_run() {
        for warmup_steps in [0, 1, 7, 1000] {
            for beta2 in [0.0, 0.9, 0.999, 0.999_999_9] {
                let rise = |from_zero| Rise {
                    warmup_steps,
                    from_zero,
                    beta2,
                };
                let (mut product, mut sum) = (1.0, 0.0);
                for t in 1..=3000 {
                    product *= beta2;
                    // In exact arithmetic one less the product, which would cancel.
                    let correction = -f64::exp_m1(t as f64 * f64::ln_1p(beta2 - 1.0));
                    let correction = if product == 0.0 { 1.0 } else { correction };
                    let warmed_up = (t as f64 / warmup_steps.max(1) as f64).min(1.0);
                    let weight = warmed_up.powi(2) * correction;
                    sum += weight;
                    let (rate, share) = rise(false).at(t);
                    let close = |x: f64, y: f64| (x - y).abs() <= 1e-9 * y;
                    assert!(close(rate, weight.sqrt()), "{rate} at {t}");
                    assert!(close(share, weight / sum), "{share} at {t}");

                    let (late, same) = rise(true).at(t);
                    assert_eq!(same, share);
                    let before = ((t - 1) as f64 / warmup_steps.max(1) as f64).min(1.0);
                    let before = if warmup_steps == 0 { 1.0 } else { before };
                    assert!(close(late, before * correction.sqrt()), "{late} at {t}");
                }
            }
        }
        let (rate, share) = Rise {
            warmup_steps: 1 << 40,
            from_zero: false,
            beta2: 0.999,
        }
        .at(u64::MAX);
        assert!(rate == 1.0 && share > 0.0 && share < 1e-15);
    }
}
