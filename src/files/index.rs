//! The index of a model in several files, as Hugging Face's libraries write it.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::entries::Entries;
use super::error::IndexError;
use super::is_git_lfs_pointer;
use super::other_format::OtherFormat;

/// The file (shard) of a model that each of its tensors lies in: a `model.safetensors.index.json`.
///
/// ```
/// use wgpu_optim::files::Index;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let index = Index::parse(
///     br#"{"metadata": {"total_size": 8}, "weight_map": {"w": "model-2.safetensors", "b": "model-1.safetensors"}}"#,
/// )?;
/// assert_eq!(index.shards(), ["model-1.safetensors", "model-2.safetensors"]);
/// assert_eq!(index.tensors()[0], ("w".to_owned(), "model-2.safetensors".to_owned()));
///
/// // A name that leaves the index's folder is refused.
/// assert!(Index::parse(br#"{"weight_map": {"w": "../other/model.safetensors"}}"#).is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// Keys and values beside `total_size`, in the index's order; those whose value is not text are left out.
    pub metadata: Vec<(String, String)>,
    tensors: Vec<(String, String)>,
    shards: Vec<String>,
}

/// The part of an index that is read and written; others may stand beside it.
#[derive(Deserialize)]
struct Json {
    metadata: Option<Entries<Value>>,
    weight_map: Entries<String>,
}

/// The metadata of every index.
const TOTAL_SIZE: &str = "total_size";

impl Index {
    /// An index of these tensors, each with the name of its file.
    ///
    /// # Errors
    /// [`IndexError`] if a tensor comes twice, or a file's name is not a plain one.
    pub fn new(tensors: Vec<(String, String)>) -> Result<Self, IndexError> {
        let weight_map = Entries(tensors);
        if let Some(tensor) = weight_map.duplicate() {
            return Err(IndexError::DuplicateTensor {
                tensor: tensor.to_owned(),
            });
        }
        for (tensor, shard) in &weight_map.0 {
            if !is_plain_file_name(shard) {
                return Err(IndexError::LeavesFolder {
                    tensor: tensor.clone(),
                    shard: shard.clone(),
                });
            }
        }
        let shards: BTreeSet<_> = weight_map.0.iter().map(|(_, shard)| shard).collect();
        Ok(Self {
            metadata: Vec::new(),
            shards: shards.into_iter().cloned().collect(),
            tensors: weight_map.0,
        })
    }

    /// Reads an index.
    ///
    /// # Errors
    /// [`IndexError`] if it is not JSON with a `weight_map` from tensor to file, and as [`new`](Self::new).
    pub fn parse(json: &[u8]) -> Result<Self, IndexError> {
        if is_git_lfs_pointer(json) {
            return Err(IndexError::GitLfsPointer);
        }
        let Json {
            metadata,
            weight_map,
        } = serde_json::from_slice(json).map_err(|error| match OtherFormat::of(json) {
            Some(OtherFormat::Json) | None => IndexError::Json(error),
            Some(format) => IndexError::OtherFormat { format },
        })?;
        let metadata = metadata.into_iter().flat_map(|entries| entries.0);
        let texts = metadata.filter_map(|(key, value)| match value {
            Value::String(value) => Some((key, value)),
            _ => None,
        });
        Ok(Self {
            metadata: texts.collect(),
            ..Self::new(weight_map.0)?
        })
    }

    /// The index as a file, its tensors in alphabetical order; `total_size` is the bytes of all of them.
    ///
    /// # Errors
    /// [`IndexError::Json`] if it cannot be written as JSON.
    pub fn to_bytes(&self, total_size: u64) -> Result<Vec<u8>, IndexError> {
        #[derive(Serialize)]
        struct Json<'a> {
            metadata: Entries<Value>,
            weight_map: Entries<&'a str>,
        }
        let texts = self.metadata.iter().filter(|(key, _)| key != TOTAL_SIZE);
        let mut metadata = vec![(TOTAL_SIZE.to_owned(), total_size.into())];
        metadata.extend(texts.map(|(key, value)| (key.clone(), value.as_str().into())));
        let tensors = self.tensors.iter();
        let mut weight_map: Vec<_> = tensors
            .map(|(tensor, shard)| (tensor.clone(), shard.as_str()))
            .collect();
        weight_map.sort_unstable();
        let mut bytes = serde_json::to_vec_pretty(&Json {
            metadata: Entries(metadata),
            weight_map: Entries(weight_map),
        })?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Every tensor with the name of its file, in the index's order.
    #[must_use]
    pub fn tensors(&self) -> &[(String, String)] {
        &self.tensors
    }

    /// The names of the files, in alphabetical order. They lie beside the index.
    #[must_use]
    pub fn shards(&self) -> &[String] {
        &self.shards
    }
}

/// Whether a name is that of a file in the folder at hand, on any system: no separator, no drive, no way up.
fn is_plain_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', ':', '\0'])
}
