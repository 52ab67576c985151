//! The states of PyTorch's optimizers, in and out (feature `safetensors`).

use std::collections::HashMap;

use super::file::{check_shape, codec_of};
use super::{OptimizerState, SlotState, StateFileError, TensorState};
use crate::files::{Dtype, Header, TensorEntry, serialize};
use crate::rules::{AnyRule, Rule};
use crate::storage::{MASTER_PARAMS, PARAMS_REST, SectionValues};

/// PyTorch's name of the count of a parameter's steps.
const STEP: &str = "step";

/// The tolerance of a scalar that PyTorch has computed step by step in f32, relative to its value. It is off
/// by two roundings a step, and another configuration by far more.
const SCALAR_TOLERANCE: f64 = 1e-3;

impl<R: Rule + Into<AnyRule>> OptimizerState<R> {
    /// Takes over what an optimizer of PyTorch remembers: the safetensors form of `optimizer.state_dict()["state"]`,
    /// with each tensor under `state.INDEX.NAME`, where the index counts the parameters in the order of `tensors`,
    /// which are their names and shapes, as [`Arena::new`](crate::Arena::new) takes them. In PyTorch, of any optimizer
    /// with tensors alone in its state:
    ///
    /// ```python
    /// from safetensors.torch import save_file
    ///
    /// state = optimizer.state_dict()["state"]
    /// save_file({f"state.{i}.{name}": value.contiguous()
    ///            for i, s in state.items() for name, value in s.items() if value is not None}, "state.safetensors")
    /// ```
    ///
    /// `config` is the configuration that PyTorch ran with. PyTorch's `SGD` does not count steps: a parameter with a
    /// buffer counts as stepped once, one without as new. Other scalars than `step` follow from the configuration and
    /// the count; they are compared, and not kept. [`MASTER_PARAMS`], which PyTorch has not, are taken where they are.
    ///
    /// # Errors
    /// [`StateFileError`] if PyTorch has no such rule, a key is not of this kind, its index has no tensor, one is
    /// missing beside others of its index, or a value is not of floats, of another shape, or a scalar that another
    /// configuration would have left.
    pub fn from_pytorch<N: Into<String>, S: Into<Vec<usize>>>(
        file: &[u8],
        config: R,
        tensors: impl IntoIterator<Item = (N, S)>,
    ) -> Result<Self, StateFileError> {
        let rule: AnyRule = config.clone().into();
        let header = Header::of(file)?;
        let tensors: Vec<_> = tensors.into_iter().collect();
        let mut entries = entries_by_index(&header, &rule, tensors.len())?;
        let tensor_state = |(index, (name, shape)): (usize, (N, S))| {
            let found = Found {
                tensor: name.into(),
                index,
                entries: entries.remove(&index).unwrap_or_default(),
                header: &header,
                file,
            };
            found.into_state(&rule, shape.into())
        };
        let tensors: Vec<_> = tensors
            .into_iter()
            .enumerate()
            .map(tensor_state)
            .collect::<Result<_, StateFileError>>()?;
        let steps = tensors.iter().map(|tensor| tensor.applied_steps).max();
        Ok(Self {
            config,
            steps: steps.unwrap_or(0),
            tensors,
            control: None,
        })
    }

    /// The state for PyTorch, under the keys that [`from_pytorch`](Self::from_pytorch) reads, the tensors' position
    /// here as the index. In PyTorch, into an optimizer of the same parameters:
    ///
    /// ```python
    /// from safetensors.torch import load_file
    ///
    /// state = optimizer.state_dict()
    /// for key, value in load_file("state.safetensors").items():
    ///     _, index, name = key.split(".")
    ///     state["state"].setdefault(int(index), {})[name] = value
    /// optimizer.load_state_dict(state)
    /// ```
    ///
    /// Scalars are those of [`config`](Self::config), whatever group a tensor is in. [`MASTER_PARAMS`] go with the slots.
    /// PyTorch's optimizers do not read them, and `load_state_dict` rounds them, as any slot, to the parameter's dtype:
    /// to go on from them there, make them its parameters.
    ///
    /// # Errors
    /// [`StateFileError`] if PyTorch has no such rule, a tensor is of a group with another, a slot does not have as
    /// many elements as its tensor's shape says, or a tensor has rests, which say nothing without its parameters.
    pub fn to_pytorch(&self) -> Result<Vec<u8>, StateFileError> {
        let rule: AnyRule = self.config.clone().into();
        // Also where there is no tensor.
        scalars_of(&rule, 0)?;
        let expected = rule.state_kind();
        let mut scalars = Vec::new();
        let mut slots = Vec::new();
        for (index, tensor) in self.tensors.iter().enumerate() {
            if tensor.state_kind != expected {
                return Err(StateFileError::OtherStateKind {
                    tensor: tensor.name.clone(),
                    expected,
                    actual: tensor.state_kind.clone(),
                });
            }
            if tensor.slot(PARAMS_REST).is_some() {
                return Err(StateFileError::RestsForPyTorch {
                    tensor: tensor.name.clone(),
                });
            }
            let of_rule = scalars_of(&rule, tensor.applied_steps)?;
            // PyTorch keeps nothing of a parameter before its first step.
            if tensor.slots.iter().any(|slot| slot.name != MASTER_PARAMS) {
                let of_rule = of_rule.into_iter();
                scalars.extend(of_rule.map(|(name, value)| (key(index, name), [value as f32])));
            }
            let of_tensor = tensor.slots.iter();
            slots.extend(of_tensor.map(|slot| {
                let key = key(index, &slot.name);
                let (dtype, bytes) = (slot.values.codec().into(), slot.values.bytes());
                (key, dtype, tensor.shape.as_slice(), bytes)
            }));
        }
        let scalars = scalars.iter();
        let scalars = scalars.map(|(key, value)| {
            (
                key.clone(),
                Dtype::F32,
                [].as_slice(),
                bytemuck::bytes_of(value),
            )
        });
        slots.extend(scalars);
        Ok(serialize(Vec::new(), slots)?)
    }
}

/// The entries of a file of one parameter.
struct Found<'f> {
    tensor: String,
    index: usize,
    entries: HashMap<&'f str, &'f TensorEntry>,
    header: &'f Header,
    file: &'f [u8],
}

impl Found<'_> {
    fn into_state(self, rule: &AnyRule, shape: Vec<usize>) -> Result<TensorState, StateFileError> {
        let mut state = TensorState {
            name: self.tensor.clone(),
            shape,
            applied_steps: 0,
            state_kind: rule.state_kind(),
            slots: Vec::new(),
        };
        let slots = rule.slots();
        let has = |name| self.entries.contains_key(name);
        // Masters may be there before the rule's first step.
        let is_stepped = self.entries.keys().any(|name| *name != MASTER_PARAMS);
        let kept = slots
            .iter()
            .filter(|slot| slot.is_kept && is_stepped || has(slot.name));
        let masters = has(MASTER_PARAMS).then_some(MASTER_PARAMS);
        for name in kept.map(|slot| slot.name).chain(masters) {
            let values = self.values(name, &state.shape)?;
            state.slots.push(SlotState {
                name: name.to_owned(),
                values,
            });
        }
        if !is_stepped {
            return Ok(state);
        }
        let counts_steps = scalars_of(rule, 0)?.iter().any(|(name, _)| *name == STEP);
        state.applied_steps = if counts_steps { self.steps()? } else { 1 };
        for (name, expected) in scalars_of(rule, state.applied_steps)? {
            if name != STEP {
                self.check_scalar(name, expected)?;
            }
        }
        Ok(state)
    }

    fn steps(&self) -> Result<u64, StateFileError> {
        let actual = self.scalar(STEP)?;
        // All that f32 holds without a fraction, and u64 without a loss.
        if actual.fract() == 0.0 && (0.0..u64::MAX as f32).contains(&actual) {
            return Ok(actual as u64);
        }
        Err(StateFileError::NotACount {
            tensor: self.tensor.clone(),
            actual,
        })
    }

    fn check_scalar(&self, name: &'static str, expected: f64) -> Result<(), StateFileError> {
        let actual = self.scalar(name)?;
        // A product that has become too small for a normal f32 has lost its precision.
        let tolerance = SCALAR_TOLERANCE * expected.abs() + f64::from(f32::MIN_POSITIVE);
        if (f64::from(actual) - expected).abs() <= tolerance {
            return Ok(());
        }
        Err(StateFileError::Scalar {
            tensor: self.tensor.clone(),
            name,
            expected,
            actual,
        })
    }

    fn scalar(&self, name: &str) -> Result<f32, StateFileError> {
        let values = self.values(name, &[])?.to_f32();
        // The shape says that there is one.
        Ok(values.first().copied().unwrap_or(f32::NAN))
    }

    fn values(&self, name: &str, shape: &[usize]) -> Result<SectionValues, StateFileError> {
        let entry = self.entries.get(name);
        let entry = entry.ok_or_else(|| StateFileError::MissingKey {
            tensor: self.tensor.clone(),
            key: key(self.index, name),
        })?;
        let codec = codec_of(&self.tensor, name, entry)?;
        check_shape(&self.tensor, name, entry, shape)?;
        let bytes = self.header.data(self.file, entry).to_vec();
        Ok(SectionValues::from_bytes(codec, bytes))
    }
}

/// Every entry by its parameter's index and its name.
fn entries_by_index<'h>(
    header: &'h Header,
    rule: &AnyRule,
    parameters: usize,
) -> Result<HashMap<usize, HashMap<&'h str, &'h TensorEntry>>, StateFileError> {
    let slots = rule.slots();
    let scalars = scalars_of(rule, 0)?;
    let names = scalars.iter().map(|(name, _)| *name);
    let names = names.chain(slots.iter().map(|slot| slot.name));
    let names: Vec<_> = names.chain([MASTER_PARAMS]).collect();
    let mut entries: HashMap<_, HashMap<_, _>> = HashMap::new();
    for entry in header.tensors() {
        let parts = entry.name.strip_prefix("state.");
        let parts = parts.and_then(|rest| rest.split_once('.'));
        let parts = parts.and_then(|(index, name)| Some((index.parse::<usize>().ok()?, name)));
        let is_key = |(index, name): &(usize, &str)| {
            // Only the one spelling of an index is a key: `07` is none.
            *index < parameters && names.contains(name) && key(*index, name) == entry.name
        };
        let Some((index, name)) = parts.filter(is_key) else {
            return Err(StateFileError::UnknownKey {
                key: entry.name.clone(),
                parameters,
                expected: names.join(", "),
            });
        };
        entries.entry(index).or_default().insert(name, entry);
    }
    Ok(entries)
}

fn scalars_of(
    rule: &AnyRule,
    applied_steps: u64,
) -> Result<Vec<(&'static str, f64)>, StateFileError> {
    let scalars = rule.pytorch_scalars(applied_steps);
    scalars.ok_or_else(|| StateFileError::NotPyTorchs {
        state_kind: rule.state_kind(),
    })
}

fn key(index: usize, name: &str) -> String {
    format!("state.{index}.{name}")
}
