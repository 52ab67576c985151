//! Errors on a rank, and what the others hear of them.

use std::path::PathBuf;

use wgpu_optim::cpu::{SliceError, TensorError};
use wgpu_optim::gpu::LoadError;
use wgpu_optim::rules::GroupError;
use wgpu_optim::state::UnknownTensor;
use wgpu_optim::{BuildError, ConfigError, StateError, StepError, TransferError};
use wgpu_optim_files::FileError;

/// A failure of a sharded optimizer. Unless a variant says otherwise, every rank gets an error at the same call, and
/// nothing has changed on any.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShardError {
    /// Ranks that do not mean the same.
    #[error("rank {rank}: {what} is {actual}, on rank 0 it is {expected}")]
    Disagreement {
        /// The first rank that differs from rank 0.
        rank: usize,
        /// The property that differs: a tensor, a group's configuration, ...
        what: String,
        /// The value on rank 0.
        expected: String,
        /// The value on the rank that differs.
        actual: String,
    },
    /// Another rank failed, which has the error itself.
    #[error("rank {rank}: {message}")]
    Rank {
        /// The first rank that failed.
        rank: usize,
        /// The error of that rank.
        message: String,
    },
    /// An earlier step failed half-way: parameters and state are not of one step. A state that is loaded, with its
    /// parameters, mends it.
    #[error(
        "an earlier step failed half-way; load the last state, with the parameters that it goes with"
    )]
    HalfWay,
    /// Stochastic rounding, whose random bits go by a tensor's elements from its first on, which a rank need not have.
    #[error("tensor {tensor:?} is rounded stochastically, which shards cannot be; keep masters")]
    Stochastic {
        /// The tensor.
        tensor: String,
    },
    /// A control that clips tensors one by one, whose norms no rank has a whole of.
    #[error(
        "shards are not clipped tensor by tensor (tensor_max_norm); clip by the norm of all or of groups"
    )]
    ClipsTensors,
    /// A rule that takes sums over tensors, of which no rank has a whole.
    #[error("group {group:?}: {rule} takes norms of whole tensors, which shards are not")]
    Sums {
        /// The parameter group.
        group: String,
        /// The rule's stem.
        rule: &'static str,
    },
    /// More than fits into one message.
    #[error("{bytes} bytes are more than one message may have; use smaller buckets")]
    TooLarge {
        /// Bytes of a part of it.
        bytes: usize,
    },
    /// Two tensors of one name, or a share of the tensors that this rank's memory cannot hold.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// No tensor of this name.
    #[error(transparent)]
    UnknownTensor(#[from] UnknownTensor),
    /// Slices that do not fit the tensors.
    #[error(transparent)]
    Slice(#[from] SliceError),
    /// A hyper-parameter that cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A group that is not there, or what it cannot use.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// The optimizer on the device could not be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The device could not make the step.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The device could not copy.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// A state that does not fit.
    #[error(transparent)]
    State(#[from] StateError),
    /// A state that the optimizer on the device could not take over.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A file that cannot be read or written, or is not of one state with the others.
    #[error(transparent)]
    File(#[from] FileError),
    /// An index that would have been replaced, and is not that of a state.
    #[error(
        "{} is not the index of a state, but of a model, perhaps: write the state under another name", path.display()
    )]
    NotAState {
        /// The index.
        path: PathBuf,
    },
    /// A name under which nobody would look for an index.
    #[error("{}: expected a name that ends in .json, for the index of a state", path.display())]
    IndexName {
        /// The path.
        path: PathBuf,
    },
    /// Files of ranks that do not see each other's disks.
    #[error(
        "the first rank does not see {}, which rank {rank} has written: expected a folder that all ranks share",
        path.display()
    )]
    NotShared {
        /// The first rank whose file is not there, or not as it has written it.
        rank: usize,
        /// The path at which the first rank looks for it.
        path: PathBuf,
    },
}
