//! What an optimizer remembers between steps, in a form that does not depend on where it runs.

use std::collections::HashSet;

use crate::error::{BuildError, StateError};
use crate::sgd::{MomentumForm, SgdConfig};

/// What an optimizer remembers of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorState {
    /// The tensor's name.
    pub name: String,
    /// How many steps have been applied to it; a step at which it was frozen does not count.
    pub applied_steps: u64,
    /// Its velocity (`momentum_buffer` in PyTorch), one value per element; none before its first applied step
    /// and none without momentum.
    pub velocity: Option<Vec<f32>>,
}

/// What an optimizer remembers: the form, which says what the velocities mean, and the tensors' states.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerState {
    /// The form that made the velocities.
    pub form: MomentumForm,
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

/// A tensor as the host sees it.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) numel: u64,
    pub(crate) applied_steps: u64,
    pub(crate) frozen: bool,
}

/// The tensors of an optimizer, in the order in which they were given.
#[derive(Clone, Debug)]
pub(crate) struct Tensors(Vec<Tensor>);

impl Tensors {
    pub(crate) fn new(
        tensors: impl IntoIterator<Item = (String, u64)>,
    ) -> Result<Self, BuildError> {
        let fresh = |(name, numel)| Tensor {
            name,
            numel,
            applied_steps: 0,
            frozen: false,
        };
        let tensors: Vec<_> = tensors.into_iter().map(fresh).collect();
        let mut names = HashSet::with_capacity(tensors.len());
        match tensors.iter().find(|t| !names.insert(t.name.as_str())) {
            Some(twice) => Err(BuildError::DuplicateName {
                tensor: twice.name.clone(),
            }),
            None => Ok(Self(tensors)),
        }
    }

    pub(crate) fn as_slice(&self) -> &[Tensor] {
        &self.0
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.iter().find(|tensor| tensor.name == name)
    }

    pub(crate) fn set_frozen(&mut self, name: &str, frozen: bool) -> Result<(), UnknownTensor> {
        let tensor = self.0.iter_mut().find(|tensor| tensor.name == name);
        tensor
            .map(|tensor| tensor.frozen = frozen)
            .ok_or_else(|| UnknownTensor {
                tensor: name.to_owned(),
            })
    }

    /// Counts a step for every tensor that is not frozen.
    pub(crate) fn count_step(&mut self) {
        for tensor in self.0.iter_mut().filter(|tensor| !tensor.frozen) {
            tensor.applied_steps += 1;
        }
    }

    /// Checks a whole state against these tensors and returns each entry with the index of its tensor.
    pub(crate) fn match_state<'s>(
        &self,
        state: &'s OptimizerState,
        config: &SgdConfig,
    ) -> Result<Vec<(usize, &'s TensorState)>, StateError> {
        if state.form != config.form() {
            return Err(StateError::Form {
                expected: config.form(),
                actual: state.form,
            });
        }
        let check = |entry: &'s TensorState| {
            let index = self.0.iter().position(|tensor| tensor.name == entry.name);
            let Some(index) = index else {
                return Err(StateError::UnknownTensor {
                    tensor: entry.name.clone(),
                });
            };
            if let Some(velocity) = &entry.velocity {
                let (expected, actual) = (self.0[index].numel, velocity.len() as u64);
                if !config.has_velocity() {
                    return Err(StateError::UnexpectedVelocity {
                        tensor: entry.name.clone(),
                    });
                }
                if actual != expected {
                    return Err(StateError::Length {
                        tensor: entry.name.clone(),
                        expected,
                        actual,
                    });
                }
            }
            Ok((index, entry))
        };
        state.tensors.iter().map(check).collect()
    }

    /// Takes over the step counts of a matched state. A velocity that did not come with it starts fresh under
    /// momentum, so its next step is the first.
    pub(crate) fn restore_counts(&mut self, matched: &[(usize, &TensorState)], momentum: bool) {
        for (index, entry) in matched {
            let fresh = momentum && entry.velocity.is_none();
            self.0[*index].applied_steps = if fresh { 0 } else { entry.applied_steps };
        }
    }
}
