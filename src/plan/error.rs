//! Tensors that cannot be planned.

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
