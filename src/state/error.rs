//! States that do not belong to an optimizer, and files that hold none.

#[cfg(feature = "safetensors")]
use crate::files::HeaderError;
#[cfg(feature = "safetensors")]
use crate::rules::ConfigError;

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
    StateKind {
        /// The tensor.
        tensor: String,
        /// The kind of the optimizer's slots.
        expected: String,
        /// The kind of the state's slots.
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
    /// Low bits of masters in a slot of numbers, or numbers where low bits are expected.
    #[error("tensor {tensor:?}: the values of {slot} cannot be {actual}")]
    Codec {
        /// The tensor.
        tensor: String,
        /// The slot.
        slot: String,
        /// The codec of its values.
        actual: &'static str,
    },
    /// A slot that the rule of the tensor keeps, and the state does not have beside its others.
    #[error("tensor {tensor:?}: the state has no {slot}, which the rule keeps")]
    MissingSlot {
        /// The tensor.
        tensor: String,
        /// The slot.
        slot: String,
    },
}

/// A record that is none of a rule's, or a rule that has none.
#[cfg(feature = "safetensors")]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Another rule's record.
    #[error("the state was made by the rule {actual}, expected {expected}")]
    OtherRule {
        /// The rule that reads it.
        expected: &'static str,
        /// The rule whose it is.
        actual: String,
    },
    /// A record that does not read.
    #[error("not a state file: its rule does not read: {message}")]
    Malformed {
        /// Why.
        message: String,
    },
    /// A rule that could not be written.
    #[error("the rule could not be written: {message}")]
    Unwritable {
        /// Why.
        message: String,
    },
}

/// A file that holds no state, or a state that no file can hold.
#[cfg(feature = "safetensors")]
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateFileError {
    /// Not a safetensors file, or a slot that does not fit its tensor's shape.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// A rule that does not read, or another one.
    #[error(transparent)]
    Rule(#[from] RecordError),
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
        /// The versions that this one reads.
        expected: &'static str,
        /// The version that the file says.
        actual: String,
    },
    /// A configuration in format 1 that is none.
    #[error("the state's configuration: {0}")]
    Config(#[from] ConfigError),
    /// A tensor with two step counts.
    #[error("tensor {tensor:?} has two applied step counts")]
    DuplicateCount {
        /// The tensor.
        tensor: String,
    },
    /// A slot, or the kind of one, without a step count.
    #[error("not a state file: tensor {tensor:?} has no applied step count")]
    MissingCount {
        /// The tensor.
        tensor: String,
    },
    /// A name in a file that is not `TENSOR.SLOT`.
    #[error("{name:?} names no slot: expected TENSOR.SLOT, and no dot in SLOT")]
    SlotName {
        /// The name.
        name: String,
    },
    /// A slot that the rule never keeps.
    #[error("tensor {tensor:?}: the state holds its {slot}, expected one of {expected}")]
    UnknownSlot {
        /// The tensor.
        tensor: String,
        /// The slot.
        slot: String,
        /// The slots that the rule may keep.
        expected: String,
    },
    /// A slot or scalar of a dtype that it cannot have.
    #[error("tensor {tensor:?}: the {slot} is {actual}, expected {expected}")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// The slot or scalar.
        slot: String,
        /// The dtypes that it may have.
        expected: &'static str,
        /// The slot's dtype.
        actual: String,
    },
    /// A slot of another shape than its tensor, or a scalar with one.
    #[error("tensor {tensor:?}: the {slot} has shape {actual:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// The slot or scalar.
        slot: String,
        /// Shape of the tensor.
        expected: Vec<usize>,
        /// Shape of the slot.
        actual: Vec<usize>,
    },
    /// A key that is not `state.INDEX.NAME` with an index below the number of parameters and a name that PyTorch has
    /// for this rule, or that of masters.
    #[error(
        "key {key:?}: expected state.INDEX.NAME with an index below {parameters} and a name among {expected}"
    )]
    UnknownKey {
        /// The key.
        key: String,
        /// Number of parameters.
        parameters: usize,
        /// The slots that PyTorch keeps under this rule, and masters.
        expected: String,
    },
    /// A key that PyTorch writes beside the others of the same parameter.
    #[error("tensor {tensor:?}: there is no key {key:?} beside its others")]
    MissingKey {
        /// The tensor.
        tensor: String,
        /// The key.
        key: String,
    },
    /// A `step` that is no count.
    #[error("tensor {tensor:?}: the step is {actual:?}, expected a whole number of steps")]
    NotACount {
        /// The tensor.
        tensor: String,
        /// The dtype of the entry.
        actual: f32,
    },
    /// A scalar that another configuration would have left.
    #[error(
        "tensor {tensor:?}: the {name} is {actual:?}, expected {expected:?} by the configuration"
    )]
    Scalar {
        /// The tensor.
        tensor: String,
        /// The scalar.
        name: &'static str,
        /// The value by the configuration and the tensor's steps.
        expected: f64,
        /// The dtype of the entry.
        actual: f32,
    },
    /// A rule that PyTorch does not have, or not in this form.
    #[error("torch.optim has no {state_kind}, or not as it is configured here")]
    NotPyTorchs {
        /// The kind of the rule's slots.
        state_kind: String,
    },
    /// A tensor with [`Masters::LowBits`](crate::Masters::LowBits): PyTorch has nothing like a rest.
    #[error(
        "tensor {tensor:?}: the state holds its params_rest, which say nothing without the parameters, expected \
         master_params, which storage::rest::join makes of both, or none"
    )]
    RestsForPyTorch {
        /// The tensor.
        tensor: String,
    },
    /// A tensor of another group's rule, of which a state knows too little for PyTorch.
    #[error(
        "tensor {tensor:?}: the state is of the {actual} form, expected {expected} as the default group"
    )]
    OtherStateKind {
        /// The tensor.
        tensor: String,
        /// The kind of the default group's slots.
        expected: String,
        /// The kind of the tensor's slots.
        actual: String,
    },
}
