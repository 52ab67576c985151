//! The parameters of a step, on their way from a module to the kernels.

use burn::module::ParamId;

/// A parameter with a gradient: its path, its shape, itself and the gradient.
#[derive(Debug)]
pub(crate) struct Stepped<T> {
    pub(crate) path: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) params: T,
    pub(crate) grads: T,
}

/// A parameter that has been found to have a gradient, and its shape.
pub(crate) struct Expected {
    pub(crate) id: ParamId,
    pub(crate) shape: Vec<usize>,
}

/// How many tensors a step had to copy before it, because their memory was shared or strided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Parameters.
    pub params: usize,
    /// Gradients.
    pub grads: usize,
}
