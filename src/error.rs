//! One small error enum per stage: config, plan, kernel, build, step, state, readback, adapter.

#[cfg(feature = "safetensors")]
use crate::files::HeaderError;
use crate::sgd::MomentumForm;

/// A hyper-parameter that cannot be used, or fields that do not go together.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A value that is not finite or out of range.
    #[error("{field} = {value:?} is out of range: expected {expected}")]
    OutOfRange {
        /// The field.
        field: &'static str,
        /// What was given.
        value: f64,
        /// What would be accepted.
        expected: &'static str,
    },
    /// Fields that no library defines together.
    #[error("unsupported combination of {fields}: {why}")]
    Unsupported {
        /// The fields.
        fields: &'static str,
        /// The rule they break.
        why: &'static str,
    },
    /// `1 - lr*decoupled_weight_decay` would be negative.
    #[error(
        "lr = {lr:?} with decoupled_weight_decay = {decoupled_weight_decay:?} is out of range: \
         expected lr*decoupled_weight_decay <= 1"
    )]
    DecayTooLarge {
        /// The learning rate.
        lr: f64,
        /// The decay.
        decoupled_weight_decay: f64,
    },
    /// A form that does not exist.
    #[error("unknown form {name:?}: expected heavy-ball, ema, lr-inside or particle")]
    UnknownForm {
        /// What was given.
        name: String,
    },
    /// A preset that does not exist.
    #[error(
        "unknown preset {name:?}: expected pytorch, optax-sgd, optax-trace, optax-ema, keras, tensorflow-js or \
         sutskever-2013"
    )]
    UnknownPreset {
        /// What was given.
        name: String,
    },
}

/// No exact conversion between two forms.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("no exact conversion from the {from} form to the {to} form: {why}")]
pub struct ConversionError {
    /// The form of the configuration.
    pub from: MomentumForm,
    /// The form that was asked for.
    pub to: MomentumForm,
    /// What stands in the way.
    pub why: &'static str,
}

/// A parameter group that cannot be, or is not there.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GroupError {
    /// A group that does not go with the others.
    #[error("group {group:?}: {why}")]
    Incompatible {
        /// The group.
        group: String,
        /// Why.
        why: &'static str,
    },
    /// No group of this name.
    #[error("no group {group:?}")]
    Unknown {
        /// The name.
        group: String,
    },
    /// A hyper-parameter that cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// Tensors that cannot be planned under the given limits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A byte offset that does not fall on an element.
    #[error("tensor {tensor}: byte offset {offset_bytes} is not a multiple of 4")]
    Misaligned {
        /// Index of the tensor.
        tensor: usize,
        /// The offset.
        offset_bytes: u64,
    },
    /// The tensor ends past the 64-bit address range.
    #[error("tensor {tensor}: {numel} elements end past the address range")]
    TooLarge {
        /// Index of the tensor.
        tensor: usize,
        /// Its number of elements.
        numel: u64,
    },
    /// A device limit below what any piece needs.
    #[error("device limit {limit} = {actual} is too low: expected at least {required}")]
    LimitTooLow {
        /// Name of the limit in `wgpu::Limits`.
        limit: &'static str,
        /// The least that works.
        required: u64,
        /// What the device has.
        actual: u64,
    },
}

/// Pipelines that could not be built on a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A device limit below what the kernels need.
    #[error(
        "device limit {limit} = {actual} is too low for the kernels: expected at least {required}"
    )]
    LimitTooLow {
        /// Name of the limit in `wgpu::Limits`.
        limit: &'static str,
        /// The least that works.
        required: u64,
        /// What the device has.
        actual: u64,
    },
    /// The device refused a shader, a layout or a pipeline.
    #[error("the device refused the kernel {kernel}: {message}")]
    Device {
        /// Label of the kernel.
        kernel: &'static str,
        /// What wgpu reported.
        message: String,
    },
}

/// Tensors from which no optimizer can be built. Nothing has been allocated.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// Two tensors of one name.
    #[error("tensor {tensor:?} was given twice")]
    DuplicateName {
        /// The name.
        tensor: String,
    },
    /// A byte offset that does not fall on an element.
    #[error("tensor {tensor:?}: {role} offset is {offset_bytes} bytes, expected a multiple of 4")]
    Misaligned {
        /// The tensor.
        tensor: String,
        /// `params` or `grads`.
        role: &'static str,
        /// The offset.
        offset_bytes: u64,
    },
    /// The slice ends past its buffer.
    #[error(
        "tensor {tensor:?}: {role} need {numel} elements from byte {offset_bytes}, \
         but the buffer has {buffer_bytes} bytes"
    )]
    OutOfBounds {
        /// The tensor.
        tensor: String,
        /// `params` or `grads`.
        role: &'static str,
        /// Byte offset of the slice.
        offset_bytes: u64,
        /// Elements in the slice.
        numel: u64,
        /// Size of the buffer.
        buffer_bytes: u64,
    },
    /// A buffer without the usage that a kernel needs.
    #[error(
        "tensor {tensor:?}: the {role} buffer has usage {actual:?}, expected it to hold {required:?}"
    )]
    MissingUsage {
        /// The tensor.
        tensor: String,
        /// `params` or `grads`.
        role: &'static str,
        /// What is missing.
        required: wgpu::BufferUsages,
        /// What the buffer has.
        actual: wgpu::BufferUsages,
    },
    /// Parameters and gradients of one tensor in one buffer. WebGPU lets a dispatch either write a buffer or
    /// read it as read-only, whatever the ranges.
    #[error(
        "tensor {tensor:?}: parameters and gradients lie in the same buffer, expected two buffers"
    )]
    SharedBuffer {
        /// The tensor.
        tensor: String,
    },
    /// Elements that would be updated twice, or read as gradients while they are updated.
    #[error("tensor {tensor:?}: its parameters overlap the {role} of tensor {other:?}")]
    Overlap {
        /// The tensor.
        tensor: String,
        /// `params` or `grads`.
        role: &'static str,
        /// The other tensor.
        other: String,
    },
    /// The tensors cannot be planned on this device.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The pipelines could not be built.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The device could not allocate the optimizer's state.
    #[error("out of device memory while allocating {bytes} bytes of optimizer state")]
    OutOfMemory {
        /// What was asked for.
        bytes: u64,
    },
    /// The device refused a buffer or a bind group.
    #[error("the device refused the optimizer's buffers or bindings: {message}")]
    Device {
        /// What wgpu reported.
        message: String,
    },
}

/// An arena that could not be made, or a tensor that it does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ArenaError {
    /// Two tensors of one name.
    #[error("tensor {tensor:?} was given twice")]
    DuplicateName {
        /// The name.
        tensor: String,
    },
    /// A tensor larger than a buffer of this device may be.
    #[error(
        "tensor {tensor:?}: {bytes} bytes with padding, and a buffer holds {max_buffer_bytes} at most"
    )]
    TooLarge {
        /// The tensor.
        tensor: String,
        /// Its size with padding, or the largest number where that does not fit.
        bytes: u64,
        /// The device's limit.
        max_buffer_bytes: u64,
    },
    /// The device could not allocate the buffers.
    #[error("out of device memory while allocating {bytes} bytes for an arena")]
    OutOfMemory {
        /// What was asked for, parameters and gradients together.
        bytes: u64,
    },
    /// The device is lost, or refused the buffers.
    #[error("the device refused the arena's buffers: {message}")]
    Device {
        /// What wgpu reported.
        message: String,
    },
    /// No tensor of this name.
    #[error("the arena has no tensor {tensor:?}")]
    UnknownTensor {
        /// The name.
        tensor: String,
    },
    /// Values of another length.
    #[error("tensor {tensor:?}: expected {expected} elements, got {actual}")]
    Length {
        /// The tensor.
        tensor: String,
        /// Elements of the tensor.
        expected: u64,
        /// Elements given.
        actual: u64,
    },
    /// Values for more or fewer tensors than there are.
    #[error("expected the values of {expected} tensors, got {actual}")]
    TensorCount {
        /// Tensors of the arena.
        expected: usize,
        /// Tensors given.
        actual: usize,
    },
    /// The data could not be moved.
    #[error(transparent)]
    Transfer(#[from] TransferError),
}

/// A file from which no arena can be made, or an arena that no file can hold.
#[cfg(feature = "safetensors")]
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArenaFileError {
    /// Not a safetensors file, or tensors that none can hold.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The arena could not be made, or its data not moved.
    #[error(transparent)]
    Arena(#[from] ArenaError),
}

#[cfg(feature = "safetensors")]
impl From<TransferError> for ArenaFileError {
    fn from(error: TransferError) -> Self {
        Self::Arena(error.into())
    }
}

/// A step that was not recorded or not applied. Parameters, velocity and step counts are as they were.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StepError {
    /// The number of slices given is not the number of tensors of the optimizer.
    #[error("expected {expected} {role} slices, one per tensor, got {actual}")]
    TensorCount {
        /// `params` or `grads`.
        role: &'static str,
        /// Number of tensors.
        expected: usize,
        /// Number of slices.
        actual: usize,
    },
    /// A slice whose length is not the tensor's.
    #[error("tensor {tensor:?}: expected {expected} {role} elements, got {actual}")]
    Length {
        /// The tensor.
        tensor: String,
        /// `params` or `grads`.
        role: &'static str,
        /// Elements of the tensor.
        expected: usize,
        /// Elements of the slice.
        actual: usize,
    },
    /// [`GpuOptimizer::record`](crate::GpuOptimizer::record) without
    /// [`prepare`](crate::GpuOptimizer::prepare) since the last step or the last change, on a device without
    /// immediates.
    #[error(
        "the step was not prepared since the last one or the last change, and this device has no immediates"
    )]
    NotPrepared,
    /// The scalars of the step could not be staged: the device is lost or out of memory.
    #[error("the step's scalars could not be staged: {message}")]
    Scalars {
        /// What wgpu reported.
        message: String,
    },
}

/// A state that does not belong to this optimizer. The optimizer is as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The state was made by another form; its velocity means something else.
    #[error("the state was made by the {actual} form, expected {expected}")]
    Form {
        /// The optimizer's form.
        expected: MomentumForm,
        /// The state's form.
        actual: MomentumForm,
    },
    /// A tensor that the optimizer does not have.
    #[error("the state has a tensor {tensor:?} that the optimizer does not have")]
    UnknownTensor {
        /// The tensor.
        tensor: String,
    },
    /// Two entries of one tensor.
    #[error("the state has tensor {tensor:?} twice")]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
    },
    /// A tensor that the state does not have.
    #[error("the state has no tensor {tensor:?}, which the optimizer has")]
    MissingTensor {
        /// The tensor.
        tensor: String,
    },
    /// A velocity of another length.
    #[error("tensor {tensor:?}: expected {expected} velocity elements, got {actual}")]
    Length {
        /// The tensor.
        tensor: String,
        /// Elements of the tensor.
        expected: u64,
        /// Elements of the state.
        actual: u64,
    },
    /// A velocity for an optimizer without momentum, which would lose it.
    #[error("tensor {tensor:?}: the state holds a velocity, but the momentum is zero")]
    UnexpectedVelocity {
        /// The tensor.
        tensor: String,
    },
    /// The velocity could not be moved to or from the device.
    #[error(transparent)]
    Transfer(#[from] TransferError),
}

/// A file that holds no state, or a state that no file can hold.
#[cfg(feature = "safetensors")]
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateFileError {
    /// Not a safetensors file, a velocity that does not fit its shape, or a name that no file can hold.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// Metadata that could not be written.
    #[error("the metadata could not be written: {0}")]
    Metadata(#[from] serde_json::Error),
    /// A metadata entry that every state file has.
    #[error("not a state file: its metadata has no {key}")]
    MissingMetadata {
        /// The entry.
        key: &'static str,
    },
    /// A metadata entry that does not read.
    #[error("not a state file: its {key} does not read: {message}")]
    MalformedMetadata {
        /// The entry.
        key: &'static str,
        /// Why.
        message: String,
    },
    /// A file of another version.
    #[error("state format version is {actual}, expected {expected}")]
    Version {
        /// What this version reads.
        expected: &'static str,
        /// What the file says.
        actual: String,
    },
    /// A configuration that is none.
    #[error("the state's configuration: {0}")]
    Config(#[from] ConfigError),
    /// A tensor with two step counts.
    #[error("tensor {tensor:?} has two applied step counts")]
    DuplicateCount {
        /// The tensor.
        tensor: String,
    },
    /// A velocity without a step count.
    #[error("not a state file: tensor {tensor:?} has no applied step count")]
    MissingCount {
        /// The tensor.
        tensor: String,
    },
    /// A velocity that is not F32.
    #[error("tensor {tensor:?}: the velocity is {actual}, expected F32")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        actual: String,
    },
    /// A velocity of another shape than its tensor.
    #[error("tensor {tensor:?}: the velocity has shape {actual:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Shape of the tensor.
        expected: Vec<usize>,
        /// Shape of the velocity.
        actual: Vec<usize>,
    },
    /// A key that is not `state.INDEX.momentum_buffer` with an index below the number of parameters.
    #[error("key {key:?}: expected state.INDEX.momentum_buffer with an index below {parameters}")]
    UnknownKey {
        /// The key.
        key: String,
        /// Number of parameters.
        parameters: usize,
    },
    /// PyTorch knows the heavy ball only.
    #[error("the state is of the {form} form, and PyTorch's is the heavy-ball form")]
    NotPyTorchsForm {
        /// The state's form.
        form: MomentumForm,
    },
}

/// An upload or a download that did not happen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// The slice ends past its buffer or does not fall on elements.
    #[error(
        "{numel} elements from byte {offset_bytes} do not lie in a buffer of {buffer_bytes} bytes, \
         or the offset is not a multiple of 4"
    )]
    OutOfBounds {
        /// Byte offset of the slice.
        offset_bytes: u64,
        /// Elements in the slice.
        numel: u64,
        /// Size of the buffer.
        buffer_bytes: u64,
    },
    /// A buffer without `COPY_SRC` (download) or `COPY_DST` (upload).
    #[error("the buffer has usage {actual:?}, expected it to hold {required:?}")]
    MissingUsage {
        /// What is missing.
        required: wgpu::BufferUsages,
        /// What the buffer has.
        actual: wgpu::BufferUsages,
    },
    /// The device was lost before the data had been moved.
    #[error("device lost: the data could not be moved")]
    DeviceLost,
    /// The device is out of memory, or refused the copy.
    #[error("the device could not copy the data: {message}")]
    Device {
        /// What wgpu reported.
        message: String,
    },
}

/// No device could be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    /// No adapter fits the request.
    #[error("no adapter found{request}; adapters of this machine: {available}")]
    NoAdapter {
        /// What was asked for, as text to append.
        request: String,
        /// What there is.
        available: String,
    },
    /// The adapter exists but gave no device.
    #[error("adapter {adapter:?} gave no device: {message}")]
    NoDevice {
        /// The adapter.
        adapter: String,
        /// What wgpu reported.
        message: String,
    },
}
