//! The twin's loops in the widest vectors that the machine has, one loop per set of terms.

use pulp::{Arch, Simd, WithSimd};

use super::reference::{direction, next_params, next_params_plain, next_velocity};
use super::{Coefficients, Terms};

/// Elements that are loaded before any is stored. A store that might be to the next load's address holds that load
/// up, and where arrays start alike in their pages it looks as if it were.
const BLOCK_ELEMS: usize = 32;

type Block = [f32; BLOCK_ELEMS];

/// A block of what `element` says. `std::array::from_fn` is not vectorised at this length.
#[inline(always)]
fn block_of(element: impl Fn(usize) -> f32) -> Block {
    let mut block = [0.0; BLOCK_ELEMS];
    for (i, value) in block.iter_mut().enumerate() {
        *value = element(i);
    }
    block
}

/// One step over a tensor or a part of one; bit for bit the one-thread reference. Without momentum `velocity` is
/// not looked at.
pub(super) fn step(
    k: &Coefficients<f32>,
    has: Terms,
    params: &mut [f32],
    velocity: &mut [f32],
    grads: &[f32],
) {
    let run = match (has.c, has.lambda, has.b, has.rho) {
        (false, false, false, false) => dispatch::<false, false, false, false>,
        (false, false, false, true) => dispatch::<false, false, false, true>,
        (false, false, true, false) => dispatch::<false, false, true, false>,
        (false, false, true, true) => dispatch::<false, false, true, true>,
        (false, true, false, false) => dispatch::<false, true, false, false>,
        (false, true, false, true) => dispatch::<false, true, false, true>,
        (false, true, true, false) => dispatch::<false, true, true, false>,
        (false, true, true, true) => dispatch::<false, true, true, true>,
        (true, false, false, false) => dispatch::<true, false, false, false>,
        (true, false, false, true) => dispatch::<true, false, false, true>,
        (true, false, true, false) => dispatch::<true, false, true, false>,
        (true, false, true, true) => dispatch::<true, false, true, true>,
        (true, true, false, false) => dispatch::<true, true, false, false>,
        (true, true, false, true) => dispatch::<true, true, false, true>,
        (true, true, true, false) => dispatch::<true, true, true, false>,
        (true, true, true, true) => dispatch::<true, true, true, true>,
    };
    run(k, has.velocity, params, velocity, grads);
}

fn dispatch<const C: bool, const LAMBDA: bool, const B: bool, const RHO: bool>(
    k: &Coefficients<f32>,
    momentum: bool,
    params: &mut [f32],
    velocity: &mut [f32],
    grads: &[f32],
) {
    let arch = Arch::new();
    if momentum {
        arch.dispatch(Momentum::<C, LAMBDA, B, RHO> {
            k,
            params,
            velocity,
            grads,
        });
    } else {
        arch.dispatch(Plain::<C, LAMBDA, B, RHO> { k, params, grads });
    }
}

const fn terms<const C: bool, const LAMBDA: bool, const B: bool, const RHO: bool>(
    velocity: bool,
) -> Terms {
    Terms {
        velocity,
        c: C,
        lambda: LAMBDA,
        b: B,
        rho: RHO,
    }
}

struct Momentum<'a, const C: bool, const LAMBDA: bool, const B: bool, const RHO: bool> {
    k: &'a Coefficients<f32>,
    params: &'a mut [f32],
    velocity: &'a mut [f32],
    grads: &'a [f32],
}

impl<const C: bool, const LAMBDA: bool, const B: bool, const RHO: bool> WithSimd
    for Momentum<'_, C, LAMBDA, B, RHO>
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (k, has) = (*self.k, terms::<C, LAMBDA, B, RHO>(true));
        let (params, params_end) = self.params.as_chunks_mut::<BLOCK_ELEMS>();
        let (velocity, velocity_end) = self.velocity.as_chunks_mut::<BLOCK_ELEMS>();
        let (grads, grads_end) = self.grads.as_chunks::<BLOCK_ELEMS>();
        for ((params, velocity), grads) in params.iter_mut().zip(velocity).zip(grads) {
            let (theta, v, g) = (*params, *velocity, *grads);
            let d = block_of(|i| direction(&k, has, theta[i], g[i]));
            let v = block_of(|i| next_velocity(&k, has, v[i], d[i]));
            *velocity = v;
            *params = block_of(|i| next_params(&k, has, theta[i], v[i], d[i]));
        }
        for ((theta, v), g) in params_end.iter_mut().zip(velocity_end).zip(grads_end) {
            let d = direction(&k, has, *theta, *g);
            *v = next_velocity(&k, has, *v, d);
            *theta = next_params(&k, has, *theta, *v, d);
        }
    }
}

struct Plain<'a, const C: bool, const LAMBDA: bool, const B: bool, const RHO: bool> {
    k: &'a Coefficients<f32>,
    params: &'a mut [f32],
    grads: &'a [f32],
}

impl<const C: bool, const LAMBDA: bool, const B: bool, const RHO: bool> WithSimd
    for Plain<'_, C, LAMBDA, B, RHO>
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (k, has) = (*self.k, terms::<C, LAMBDA, B, RHO>(false));
        let (params, params_end) = self.params.as_chunks_mut::<BLOCK_ELEMS>();
        let (grads, grads_end) = self.grads.as_chunks::<BLOCK_ELEMS>();
        for (params, grads) in params.iter_mut().zip(grads) {
            let (theta, g) = (*params, *grads);
            let d = block_of(|i| direction(&k, has, theta[i], g[i]));
            *params = block_of(|i| next_params_plain(&k, has, theta[i], d[i]));
        }
        for (theta, g) in params_end.iter_mut().zip(grads_end) {
            let d = direction(&k, has, *theta, *g);
            *theta = next_params_plain(&k, has, *theta, d);
        }
    }
}
