//! Files that cannot be read, written or understood, and devices that fail.

use std::io;
use std::path::{Path, PathBuf};

use wgpu_optim::files::{HeaderError, IndexError};
use wgpu_optim::{
    ArenaError, BuildError, StateFileError, StepError, StorageType, UnknownTensor, wgpu,
};

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
    /// It does not hold what it has to.
    #[error("{}: {source}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ContentError,
    },
    /// A file that an index names.
    #[error("index {}: {source}", path.display())]
    OfIndex {
        /// The index.
        path: PathBuf,
        /// What is wrong with the file.
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
        /// How the user named the first.
        one: String,
        /// And the second.
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
        /// How the user named it.
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
        /// What went wrong before.
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
        /// What is wrong with it.
        why: SlotError,
    },
}

/// A slot of a state that does not fit its tensor, or the rule.
#[derive(Clone, Debug, PartialEq)]
pub enum SlotError {
    /// It has another shape than its tensor, which is named first.
    Shape(Vec<usize>, Vec<usize>),
    /// No file has its elements from this one on, or two have.
    Coverage {
        /// The first such element.
        elem: u64,
        /// How many files have it.
        files: usize,
    },
    /// The state has others that the rule keeps, and not this one.
    Missing,
    /// The rule does not keep it.
    NotKept,
    /// It is what is remembered of parameters of 16 bits, and these are of another type.
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
    /// What the system says where something could not be done (`read`, `write`, ...) with a file.
    pub fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            what,
            path: path.to_owned(),
            source,
        }
    }

    /// What is wrong with the content of a file.
    pub fn content<E: Into<ContentError>>(path: &Path) -> impl FnOnce(E) -> Self {
        move |source| Self::Content {
            path: path.to_owned(),
            source: source.into(),
        }
    }
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// It is not a safetensors file.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// It is not an index.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// It is not a file of a state.
    #[error(transparent)]
    State(#[from] StateFileError),
}

/// A device that has not stepped a window.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// It has no memory for windows of this size.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The same, of their parameters and gradients.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// It does not make the step.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The window that is stepped is not there.
    #[error(transparent)]
    Window(#[from] UnknownTensor),
    /// It did not finish.
    #[error("the device did not finish: {0}")]
    Poll(#[from] wgpu::PollError),
    /// Its memory cannot be mapped.
    #[error(transparent)]
    Map(#[from] wgpu::BufferAsyncError),
    /// Likewise.
    #[error(transparent)]
    Range(#[from] wgpu::MapRangeError),
    /// It was lost.
    #[error("the device was lost")]
    Lost,
}
