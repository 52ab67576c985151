//! Tensors that no optimizer in memory can have, and slices that are not those of its tensors.

use crate::rules::UnknownSlot;
use crate::state::{CheckpointMismatch, DuplicateName};

/// Tensors that no optimizer in memory can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    /// Two tensors of one name.
    #[error(transparent)]
    DuplicateName(#[from] DuplicateName),
    /// A storage type for a slot that there is not.
    #[error(transparent)]
    UnknownSlot(#[from] UnknownSlot),
    /// A tensor of more elements than a slice can have.
    #[error("tensor {tensor:?}: no slice has as many elements as the shape {shape:?}")]
    TooLarge {
        /// The tensor.
        tensor: String,
        /// The tensor's shape.
        shape: Vec<usize>,
    },
    /// There is no memory for what is remembered of a tensor.
    #[error("tensor {tensor:?}: out of memory while allocating {numel} elements of its state")]
    OutOfMemory {
        /// The tensor.
        tensor: String,
        /// The number of the tensor's elements.
        numel: u64,
    },
}

/// Slices that do not fit the tensors. Parameters, state and step counts are as they were.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SliceError {
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
    /// A control that clips a parameter group by itself which the optimizer does not have.
    #[error("the control clips the group {group:?}, and the optimizer has no group of this name")]
    UnknownGroup {
        /// The group.
        group: String,
    },
    /// A slice of another type than the tensor's.
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
}

/// A checkpoint that was not taken over. Parameters, optimizer and control are as they were.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// Slices that do not fit the tensors.
    #[error(transparent)]
    Slices(#[from] SliceError),
    /// A checkpoint that does not belong to the optimizer.
    #[error(transparent)]
    Mismatch(#[from] CheckpointMismatch),
}
