//! Errors of a device and of a step.

use burn::tensor::DType;
use wgpu_optim::gpu::{LoadError, RebindError};
use wgpu_optim::rules::GroupError;
use wgpu_optim::wgsl::KernelError;
use wgpu_optim::{BuildError, ConfigError, TransferError};

/// A device that cannot be shared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShareError {
    /// A device of another backend.
    #[error("expected a device of burn's wgpu backend, got {actual}")]
    Backend {
        /// The device.
        actual: String,
    },
    /// Kernels that cannot be built on it.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// A step that was not made. Parameters, state and step counts are as they were; the module is gone with its last clone.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum StepError {
    /// A parameter or its gradient on another device, or on another backend.
    #[error("parameter {param:?}: its {role} are on {actual}, expected them on {expected}")]
    Device {
        /// Path of the parameter.
        param: String,
        /// `params` or `grads`.
        role: &'static str,
        /// The shared device.
        expected: String,
        /// The tensor's.
        actual: String,
    },
    /// A parameter or its gradient of a type that is not stepped.
    #[error("parameter {param:?}: its {role} are {actual:?}, expected F32, BF16 or F16")]
    DType {
        /// Path of the parameter.
        param: String,
        /// `params` or `grads`.
        role: &'static str,
        /// The tensor's type.
        actual: DType,
    },
    /// A parameter or its gradient of 16 bits on a device where burn cannot compute with them.
    #[error(
        "parameter {param:?}: its {role} are {actual:?}, which burn does not support on this device"
    )]
    Unsupported {
        /// Path of the parameter.
        param: String,
        /// `params` or `grads`.
        role: &'static str,
        /// The tensor's type.
        actual: DType,
    },
    /// Parameters of one group that burn's learning rates tell apart.
    #[error(
        "parameter {param:?} has the learning rate {actual}, but {first:?} of the same group {group:?} has {expected}"
    )]
    Rates {
        /// The name of the group.
        group: String,
        /// Path of a parameter.
        param: String,
        /// The learning rate of that parameter.
        actual: f64,
        /// Path of the group's first parameter.
        first: String,
        /// The learning rate of the group's first parameter.
        expected: f64,
    },
    /// A gradient of another shape than its parameter.
    #[error("parameter {param:?}: its shape is {expected:?}, that of its gradient {actual:?}")]
    Shape {
        /// Path of the parameter.
        param: String,
        /// The parameter's shape.
        expected: Vec<usize>,
        /// The gradient's.
        actual: Vec<usize>,
    },
    /// Memory that burn did not give.
    #[error("parameter {param:?}: burn gave no buffer for its {role}: {message}")]
    Buffer {
        /// Path of the parameter.
        param: String,
        /// `params` or `grads`.
        role: &'static str,
        /// The message of burn.
        message: String,
    },
    /// burn could not execute or submit what it had queued.
    #[error("burn's runtime failed: {message}")]
    Runtime {
        /// The message of burn.
        message: String,
    },
    /// A learning rate that the rule does not take.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A learning rate that the rule of a group does not take.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// Tensors that cannot be stepped on this device.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// Tensors that the optimizer cannot be bound to: a parameter that has had another shape before, say.
    #[error(transparent)]
    Rebind(#[from] RebindError),
    /// A loaded record that does not fit.
    #[error(transparent)]
    State(#[from] LoadError),
    /// A checkpoint of burn's without the state of this optimizer.
    #[cfg(feature = "train")]
    #[error("the checkpoint holds no state of this optimizer")]
    NoRecord,
    /// A checkpoint's state that cannot be read or written.
    #[cfg(feature = "train")]
    #[error("the optimizer's state in the checkpoint: {message}")]
    Checkpoint {
        /// The reason why the state cannot be read or written.
        message: String,
    },
    /// State that could not be moved off the device.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// A step that could not be recorded.
    #[error(transparent)]
    Record(#[from] wgpu_optim::StepError),
}
