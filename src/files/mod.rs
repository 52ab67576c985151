//! Safetensors files as bytes (feature `safetensors`): headers that are read strictly and written in one order, and
//! the index of a model that lies in several files.
//!
//! The crate `safetensors` defines the types; reading and writing are here because its own keep metadata in a map
//! without an order, so that the same content gave other bytes at every run, and take a name that comes twice.

mod entries;
mod error;
mod header;
mod index;
mod other_format;

pub(crate) use entries::Entries;
pub use error::{HeaderError, IndexError};
pub(crate) use header::{Content, Contents, serialize};
pub use header::{Header, TensorEntry};
pub use index::Index;
pub use other_format::OtherFormat;
pub use safetensors::Dtype;

use crate::storage::{Codec, StorageType};

/// Whether `file` is what Git checks out in place of a large file that has not been fetched: a few lines that say
/// where it is. The start of the file is enough.
#[must_use]
pub fn is_git_lfs_pointer(file: &[u8]) -> bool {
    file.starts_with(GIT_LFS_POINTER)
}

const GIT_LFS_POINTER: &[u8] = b"version https://git-lfs";

/// Whether a metadata key holds a hash of a file's tensors, which no longer holds once they have been updated: those
/// of Stable Diffusion's trainers and of the `ModelSpec` standard.
#[must_use]
pub fn is_content_hash(key: &str) -> bool {
    matches!(
        key,
        "sshs_model_hash" | "sshs_legacy_hash" | "modelspec.hash_sha256"
    )
}

impl From<StorageType> for Dtype {
    fn from(of: StorageType) -> Self {
        match of {
            StorageType::F32 => Self::F32,
            StorageType::Bf16 => Self::BF16,
            StorageType::F16 => Self::F16,
        }
    }
}

impl From<Codec> for Dtype {
    fn from(codec: Codec) -> Self {
        codec.float().map_or(Self::U16, Self::from)
    }
}

impl TryFrom<Dtype> for Codec {
    type Error = Dtype;

    /// Gives back a dtype that no section of a state has.
    fn try_from(dtype: Dtype) -> Result<Self, Dtype> {
        match dtype {
            Dtype::U16 => Ok(Self::LowBits),
            dtype => StorageType::try_from(dtype).map(Self::from),
        }
    }
}

impl TryFrom<Dtype> for StorageType {
    type Error = Dtype;

    /// Gives back a dtype that no kernel updates.
    fn try_from(dtype: Dtype) -> Result<Self, Dtype> {
        match dtype {
            Dtype::F32 => Ok(Self::F32),
            Dtype::BF16 => Ok(Self::Bf16),
            Dtype::F16 => Ok(Self::F16),
            other => Err(other),
        }
    }
}
