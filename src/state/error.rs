//! States that do not belong to an optimizer, and files that hold none.

#[cfg(feature = "safetensors")]
use crate::files::HeaderError;
use crate::gpu::TransferError;
#[cfg(feature = "safetensors")]
use crate::rules::ConfigError;
use crate::rules::sgd::MomentumForm;

/// Two tensors of one name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("tensor {tensor:?} was given twice")]
pub struct DuplicateName {
    /// The name.
    pub tensor: String,
}

/// A state that does not belong to this optimizer. The optimizer is as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The state was made by another rule or form of it; its slots mean something else.
    #[error("tensor {tensor:?}: the state is of the {actual} form, expected {expected}")]
    Meaning {
        /// The tensor.
        tensor: String,
        /// What the optimizer's slots mean.
        expected: String,
        /// What the state's slots mean.
        actual: String,
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
    /// A tensor of another shape.
    #[error("tensor {tensor:?}: the state has shape {actual:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Shape of the tensor.
        expected: Vec<usize>,
        /// Shape in the state.
        actual: Vec<usize>,
    },
    /// A slot of another length.
    #[error("tensor {tensor:?}: expected {expected} elements of {slot}, got {actual}")]
    Length {
        /// The tensor.
        tensor: String,
        /// The slot.
        slot: String,
        /// Elements of the tensor.
        expected: u64,
        /// Elements of the state.
        actual: u64,
    },
    /// A slot that the rule of the tensor does not keep and would lose: a velocity without momentum, say.
    #[error("tensor {tensor:?}: the state holds its {slot}, which the rule does not keep")]
    UnexpectedSlot {
        /// The tensor.
        tensor: String,
        /// The slot.
        slot: String,
    },
    /// A slot that the rule of the tensor keeps, and the state does not have beside its others.
    #[error("tensor {tensor:?}: the state has no {slot}, which the rule keeps")]
    MissingSlot {
        /// The tensor.
        tensor: String,
        /// The slot.
        slot: String,
    },
    /// The state could not be moved to or from the device.
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
