//! The storage of tensors, as it is typed.

use clap::{Args as ClapArgs, ValueEnum};
use wgpu_optim::rules::Slots;
use wgpu_optim::storage::{Codec, Storage};
use wgpu_optim::{Masters, Precision, StorageType};

/// The storage of the tensors of a measurement, and the precision with which they are remembered.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stored {
    pub params: StorageType,
    pub grads: StorageType,
    pub precision: Precision,
}

impl Stored {
    /// The storage of a rule that has these slots.
    pub fn storage(&self, slots: &Slots) -> Storage {
        Storage::new(self.params, self.grads, slots.kept_names(), &self.precision)
    }

    /// The difference from `f32`, for the name of a measurement.
    pub fn suffix(&self, slots: &Slots) -> String {
        let storage = self.storage(slots);
        let state = storage.slots().first().copied().unwrap_or_default();
        let roles = [
            (storage.params.into(), "params"),
            (storage.grads.into(), "grads"),
            (state, "state"),
        ];
        let narrow = roles.iter().filter(|(of, _)| *of != Codec::F32);
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
