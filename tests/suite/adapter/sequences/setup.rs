//! Rules, ways to store, places in memory and values that the sequences run with.

use super::*;

pub const CANARY: u8 = 0xa5;

/// What is run.
#[derive(Clone, Debug)]
pub struct Setup<R> {
    pub rule: R,
    pub stored: Stored,
    pub control: Option<StepControl>,
}

impl<R: Rule> Setup<R> {
    pub fn storage(&self) -> Storage {
        self.stored.storage(&self.rule.slots())
    }

    /// Whether every step has the same scalars, whatever has been counted.
    pub fn is_constant(&self) -> bool {
        let slots = self.rule.slots();
        let mut kept = slots.kept();
        let is_value = kept.all(|slot| matches!(slot.start, Start::Value(_)));
        is_value && (0..50).all(|count| self.rule.phase(count) == self.rule.phase(0))
    }

    /// Neighbours in memory, enough of them for a step to be in chunks; small ones apart, a larger one. State of sixteen
    /// bits moves by the word, so that neighbours end on words there.
    pub fn numels(&self) -> Vec<usize> {
        let in_a_row: [_; IN_A_ROW] = match self.storage().is_f32() {
            true => [5, 1000, 64, 1, 333, 3, 17, 256, 2, 31, 130],
            false => [6, 1000, 64, 2, 334, 4, 18, 256, 8, 30, 130],
        };
        in_a_row.into_iter().chain([8, 12, 64, 4099]).collect()
    }
}

pub const IN_A_ROW: usize = 11;

/// Elements in the offset alignment of any device, of any type.
pub const ALIGNMENT: usize = 128;

/// Where tensors may lie: neighbours in a row, all apart, all apart on no alignment.
pub const PLACES: usize = 3;

/// Sets of gradients: ordinary, small, large, and one that is not finite.
pub const GRADIENTS: usize = 4;
pub const POISONED: usize = 3;

/// One buffer of parameters and one of gradients.
pub struct Place {
    /// In elements.
    pub starts: Vec<usize>,
    pub params: wgpu::Buffer,
    pub grads: wgpu::Buffer,
    /// What the gradients may be.
    pub gradients: Vec<wgpu::Buffer>,
}

impl Place {
    pub fn new<R: Rule>(bench: &Bench, setup: &Setup<R>, place: usize, host: &Host) -> Self {
        let stored = &setup.stored;
        let mut starts = vec![0; host.numels.len()];
        let mut next = 0;
        let mut order: Vec<_> = (0..starts.len()).collect();
        if place == 1 {
            order.reverse();
        }
        for tensor in order {
            starts[tensor] = match place {
                0 if tensor < IN_A_ROW => next,
                // Whole words of sixteen bits.
                2 => next + if setup.storage().is_f32() { 5 } else { 6 },
                _ => next,
            };
            next = starts[tensor] + host.numels[tensor];
            if place != 0 || tensor + 1 >= IN_A_ROW {
                next = (next + 2).next_multiple_of(ALIGNMENT);
            }
        }
        let image = |of, values: &[Vec<f32>]| {
            let image = image(of, &starts, next, values);
            buffer_of_bytes(bench, &image)
        };
        let gradients = host.grads.iter().map(|grads| image(stored.grads, grads));
        Self {
            params: image(stored.params, &host.params),
            grads: image(stored.grads, &host.grads[0]),
            gradients: gradients.collect(),
            starts,
        }
    }
}

/// A buffer's bytes: values where tensors lie, canaries elsewhere.
pub fn image(of: StorageType, starts: &[usize], end: usize, values: &[Vec<f32>]) -> Vec<u8> {
    let size = of.bytes() as usize;
    let mut bytes = vec![CANARY; end * size];
    for (start, values) in starts.iter().zip(values) {
        bytes[start * size..(start + values.len()) * size].copy_from_slice(&encode(of, values));
    }
    bytes
}

pub fn buffer_of_bytes(bench: &Bench, bytes: &[u8]) -> wgpu::Buffer {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(4), CANARY);
    bench.buffer_of(&bytemuck::pod_collect_to_vec::<u8, f32>(&bytes))
}

/// What tensors start as, and the sets of their gradients.
pub struct Host {
    pub numels: Vec<usize>,
    pub params: Vec<Vec<f32>>,
    pub grads: Vec<Vec<Vec<f32>>>,
}

impl Host {
    pub fn new(stored: &Stored, numels: Vec<usize>, seed: u64) -> Self {
        let of = |of: StorageType, seed: u64, size: f32| -> Vec<Vec<f32>> {
            let tensors = (0..).zip(&numels);
            let values = tensors.map(|(i, numel)| values(seed + i, *numel));
            let scaled = values.map(|values| values.iter().map(|x| size * x).collect::<Vec<_>>());
            scaled.map(|values| rounded(of, &values)).collect()
        };
        let sizes = [1.0, 0.125, 3.0, 1.0];
        let mut grads: Vec<_> = (0..)
            .zip(sizes)
            .map(|(i, size)| of(stored.grads, seed + 100 * (i + 1), size))
            .collect();
        grads[POISONED][1][999] = f32::NAN;
        Self {
            params: of(stored.params, seed, 1.0),
            grads,
            numels,
        }
    }
}

pub fn groups<R: Rule>(setup: &Setup<R>) -> ParamGroups<R> {
    ParamGroups::new(setup.rule.clone()).with_precision(setup.stored.precision)
}

pub fn bindings<'a, R: Rule>(
    setup: &Setup<R>,
    host: &Host,
    names: &'a [String],
    place: &'a Place,
    absent: &[bool],
) -> Vec<TensorBinding<'a>> {
    let stored = &setup.stored;
    let present = (0..names.len()).filter(|tensor| !absent[*tensor]);
    let binding = |tensor: usize| {
        let [params, grads] =
            [stored.params, stored.grads].map(|of| of.bytes() * place.starts[tensor] as u64);
        let numel = host.numels[tensor];
        TensorBinding::new(&names[tensor], &place.params, &place.grads, [numel])
            .params_type(stored.params)
            .grads_type(stored.grads)
            .params_at(params)
            .grads_at(grads)
    };
    present.map(binding).collect()
}

pub fn stored(
    params: StorageType,
    grads: StorageType,
    state: StorageType,
    masters: Masters,
    rounding: storage::Rounding,
) -> Stored {
    let precision = Precision {
        state,
        masters,
        rounding,
        ..Precision::default()
    };
    Stored {
        params,
        grads,
        precision,
    }
}

/// Ways to store, of which each has something that starts with a first step or goes with each.
pub fn ways_to_store() -> [Stored; 8] {
    use StorageType::{Bf16, F16, F32};
    use storage::Rounding::{Nearest, Stochastic};
    let random = Stochastic { seed: 3 };
    [
        stored(F32, F32, F32, Masters::None, Nearest),
        stored(Bf16, Bf16, F32, Masters::F32, Nearest),
        stored(Bf16, F32, F32, Masters::LowBits, Nearest),
        stored(Bf16, Bf16, Bf16, Masters::None, Nearest),
        stored(Bf16, Bf16, F32, Masters::None, random),
        stored(F16, F16, F32, Masters::F32, Nearest),
        stored(F16, F32, F32, Masters::None, Nearest),
        stored(F32, F32, Bf16, Masters::None, random),
    ]
}

pub fn momentum() -> AnyRule {
    let config = SgdConfig::builder(0.05).momentum(0.9).dampening(0.3);
    config.build().unwrap().into()
}

pub fn preset(rule: &str, library: Option<&str>) -> AnyRule {
    AnyRule::preset(rule, library, 0.05).unwrap()
}

/// Scalars of the first step, of every step, slots that start as the parameters, by the first step, at a value, and nothing of
/// the kind.
pub fn rules() -> [AnyRule; 6] {
    [
        momentum(),
        preset("adamw", None),
        preset("schedule-free-adamw", None),
        preset("rprop", None),
        preset("adagrad", Some("keras")),
        SgdConfig::builder(0.05)
            .momentum(0.5)
            .build()
            .unwrap()
            .into(),
    ]
}

pub fn controls() -> [StepControl; 4] {
    let scale = LossScale {
        initial: 4.0,
        growth_interval: 2,
        ..LossScale::default()
    };
    [
        StepControl::builder(),
        StepControl::builder().max_norm(40.0),
        StepControl::builder().max_norm(10.0).loss_scale(scale),
        StepControl::builder()
            .tensor_max_norm(2.0)
            .loss_scale(scale),
    ]
    .map(|control| control.build().unwrap())
}
