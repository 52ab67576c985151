//! Errors of devices, their kernels, their buffers, and of steps: one enum per stage.

#[cfg(feature = "safetensors")]
use crate::files::HeaderError;
use crate::plan::PlanError;
use crate::rules::UnknownSlot;
use crate::state::{CheckpointMismatch, DuplicateName, StateError, UnknownTensor};
use crate::wgsl::KernelError;

/// No device could be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    /// No adapter fits the request.
    #[error("no adapter found{request}; adapters of this machine: {available}")]
    NoAdapter {
        /// The request, as text to append.
        request: String,
        /// The adapters that there are.
        available: String,
    },
    /// The adapter exists but gave no device.
    #[error("adapter {adapter:?} gave no device: {message}")]
    NoDevice {
        /// The adapter.
        adapter: String,
        /// The message of wgpu.
        message: String,
    },
}

/// Tensors from which no optimizer can be built. Nothing has been allocated.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// Two tensors of one name.
    #[error(transparent)]
    DuplicateName(#[from] DuplicateName),
    /// A storage type for a slot that there is not.
    #[error(transparent)]
    UnknownSlot(#[from] UnknownSlot),
    /// A byte offset that does not fall on an element.
    #[error(
        "tensor {tensor:?}: {role} offset is {offset_bytes} bytes, expected a multiple of {elem_bytes}"
    )]
    Misaligned {
        /// The tensor.
        tensor: String,
        /// `params` or `grads`.
        role: &'static str,
        /// The offset.
        offset_bytes: u64,
        /// Bytes of an element.
        elem_bytes: u64,
    },
    /// The slice ends past its buffer.
    #[error(
        "tensor {tensor:?}: {role} need {numel} elements of {storage} from byte {offset_bytes}, \
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
        /// The storage type of its values.
        storage: &'static str,
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
        /// The usages that are missing.
        required: wgpu::BufferUsages,
        /// The usages of the buffer.
        actual: wgpu::BufferUsages,
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
    Plan(#[from] PlanError<String>),
    /// The pipelines could not be built.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The device could not allocate the optimizer's state.
    #[error("out of device memory while allocating {bytes} bytes of optimizer state")]
    OutOfMemory {
        /// The bytes that were asked for.
        bytes: u64,
    },
    /// The device refused a buffer or a bind group.
    #[error("the device refused the optimizer's buffers or bindings: {message}")]
    Device {
        /// The message of wgpu.
        message: String,
    },
}

impl From<wgpu::Error> for BuildError {
    fn from(error: wgpu::Error) -> Self {
        Self::Device {
            message: error.to_string(),
        }
    }
}

/// Tensors to which an optimizer cannot be bound anew. It is as it was.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RebindError {
    /// A tensor that the optimizer does not have.
    #[error(transparent)]
    UnknownTensor(#[from] UnknownTensor),
    /// A tensor of another shape.
    #[error("tensor {tensor:?}: expected the shape {expected:?}, got {actual:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// The tensor's shape.
        expected: Vec<usize>,
        /// The shape given.
        actual: Vec<usize>,
    },
    /// A tensor that is stored otherwise.
    #[error("tensor {tensor:?}: expected {role} of {expected}, got {actual}")]
    Stored {
        /// The tensor.
        tensor: String,
        /// `params` or `grads`.
        role: &'static str,
        /// The storage type of the tensor.
        expected: &'static str,
        /// The storage type that was given.
        actual: &'static str,
    },
    /// State of 16 bits whose place would change by half a word, which no copy can do: parameters that started on an even
    /// element and now start on an odd one, or the other way round.
    #[error("tensor {tensor:?}: its state of 16 bits cannot move by half a word")]
    HalfWord {
        /// The tensor.
        tensor: String,
    },
    /// The buffers cannot be bound.
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// A step that was not recorded or not applied. Parameters, state and step counts are as they were.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum StepError {
    /// [`GpuOptimizer::record`](crate::GpuOptimizer::record) on a device without immediates, or
    /// [`GpuControl::record`](crate::GpuControl::record), without a `prepare` of the same optimizers since the last step or
    /// the last change, or after the encoder of that was dropped.
    #[error(
        "the step was not prepared since the last one or the last change, or its encoder was dropped"
    )]
    NotPrepared,
    /// The scalars of the step could not be staged: the device is lost or out of memory.
    #[error("the step's scalars could not be staged: {message}")]
    Scalars {
        /// The message of wgpu.
        message: String,
    },
    /// Steps under a control have been recorded of which the host does not know yet whether they were skipped, and so
    /// not how many were applied: a step without a control, or under another one, has to wait until
    /// [`GpuControl::read`](crate::GpuControl::read) has had the outcome of the last.
    #[error("the outcome of steps under a control has not been read yet")]
    Unread,
    /// The device has skipped a step, and perhaps more, because it had no scalars for it: of the steps whose outcome had
    /// not arrived by then more than 64 had been skipped. Steps that are recorded faster than the device does them, and
    /// skipped, need a host that waits for the device now and then. Said once; nothing has been recorded, and the next
    /// step can be.
    #[error(
        "step {step} was skipped: more than 64 steps before it had been skipped of which nothing had arrived yet; \
         let the device catch up (poll it) and step again"
    )]
    TooFarAhead {
        /// The last such step, by its number in [`ControlRecord`](crate::control::ControlRecord).
        step: u64,
    },
    /// The control clips a parameter group that none of the optimizers has.
    #[error("the control clips a parameter group {group:?}, and no optimizer has one of that name")]
    UnknownGroup {
        /// The group's name.
        group: String,
    },
    /// The optimizer and its control are not built from the same [`Kernels`](crate::Kernels) or clones of them.
    #[error("the optimizer and its control are not built from the same kernels")]
    OtherKernels,
    /// The device could not build what the first step under a control needs.
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// An upload or a download that did not happen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// A region that ends before it starts.
    #[error(
        "the region ends at byte {end} and starts at byte {start}, expected it to start before it ends"
    )]
    Backwards {
        /// The byte at which it starts.
        start: u64,
        /// The byte at which it ends.
        end: u64,
    },
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
        /// The usages that are missing.
        required: wgpu::BufferUsages,
        /// The usages of the buffer.
        actual: wgpu::BufferUsages,
    },
    /// Regions that have not as many bytes as were given for them.
    #[error("the regions have {expected} bytes, got {actual}")]
    Length {
        /// Bytes of all regions.
        expected: u64,
        /// Bytes given.
        actual: u64,
    },
    /// The device was lost before the data had been moved.
    #[error("device lost: the data could not be moved")]
    DeviceLost,
    /// The device is out of memory, or refused the copy.
    #[error("the device could not copy the data: {message}")]
    Device {
        /// The message of wgpu.
        message: String,
    },
}

/// A state that an optimizer on the device could not take over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A state that does not belong to this optimizer, which is as it was.
    #[error(transparent)]
    State(#[from] StateError),
    /// The device failed half-way: the optimizer's state is undefined.
    #[error(transparent)]
    Transfer(#[from] TransferError),
}

/// A checkpoint that could not be made of an optimizer on the device, or not be taken over by one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A checkpoint that does not belong to this optimizer. Nothing has been written.
    #[error(transparent)]
    Mismatch(#[from] CheckpointMismatch),
    /// A tensor that lies nowhere at the moment, so that its parameters are not to be had. Nothing has been written.
    #[error("tensor {tensor:?} lies nowhere at the moment, expected it to be bound")]
    Unbound {
        /// The tensor.
        tensor: String,
    },
    /// Parameters in a buffer that cannot be copied from, or to. Nothing has been written.
    #[error(
        "tensor {tensor:?}: the params buffer has usage {actual:?}, expected it to hold {required:?}"
    )]
    MissingUsage {
        /// The tensor.
        tensor: String,
        /// The usage that is missing.
        required: wgpu::BufferUsages,
        /// The usages of the buffer.
        actual: wgpu::BufferUsages,
    },
    /// The device is lost, or out of memory. Half-way through a checkpoint that is loaded parameters and state are undefined.
    #[error(transparent)]
    Transfer(#[from] TransferError),
}

impl From<LoadError> for CheckpointError {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::State(error) => Self::Mismatch(error.into()),
            LoadError::Transfer(error) => Self::Transfer(error),
        }
    }
}

/// An arena that could not be made, or a tensor that it does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ArenaError {
    /// Two tensors of one name.
    #[error(transparent)]
    DuplicateName(#[from] DuplicateName),
    /// A tensor larger than a buffer of this device may be.
    #[error(
        "tensor {tensor:?}: {bytes} bytes with padding, and a buffer holds {max_buffer_bytes} at most"
    )]
    TooLarge {
        /// The tensor.
        tensor: String,
        /// The size of the arena with padding, or the largest number where that does not fit.
        bytes: u64,
        /// The device's limit.
        max_buffer_bytes: u64,
    },
    /// The device could not allocate the buffers.
    #[error("out of device memory while allocating {bytes} bytes for an arena")]
    OutOfMemory {
        /// The bytes that were asked for, parameters and gradients together.
        bytes: u64,
    },
    /// The device is lost, or refused the buffers.
    #[error("the device refused the arena's buffers: {message}")]
    Device {
        /// The message of wgpu.
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
