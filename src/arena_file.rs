//! Arenas from and to safetensors files (feature `safetensors`).

use std::collections::HashMap;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::arena::Arena;
use crate::error::{ArenaError, ArenaFileError};
use crate::groups::ParamGroups;

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
    /// # let file = readback::block_on(&device, model.to_safetensors(None))?;
    /// let (arena, left_out) = Arena::from_safetensors(&device, &queue, &file)?;
    /// assert!(left_out.is_empty(), "not F32: {left_out:?}");
    /// assert_eq!(arena.tensors()[0].shape, [2, 3]);
    /// let after = readback::block_on(&device, arena.to_safetensors(None))?;
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
    pub fn from_safetensors_with_groups(
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        groups: &ParamGroups,
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
        let (_, header) = SafeTensors::read_metadata(file)?;
        let tensors = SafeTensors::deserialize(file)?;
        let (mut shapes, mut contents, mut left_out) = (Vec::new(), Vec::new(), Vec::new());
        for name in header.offset_keys() {
            let view = tensors.tensor(&name)?;
            if view.dtype() == Dtype::F32 {
                shapes.push((name, view.shape().to_vec()));
                contents.push(view.data());
            } else {
                left_out.push((name, view.dtype()));
            }
        }
        let arena = new(shapes)?;
        arena.overwrite(arena.params(), contents.into_iter())?;
        Ok((arena, left_out))
    }

    /// The content of a safetensors file of all parameters, under their names and shapes, with `metadata` (Hugging
    /// Face's libraries want `format`: `pt`). Waits as [`download_all_params`](Self::download_all_params) does.
    ///
    /// # Errors
    /// [`ArenaFileError`] as [`download_all_params`](Self::download_all_params).
    pub async fn to_safetensors(
        &self,
        metadata: Option<HashMap<String, String>>,
    ) -> Result<Vec<u8>, ArenaFileError> {
        let values = self.download_all_params().await?;
        let mut views = Vec::with_capacity(values.len());
        for (tensor, values) in self.tensors().iter().zip(&values) {
            let bytes = bytemuck::cast_slice(values);
            let view = TensorView::new(Dtype::F32, tensor.shape.clone(), bytes)?;
            views.push((&tensor.name, view));
        }
        Ok(safetensors::serialize(views, metadata)?)
    }
}
