//! GPU-accelerated optimizer kernels for wgpu.

mod binding;
mod coefficients;
mod cpu;
mod error;
mod error_scope;
mod gpu;
mod kernel;
mod optimizer;
pub mod oracle;
pub mod plan;
pub mod readback;
pub mod reference;
mod scalars;
mod sgd;
mod state;

pub use binding::TensorBinding;
pub use coefficients::{Coefficients, Terms};
pub use cpu::CpuOptimizer;
pub use error::{
    BuildError, ConfigError, GpuError, KernelError, PlanError, StateError, StepError, TransferError,
};
pub use gpu::{AdapterRequest, Gpu, OPTIONAL_FEATURES, adapters};
pub use kernel::Kernels;
pub use optimizer::GpuOptimizer;
pub use scalars::ScalarPath;
pub use sgd::{MomentumForm, SgdConfig, SgdConfigBuilder};
pub use state::{OptimizerState, TensorState, UnknownTensor};
pub use wgpu;
