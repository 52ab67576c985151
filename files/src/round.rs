//! Rounds of local training, as in DiLoCo and federated averaging: what a global model and the local ones that started
//! from it have to have in common, and the pseudo-gradient that they make.

use wgpu_optim::StorageType;
use wgpu_optim::files::{Dtype, is_content_hash};
use wgpu_optim::half::{bf16, f16};
use wgpu_optim::storage::unpack;

use crate::model::{Model, Place, storage_type};

/// The metadata of a global model that say how many rounds have made it.
const OUTER_STEPS: &str = "wgpu_optim.outer_steps";

/// Values of 16 bits that are unpacked at a time.
const BLOCK_ELEMS: usize = 1024;

/// Models or weights that make no round.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RoundError {
    /// A tensor of the global model that a local one lacks.
    #[error("tensor {tensor:?} is not in the local model")]
    NotInLocal {
        /// The tensor.
        tensor: String,
    },
    /// A tensor of a local model that the global one lacks.
    #[error("tensor {tensor:?} is not in the global model")]
    NotInGlobal {
        /// The tensor.
        tensor: String,
    },
    /// A tensor that is not stored alike, or has another shape.
    #[error(
        "tensor {tensor:?}: the local model has {} of {:?}, the global one {} of {:?}",
        local.0, local.1, global.0, global.1
    )]
    Differs {
        /// The tensor.
        tensor: String,
        /// Its dtype and shape in the local model.
        local: (Dtype, Vec<usize>),
        /// Its dtype and shape in the global model.
        global: (Dtype, Vec<usize>),
    },
    /// A value that no mean can be taken of.
    #[error("tensor {tensor:?}: the {model} model's element {elem} is infinite or NaN")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// `local` or `global`.
        model: &'static str,
        /// The element.
        elem: u64,
    },
    /// Files of a global model that different rounds have written.
    #[error("the files of the global model are not of one round")]
    Mixed,
    /// A number of rounds that does not read.
    #[error("the global model's {OUTER_STEPS} is {actual:?}, expected a number")]
    Malformed {
        /// The text in its place.
        actual: String,
    },
    /// A global model that another round has made than the state: one of the two is of a run that was killed.
    #[error("it is of round {model}, and the state of round {state}")]
    OtherRound {
        /// The round that has made the model.
        model: u64,
        /// The round that has made the state.
        state: u64,
    },
    /// A weight that is negative or no number.
    #[error("weight {weight}: expected zero or a positive number")]
    Weight {
        /// The weight.
        weight: f64,
    },
    /// Weights that have no mean.
    #[error("the weights of all local models are zero, or their sum is infinite")]
    Weights,
}

/// The number of rounds that have made a global model, if it says so.
///
/// # Errors
/// [`RoundError`] if its files say different things, or no number.
pub fn outer_steps(global: &Model) -> Result<Option<u64>, RoundError> {
    // Its index is copied as it is.
    let shards = global.shards().iter();
    let metadata = shards.flat_map(|shard| &shard.header.metadata);
    let mut said = metadata.filter_map(|(key, value)| (key == OUTER_STEPS).then_some(value));
    let Some(first) = said.next() else {
        return Ok(None);
    };
    if said.any(|other| other != first) {
        return Err(RoundError::Mixed);
    }
    let malformed = |_| RoundError::Malformed {
        actual: first.to_owned(),
    };
    first.parse().map(Some).map_err(malformed)
}

/// Makes sure that a global model is of the round that a state is of, as far as it says: a run that was killed while it
/// replaced files may have left some of the round before.
///
/// # Errors
/// [`RoundError`] if it is not, or does not read.
pub fn check_round(global: &Model, state: Option<u64>) -> Result<(), RoundError> {
    match (outer_steps(global)?, state) {
        (Some(model), Some(state)) if model != state => {
            Err(RoundError::OtherRound { model, state })
        }
        _ => Ok(()),
    }
}

/// Makes the metadata of a global model's file those of the model that so many rounds have made.
pub fn set_outer_steps(metadata: &mut Vec<(String, String)>, steps: u64) {
    metadata.retain(|(key, _)| !is_content_hash(key) && key != OUTER_STEPS);
    metadata.push((OUTER_STEPS.to_owned(), steps.to_string()));
}

/// Returns every tensor that a round moves, as the global model and a local one have it, in the order of the global
/// model's files: those of F32, BF16 and F16.
///
/// # Errors
/// [`RoundError`] if one of the two models has a tensor that the other has not, or has otherwise.
pub fn tensors_of<'m>(
    global: &'m Model,
    local: &'m Model,
) -> Result<Vec<(Place<'m>, Place<'m>)>, RoundError> {
    let mut pairs = Vec::new();
    for place in global.in_place_order() {
        let entry = place.entry;
        if storage_type(entry.dtype).is_none() {
            continue;
        }
        let tensor = || entry.name.clone();
        let missing = || RoundError::NotInLocal { tensor: tensor() };
        let own = local.get(&entry.name).ok_or_else(missing)?;
        if own.entry.dtype != entry.dtype || own.entry.shape != entry.shape {
            return Err(RoundError::Differs {
                tensor: tensor(),
                local: (own.entry.dtype, own.entry.shape.clone()),
                global: (entry.dtype, entry.shape.clone()),
            });
        }
        pairs.push((place, own));
    }
    match local
        .in_place_order()
        .find(|place| global.get(&place.entry.name).is_none())
    {
        Some(place) => Err(RoundError::NotInGlobal {
            tensor: place.entry.name.clone(),
        }),
        None => Ok(pairs),
    }
}

/// Factors of values that are summed in order and in `f64`, and a divisor of the sum, so that it depends on nothing else.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightedSum {
    /// The factors, in the order in which values are summed.
    pub factors: Vec<f64>,
    /// The divisor of the sum.
    pub divisor: f64,
}

impl WeightedSum {
    /// The mean by these weights.
    ///
    /// # Errors
    /// [`RoundError`] if one is negative or no number, or all of them have no mean.
    pub fn mean(weights: Vec<f64>) -> Result<Self, RoundError> {
        let is_weight = |weight: &f64| *weight >= 0.0 && weight.is_finite();
        if let Some(weight) = weights.iter().copied().find(|weight| !is_weight(weight)) {
            return Err(RoundError::Weight { weight });
        }
        let divisor: f64 = weights.iter().sum();
        match divisor > 0.0 && divisor.is_finite() {
            true => Ok(Self {
                factors: weights,
                divisor,
            }),
            false => Err(RoundError::Weights),
        }
    }

    /// Adds values, as they are stored, by the factor of this place; in the order of the places.
    pub fn add(&self, place: usize, of: StorageType, bytes: &[u8], sums: &mut [f64]) {
        let (elem_bytes, factor) = (of.bytes() as usize, self.factors[place]);
        let (mut halves, mut values) = ([0; BLOCK_ELEMS], [0.0; BLOCK_ELEMS]);
        let blocks = bytes.chunks(BLOCK_ELEMS * elem_bytes);
        for (bytes, sums) in blocks.zip(sums.chunks_mut(BLOCK_ELEMS)) {
            let values = &mut values[..sums.len()];
            match of {
                StorageType::F32 => bytemuck::cast_slice_mut(values).copy_from_slice(bytes),
                of => {
                    let halves = &mut halves[..sums.len()];
                    bytemuck::cast_slice_mut(halves).copy_from_slice(bytes);
                    unpack(of, halves, values);
                }
            }
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += factor * f64::from(*value);
            }
        }
    }

    /// Divides sums to which every place has been added.
    pub fn divide(&self, sums: &mut [f64]) {
        for sum in sums {
            *sum /= self.divisor;
        }
    }

    /// Sums values that lie in one slice for each place, behind `sums`, and divides them.
    pub fn sum(&self, of: StorageType, of_places: &[&[u8]], sums: &mut Vec<f64>) {
        let first = sums.len();
        let bytes = of_places.first().map_or(0, |bytes| bytes.len());
        sums.resize(first + bytes / of.bytes() as usize, 0.0);
        let block_bytes = BLOCK_ELEMS * of.bytes() as usize;
        // Block by block, so that sums stay in the caches.
        for (index, sums) in sums[first..].chunks_mut(BLOCK_ELEMS).enumerate() {
            let start = index * block_bytes;
            for (place, bytes) in of_places.iter().enumerate() {
                let end = bytes.len().min(start + block_bytes);
                self.add(place, of, &bytes[start..end], sums);
            }
            self.divide(sums);
        }
    }
}

/// Puts pseudo-gradients in place of `grads`: parameters of the global model less the local ones' means, rounded once.
pub fn pseudo_gradients(params: &[f32], means: &[f64], grads: &mut Vec<f32>) {
    let moved = |(param, mean): (&f32, &f64)| (f64::from(*param) - mean) as f32;
    grads.clear();
    grads.extend(params.iter().zip(means).map(moved));
}

/// The first of some stored values that is infinite or no number.
#[must_use]
pub fn first_not_finite(of: StorageType, bytes: &[u8]) -> Option<usize> {
    let (words, halves) = (bytes.as_chunks().0, bytes.as_chunks().0);
    match of {
        StorageType::F32 => words
            .iter()
            .position(|word| !f32::from_le_bytes(*word).is_finite()),
        StorageType::Bf16 => halves
            .iter()
            .position(|half| !bf16::from_le_bytes(*half).is_finite()),
        StorageType::F16 => halves
            .iter()
            .position(|half| !f16::from_le_bytes(*half).is_finite()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_is_summed_in_order_whatever_the_blocks() {
        let numel = 2 * BLOCK_ELEMS + 5;
        let models: [Vec<f32>; 3] =
            [1.0, 0.3, -7.7].map(|scale| (0..numel).map(|elem| elem as f32 * scale).collect());
        let mean = WeightedSum {
            factors: vec![1.0, 2.5, 0.0],
            divisor: 3.5,
        };
        assert_eq!(WeightedSum::mean(vec![1.0, 2.5, 0.0]), Ok(mean.clone()));
        let bytes = models
            .each_ref()
            .map(|values| bytemuck::cast_slice::<_, u8>(values));
        let mut sums = vec![9.0];
        mean.sum(StorageType::F32, &bytes, &mut sums);
        assert_eq!((sums.len(), sums[0]), (numel + 1, 9.0));
        let mut one_by_one = vec![0.0; numel];
        for (place, bytes) in bytes.iter().enumerate() {
            mean.add(place, StorageType::F32, bytes, &mut one_by_one);
        }
        mean.divide(&mut one_by_one);
        assert_eq!(sums[1..], one_by_one);
        for (elem, sum) in sums[1..].iter().enumerate() {
            let [one, two, _] = models.each_ref().map(|values| f64::from(values[elem]));
            assert_eq!(*sum, (one + 2.5 * two) / 3.5);
        }
    }

    #[test]
    fn weights_without_a_mean_are_refused() {
        for (weights, error) in [
            (vec![1.0, -1e-3], RoundError::Weight { weight: -1e-3 }),
            (vec![0.0, 0.0], RoundError::Weights),
            (vec![f64::MAX, f64::MAX], RoundError::Weights),
            (
                vec![f64::INFINITY],
                RoundError::Weight {
                    weight: f64::INFINITY,
                },
            ),
        ] {
            assert_eq!(WeightedSum::mean(weights), Err(error));
        }
        assert!(matches!(
            WeightedSum::mean(vec![f64::NAN]),
            Err(RoundError::Weight { .. })
        ));
    }
}
