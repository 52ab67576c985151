//! The CPU twin: one element at a time, in the names and the statement order of `shaders/rules/sgd.wgsl`.

use super::{Coefficients, Terms};
use crate::rules::Real;

/// `d = g + lambda*theta`
#[inline(always)]
pub(crate) fn direction<T: Real>(k: &Coefficients<T>, has: Terms, theta: T, g: T) -> T {
    if has.lambda { g + k.lambda * theta } else { g }
}

/// `v = alpha*v + c*d`
#[inline(always)]
pub(crate) fn next_velocity<T: Real>(k: &Coefficients<T>, has: Terms, v: T, d: T) -> T {
    if has.c {
        k.alpha * v + k.c * d
    } else {
        k.alpha * v + d
    }
}

/// `theta = rho*theta - (a*v + b*d)`
#[inline(always)]
pub(crate) fn next_params<T: Real>(k: &Coefficients<T>, has: Terms, theta: T, v: T, d: T) -> T {
    let mut update = k.a * v;
    if has.b {
        update = update + k.b * d;
    }
    decayed(k, has, theta) - update
}

/// `theta = rho*theta - b*d`
#[inline(always)]
pub(crate) fn next_params_plain<T: Real>(k: &Coefficients<T>, has: Terms, theta: T, d: T) -> T {
    decayed(k, has, theta) - k.b * d
}

#[inline(always)]
fn decayed<T: Real>(k: &Coefficients<T>, has: Terms, theta: T) -> T {
    if has.rho { k.rho * theta } else { theta }
}

/// One momentum step over whole tensors: the twin of the entry points `sgd` and `sgd_scalar`.
///
/// All three slices hold one value per element; of unequal lengths the shortest counts. `params` and
/// `velocity` are updated in place.
// Not inlined: the slices' promise not to overlap, on which vectorising hangs, is lost in some callers.
#[inline(never)]
pub fn sgd<T: Real>(
    k: &Coefficients<T>,
    has: Terms,
    params: &mut [T],
    velocity: &mut [T],
    grads: &[T],
) {
    for ((theta, v), g) in params.iter_mut().zip(velocity).zip(grads) {
        let d = direction(k, has, *theta, *g);
        *v = next_velocity(k, has, *v, d);
        *theta = next_params(k, has, *theta, *v, d);
    }
}

/// One step of plain gradient descent over whole tensors: the twin of the entry points `sgd_plain` and
/// `sgd_plain_scalar`.
///
/// Both slices hold one value per element; of unequal lengths the shorter counts. `params` is updated in
/// place.
#[inline(never)]
pub fn sgd_plain<T: Real>(k: &Coefficients<T>, has: Terms, params: &mut [T], grads: &[T]) {
    for (theta, g) in params.iter_mut().zip(grads) {
        let d = direction(k, has, *theta, *g);
        *theta = next_params_plain(k, has, *theta, d);
    }
}
