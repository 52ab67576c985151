//! What an optimizer remembers between steps, in a form that does not depend on where it runs.

mod error;
#[cfg(feature = "safetensors")]
mod file;
#[cfg(feature = "safetensors")]
mod pytorch;

use std::collections::HashMap;

use crate::rules::ParamGroups;
use crate::rules::sgd::SgdConfig;
pub use error::{DuplicateName, StateError};
#[cfg(feature = "safetensors")]
pub use {error::StateFileError, file::StateRecord};

/// What an optimizer remembers of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorState {
    /// The tensor's name.
    pub name: String,
    /// Its shape, first dimension first; empty where a file did not say, because there is no velocity.
    pub shape: Vec<usize>,
    /// How many steps have been applied to it; a step at which it was frozen does not count.
    pub applied_steps: u64,
    /// Its velocity (`momentum_buffer` in PyTorch), one value per element; none before its first applied step
    /// and none without momentum.
    pub velocity: Option<Vec<f32>>,
}

/// What an optimizer remembers.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerState {
    /// The configuration at the time, that of the default group where there are several. Its form says what the
    /// velocities mean; the rest is for the record, an optimizer that loads the state keeps its own.
    pub config: SgdConfig,
    /// How many steps the optimizer has made, whatever was frozen: the position in a schedule.
    pub steps: u64,
    /// The states, in the order of the optimizer's tensors.
    pub tensors: Vec<TensorState>,
}

/// No tensor of this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the optimizer has no tensor {tensor:?}")]
pub struct UnknownTensor {
    /// The name.
    pub tensor: String,
}

/// Number of elements, the product of a shape; the largest number where that does not fit.
pub(crate) fn numel(shape: &[usize]) -> u64 {
    shape
        .iter()
        .fold(1, |numel: u64, size| numel.saturating_mul(*size as u64))
}

/// A tensor as the host sees it.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) numel: u64,
    pub(crate) group: usize,
    /// Whether its group has momentum.
    pub(crate) has_velocity: bool,
    pub(crate) applied_steps: u64,
    pub(crate) frozen: bool,
}

/// The tensors of an optimizer, in the order in which they were given, and how far it has come.
#[derive(Clone, Debug)]
pub(crate) struct Tensors {
    tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
    steps: u64,
}

impl Tensors {
    pub(crate) fn new(
        groups: &ParamGroups,
        tensors: impl IntoIterator<Item = (String, Vec<usize>)>,
    ) -> Result<Self, DuplicateName> {
        let fresh = |(name, shape): (String, Vec<usize>)| {
            let group = groups.index_of(&name);
            Tensor {
                group,
                has_velocity: groups.config(group).has_velocity(),
                name,
                numel: numel(&shape),
                shape,
                applied_steps: 0,
                frozen: false,
            }
        };
        let tensors: Vec<_> = tensors.into_iter().map(fresh).collect();
        let mut by_name = HashMap::with_capacity(tensors.len());
        for (index, tensor) in tensors.iter().enumerate() {
            if by_name.insert(tensor.name.clone(), index).is_some() {
                return Err(DuplicateName {
                    tensor: tensor.name.clone(),
                });
            }
        }
        Ok(Self {
            tensors,
            by_name,
            steps: 0,
        })
    }

    pub(crate) fn as_slice(&self) -> &[Tensor] {
        &self.tensors
    }

    pub(crate) fn steps(&self) -> u64 {
        self.steps
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).map(|index| &self.tensors[*index])
    }

    pub(crate) fn index_of(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    fn get_mut(&mut self, name: &str) -> Result<&mut Tensor, UnknownTensor> {
        match self.by_name.get(name) {
            Some(index) => Ok(&mut self.tensors[*index]),
            None => Err(UnknownTensor {
                tensor: name.to_owned(),
            }),
        }
    }

    /// Returns whether that changed anything.
    pub(crate) fn set_frozen(&mut self, name: &str, frozen: bool) -> Result<bool, UnknownTensor> {
        let before = std::mem::replace(&mut self.get_mut(name)?.frozen, frozen);
        Ok(before != frozen)
    }

    pub(crate) fn set_applied_steps(
        &mut self,
        name: &str,
        steps: u64,
    ) -> Result<(), UnknownTensor> {
        self.get_mut(name)?.applied_steps = steps;
        Ok(())
    }

    /// Counts a step, and for every tensor that is not frozen an applied one.
    pub(crate) fn count_step(&mut self) {
        // A loaded state may say any number.
        self.steps = self.steps.saturating_add(1);
        for tensor in self.tensors.iter_mut().filter(|tensor| !tensor.frozen) {
            tensor.applied_steps = tensor.applied_steps.saturating_add(1);
        }
    }

    /// What the optimizer remembers; `velocity_of` is asked for tensors that have been updated under momentum.
    pub(crate) fn state(
        &self,
        config: &SgdConfig,
        velocity_of: impl Fn(usize) -> Vec<f32>,
    ) -> OptimizerState {
        let tensor_state = |(index, tensor): (usize, &Tensor)| TensorState {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            applied_steps: tensor.applied_steps,
            velocity: (tensor.has_velocity && tensor.applied_steps > 0).then(|| velocity_of(index)),
        };
        OptimizerState {
            config: *config,
            steps: self.steps,
            tensors: self.tensors.iter().enumerate().map(tensor_state).collect(),
        }
    }

    /// Checks a whole state against these tensors and returns the entry of each, in their order.
    pub(crate) fn match_state<'s>(
        &self,
        state: &'s OptimizerState,
        config: &SgdConfig,
    ) -> Result<Vec<&'s TensorState>, StateError> {
        if state.config.form() != config.form() {
            return Err(StateError::Form {
                expected: config.form(),
                actual: state.config.form(),
            });
        }
        let mut entries = HashMap::with_capacity(state.tensors.len());
        for entry in &state.tensors {
            if entries.insert(entry.name.as_str(), entry).is_some() {
                return Err(StateError::DuplicateTensor {
                    tensor: entry.name.clone(),
                });
            }
        }
        let take = |tensor: &Tensor| {
            let name = || tensor.name.clone();
            let Some(entry) = entries.remove(tensor.name.as_str()) else {
                return Err(StateError::MissingTensor { tensor: name() });
            };
            if let Some(velocity) = &entry.velocity {
                let (expected, actual) = (tensor.numel, velocity.len() as u64);
                if !tensor.has_velocity {
                    return Err(StateError::UnexpectedVelocity { tensor: name() });
                }
                if actual != expected {
                    return Err(StateError::Length {
                        tensor: name(),
                        expected,
                        actual,
                    });
                }
                // A flat one fits any: it is what older files hold.
                if entry.shape != tensor.shape && entry.shape != [velocity.len()] {
                    return Err(StateError::Shape {
                        tensor: name(),
                        expected: tensor.shape.clone(),
                        actual: entry.shape.clone(),
                    });
                }
            }
            Ok(entry)
        };
        let matched = self
            .tensors
            .iter()
            .map(take)
            .collect::<Result<Vec<_>, _>>()?;
        match entries.into_keys().min() {
            Some(unknown) => Err(StateError::UnknownTensor {
                tensor: unknown.to_owned(),
            }),
            None => Ok(matched),
        }
    }

    /// Takes over the counts of a matched state. A velocity that did not come with it starts fresh under
    /// momentum, so its next step is the first.
    pub(crate) fn restore_counts(&mut self, steps: u64, matched: &[&TensorState]) {
        self.steps = steps;
        for (tensor, entry) in self.tensors.iter_mut().zip(matched) {
            let fresh = tensor.has_velocity && entry.velocity.is_none();
            tensor.applied_steps = if fresh { 0 } else { entry.applied_steps };
        }
    }
}
