//! States as safetensors files (feature `safetensors`), and PyTorch's `momentum_buffer` in and out.
//!
//! A state file holds one F32 tensor per velocity, under the tensor's name and shape, and as metadata
//! `format_version`, `form`, `config`, `steps`, and `applied_steps`, a JSON map from tensor name to count.

use std::collections::{BTreeMap, HashMap};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::error::StateFileError;
use crate::sgd::{MomentumForm, SgdConfig};
use crate::state::{OptimizerState, TensorState};

const FORMAT_VERSION: &str = "1";

/// The configuration as it stands in a file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigRecord {
    lr: f64,
    momentum: f64,
    dampening: f64,
    nesterov: bool,
    weight_decay: f64,
    decoupled_weight_decay: f64,
    maximize: bool,
    time_step: f64,
}

impl ConfigRecord {
    fn of(config: &SgdConfig) -> Self {
        Self {
            lr: config.lr(),
            momentum: config.momentum(),
            dampening: config.dampening(),
            nesterov: config.nesterov(),
            weight_decay: config.weight_decay(),
            decoupled_weight_decay: config.decoupled_weight_decay(),
            maximize: config.maximize(),
            time_step: config.time_step(),
        }
    }

    fn with_form(&self, form: &str) -> Result<SgdConfig, StateFileError> {
        Ok(SgdConfig::builder(self.lr)
            .momentum(self.momentum)
            .dampening(self.dampening)
            .nesterov(self.nesterov)
            .weight_decay(self.weight_decay)
            .decoupled_weight_decay(self.decoupled_weight_decay)
            .maximize(self.maximize)
            .time_step(self.time_step)
            .form(form.parse()?)
            .build()?)
    }
}

impl OptimizerState {
    /// The content of a state file.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, OptimizerState, SgdConfig};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let config = SgdConfig::builder(0.1).momentum(0.9).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", 2)])?;
    /// optimizer.step(&mut [&mut [1.0, 2.0]], &[&[0.5, -0.5]])?;
    /// let file = optimizer.state().to_safetensors()?;
    ///
    /// let mut resumed = CpuOptimizer::new(config, [("weight", 2)])?;
    /// resumed.load_state(&OptimizerState::from_safetensors(&file)?)?;
    /// assert_eq!(resumed.state(), optimizer.state());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`StateFileError`] if a velocity does not have as many elements as its shape says.
    pub fn to_safetensors(&self) -> Result<Vec<u8>, StateFileError> {
        let applied_steps: BTreeMap<_, _> = self
            .tensors
            .iter()
            .map(|tensor| (tensor.name.as_str(), tensor.applied_steps))
            .collect();
        let entries = [
            ("format_version", FORMAT_VERSION.to_owned()),
            ("form", self.config.form().to_string()),
            (
                "config",
                serde_json::to_string(&ConfigRecord::of(&self.config))?,
            ),
            ("steps", self.steps.to_string()),
            ("applied_steps", serde_json::to_string(&applied_steps)?),
        ];
        let metadata: HashMap<_, _> = entries.map(|(key, value)| (key.to_owned(), value)).into();
        let mut views = Vec::new();
        for tensor in &self.tensors {
            if let Some(velocity) = &tensor.velocity {
                views.push((tensor.name.as_str(), f32_view(&tensor.shape, velocity)?));
            }
        }
        Ok(safetensors::serialize(views, Some(metadata))?)
    }

    /// Reads the content of a state file. Tensors come in alphabetical order.
    ///
    /// # Errors
    /// [`StateFileError`] naming what is missing or wrong.
    pub fn from_safetensors(file: &[u8]) -> Result<Self, StateFileError> {
        let (_, header) = SafeTensors::read_metadata(file)?;
        let tensors = SafeTensors::deserialize(file)?;
        let metadata = header.metadata().as_ref();
        let entry = |key: &'static str| {
            metadata
                .and_then(|metadata| metadata.get(key))
                .ok_or(StateFileError::MissingMetadata { key })
        };
        let version = entry("format_version")?;
        if version != FORMAT_VERSION {
            return Err(StateFileError::Version {
                expected: FORMAT_VERSION,
                actual: version.clone(),
            });
        }
        let malformed = |key: &'static str| {
            move |error: String| StateFileError::MalformedMetadata {
                key,
                message: error,
            }
        };
        let record: ConfigRecord = serde_json::from_str(entry("config")?)
            .map_err(|error| malformed("config")(error.to_string()))?;
        let config = record.with_form(entry("form")?)?;
        let steps = entry("steps")?
            .parse()
            .map_err(|error: std::num::ParseIntError| malformed("steps")(error.to_string()))?;
        let applied_steps: BTreeMap<String, u64> = serde_json::from_str(entry("applied_steps")?)
            .map_err(|error| malformed("applied_steps")(error.to_string()))?;
        if let Some(name) = tensors
            .names()
            .into_iter()
            .filter(|name| !applied_steps.contains_key(*name))
            .min()
        {
            return Err(StateFileError::MissingCount {
                tensor: name.to_owned(),
            });
        }
        let tensor_state = |(name, applied_steps): (String, u64)| {
            let view = tensors.tensor(&name).ok();
            let velocity = view
                .as_ref()
                .map(|view| f32_values(&name, view))
                .transpose()?;
            Ok(TensorState {
                shape: view.map_or_else(Vec::new, |view| view.shape().to_vec()),
                name,
                applied_steps,
                velocity,
            })
        };
        Ok(Self {
            config,
            steps,
            tensors: applied_steps
                .into_iter()
                .map(tensor_state)
                .collect::<Result<_, StateFileError>>()?,
        })
    }

    /// Takes over what PyTorch's `SGD` remembers: the safetensors form of `optimizer.state_dict()["state"]`, with
    /// each buffer under `state.INDEX.momentum_buffer`, where the index counts the parameters in the order of
    /// `names`. In PyTorch:
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
    /// [`StateFileError`] if a key is not of this kind, its index has no name, or a buffer is not F32.
    pub fn from_pytorch(
        file: &[u8],
        config: SgdConfig,
        names: &[&str],
    ) -> Result<Self, StateFileError> {
        check_pytorchs_form(&config)?;
        let buffers = SafeTensors::deserialize(file)?;
        for key in buffers.names() {
            let index = key
                .strip_prefix("state.")
                .and_then(|rest| rest.strip_suffix(".momentum_buffer"))
                .and_then(|index| index.parse::<usize>().ok());
            if index.is_none_or(|index| index >= names.len()) {
                return Err(StateFileError::UnknownKey {
                    key: key.to_owned(),
                    parameters: names.len(),
                });
            }
        }
        let tensor_state = |(index, name): (usize, &&str)| {
            let view = buffers.tensor(&pytorch_key(index)).ok();
            let velocity = view
                .as_ref()
                .map(|view| f32_values(name, view))
                .transpose()?;
            Ok(TensorState {
                name: (*name).to_owned(),
                shape: view.map_or_else(Vec::new, |view| view.shape().to_vec()),
                applied_steps: velocity.is_some().into(),
                velocity,
            })
        };
        let tensors: Vec<_> = names
            .iter()
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
        let mut views = Vec::new();
        for (index, tensor) in self.tensors.iter().enumerate() {
            if let Some(velocity) = &tensor.velocity {
                views.push((pytorch_key(index), f32_view(&tensor.shape, velocity)?));
            }
        }
        Ok(safetensors::serialize(views, None)?)
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

fn f32_view<'data>(
    shape: &[usize],
    values: &'data [f32],
) -> Result<TensorView<'data>, StateFileError> {
    let bytes = bytemuck::cast_slice(values);
    Ok(TensorView::new(Dtype::F32, shape.to_vec(), bytes)?)
}

fn f32_values(name: &str, view: &TensorView<'_>) -> Result<Vec<f32>, StateFileError> {
    if view.dtype() != Dtype::F32 {
        return Err(StateFileError::Dtype {
            tensor: name.to_owned(),
            actual: format!("{:?}", view.dtype()),
        });
    }
    Ok(bytemuck::pod_collect_to_vec(view.data()))
}
