//! Tensors that are not stored as f32, for the tests of every tier.

use wgpu_optim::rules::Slots;
use wgpu_optim::storage::{Rounding, Storage};
use wgpu_optim::{Masters, Precision, StorageType, half};

/// How a tensor is given, and how its group remembers it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stored {
    pub params: StorageType,
    pub grads: StorageType,
    pub precision: Precision,
}

impl Stored {
    pub fn storage(&self, slots: &Slots) -> Storage {
        Storage::new(self.params, self.grads, slots.kept_names(), &self.precision)
    }
}

/// Types of slots that not all others of their rule have.
const OF_SLOTS: [&[(&str, StorageType)]; 3] = [
    &[("exp_avg", StorageType::Bf16)],
    &[("exp_avg_sq", StorageType::F32), ("z", StorageType::F16)],
    &[
        ("exp_avg", StorageType::F16),
        ("max_exp_avg_sq", StorageType::Bf16),
    ],
];

/// Every way that differs for a rule with these slots, but for that all of f32.
pub fn all(slots: &Slots) -> Vec<Stored> {
    let (types, mut found) = (StorageType::ALL, Vec::<Stored>::new());
    let mut add = |stored: Stored| {
        let storage = stored.storage(slots);
        let is_new = found.iter().all(|other| other.storage(slots) != storage);
        if is_new && !storage.is_f32() {
            found.push(stored);
        }
    };
    let masters = [Masters::None, Masters::F32, Masters::LowBits];
    let roundings = [Rounding::Nearest, Rounding::Stochastic { seed: 11 }];
    for (params, grads, state) in types
        .iter()
        .flat_map(|p| types.iter().map(move |g| (*p, *g)))
        .flat_map(|(p, g)| types.map(|s| (p, g, s)))
    {
        for (masters, rounding) in masters.iter().flat_map(|m| roundings.map(|r| (*m, r))) {
            let precision = Precision {
                state,
                masters,
                rounding,
                ..Precision::default()
            };
            let stored = Stored {
                params,
                grads,
                precision,
            };
            add(stored);
            // By turns.
            let mixed = OF_SLOTS[(params as usize + grads as usize + state as usize) % 3];
            if mixed
                .iter()
                .all(|(name, _)| slots.kept_names().any(|kept| kept == *name))
            {
                let mut mixed_stored = stored;
                mixed_stored.precision.slots = mixed;
                add(mixed_stored);
            }
        }
    }
    found
}

/// The bits of values that a type holds, rounded to it.
pub fn halves(of: StorageType, values: &[f32]) -> Vec<u16> {
    let half = |value: &f32| match of {
        StorageType::Bf16 => half::bf16::from_f32(*value).to_bits(),
        StorageType::F16 => half::f16::from_f32(*value).to_bits(),
        StorageType::F32 => panic!("these are none of 16 bits"),
    };
    values.iter().map(half).collect()
}

/// Values as they lie in memory.
pub fn encode(of: StorageType, values: &[f32]) -> Vec<u8> {
    match of {
        StorageType::F32 => bytemuck::cast_slice(values).to_vec(),
        of => bytemuck::cast_slice(&halves(of, values)).to_vec(),
    }
}

/// Values that lie in memory.
pub fn decode(of: StorageType, bytes: &[u8]) -> Vec<f32> {
    let halves = || bytemuck::pod_collect_to_vec::<u8, u16>(bytes).into_iter();
    match of {
        StorageType::F32 => bytemuck::pod_collect_to_vec(bytes),
        StorageType::Bf16 => halves().map(half::bf16::from_bits).map(f32::from).collect(),
        StorageType::F16 => halves().map(half::f16::from_bits).map(f32::from).collect(),
    }
}

/// What values become in a type.
pub fn rounded(of: StorageType, values: &[f32]) -> Vec<f32> {
    decode(of, &encode(of, values))
}
