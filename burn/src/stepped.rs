//! The parameters of a step, on their way from a module to the kernels.

use burn::module::ParamId;
use burn::tensor::DType;

/// A parameter with a gradient: its path, its shape, itself and the gradient.
#[derive(Debug)]
pub(crate) struct Stepped<T> {
    pub(crate) path: String,
    pub(crate) shape: Vec<usize>,
    /// The parameter's.
    pub(crate) dtype: DType,
    pub(crate) params: T,
    pub(crate) grads: T,
}

/// A parameter that has been found to have a gradient.
pub(crate) struct Expected {
    pub(crate) id: ParamId,
    pub(crate) path: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: DType,
}

/// How many tensors a step had to copy before it, because their memory was shared or strided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Parameters.
    pub params: usize,
    /// Gradients.
    pub grads: usize,
}
