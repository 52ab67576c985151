//! A twin's step over values that are not stored as it computes: a block at a time, through `f32` that stay in the
//! first-level cache.

use pulp::{Arch, Simd, WithSimd};

use super::slices::{Words, WordsMut};
use crate::control::Factors;
use crate::rules::{MAX_SLOTS, Scalars, Twin};
use crate::storage::{Key, Random, Storage, rest, round, unpack};

/// Elements of a block: with two slots, four arrays of a KiB. Larger ones hold up what is read ahead from memory.
const BLOCK_ELEMS: usize = 256;

type Block = [f32; BLOCK_ELEMS];

/// Elements of a block of `f32` whose gradients alone are copied: a call of the twin costs as much as some hundred elements.
const SCALED_ELEMS: usize = 2048;

/// The properties of a tensor that a step needs beside its values.
#[derive(Clone, Copy)]
pub(super) struct Stored {
    pub(super) storage: Storage,
    pub(super) key: Key,
    /// The tensor's element that comes first.
    pub(super) start: usize,
    /// The factors that the gradients go through, if they do not come as they are.
    pub(super) factors: Option<Factors>,
}

/// One step of a rule over some elements of a tensor: `state` has the slots that it keeps, and behind them the masters,
/// if there are any.
pub(super) fn step<R: Twin>(
    config: &R,
    scalars: &Scalars,
    stored: Stored,
    params: WordsMut<'_>,
    state: &mut [WordsMut<'_>],
    grads: Words<'_>,
) {
    over(stored, params, state, grads, |theta, values, g| {
        config.step(scalars, theta, values, g);
    });
}

/// Adds what some elements of a tensor contribute to the sums of a rule. What is stored is read and rounded again, which
/// changes nothing.
pub(super) fn measure<R: Twin>(
    config: &R,
    scalars: &Scalars,
    stored: Stored,
    params: WordsMut<'_>,
    state: &mut [WordsMut<'_>],
    grads: Words<'_>,
    sums: &mut [f64],
) {
    over(stored, params, state, grads, |theta, values, g| {
        let (mut state, kept): ([&[f32]; MAX_SLOTS], _) = (Default::default(), values.len());
        for (slot, values) in state.iter_mut().zip(values) {
            *slot = values;
        }
        config.measure(scalars, theta, &state[..kept], g, sums);
    });
}

/// Calls for values as a twin takes them, and stores what it makes of them: parameters, slots and gradients, all at once
/// or block by block.
fn over(
    stored: Stored,
    mut params: WordsMut<'_>,
    state: &mut [WordsMut<'_>],
    grads: Words<'_>,
    mut update: impl FnMut(&mut [f32], &mut [&mut [f32]], &[f32]),
) {
    let storage = stored.storage;
    if storage.is_f32() {
        return over_f32(stored.factors, params, state, grads, update);
    }
    let (slots, masters) = state.split_at_mut(storage.slots().len());
    let mut blocks: [Block; 2 + MAX_SLOTS] = [[0.0; BLOCK_ELEMS]; 2 + MAX_SLOTS];
    for start in (0..params.len()).step_by(BLOCK_ELEMS) {
        let elems = start..params.len().min(start + BLOCK_ELEMS);
        let [theta, g, unpacked @ ..] = &mut blocks;
        let (theta, g) = (&mut theta[..elems.len()], &mut g[..elems.len()]);
        let g = match (grads, stored.factors) {
            (Words::F32(grads), None) => &grads[elems.clone()],
            (Words::F32(grads), Some(factors)) => {
                Arch::new().dispatch(Scale(factors, &grads[elems.clone()], g));
                g
            }
            (Words::Half(grads), factors) => {
                unpack(storage.grads, &grads[elems.clone()], g);
                if let Some(factors) = factors {
                    Arch::new().dispatch(ScaleInPlace(factors, g));
                }
                g
            }
        };
        let mut values: [&mut [f32]; MAX_SLOTS] = Default::default();
        let kept = slots.len();
        let blocks = unpacked.iter_mut().zip(slots.iter_mut());
        let blocks = blocks.zip(storage.slots());
        for (values, ((unpacked, slot), codec)) in values.iter_mut().zip(blocks) {
            *values = match slot {
                WordsMut::F32(slot) => &mut slot[elems.clone()],
                WordsMut::Half(slot) => {
                    let unpacked = &mut unpacked[..elems.len()];
                    unpack(
                        codec.float().unwrap_or_default(),
                        &slot[elems.clone()],
                        unpacked,
                    );
                    unpacked
                }
            };
        }
        let mut update = |theta: &mut [f32]| update(theta, &mut values[..kept], g);
        let random = |number| {
            storage.is_stochastic.then_some(Random {
                key: stored.key,
                first: (stored.start + start) as u32,
                number,
            })
        };
        match (&mut params, &mut *masters) {
            (WordsMut::F32(params), _) => update(&mut params[elems.clone()]),
            (WordsMut::Half(params), []) => {
                let params = &mut params[elems.clone()];
                unpack(storage.params, params, theta);
                update(theta);
                round(storage.params, theta, random(0), params);
            }
            (WordsMut::Half(params), [WordsMut::F32(masters), ..]) => {
                let (params, masters) = (&mut params[elems.clone()], &mut masters[elems.clone()]);
                unpack(storage.params, params, theta);
                Arch::new().dispatch(Remember(theta, masters));
                update(masters);
                round(storage.params, masters, None, params);
            }
            (WordsMut::Half(params), [WordsMut::Half(rests), ..]) => {
                let (params, rests) = (&mut params[elems.clone()], &mut rests[elems.clone()]);
                Arch::new().dispatch(Join(params, rests, theta));
                update(theta);
                Arch::new().dispatch(Split(theta, params, rests));
            }
        }
        let slots = (1..).zip(slots.iter_mut()).zip(storage.slots());
        for (((number, slot), codec), unpacked) in slots.zip(unpacked) {
            if let WordsMut::Half(slot) = slot {
                let (slot, values) = (&mut slot[elems.clone()], &unpacked[..elems.len()]);
                round(
                    codec.float().unwrap_or_default(),
                    values,
                    random(number),
                    slot,
                );
            }
        }
    }
}

/// Calls for all elements at once, or in blocks where gradients go through factors.
fn over_f32(
    factors: Option<Factors>,
    params: WordsMut<'_>,
    state: &mut [WordsMut<'_>],
    grads: Words<'_>,
    mut update: impl FnMut(&mut [f32], &mut [&mut [f32]], &[f32]),
) {
    let (mut values, kept): ([&mut [f32]; MAX_SLOTS], _) = (Default::default(), state.len());
    for (values, slot) in values.iter_mut().zip(state) {
        if let WordsMut::F32(slot) = slot {
            *values = slot;
        }
    }
    let (WordsMut::F32(params), Words::F32(grads)) = (params, grads) else {
        return;
    };
    let Some(factors) = factors else {
        return update(params, &mut values[..kept], grads);
    };
    let mut scaled = [0.0; SCALED_ELEMS];
    let blocks = params.chunks_mut(SCALED_ELEMS);
    for (index, (params, grads)) in blocks.zip(grads.chunks(SCALED_ELEMS)).enumerate() {
        let scaled = &mut scaled[..grads.len()];
        Arch::new().dispatch(Scale(factors, grads, scaled));
        let start = index * SCALED_ELEMS;
        let mut block: [&mut [f32]; MAX_SLOTS] = Default::default();
        for (block, slot) in block.iter_mut().zip(&mut values[..kept]) {
            *block = &mut slot[start..start + params.len()];
        }
        update(params, &mut block[..kept], scaled);
    }
}

/// Gradients through their factors.
struct Scale<'a>(Factors, &'a [f32], &'a mut [f32]);

impl WithSimd for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self(factors, grads, to) = self;
        for (to, grad) in to.iter_mut().zip(grads) {
            *to = factors.apply(*grad);
        }
    }
}

struct ScaleInPlace<'a>(Factors, &'a mut [f32]);

impl WithSimd for ScaleInPlace<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self(factors, grads) = self;
        for grad in grads {
            *grad = factors.apply(*grad);
        }
    }
}

/// Parameters into masters that are zero: those that have not been made yet, and those of parameters that are zero.
struct Remember<'a>(&'a [f32], &'a mut [f32]);

impl WithSimd for Remember<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self(params, masters) = self;
        for (master, param) in masters.iter_mut().zip(params) {
            let bits = master.to_bits();
            *master = f32::from_bits(if bits == 0 { param.to_bits() } else { bits });
        }
    }
}

/// Halves and rests into values.
struct Join<'a>(&'a [u16], &'a [u16], &'a mut [f32]);

impl WithSimd for Join<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self(halves, rests, to) = self;
        for ((to, half), rest) in to.iter_mut().zip(halves).zip(rests) {
            *to = f32::from_bits(rest::join(*half, *rest));
        }
    }
}

/// Values into halves and rests.
struct Split<'a>(&'a [f32], &'a mut [u16], &'a mut [u16]);

impl WithSimd for Split<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self(values, halves, rests) = self;
        for ((value, half), rest) in values.iter().zip(halves).zip(rests) {
            (*half, *rest) = rest::split(value.to_bits());
        }
    }
}
