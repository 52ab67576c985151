//! Checkpoints as safetensors files (feature `safetensors`).

use std::collections::HashMap;
use std::io::Read;

use super::{Checkpoint, TensorParams};
use crate::files::{Contents, Dtype, Header, HeaderError, TensorEntry};
use crate::state::{Recorded, SlotEntry, StateFileError, StateRecord};
use crate::storage::{SectionValues, StorageType};

#[cfg(not(target_arch = "wasm32"))]
use std::{
    fs::{self, File},
    io::{self, BufReader, BufWriter, Write as _},
    path::{Path, PathBuf},
};

/// A file that holds no checkpoint, or a checkpoint that no file can hold.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointFileError {
    /// A file of no state, or a state that no file can hold.
    #[error(transparent)]
    State(#[from] StateFileError),
    /// A tensor with a step count and without parameters, as every tensor in the file of a state alone is.
    #[error("not a checkpoint: it has no parameters of tensor {tensor:?}")]
    MissingParams {
        /// The tensor.
        tensor: String,
    },
    /// Parameters of a dtype that no kernel steps.
    #[error("tensor {tensor:?}: the params are {actual}, expected F32, BF16 or F16")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// The dtype.
        actual: Dtype,
    },
    /// Parameters of a tensor that the state does not have.
    #[error("the checkpoint has parameters of tensor {tensor:?}, of which it has no state")]
    UnknownParams {
        /// The tensor.
        tensor: String,
    },
    /// A file in which something is wrong.
    #[cfg(not(target_arch = "wasm32"))]
    #[error("{}: {source}", path.display())]
    In {
        /// The file.
        path: PathBuf,
        /// The error.
        source: Box<CheckpointFileError>,
    },
    /// A file that cannot be read or written; one that was there is as it was.
    #[cfg(not(target_arch = "wasm32"))]
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
}

impl From<HeaderError> for CheckpointFileError {
    fn from(error: HeaderError) -> Self {
        Self::State(error.into())
    }
}

impl<R: Recorded> Checkpoint<R> {
    /// The content of a file. The same checkpoint makes the same bytes.
    ///
    /// # Errors
    /// [`CheckpointFileError`] if names of parameters and slots meet, parameters and state are not of the same tensors, or
    /// the state cannot be written.
    pub fn to_safetensors(&self) -> Result<Vec<u8>, CheckpointFileError> {
        Ok(self.contents()?.to_bytes())
    }

    fn contents(&self) -> Result<Contents<'_>, CheckpointFileError> {
        let (record, mut tensors) = self.state.record_and_slots()?;
        for params in &self.params {
            if !record.applied_steps.contains_key(&params.name) {
                return Err(CheckpointFileError::UnknownParams {
                    tensor: params.name.clone(),
                });
            }
            let (dtype, bytes) = (params.values.codec().into(), params.values.bytes());
            tensors.push((params.name.clone(), dtype, &*params.shape, bytes));
        }
        // Where a name comes twice, this says so.
        let contents = Contents::new(record.to_metadata()?, tensors)?;
        for tensor in &self.state.tensors {
            if self.params.iter().all(|params| params.name != tensor.name) {
                return Err(missing_params(&tensor.name));
            }
        }
        Ok(contents)
    }

    /// Reads the content of a file. Tensors come in alphabetical order.
    ///
    /// # Errors
    /// [`CheckpointFileError`] naming what is missing or wrong.
    pub fn from_safetensors(file: &[u8]) -> Result<Self, CheckpointFileError> {
        Self::read(&mut &*file, file.len() as u64)
    }

    fn read(file: &mut impl Read, file_bytes: u64) -> Result<Self, CheckpointFileError> {
        let header = Header::read(file, file_bytes)?;
        let record = StateRecord::<R>::of_metadata(&header)?;
        let is_params = |entry: &&TensorEntry| record.applied_steps.contains_key(&entry.name);
        record.check_slots(&header, header.in_place_order().filter(|of| !is_params(of)))?;
        let (mut params, mut slots) = (HashMap::new(), Vec::new());
        for entry in header.in_place_order() {
            let size = entry.data_bytes.end - entry.data_bytes.start;
            let mut bytes = Vec::with_capacity(size as usize);
            file.take(size)
                .read_to_end(&mut bytes)
                .map_err(HeaderError::from)?;
            if bytes.len() as u64 != size {
                return Err(HeaderError::Length {
                    expected_bytes: file_bytes,
                    actual_bytes: header.data_start() + entry.data_bytes.start + bytes.len() as u64,
                }
                .into());
            }
            if !is_params(&entry) {
                slots.extend(SlotEntry::of_entry(entry).map(|slot| (slot, bytes)));
                continue;
            }
            let of = StorageType::try_from(entry.dtype).map_err(|actual| {
                CheckpointFileError::Dtype {
                    tensor: entry.name.clone(),
                    actual,
                }
            })?;
            let values = SectionValues::from_bytes(of.into(), bytes);
            params.insert(entry.name.clone(), (entry.shape.clone(), values));
        }
        let mut state = record.with_slots(slots)?;
        let take = |name: &String| {
            let (shape, values) = params.remove(name).ok_or_else(|| missing_params(name))?;
            Ok(TensorParams {
                name: name.clone(),
                shape,
                values,
            })
        };
        let names = state.tensors.iter().map(|tensor| &tensor.name);
        let params: Vec<_> = names
            .map(take)
            .collect::<Result<_, CheckpointFileError>>()?;
        // Tensors without slots have a shape, too.
        for (tensor, params) in state.tensors.iter_mut().zip(&params) {
            tensor.shape.clone_from(&params.shape);
        }
        Ok(Self { params, state })
    }

    /// Writes a file, in place of one that is there: beside it and onto the disk first, so that whatever happens one of both
    /// is there whole. A process that is killed meanwhile leaves a hidden file beside it, `.wgpu-optim-` and some letters.
    /// Links are followed.
    ///
    /// # Errors
    /// [`CheckpointFileError`] as [`to_safetensors`](Self::to_safetensors), or if the file cannot be written; one that was
    /// there is as it was.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), CheckpointFileError> {
        let path = path.as_ref();
        let contents = self.contents()?;
        replace(path, &contents).map_err(|source| CheckpointFileError::Io {
            action: "write",
            path: path.to_owned(),
            source,
        })
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`CheckpointFileError`] that names the file, and what is missing or wrong.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn load(path: impl AsRef<Path>) -> Result<Self, CheckpointFileError> {
        let path = path.as_ref();
        let open = || -> io::Result<(File, u64)> {
            let file = File::open(path)?;
            let file_bytes = file.metadata()?.len();
            Ok((file, file_bytes))
        };
        let (file, file_bytes) = open().map_err(|source| CheckpointFileError::Io {
            action: "read",
            path: path.to_owned(),
            source,
        })?;
        let read = Self::read(&mut BufReader::new(file), file_bytes);
        read.map_err(|error| CheckpointFileError::In {
            path: path.to_owned(),
            source: Box::new(error),
        })
    }
}

fn missing_params(tensor: &str) -> CheckpointFileError {
    CheckpointFileError::MissingParams {
        tensor: tensor.to_owned(),
    }
}

/// Puts a file in the place of another, with its permissions, or makes a new one.
#[cfg(not(target_arch = "wasm32"))]
fn replace(path: &Path, contents: &Contents<'_>) -> io::Result<()> {
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let directory = match target.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".wgpu-optim-");
    let existing = fs::metadata(&target).ok();
    // What any new file gets, instead of a temporary file's privacy.
    #[cfg(unix)]
    if existing.is_none() {
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    }
    let temporary = builder.tempfile_in(directory)?;
    let mut writer = BufWriter::new(temporary.as_file());
    for part in contents.parts() {
        writer.write_all(part)?;
    }
    writer.flush()?;
    drop(writer);
    if let Some(existing) = existing {
        temporary
            .as_file()
            .set_permissions(existing.permissions())?;
    }
    // Or a crash could leave the new name with an empty file.
    temporary.as_file().sync_all()?;
    temporary.persist(&target).map_err(|error| error.error)?;
    // So that the new name survives a crash. Where a directory cannot be synced it is there all the same.
    let _ = File::open(directory).and_then(|directory| directory.sync_all());
    Ok(())
}
