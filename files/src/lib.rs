//! Models and optimizer states of [wgpu-optim](wgpu_optim) in safetensors files, for programs that step them without
//! having them in memory: the commands `wgpu-optim` and `wgpu-optim-mpi`, and the checkpoints of the latter.
//!
//! A [`Model`] is one file or several, of which only headers are in memory, and a [`SavedState`] is one whose tensors are
//! slots, whole or in parts. [`window`] moves some of their elements into memory, steps them and moves them out again, into
//! [`Outputs`] that take their targets' places together or not at all. [`round`] has what a round of local training is, for
//! both commands.

mod access;
mod at;
mod error;
mod identity;
mod model;
mod output;
pub mod round;
mod source;
mod state;
pub mod window;

pub use at::{At, Part};
pub use error::{ContentError, EngineError, FileError, NeedsTensors, SlotError};
pub use identity::directory_of;
pub use model::{
    IndexFile, Layout, Model, NewFile, Place, Shard, Steppable, is_index, read_index, storage_type,
};
pub use output::{Finished, Output, Outputs};
pub use source::{SourceFile, read_whole};
pub use state::{SavedState, SavedTensor, slot_entry};
