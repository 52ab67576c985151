//! Checkpoints: parameters, and all that is remembered of them, in one piece.

#[cfg(feature = "safetensors")]
mod file;

use super::{OptimizerState, StateError, Tensors, Unpaired};
use crate::rules::Rule;
use crate::rules::sgd::SgdConfig;
use crate::storage::{Codec, SectionValues};
#[cfg(feature = "safetensors")]
pub use file::CheckpointFileError;

/// The parameters of an optimizer's tensors with its state and the memory of its control: a run that loads it goes on as if it
/// had never stopped, bit for bit where the gradients are.
///
/// `GpuOptimizer::checkpoint` and [`CpuOptimizer::checkpoint`](crate::CpuOptimizer::checkpoint) make one, `load_checkpoint`
/// of either takes it over. With the feature `safetensors` it is one file: the parameters under their own names, as any
/// reader of safetensors finds them, and beside them `TENSOR.SLOT` and the metadata of a state file. [`save`](Self::save)
/// replaces the file at once, or not at all.
///
/// Hyper-parameters, groups and frozen tensors are the program's, which sets them as it did for the first run: a schedule goes
/// by [`Optimizer::steps`](crate::Optimizer::steps). Gradients are no part of it.
///
/// ```
/// # #[cfg(all(feature = "safetensors", not(target_arch = "wasm32")))] {
/// use wgpu_optim::state::Checkpoint;
/// use wgpu_optim::{CpuOptimizer, Optimizer, SgdConfig, TensorSlice};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let path = std::env::temp_dir().join(format!("wgpu-optim-doc-{}.safetensors", std::process::id()));
/// let config = SgdConfig::builder(0.1).momentum(0.9).build()?;
/// let mut optimizer = CpuOptimizer::new(config, [("weight", [2])])?;
/// let mut weight = [1.0, 2.0];
/// optimizer.step(&mut [&mut weight], &[&[0.5, -0.5]])?;
/// optimizer.checkpoint(&[TensorSlice::F32(&weight)], None)?.save(&path)?;
///
/// let mut resumed = CpuOptimizer::new(config, [("weight", [2])])?;
/// let mut loaded = [0.0; 2];
/// resumed.load_checkpoint(&Checkpoint::load(&path)?, &mut [(&mut loaded[..]).into()], None)?;
/// assert_eq!((loaded, resumed.steps()), (weight, 1));
/// # std::fs::remove_file(&path)?;
/// # Ok(())
/// # }
/// # main().unwrap();
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint<R = SgdConfig> {
    /// The parameters of each tensor of the state.
    pub params: Vec<TensorParams>,
    /// The state, the control's memory included.
    pub state: OptimizerState<R>,
}

/// The parameters of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorParams {
    /// The tensor's name.
    pub name: String,
    /// Its shape, first dimension first.
    pub shape: Vec<usize>,
    /// One value per element, as it is stored.
    pub values: SectionValues,
}

/// A checkpoint that does not belong to an optimizer. Parameters, optimizer and control are as they were.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointMismatch {
    /// The state belongs to another rule or to other tensors.
    #[error(transparent)]
    State(#[from] StateError),
    /// A tensor of which there are no parameters.
    #[error("the checkpoint has no parameters of tensor {tensor:?}, which the optimizer has")]
    MissingParams {
        /// The tensor.
        tensor: String,
    },
    /// Parameters of a tensor that the optimizer does not have.
    #[error(
        "the checkpoint has parameters of a tensor {tensor:?} that the optimizer does not have"
    )]
    UnknownParams {
        /// The tensor.
        tensor: String,
    },
    /// Two entries of one tensor.
    #[error("the checkpoint has parameters of tensor {tensor:?} twice")]
    DuplicateParams {
        /// The tensor.
        tensor: String,
    },
    /// Parameters of another shape.
    #[error("tensor {tensor:?}: the checkpoint has shape {actual:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Shape of the tensor.
        expected: Vec<usize>,
        /// Shape in the checkpoint.
        actual: Vec<usize>,
    },
    /// Parameters that are stored otherwise.
    #[error("tensor {tensor:?}: the checkpoint has params of {actual}, expected {expected}")]
    Stored {
        /// The tensor.
        tensor: String,
        /// The storage type of its parameters.
        expected: &'static str,
        /// The codec of those in the checkpoint.
        actual: &'static str,
    },
    /// Another number of values than the shape says.
    #[error("tensor {tensor:?}: the checkpoint has {actual} parameters, expected {expected}")]
    Length {
        /// The tensor.
        tensor: String,
        /// Elements of the tensor.
        expected: u64,
        /// Values in the checkpoint.
        actual: u64,
    },
    /// A control is to be resumed, and the checkpoint was made without one.
    #[error("the checkpoint was made without a control, and one is to be resumed")]
    NoControl,
    /// The checkpoint was made with a control, and none is to be resumed: its loss scale would be lost. A program that means
    /// it sets `state.control` to [`None`].
    #[error("the checkpoint was made with a control, and none is to be resumed")]
    UnusedControl,
}

impl From<Unpaired> for CheckpointMismatch {
    fn from(unpaired: Unpaired) -> Self {
        match unpaired {
            Unpaired::Missing(tensor) => Self::MissingParams { tensor },
            Unpaired::Unknown(tensor) => Self::UnknownParams { tensor },
            Unpaired::Duplicate(tensor) => Self::DuplicateParams { tensor },
        }
    }
}

impl<R: Rule> Checkpoint<R> {
    /// Checks parameters and the presence of a control against these tensors, and returns the parameters of each, in their
    /// order. The state is checked where it is loaded.
    pub(crate) fn params_of(
        &self,
        tensors: &Tensors,
        has_control: bool,
    ) -> Result<Vec<&TensorParams>, CheckpointMismatch> {
        match (self.state.control, has_control) {
            (None, true) => return Err(CheckpointMismatch::NoControl),
            (Some(_), false) => return Err(CheckpointMismatch::UnusedControl),
            _ => {}
        }
        let matched = tensors.pair(&self.params, |params| &*params.name)?;
        for (tensor, params) in tensors.as_slice().iter().zip(&matched) {
            let name = || tensor.name.clone();
            let (expected, actual) = (Codec::from(tensor.storage.params), params.values.codec());
            if actual != expected {
                return Err(CheckpointMismatch::Stored {
                    tensor: name(),
                    expected: expected.name(),
                    actual: actual.name(),
                });
            }
            if params.shape != tensor.shape {
                return Err(CheckpointMismatch::Shape {
                    tensor: name(),
                    expected: tensor.shape.clone(),
                    actual: params.shape.clone(),
                });
            }
            let actual = params.values.len() as u64;
            if actual != tensor.numel {
                return Err(CheckpointMismatch::Length {
                    tensor: name(),
                    expected: tensor.numel,
                    actual,
                });
            }
        }
        Ok(matched)
    }
}

impl Tensors {
    /// Parameters that lie in memory like this, in the order of the tensors.
    pub(crate) fn params(&self, values: impl Iterator<Item = SectionValues>) -> Vec<TensorParams> {
        let tensors = self.as_slice().iter().zip(values);
        let params = tensors.map(|(tensor, values)| TensorParams {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            values,
        });
        params.collect()
    }
}
