//! [wgpu-optim](wgpu_optim) over MPI: optimizer state sharded over ranks, and rounds of local training.
//!
//! [`ShardedOptimizer`] steps parameters that every rank has, and keeps 1/N of the state on each of N. The command
//! `wgpu-optim-mpi round` makes a round of DiLoCo or federated averaging over the ranks' models in files.
//!
//! What goes over the wire, into memory and onto disk is in `docs/scale.md` in the repository.

mod buckets;
mod checkpoint;
#[cfg(feature = "command")]
pub mod command;
mod error;
mod memory;
mod optimizer;
mod ranks;
mod share;
mod shares;

pub use error::ShardError;
pub use mpi;
pub use optimizer::{Reduction, ShardedOptimizer, Sharding};
pub use ranks::Traffic;
pub use share::{CpuShare, GpuShare, Share};
pub use shares::{ALIGN_ELEMS, Shares, Slice};
pub use wgpu_optim_files::{ContentError, FileError, SlotError};

/// The README's example is compiled and run as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;
