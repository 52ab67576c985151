//! Models, and gradients that each rank can make for all.

use wgpu_optim::cpu::TensorValues;
use wgpu_optim::{StorageType, TensorSpec};

/// Sizes that no number of ranks divides: nothing, less than there are ranks, less and more than alignment and buckets.
pub const SHAPES: [&[usize]; 8] = [
    &[5],
    &[0],
    &[77, 13],
    &[1],
    &[4097],
    &[2, 0, 3],
    &[31],
    &[3],
];

/// What of a model is the same on every rank.
pub struct Model {
    pub tensors: Vec<TensorSpec>,
    pub params: Vec<TensorValues>,
    seed: u64,
}

impl Model {
    /// Tensors of [`SHAPES`], every other one a bias, stored as these in turn.
    pub fn new(seed: u64, types: &[(StorageType, StorageType)]) -> Self {
        let tensor = |(index, shape): (usize, &&[usize])| {
            let kind = ["weight", "bias"][index % 2];
            let (params, grads) = types[index % types.len()];
            TensorSpec::new(format!("layer{index}.{kind}"), *shape)
                .params_type(params)
                .grads_type(grads)
        };
        let tensors: Vec<_> = SHAPES.iter().enumerate().map(tensor).collect();
        let values = |(index, tensor): (usize, &TensorSpec)| {
            TensorValues::new(
                tensor.params_type,
                &values(numel(tensor), [seed, index as u64, 0, 0]),
            )
        };
        Self {
            params: tensors.iter().enumerate().map(values).collect(),
            tensors,
            seed,
        }
    }

    /// The gradients of a rank at a step.
    pub fn grads(&self, rank: usize, step: u64) -> Vec<TensorValues> {
        let tensors = self.tensors.iter().enumerate();
        tensors
            .map(|(index, tensor)| {
                let seed = [self.seed, index as u64, 1 + rank as u64, step];
                TensorValues::new(tensor.grads_type, &values(numel(tensor), seed))
            })
            .collect()
    }

    /// Their mean over so many ranks, added up in order in `f64`.
    pub fn mean_grads(&self, ranks: usize, step: u64) -> Vec<Vec<f32>> {
        let of_ranks: Vec<_> = (0..ranks).map(|rank| self.grads(rank, step)).collect();
        (0..self.tensors.len())
            .map(|tensor| {
                let of_ranks: Vec<_> = of_ranks
                    .iter()
                    .map(|grads| grads[tensor].to_f32())
                    .collect();
                (0..of_ranks[0].len())
                    .map(|elem| {
                        let sum: f64 = of_ranks.iter().map(|grads| f64::from(grads[elem])).sum();
                        (sum / ranks as f64) as f32
                    })
                    .collect()
            })
            .collect()
    }
}

pub fn numel(tensor: &TensorSpec) -> usize {
    tensor.shape.iter().product()
}

fn values(numel: usize, seed: [u64; 4]) -> Vec<f32> {
    let seed = seed.iter().fold(0_u64, |seed, part| {
        (seed ^ part)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(31)
    });
    let mut random = fastrand::Rng::with_seed(seed);
    (0..numel).map(|_| random.f32() * 2.0 - 1.0).collect()
}

/// The bits of all values, to be compared.
pub fn bits(values: &TensorValues) -> Vec<u32> {
    match values {
        TensorValues::F32(values) => values.iter().map(|value| value.to_bits()).collect(),
        TensorValues::Bf16(values) => values.iter().map(|value| value.to_bits().into()).collect(),
        TensorValues::F16(values) => values.iter().map(|value| value.to_bits().into()).collect(),
    }
}
