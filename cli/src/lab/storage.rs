//! The storage of tensors, as it is typed.

use clap::{Args as ClapArgs, ValueEnum};
use wgpu_optim::storage::Storage;
use wgpu_optim::{Masters, Precision, StorageType};

/// The storage of the tensors of a measurement, and the precision with which they are remembered.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stored {
    pub params: StorageType,
    pub grads: StorageType,
    pub precision: Precision,
}

impl Stored {
    /// The storage of a rule that keeps so many slots.
    pub fn storage(&self, slots: usize) -> Storage {
        Storage::new(self.params, self.grads, slots, &self.precision)
    }

    /// The difference from `f32`, for the name of a measurement.
    pub fn suffix(&self, slots: usize) -> String {
        let storage = self.storage(slots);
        let roles = [
            (storage.params, "params"),
            (storage.grads, "grads"),
            (storage.state, "state"),
        ];
        let narrow = roles.iter().filter(|(of, _)| *of != StorageType::F32);
        let mut suffix: String = narrow
            .map(|(of, role)| format!(", {} {role}", of.name()))
            .collect();
        match storage.masters {
            Masters::F32 => suffix += ", f32 masters",
            Masters::LowBits => suffix += ", low bits",
            Masters::None => {}
        }
        suffix
    }
}

/// The type of a stored value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    #[default]
    F32,
    Bf16,
    F16,
}

impl From<Dtype> for StorageType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::Bf16,
            Dtype::F16 => Self::F16,
        }
    }
}

/// The memory of 16-bit parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum MastersKind {
    /// The parameters as F32
    #[default]
    F32,
    /// The 16 bits by which the F32 differs from BF16; for F16, the F32
    LowBits,
    /// Nothing beside the parameters
    None,
}

#[derive(Clone, Debug, Default, ClapArgs)]
#[command(next_help_heading = "Storage")]
pub struct StorageArgs {
    /// Storage type of the parameters [default: f32, or as in --model]
    #[arg(long, value_name = "DTYPE", value_enum)]
    pub params_dtype: Option<Dtype>,
    /// Storage type of the gradients [default: f32, or as the parameters in --model]
    #[arg(long, value_name = "DTYPE", value_enum)]
    pub grads_dtype: Option<Dtype>,
    /// Storage type of the rule's state
    #[arg(long, value_name = "DTYPE", value_enum, default_value_t)]
    pub state_dtype: Dtype,
    /// Memory of 16-bit parameters beside themselves
    #[arg(long, value_name = "KIND", value_enum, default_value_t)]
    pub masters: MastersKind,
}

impl StorageArgs {
    /// The storage that was typed; `of` is the type of parameters and gradients where none was.
    pub fn stored(&self, of: StorageType) -> Stored {
        Stored {
            params: self.params_dtype.map_or(of, Into::into),
            grads: self.grads_dtype.map_or(of, Into::into),
            precision: Precision {
                state: self.state_dtype.into(),
                masters: match self.masters {
                    MastersKind::F32 => Masters::F32,
                    MastersKind::LowBits => Masters::LowBits,
                    MastersKind::None => Masters::None,
                },
                ..Precision::default()
            },
        }
    }
}
