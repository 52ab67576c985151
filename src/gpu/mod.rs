//! The optimizer on the GPU: devices, kernels, tensor bindings, arenas, steps and their control, and transfers.

mod arena;
mod binding;
mod bound;
mod chunks;
mod control;
mod convert;
mod device;
mod error;
mod error_scope;
mod fill;
mod kernels;
mod ledger;
mod mapped;
mod metrics;
mod moves;
mod optimizer;
mod pass;
pub mod readback;
mod rules;
mod scalars;
mod staged;
mod submission;
mod sums;

pub use arena::{Arena, ArenaBuffer, ArenaBuilder, ArenaLayout, ArenaTensor};
pub use binding::TensorBinding;
pub use control::{Controlled, GpuControl};
pub use convert::Converter;
pub use device::{AdapterRequest, Gpu, OPTIONAL_FEATURES, adapters};
#[cfg(feature = "safetensors")]
pub use error::ArenaFileError;
pub use error::{
    ArenaError, BuildError, CheckpointError, GpuError, LoadError, RebindError, StepError,
    TransferError,
};
pub use kernels::Kernels;
pub use metrics::{Metrics, StepMetrics};
pub use optimizer::{GpuOptimizer, StateSlice};
