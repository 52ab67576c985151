//! Files that cannot be read, written or understood, and devices that fail.

use std::io;
use std::path::{Path, PathBuf};

use wgpu_optim::files::{HeaderError, IndexError};
use wgpu_optim::gpu::ArenaError;
use wgpu_optim::state::{StateFileError, UnknownTensor};
use wgpu_optim::{BuildError, StepError, StorageType, wgpu};

/// A file that cannot be read or written, or does not hold what it has to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The system does not read or write it, or it is not what can be read or replaced.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// `read`, `write`, ...
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of another format or content than expected.
    #[error("{}: {source}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// The mistake in it.
        source: ContentError,
    },
    /// A file that an index names.
    #[error("index {}: {source}", path.display())]
    OfIndex {
        /// The index.
        path: PathBuf,
        /// The mistake in the file.
        source: Box<FileError>,
    },
    /// A tensor that is not in the file that the index says.
    #[error("index {}: tensor {tensor:?} is not in {file}, where the index says it is", path.display())]
    NotThere {
        /// The index.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The file.
        file: String,
    },
    /// Another process has claimed it.
    #[error(
        "{} is being replaced by another run, and one of the two would be lost; start this one when that has ended",
        path.display()
    )]
    Claimed {
        /// The file.
        path: PathBuf,
    },
    /// Two outputs that are one file.
    #[error("{one} and {other} are the same file, {}", path.display())]
    SameFile {
        /// One of them, as the user named it.
        one: String,
        /// The other one, as the user named it.
        other: String,
        /// The file.
        path: PathBuf,
    },
    /// An output whose header would be too large.
    #[error(
        "{role} would have a header of {header_bytes} bytes, expected at most {max_header_bytes}, as many as a safetensors \
         file may have"
    )]
    TooLarge {
        /// The user's name for the file.
        role: String,
        /// The size of its header.
        header_bytes: u64,
        /// The most that there may be.
        max_header_bytes: u64,
    },
    /// A file that was replaced before another one could not be, and is not what it was again.
    #[error("{} could not be put back: {undo}: {source}", path.display())]
    NotPutBack {
        /// The file.
        path: PathBuf,
        /// Why not.
        undo: io::Error,
        /// The error because of which it was to be put back.
        source: Box<FileError>,
    },
    /// Files that are not of one state.
    #[error("{} and the files before are not of one state: its {key} is of another state", path.display())]
    Mixed {
        /// The first file that differs.
        path: PathBuf,
        /// The metadata in which it does.
        key: &'static str,
    },
    /// A slot that does not fit its tensor, or the rule.
    #[error("tensor {tensor:?}: {}", why.of(slot))]
    Slot {
        /// The tensor.
        tensor: String,
        /// The slot.
        slot: String,
        /// The mistake.
        why: SlotError,
    },
}

/// A slot of a state that does not fit its tensor, or the rule.
#[derive(Clone, Debug, PartialEq)]
pub enum SlotError {
    /// Another shape than that of its tensor, which comes first.
    Shape(Vec<usize>, Vec<usize>),
    /// Elements that no file has, or two.
    Coverage {
        /// The first such element.
        elem: u64,
        /// The number of files that have it.
        files: usize,
    },
    /// A slot that the rule keeps is missing, and others are there.
    Missing,
    /// A slot that the rule does not keep.
    NotKept,
    /// Masters or their low bits, of parameters of a type that has none.
    NoMasters(StorageType),
}

impl SlotError {
    fn of(&self, slot: &str) -> String {
        match self {
            Self::Shape(expected, actual) => {
                format!("the {slot} has shape {actual:?}, expected {expected:?}")
            }
            Self::Coverage { elem, files } => {
                format!("its {slot} is in {files} files from element {elem} on, expected in one")
            }
            Self::Missing => format!("the state has no {slot}, which the rule keeps"),
            Self::NotKept => format!(
                "the state holds its {slot}, which the rule does not keep with these options"
            ),
            Self::NoMasters(of) => format!(
                "the state holds its {slot}, expected none, because its parameters are {}",
                of.name().to_uppercase()
            ),
        }
    }
}

impl FileError {
    /// Makes an error of what the system says, where something (`read`, `write`, ...) could not be done with a file.
    pub fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            what,
            path: path.to_owned(),
            source,
        }
    }

    /// Makes an error of a mistake in the content of a file.
    pub fn content<E: Into<ContentError>>(path: &Path) -> impl FnOnce(E) -> Self {
        move |source| Self::Content {
            path: path.to_owned(),
            source: source.into(),
        }
    }
}

/// A mistake in the content of a file.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// Not a safetensors file.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// Not an index.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// Not a file of a state.
    #[error(transparent)]
    State(#[from] StateFileError),
}

/// A rule that takes sums over tensors, of which a window has a part only.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{rule} takes norms of whole tensors, and files are stepped window by window; expected a rule by element"
)]
pub struct NeedsTensors {
    /// The rule's name.
    pub rule: &'static str,
}

/// A failure of the device that steps windows.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// No memory for the state of windows of this size.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// No memory for parameters and gradients of windows of this size.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// The step could not be recorded.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The optimizer has no tensor for windows.
    #[error(transparent)]
    Window(#[from] UnknownTensor),
    /// The device did not finish.
    #[error("the device did not finish: {0}")]
    Poll(#[from] wgpu::PollError),
    /// Memory of the device cannot be mapped.
    #[error(transparent)]
    Map(#[from] wgpu::BufferAsyncError),
    /// A range of a buffer cannot be mapped.
    #[error(transparent)]
    Range(#[from] wgpu::MapRangeError),
    /// The device was lost.
    #[error("the device was lost")]
    Lost,
}
