//! States as safetensors files (feature `safetensors`).
//!
//! A state file holds one F32 tensor per velocity, under the tensor's name and shape, and as metadata
//! `format_version`, `form`, `config`, `steps`, and `applied_steps`, a JSON map from tensor name to count.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::{OptimizerState, SlotState, StateFileError, TensorState};
use crate::files::{Dtype, Entries, Header, TensorEntry, serialize};
use crate::rules::Rule as _;
use crate::rules::sgd::SgdConfig;

const FORMAT_VERSION: &str = "1";

/// The slot that a file of this version holds.
const MOMENTUM_BUFFER: &str = "momentum_buffer";

/// That slot from its bytes.
pub(super) fn momentum_buffer(bytes: &[u8]) -> SlotState {
    SlotState {
        name: MOMENTUM_BUFFER.to_owned(),
        values: bytemuck::pod_collect_to_vec(bytes),
    }
}

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

/// What a state file says beside its velocities, in its metadata: `format_version`, `form`, `config`, `steps` and
/// `applied_steps`, always in this order.
///
/// [`OptimizerState`] has it together with the velocities; a program that does not want them in memory all at once
/// reads and writes it with a file's [`Header`].
#[derive(Clone, Debug, PartialEq)]
pub struct StateRecord {
    /// The configuration at the time; see [`OptimizerState::config`].
    pub config: SgdConfig,
    /// How many steps the optimizer has made.
    pub steps: u64,
    /// How many steps have been applied to each tensor, by name. A tensor without a velocity is in it, too.
    pub applied_steps: BTreeMap<String, u64>,
}

impl StateRecord {
    /// The record as a file's metadata.
    ///
    /// # Errors
    /// [`StateFileError::Metadata`] if a part of it cannot be written as JSON.
    pub fn to_metadata(&self) -> Result<Vec<(String, String)>, StateFileError> {
        let entries = [
            ("format_version", FORMAT_VERSION.to_owned()),
            ("form", self.config.form().to_string()),
            (
                "config",
                serde_json::to_string(&ConfigRecord::of(&self.config))?,
            ),
            ("steps", self.steps.to_string()),
            ("applied_steps", serde_json::to_string(&self.applied_steps)?),
        ];
        Ok(entries.map(|(key, value)| (key.to_owned(), value)).into())
    }

    /// The record in the header of a state file.
    ///
    /// # Errors
    /// [`StateFileError`] naming what is missing or wrong: a metadata entry, a velocity that is not F32 or has no
    /// count.
    pub fn of(header: &Header) -> Result<Self, StateFileError> {
        let entry = |key: &'static str| {
            let entry = header.metadata.iter().find(|(name, _)| name == key);
            entry
                .map(|(_, value)| value)
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
        let counts: Entries<u64> = serde_json::from_str(entry("applied_steps")?)
            .map_err(|error| malformed("applied_steps")(error.to_string()))?;
        if let Some(tensor) = counts.duplicate() {
            return Err(StateFileError::DuplicateCount {
                tensor: tensor.to_owned(),
            });
        }
        let applied_steps: BTreeMap<_, _> = counts.0.into_iter().collect();
        for tensor in header.in_place_order() {
            if !applied_steps.contains_key(&tensor.name) {
                return Err(StateFileError::MissingCount {
                    tensor: tensor.name.clone(),
                });
            }
            check_f32(&tensor.name, tensor)?;
        }
        Ok(Self {
            config,
            steps,
            applied_steps,
        })
    }
}

impl OptimizerState {
    /// The content of a state file. The same state makes the same bytes.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, OptimizerState, SgdConfig};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let config = SgdConfig::builder(0.1).momentum(0.9).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
    /// optimizer.step(&mut [&mut [1.0, 2.0]], &[&[0.5, -0.5]])?;
    /// let file = optimizer.state().to_safetensors()?;
    ///
    /// let mut resumed = CpuOptimizer::new(config, [("weight", [2])])?;
    /// resumed.load_state(&OptimizerState::from_safetensors(&file)?)?;
    /// assert_eq!(resumed.state(), optimizer.state());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`StateFileError`] if a velocity does not have as many elements as its shape says, a name comes twice, or a
    /// tensor with a velocity is named `__metadata__`, which no file can hold.
    pub fn to_safetensors(&self) -> Result<Vec<u8>, StateFileError> {
        let mut applied_steps = BTreeMap::new();
        for tensor in &self.tensors {
            if applied_steps
                .insert(tensor.name.clone(), tensor.applied_steps)
                .is_some()
            {
                return Err(StateFileError::DuplicateCount {
                    tensor: tensor.name.clone(),
                });
            }
        }
        let record = StateRecord {
            config: self.config,
            steps: self.steps,
            applied_steps,
        };
        Ok(serialize(
            record.to_metadata()?,
            self.velocities(|_, name| name.to_owned()),
        )?)
    }

    /// Every velocity with its shape, under the name that `key` makes of a tensor's index and name.
    pub(super) fn velocities(
        &self,
        key: impl Fn(usize, &str) -> String,
    ) -> Vec<(String, &[usize], &[f32])> {
        let tensors = self.tensors.iter().enumerate();
        tensors
            .filter_map(|(index, tensor)| {
                let velocity = tensor.slot(MOMENTUM_BUFFER)?;
                Some((key(index, &tensor.name), &*tensor.shape, velocity))
            })
            .collect()
    }

    /// Reads the content of a state file. Tensors come in alphabetical order.
    ///
    /// # Errors
    /// [`StateFileError`] naming what is missing or wrong.
    pub fn from_safetensors(file: &[u8]) -> Result<Self, StateFileError> {
        let header = Header::of(file)?;
        let StateRecord {
            config,
            steps,
            applied_steps,
        } = StateRecord::of(&header)?;
        let mut velocities: HashMap<_, _> = header
            .tensors()
            .iter()
            .map(|tensor| (tensor.name.as_str(), tensor))
            .collect();
        let meaning = config.meaning();
        let tensor_state = |(name, applied_steps): (String, u64)| {
            let entry = velocities.remove(name.as_str());
            TensorState {
                shape: entry.map_or_else(Vec::new, |entry| entry.shape.clone()),
                slots: entry
                    .map(|entry| momentum_buffer(header.data(file, entry)))
                    .into_iter()
                    .collect(),
                name,
                applied_steps,
                meaning: meaning.clone(),
            }
        };
        Ok(Self {
            config,
            steps,
            tensors: applied_steps.into_iter().map(tensor_state).collect(),
        })
    }
}

pub(super) fn check_f32(tensor: &str, entry: &TensorEntry) -> Result<(), StateFileError> {
    if entry.dtype == Dtype::F32 {
        return Ok(());
    }
    Err(StateFileError::Dtype {
        tensor: tensor.to_owned(),
        actual: entry.dtype.to_string(),
    })
}
