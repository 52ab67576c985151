//! Arenas from and to safetensors files (feature `safetensors`).

use std::borrow::Cow;

use super::{Arena, ArenaBuilder, Values};
use crate::files::{Dtype, Header, is_content_hash, serialize};
use crate::gpu::error::ArenaFileError;
use crate::state::TensorSpec;
use crate::storage::StorageType;

impl ArenaBuilder<'_> {
    /// An arena of a safetensors file's F32, BF16 and F16 tensors, with their values as parameters, in the order in which
    /// their data lies in the file. Gradients are `f32`, or of the type that [`grads_type`](Self::grads_type) says.
    /// Submits the upload, as [`Arena::upload_all_params`] does.
    ///
    /// Tensors of other dtypes, which no kernel updates, are left out: their names and dtypes come second.
    ///
    /// # Errors
    /// [`ArenaFileError`] if the file does not read, or as [`build`](Self::build) and [`Arena::upload_all_params`].
    pub fn load(
        &self,
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        file: &[u8],
    ) -> Result<(Arena, Vec<(String, Dtype)>), ArenaFileError> {
        let header = Header::of(file)?;
        let (mut specs, mut contents, mut left_out) = (Vec::new(), Vec::new(), Vec::new());
        for tensor in header.in_place_order() {
            let name = tensor.name.clone();
            let Ok(params_type) = StorageType::try_from(tensor.dtype) else {
                left_out.push((name, tensor.dtype));
                continue;
            };
            let spec = TensorSpec::new(name, tensor.shape.clone());
            specs.push(spec.params_type(params_type));
            contents.push(Cow::Borrowed(header.data(file, tensor)));
        }
        let mut arena = self.build(device, queue, specs)?;
        arena.overwrite(Values::Params, contents.into_iter())?;
        arena.file_metadata = header.metadata;
        arena.file_metadata.retain(|(key, _)| !is_content_hash(key));
        Ok((arena, left_out))
    }
}

impl Arena {
    /// An arena of a safetensors file; see [`ArenaBuilder::load`], which it is by default.
    ///
    /// ```
    /// use wgpu_optim::{AdapterRequest, Arena, Gpu, readback};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default())?;
    /// # let model = Arena::new(&device, &queue, [("weight", vec![2, 3])])?;
    /// # let file = readback::block_on(&device, model.to_safetensors())?;
    /// let (arena, left_out) = Arena::from_safetensors(&device, &queue, &file)?;
    /// assert!(left_out.is_empty(), "no floats of 16 or 32 bits: {left_out:?}");
    /// assert_eq!(arena.tensors()[0].shape, [2, 3]);
    /// let after = readback::block_on(&device, arena.to_safetensors())?;
    /// # assert_eq!(after, file);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`ArenaBuilder::load`].
    pub fn from_safetensors(
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        file: &[u8],
    ) -> Result<(Self, Vec<(String, Dtype)>), ArenaFileError> {
        Self::builder().load(device, queue, file)
    }

    /// The content of a safetensors file of all parameters, as they are stored, under their names and shapes, with the metadata of
    /// [`file_metadata`](Self::file_metadata). The same parameters make the same bytes. Waits as
    /// [`download_all_params`](Self::download_all_params) does.
    ///
    /// # Errors
    /// [`ArenaFileError`] as [`download_all_params`](Self::download_all_params), or if a tensor is named
    /// `__metadata__`, which no file can hold.
    pub async fn to_safetensors(&self) -> Result<Vec<u8>, ArenaFileError> {
        let bytes = self.download_all(|_, bytes: &[u8]| bytes.to_vec()).await?;
        let tensors = self.tensors().iter().zip(&bytes);
        let tensors = tensors.map(|(tensor, bytes)| {
            let dtype = tensor.params_type.into();
            (tensor.name.clone(), dtype, &*tensor.shape, bytes.as_slice())
        });
        Ok(serialize(self.file_metadata.clone(), tensors.collect())?)
    }

    /// The metadata that [`to_safetensors`](Self::to_safetensors) writes beside the tensors, in this order: that of the
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
