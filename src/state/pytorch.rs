//! PyTorch's `momentum_buffer` in and out (feature `safetensors`).

use std::collections::HashMap;

use super::file::{check_f32, momentum_buffer};
use super::{OptimizerState, StateFileError, TensorState};
use crate::files::{Header, serialize};
use crate::rules::Rule as _;
use crate::rules::sgd::{MomentumForm, SgdConfig};

impl OptimizerState {
    /// Takes over what PyTorch's `SGD` remembers: the safetensors form of `optimizer.state_dict()["state"]`, with
    /// each buffer under `state.INDEX.momentum_buffer`, where the index counts the parameters in the order of
    /// `tensors`, which are their names and shapes, as [`Arena::new`](crate::Arena::new) takes them. In PyTorch:
    ///
    /// ```python
    /// from safetensors.torch import save_file
    ///
    /// state = optimizer.state_dict()["state"]
    /// save_file({f"state.{i}.momentum_buffer": s["momentum_buffer"].contiguous()
    ///            for i, s in state.items() if s.get("momentum_buffer") is not None}, "state.safetensors")
    /// ```
    ///
    /// PyTorch does not count steps: a parameter with a buffer counts as stepped once, one without as new. `config`
    /// is the configuration that PyTorch ran with; its form has to be the heavy ball.
    ///
    /// # Errors
    /// [`StateFileError`] if a key is not of this kind, its index has no tensor, or a buffer is not F32 or of another
    /// shape than its tensor.
    pub fn from_pytorch<N: Into<String>, S: Into<Vec<usize>>>(
        file: &[u8],
        config: SgdConfig,
        tensors: impl IntoIterator<Item = (N, S)>,
    ) -> Result<Self, StateFileError> {
        check_pytorchs_form(&config)?;
        let header = Header::of(file)?;
        let tensors: Vec<_> = tensors.into_iter().collect();
        let mut buffers = HashMap::new();
        for entry in header.tensors() {
            let index = entry
                .name
                .strip_prefix("state.")
                .and_then(|rest| rest.strip_suffix(".momentum_buffer"))
                .and_then(|index| index.parse::<usize>().ok());
            // Only the one spelling of an index is a key: `07` is none.
            let Some(index) =
                index.filter(|index| *index < tensors.len() && pytorch_key(*index) == entry.name)
            else {
                return Err(StateFileError::UnknownKey {
                    key: entry.name.clone(),
                    parameters: tensors.len(),
                });
            };
            buffers.insert(index, entry);
        }
        let tensor_state = |(index, (name, shape)): (usize, (N, S))| {
            let shape = shape.into();
            let name = name.into();
            let entry = buffers.get(&index);
            if let Some(entry) = entry {
                check_f32(&name, entry)?;
                if entry.shape != shape {
                    return Err(StateFileError::Shape {
                        tensor: name,
                        expected: shape,
                        actual: entry.shape.clone(),
                    });
                }
            }
            Ok(TensorState {
                name,
                shape,
                applied_steps: entry.is_some().into(),
                meaning: config.meaning(),
                slots: entry
                    .map(|entry| momentum_buffer(header.data(file, entry)))
                    .into_iter()
                    .collect(),
            })
        };
        let tensors: Vec<_> = tensors
            .into_iter()
            .enumerate()
            .map(tensor_state)
            .collect::<Result<_, StateFileError>>()?;
        Ok(Self {
            config,
            steps: tensors.iter().any(|tensor| tensor.applied_steps > 0).into(),
            tensors,
        })
    }

    /// The buffers for PyTorch, under the keys that [`from_pytorch`](Self::from_pytorch) reads, the tensors'
    /// position here as the index.
    ///
    /// # Errors
    /// [`StateFileError`] if the state is not of the heavy-ball form, which is PyTorch's, or a velocity does not
    /// have as many elements as its shape says.
    pub fn to_pytorch(&self) -> Result<Vec<u8>, StateFileError> {
        check_pytorchs_form(&self.config)?;
        Ok(serialize(
            Vec::new(),
            self.velocities(|index, _| pytorch_key(index)),
        )?)
    }
}

fn check_pytorchs_form(config: &SgdConfig) -> Result<(), StateFileError> {
    match config.form() {
        MomentumForm::HeavyBall => Ok(()),
        form => Err(StateFileError::NotPyTorchsForm { form }),
    }
}

fn pytorch_key(index: usize) -> String {
    format!("state.{index}.momentum_buffer")
}
