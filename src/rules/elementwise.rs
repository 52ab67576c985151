//! Loops over slices for twins, in the widest vectors that the machine has.

use pulp::{Arch, Simd, WithSimd};

/// Elements that are loaded before any is stored. A store that might be to the next load's address holds that load
/// up, and where arrays start alike in their pages it looks as if it were.
const BLOCK_ELEMS: usize = 32;

/// What a rule does to one element, with so many slots of state.
pub(super) trait Element<const SLOTS: usize>: Copy {
    /// Returns the new parameter and the new slots. Has to be inlined, or it is not vectorised.
    fn update(self, theta: f32, g: f32, slots: [f32; SLOTS]) -> (f32, [f32; SLOTS]);
}

/// A way through slices of one length.
pub(super) trait Walk {
    fn walk<const SLOTS: usize>(
        element: impl Element<SLOTS>,
        params: &mut [f32],
        state: [&mut [f32]; SLOTS],
        grads: &[f32],
    );
}

/// One element after the other: what every other way is bit for bit the same as.
pub(super) struct InTurn;

impl Walk for InTurn {
    #[inline(always)]
    fn walk<const SLOTS: usize>(
        element: impl Element<SLOTS>,
        params: &mut [f32],
        state: [&mut [f32]; SLOTS],
        grads: &[f32],
    ) {
        for (i, (theta, g)) in params.iter_mut().zip(grads).enumerate() {
            let slots = std::array::from_fn(|slot| state[slot][i]);
            let (next, slots) = element.update(*theta, *g, slots);
            *theta = next;
            for (slot, value) in slots.into_iter().enumerate() {
                state[slot][i] = value;
            }
        }
    }
}

/// In vectors.
pub(super) struct Vectors;

impl Walk for Vectors {
    fn walk<const SLOTS: usize>(
        element: impl Element<SLOTS>,
        params: &mut [f32],
        state: [&mut [f32]; SLOTS],
        grads: &[f32],
    ) {
        Arch::new().dispatch(Blocks {
            element,
            params,
            state,
            grads,
        });
    }
}

struct Blocks<'a, E, const SLOTS: usize> {
    element: E,
    params: &'a mut [f32],
    state: [&'a mut [f32]; SLOTS],
    grads: &'a [f32],
}

impl<E: Element<SLOTS>, const SLOTS: usize> WithSimd for Blocks<'_, E, SLOTS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self {
            element,
            params,
            state,
            grads,
        } = self;
        let (params, params_end) = params.as_chunks_mut::<BLOCK_ELEMS>();
        let (grads, grads_end) = grads.as_chunks::<BLOCK_ELEMS>();
        let blocks = state.map(|slot| slot.as_chunks_mut::<BLOCK_ELEMS>());
        for (block, (params, grads)) in params.iter_mut().zip(grads).enumerate() {
            let (mut theta, g) = (*params, *grads);
            let mut slots: [[f32; BLOCK_ELEMS]; SLOTS] =
                std::array::from_fn(|s| blocks[s].0[block]);
            for i in 0..BLOCK_ELEMS {
                let values = std::array::from_fn(|slot| slots[slot][i]);
                let (next, values) = element.update(theta[i], g[i], values);
                theta[i] = next;
                for slot in 0..SLOTS {
                    slots[slot][i] = values[slot];
                }
            }
            for slot in 0..SLOTS {
                blocks[slot].0[block] = slots[slot];
            }
            *params = theta;
        }
        InTurn::walk(element, params_end, blocks.map(|(_, end)| end), grads_end);
    }
}

/// A slot that is made at its tensor's first step, which is NaN until then.
#[inline(always)]
pub(super) fn started(slot: f32, start: f32) -> f32 {
    if slot.is_nan() { start } else { slot }
}

/// WGSL's `sign`: zero of zero.
#[inline(always)]
pub(super) fn sign(x: f32) -> f32 {
    if x > 0.0 {
        1.0
    } else if x < 0.0 {
        -1.0
    } else {
        x
    }
}

/// WGSL's `max` where neither is NaN; `f32::max` is slower, as it has to look.
#[inline(always)]
pub(super) fn larger(x: f32, y: f32) -> f32 {
    if x < y { y } else { x }
}
