//! Slices that are not those of an optimizer's tensors.

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
    /// A slice of another type than the tensor's.
    #[error("tensor {tensor:?}: expected {role} of {expected}, got {actual}")]
    Stored {
        /// The tensor.
        tensor: String,
        /// `params` or `grads`.
        role: &'static str,
        /// What they are stored as.
        expected: &'static str,
        /// What was given.
        actual: &'static str,
    },
}
