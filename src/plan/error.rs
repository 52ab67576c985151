//! Tensors that cannot be planned.

/// Tensors that cannot be planned under the given limits. A plan knows a tensor by its index among those that it was given;
/// an optimizer, in its errors, by its name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError<T = usize> {
    /// A byte offset that does not fall on an element.
    #[error("tensor {tensor:?}: byte offset {offset_bytes} is not a multiple of {elem_bytes}")]
    Misaligned {
        /// The tensor.
        tensor: T,
        /// The offset.
        offset_bytes: u64,
        /// Bytes of an element.
        elem_bytes: u64,
    },
    /// The tensor ends past the 64-bit address range.
    #[error("tensor {tensor:?}: {numel} elements end past the address range")]
    TooLarge {
        /// The tensor.
        tensor: T,
        /// The tensor's number of elements.
        numel: u64,
    },
    /// Parameters and gradients in one buffer, so close to each other that their bindings, which start where the device
    /// lets them, would overlap.
    #[error(
        "tensor {tensor:?}: parameters at byte {params_offset_bytes} and gradients at byte {grads_offset_bytes} of one \
         buffer cannot be bound side by side: expected the later ones at byte {least_offset_bytes} or after it"
    )]
    TooClose {
        /// The first tensor that is concerned.
        tensor: T,
        /// The byte at which the parameters start.
        params_offset_bytes: u64,
        /// The byte at which the gradients start.
        grads_offset_bytes: u64,
        /// The least byte at which the later of both may start.
        least_offset_bytes: u64,
    },
    /// A device limit below what any piece needs.
    #[error("device limit {limit} = {actual} is too low: expected at least {required}")]
    LimitTooLow {
        /// Name of the limit in `wgpu::Limits`.
        limit: &'static str,
        /// The least that works.
        required: u64,
        /// The limit of the device.
        actual: u64,
    },
}

impl<T> PlanError<T> {
    /// This error with another name for its tensor.
    pub fn named<U>(self, name: impl FnOnce(T) -> U) -> PlanError<U> {
        match self {
            Self::Misaligned {
                tensor,
                offset_bytes,
                elem_bytes,
            } => PlanError::Misaligned {
                tensor: name(tensor),
                offset_bytes,
                elem_bytes,
            },
            Self::TooLarge { tensor, numel } => PlanError::TooLarge {
                tensor: name(tensor),
                numel,
            },
            Self::TooClose {
                tensor,
                params_offset_bytes,
                grads_offset_bytes,
                least_offset_bytes,
            } => PlanError::TooClose {
                tensor: name(tensor),
                params_offset_bytes,
                grads_offset_bytes,
                least_offset_bytes,
            },
            Self::LimitTooLow {
                limit,
                required,
                actual,
            } => PlanError::LimitTooLow {
                limit,
                required,
                actual,
            },
        }
    }
}
