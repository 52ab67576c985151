//! Arenas from and to safetensors files (feature `safetensors`).

use super::arena::Arena;
use super::error::{ArenaError, ArenaFileError};
use crate::files::{Dtype, Header, is_content_hash, serialize};
use crate::rules::{ParamGroups, Rule};

impl Arena {
    /// An arena of a safetensors file's F32 tensors, with their values as parameters, in the order in which their
    /// data lies in the file. Submits the upload, as [`upload_all_params`](Self::upload_all_params) does.
    ///
    /// Tensors of other dtypes, which no kernel updates, are left out: their names and dtypes come second.
    ///
    /// ```
    /// use wgpu_optim::{AdapterRequest, Arena, Gpu, readback};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default())?;
    /// # let model = Arena::new(&device, &queue, [("weight", vec![2, 3])])?;
    /// # let file = readback::block_on(&device, model.to_safetensors())?;
    /// let (arena, left_out) = Arena::from_safetensors(&device, &queue, &file)?;
    /// assert!(left_out.is_empty(), "not F32: {left_out:?}");
    /// assert_eq!(arena.tensors()[0].shape, [2, 3]);
    /// let after = readback::block_on(&device, arena.to_safetensors())?;
    /// # assert_eq!(after, file);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ArenaFileError`] if the file does not read, or as [`new`](Self::new) and
    /// [`upload_all_params`](Self::upload_all_params).
    pub fn from_safetensors(
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        file: &[u8],
    ) -> Result<(Self, Vec<(String, Dtype)>), ArenaFileError> {
        Self::from_file(file, |shapes| Self::new(device, queue, shapes))
    }

    /// The same with the tensors of each parameter group side by side, as [`with_groups`](Self::with_groups) lays
    /// them out.
    ///
    /// # Errors
    /// As [`from_safetensors`](Self::from_safetensors).
    pub fn from_safetensors_with_groups<R: Rule>(
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        groups: &ParamGroups<R>,
        file: &[u8],
    ) -> Result<(Self, Vec<(String, Dtype)>), ArenaFileError> {
        Self::from_file(file, |shapes| {
            Self::with_groups(device, queue, groups, shapes)
        })
    }

    fn from_file(
        file: &[u8],
        new: impl FnOnce(Vec<(String, Vec<usize>)>) -> Result<Self, ArenaError>,
    ) -> Result<(Self, Vec<(String, Dtype)>), ArenaFileError> {
        let header = Header::of(file)?;
        let (mut shapes, mut contents, mut left_out) = (Vec::new(), Vec::new(), Vec::new());
        for tensor in header.in_place_order() {
            let name = tensor.name.clone();
            if tensor.dtype == Dtype::F32 {
                shapes.push((name, tensor.shape.clone()));
                contents.push(header.data(file, tensor));
            } else {
                left_out.push((name, tensor.dtype));
            }
        }
        let mut arena = new(shapes)?;
        arena.overwrite_params(contents.into_iter())?;
        arena.file_metadata = header.metadata;
        arena.file_metadata.retain(|(key, _)| !is_content_hash(key));
        Ok((arena, left_out))
    }

    /// The content of a safetensors file of all parameters, under their names and shapes, with the metadata of
    /// [`file_metadata`](Self::file_metadata). The same parameters make the same bytes. Waits as
    /// [`download_all_params`](Self::download_all_params) does.
    ///
    /// # Errors
    /// [`ArenaFileError`] as [`download_all_params`](Self::download_all_params), or if a tensor is named
    /// `__metadata__`, which no file can hold.
    pub async fn to_safetensors(&self) -> Result<Vec<u8>, ArenaFileError> {
        let values = self.download_all_params().await?;
        let tensors = self.tensors().iter().zip(&values);
        let tensors = tensors
            .map(|(tensor, values)| (tensor.name.clone(), &*tensor.shape, values.as_slice()));
        Ok(serialize(self.file_metadata.clone(), tensors.collect())?)
    }

    /// What [`to_safetensors`](Self::to_safetensors) writes beside the tensors, in this order: the metadata of the
    /// file that the arena came from, without hashes of its content, which no longer hold after a step. Empty for an
    /// arena that came from none. Hugging Face's libraries want an entry `format`: `pt`.
    #[must_use]
    pub const fn file_metadata(&self) -> &Vec<(String, String)> {
        &self.file_metadata
    }

    /// [`file_metadata`](Self::file_metadata) to change.
    pub const fn file_metadata_mut(&mut self) -> &mut Vec<(String, String)> {
        &mut self.file_metadata
    }
}
