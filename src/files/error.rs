//! Errors of files, before their tensors are looked at.

use std::io;
use std::ops::Range;

use super::other_format::OtherFormat;

/// A file that is not a safetensors file, or tensors that none can hold.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The file does not read.
    #[error("it does not read: {0}")]
    Io(#[from] io::Error),
    /// A pointer that Git leaves in place of a large file that has not been fetched.
    #[error(
        "it is a Git LFS pointer, not the file itself: `git lfs pull` in its repository fetches the file"
    )]
    GitLfsPointer,
    /// A file of another format.
    #[error("not a safetensors file but {format}")]
    OtherFormat {
        /// The format.
        format: OtherFormat,
    },
    /// A file that ends before its header begins.
    #[error("not a safetensors file: it has {file_bytes} bytes, expected at least 8")]
    TooShort {
        /// The size of the file.
        file_bytes: u64,
    },
    /// A header larger than any reader takes.
    #[error(
        "not a safetensors file: its header would be {header_bytes} bytes, expected at most {max_header_bytes}"
    )]
    TooLarge {
        /// The header's length that the file says, or would say.
        header_bytes: u64,
        /// The most that is allowed.
        max_header_bytes: u64,
    },
    /// A file that is shorter or longer than its header says.
    #[error(
        "not a safetensors file: it has {actual_bytes} bytes, expected {expected_bytes}, as its header says"
    )]
    Length {
        /// The size of the file by its header.
        expected_bytes: u64,
        /// The length of the file.
        actual_bytes: u64,
    },
    /// A header that is not the JSON of one.
    #[error("not a safetensors file: its header: {0}")]
    Json(#[from] serde_json::Error),
    /// Two tensors of one name.
    #[error("tensor {tensor:?} comes twice in the header")]
    DuplicateTensor {
        /// The name.
        tensor: String,
    },
    /// Two metadata entries of one key.
    #[error("metadata key {key:?} comes twice in the header")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// The name of the metadata, which no tensor can have in a file.
    #[error("a tensor is named \"__metadata__\", which is where a file keeps its metadata")]
    ReservedName,
    /// A size that is not a whole number of bytes, or more than there can be.
    #[error("tensor {tensor:?}: its shape gives no whole number of bytes that a file can have")]
    Size {
        /// The tensor.
        tensor: String,
    },
    /// Data that overlap, leave a gap, or are not as long as the shape says.
    #[error("tensor {tensor:?}: its data lie in bytes {actual:?}, expected {expected:?}")]
    Place {
        /// The tensor.
        tensor: String,
        /// The bytes that would follow the tensor before, as long as the shape says.
        expected: Range<u64>,
        /// The bytes that the header names.
        actual: Range<u64>,
    },
    /// Values of another length than the shape says.
    #[error(
        "tensor {tensor:?}: its values are {actual_bytes} bytes, expected {expected_bytes} by its shape"
    )]
    Values {
        /// The tensor.
        tensor: String,
        /// The number of bytes by the shape.
        expected_bytes: u64,
        /// Given.
        actual_bytes: u64,
    },
}

/// A file that is not the index of a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// A pointer that Git leaves in place of a large file that has not been fetched.
    #[error(
        "it is a Git LFS pointer, not the file itself: `git lfs pull` in its repository fetches the file"
    )]
    GitLfsPointer,
    /// A file of another format.
    #[error("not the index of a model but {format}")]
    OtherFormat {
        /// The format.
        format: OtherFormat,
    },
    /// Not JSON, or without a `weight_map` from tensor to file.
    #[error("not the index of a model: {0}")]
    Json(#[from] serde_json::Error),
    /// A tensor in two places.
    #[error("tensor {tensor:?} comes twice in the index")]
    DuplicateTensor {
        /// The name.
        tensor: String,
    },
    /// A file that is not beside the index.
    #[error("tensor {tensor:?}: file {shard:?} does not lie in the folder of the index")]
    LeavesFolder {
        /// The tensor.
        tensor: String,
        /// The file's name.
        shard: String,
    },
}
