//! Many tensors in few buffers, laid out so that one dispatch updates them all.

#[cfg(feature = "safetensors")]
mod file;
mod layout;

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

use super::binding::TensorBinding;
use super::error::{ArenaError, TransferError};
use super::error_scope::{LOST, checked, is_lost};
use super::readback::{self, Region};
use crate::plan::{ELEM_BYTES, TensorLayout};
use crate::rules::Slots;
use crate::state::TensorSpec;
use crate::storage::{Precision, StorageType};
pub use layout::{ArenaBuffer, ArenaBuilder, ArenaLayout, ArenaTensor};

/// Named tensors side by side in a parameter buffer and a gradient buffer of the same layout (more than one of
/// each where a buffer may not be that large, or where tensors are stored in different types).
///
/// Each tensor starts where a binding may start, so it can be bound on its own; the gaps belong to nobody, so a
/// step runs over them. An optimizer built from [`bindings`](Self::bindings) takes one dispatch per binding's worth
/// of elements, whatever the number of tensors. Buffers have the usages `STORAGE`, `COPY_SRC` and `COPY_DST`, and
/// start at zero.
///
/// ```
/// use wgpu_optim::{AdapterRequest, Arena, Gpu, GpuOptimizer, Kernels, SgdConfig};
/// use wgpu_optim::readback::block_on;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default())?;
/// let arena = Arena::new(&device, &queue, [("weight", vec![2, 3]), ("bias", vec![2])])?;
/// arena.upload_params("weight", &[1.0; 6])?;
/// arena.upload_grads("weight", &[1.0; 6])?;
///
/// let kernels = Kernels::new(&device, &queue)?;
/// let config = SgdConfig::builder(0.5).momentum(0.9).build()?;
/// let mut optimizer = GpuOptimizer::new(&kernels, config, &arena.bindings())?;
/// let mut encoder = device.create_command_encoder(&Default::default());
/// optimizer.step(&mut encoder)?;
/// queue.submit([encoder.finish()]);
///
/// assert_eq!(optimizer.dispatches(), 1);
/// assert_eq!(block_on(&device, arena.download_params("weight"))?, [0.5; 6]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Arena {
    device: wgpu::Device,
    queue: wgpu::Queue,
    tensors: Vec<ArenaTensor>,
    by_name: HashMap<String, usize>,
    params: Vec<wgpu::Buffer>,
    grads: Vec<wgpu::Buffer>,
    /// The sizes and types of each buffer.
    buffers: Vec<ArenaBuffer>,
    /// Whether `grads` are the buffers of `params`, and the gradients come after the parameters there.
    is_pooled: bool,
    /// The metadata of its file.
    #[cfg(feature = "safetensors")]
    file_metadata: Vec<(String, String)>,
}

impl Arena {
    /// Lays out tensors of these names and shapes, or [`TensorSpec`](crate::TensorSpec)s, and allocates their buffers.
    /// Submits nothing. What is uploaded and downloaded is `f32`: values of other types are rounded to the nearest and
    /// unpacked on the host.
    ///
    /// # Errors
    /// [`ArenaError`] if a name comes twice, a tensor is larger than a buffer of this device may be, or the device
    /// is out of memory.
    pub fn new(
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        tensors: impl IntoIterator<Item: Into<TensorSpec>>,
    ) -> Result<Self, ArenaError> {
        Self::builder().build(device, queue, tensors)
    }

    /// An arena that is laid out otherwise: by parameter groups, in pools, from a file.
    pub fn builder<'g>() -> ArenaBuilder<'g> {
        ArenaBuilder::default()
    }

    fn allocate(
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        layout: ArenaLayout,
        is_pooled: bool,
    ) -> Result<Self, ArenaError> {
        let all = |of: fn(&ArenaBuffer) -> u64| layout.buffers.iter().map(of).collect::<Vec<_>>();
        let grads_sizes = all(ArenaBuffer::grads_bytes);
        let params_sizes = all(match is_pooled {
            true => ArenaBuffer::bytes,
            false => ArenaBuffer::params_bytes,
        });
        if is_lost(device) {
            return Err(ArenaError::Device {
                message: LOST.to_owned(),
            });
        }
        let allocate = |label: &'static str, sizes: &[u64]| {
            let buffers = checked(device, || {
                let allocate = |size: &u64| {
                    device.create_buffer(&wgpu::BufferDescriptor {
                        label: Some(label),
                        size: *size,
                        usage: wgpu::BufferUsages::STORAGE
                            | wgpu::BufferUsages::COPY_SRC
                            | wgpu::BufferUsages::COPY_DST,
                        mapped_at_creation: false,
                    })
                };
                sizes.iter().map(allocate).collect()
            });
            buffers.map_err(|error| match error {
                wgpu::Error::OutOfMemory { .. } => ArenaError::OutOfMemory {
                    bytes: all(ArenaBuffer::bytes).iter().sum(),
                },
                error => ArenaError::Device {
                    message: error.to_string(),
                },
            })
        };
        let params: Vec<_> = allocate("wgpu_optim.arena.params", &params_sizes)?;
        let grads = match is_pooled {
            true => params.clone(),
            false => allocate("wgpu_optim.arena.grads", &grads_sizes)?,
        };
        let names = layout.tensors.iter().enumerate();
        Ok(Self {
            device: device.clone(),
            queue: queue.clone(),
            by_name: names
                .map(|(index, tensor)| (tensor.name.clone(), index))
                .collect(),
            params,
            grads,
            is_pooled,
            buffers: layout.buffers,
            tensors: layout.tensors,
            #[cfg(feature = "safetensors")]
            file_metadata: Vec::new(),
        })
    }

    /// The tensors, in the order in which they were given.
    #[must_use]
    pub fn tensors(&self) -> &[ArenaTensor] {
        &self.tensors
    }

    /// The parameter buffers.
    #[must_use]
    pub fn params(&self) -> &[wgpu::Buffer] {
        &self.params
    }

    /// The gradient buffers, of as many elements; of a [pooled](ArenaBuilder::pooled) arena those of the parameters.
    #[must_use]
    pub fn grads(&self) -> &[wgpu::Buffer] {
        &self.grads
    }

    /// The start of a tensor's gradients in their buffer, in bytes.
    #[must_use]
    pub fn grads_offset_bytes(&self, tensor: &ArenaTensor) -> u64 {
        self.grads_start_bytes(tensor.buffer) + tensor.offset_elems() * tensor.grads_type.bytes()
    }

    /// The start of the gradients in each gradient buffer, in bytes: zero, but in a [pooled](ArenaBuilder::pooled) arena.
    #[must_use]
    pub fn grads_start_bytes(&self, buffer: usize) -> u64 {
        match self.is_pooled {
            true => self.buffers[buffer].params_bytes(),
            false => 0,
        }
    }

    /// The values of all parameters, or of all gradients, in the buffers.
    fn values(&self, of: Values) -> Vec<Region<'_>> {
        let region = |(index, buffer): (usize, &ArenaBuffer)| match of {
            Values::Params => (&self.params[index], 0..buffer.params_bytes()),
            Values::Grads => {
                let start = self.grads_start_bytes(index);
                (&self.grads[index], start..start + buffer.grads_bytes())
            }
        };
        self.buffers.iter().enumerate().map(region).collect()
    }

    /// The tensors as the planner wants them, for a rule with these slots, with this precision; the gradient buffers are
    /// numbered after the parameter buffers.
    #[must_use]
    pub fn layouts(&self, slots: &Slots, precision: &Precision) -> Vec<TensorLayout> {
        layout::layouts(&self.tensors, self.buffers.len(), slots, precision)
    }

    /// Every tensor for an optimizer.
    #[must_use]
    pub fn bindings(&self) -> Vec<TensorBinding<'_>> {
        let tensors = self.tensors.iter();
        tensors
            .map(|tensor| TensorBinding {
                name: &tensor.name,
                params: &self.params[tensor.buffer],
                params_type: tensor.params_type,
                params_offset_bytes: tensor.offset_bytes,
                grads: &self.grads[tensor.buffer],
                grads_type: tensor.grads_type,
                grads_offset_bytes: self.grads_offset_bytes(tensor),
                shape: tensor.shape.clone(),
                padding_elems: tensor.padding_elems,
            })
            .collect()
    }

    /// Writes one tensor's parameters; see [`readback::upload`].
    ///
    /// # Errors
    /// [`ArenaError`] if there is no such tensor, `values` has another length, or the device is out of memory.
    pub fn upload_params(&self, tensor: &str, values: &[f32]) -> Result<(), ArenaError> {
        self.upload(Values::Params, tensor, values)
    }

    /// Writes one tensor's gradients; see [`readback::upload`].
    ///
    /// # Errors
    /// As [`upload_params`](Self::upload_params).
    pub fn upload_grads(&self, tensor: &str, values: &[f32]) -> Result<(), ArenaError> {
        self.upload(Values::Grads, tensor, values)
    }

    /// Writes all parameters, tensor by tensor in order, in one transfer per buffer. Submits the copies: they take
    /// effect after everything submitted so far.
    ///
    /// # Errors
    /// [`ArenaError`] if `values` has more or fewer tensors than the arena or one of them has another length, or the
    /// device is lost or out of memory; then nothing has been written.
    pub fn upload_all_params(&self, values: &[impl AsRef<[f32]>]) -> Result<(), ArenaError> {
        self.upload_all(Values::Params, values)
    }

    /// Writes all gradients, as [`upload_all_params`](Self::upload_all_params) does the parameters.
    ///
    /// # Errors
    /// As [`upload_all_params`](Self::upload_all_params).
    pub fn upload_all_grads(&self, values: &[impl AsRef<[f32]>]) -> Result<(), ArenaError> {
        self.upload_all(Values::Grads, values)
    }

    /// Reads one tensor's parameters; see [`readback::download`].
    ///
    /// # Errors
    /// [`ArenaError`] if there is no such tensor, or the device is lost or out of memory.
    pub async fn download_params(&self, tensor: &str) -> Result<Vec<f32>, ArenaError> {
        let tensor = self.tensor(tensor)?;
        let buffer = &self.params[tensor.buffer];
        let bytes = Values::Params.place(tensor);
        let words = (bytes.len() as u64).div_ceil(ELEM_BYTES);
        let decode = |words: &[u8]| tensor.params_type.decode(&words[..bytes.len()]);
        let (device, queue, start) = (&self.device, &self.queue, bytes.start as u64);
        Ok(readback::read(device, queue, buffer, start, words, decode).await?)
    }

    /// Reads all parameters, tensor by tensor in order, in one transfer per buffer; see [`readback::download`].
    ///
    /// # Errors
    /// [`ArenaError`] if the device is lost or out of memory.
    pub async fn download_all_params(&self) -> Result<Vec<Vec<f32>>, ArenaError> {
        let take = |tensor: &ArenaTensor, bytes: &[u8]| tensor.params_type.decode(bytes);
        Ok(self.download_all(take).await?)
    }

    /// Makes something of the bytes of every tensor's parameters.
    async fn download_all<T: Clone + Default>(
        &self,
        take: impl Fn(&ArenaTensor, &[u8]) -> T,
    ) -> Result<Vec<T>, TransferError> {
        let mut values = vec![T::default(); self.tensors.len()];
        for (index, buffer) in self.params.iter().enumerate() {
            let words = self.buffers[index].params_bytes() / ELEM_BYTES;
            let split = |bytes: &[u8]| {
                let tensors = self.tensors.iter().zip(&mut values);
                for (tensor, value) in tensors.filter(|(tensor, _)| tensor.buffer == index) {
                    *value = take(tensor, &bytes[Values::Params.place(tensor)]);
                }
            };
            readback::read(&self.device, &self.queue, buffer, 0, words, split).await?;
        }
        Ok(values)
    }

    fn tensor(&self, name: &str) -> Result<&ArenaTensor, ArenaError> {
        let index = self.by_name.get(name);
        index
            .map(|index| &self.tensors[*index])
            .ok_or_else(|| ArenaError::UnknownTensor {
                tensor: name.to_owned(),
            })
    }

    fn upload(&self, of: Values, tensor: &str, values: &[f32]) -> Result<(), ArenaError> {
        let tensor = self.tensor(tensor)?;
        tensor.check_len(values)?;
        let (buffer, region) = &self.values(of)[tensor.buffer];
        let start = region.start + of.place(tensor).start as u64;
        let mut bytes = of.encode(tensor, values).into_owned();
        // What shares the last word is padding.
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        Ok(readback::upload_bytes(
            &self.device,
            &self.queue,
            buffer,
            start,
            &bytes,
        )?)
    }

    fn upload_all(&self, of: Values, values: &[impl AsRef<[f32]>]) -> Result<(), ArenaError> {
        if values.len() != self.tensors.len() {
            return Err(ArenaError::TensorCount {
                expected: self.tensors.len(),
                actual: values.len(),
            });
        }
        for (tensor, values) in self.tensors.iter().zip(values) {
            tensor.check_len(values.as_ref())?;
        }
        let tensors = self.tensors.iter().zip(values);
        let bytes = tensors.map(|(tensor, values)| of.encode(tensor, values.as_ref()));
        Ok(self.overwrite(of, bytes)?)
    }

    /// Writes the bytes of all parameters or gradients, tensor by tensor in order.
    fn overwrite<'b>(
        &self,
        of: Values,
        bytes: impl Iterator<Item = Cow<'b, [u8]>>,
    ) -> Result<(), TransferError> {
        readback::overwrite(&self.device, &self.queue, &self.values(of), |mapped| {
            for (tensor, bytes) in self.tensors.iter().zip(bytes) {
                let place = of.place(tensor);
                mapped[tensor.buffer].slice(place).copy_from_slice(&bytes);
            }
        })
    }
}

/// The values of the tensors that are meant.
#[derive(Clone, Copy)]
enum Values {
    Params,
    Grads,
}

impl Values {
    fn type_in(self, tensor: &ArenaTensor) -> StorageType {
        match self {
            Self::Params => tensor.params_type,
            Self::Grads => tensor.grads_type,
        }
    }

    /// The bytes of a tensor in its buffer's region of these values.
    fn place(self, tensor: &ArenaTensor) -> Range<usize> {
        let elem_bytes = self.type_in(tensor).bytes();
        let start = tensor.offset_elems() * elem_bytes;
        start as usize..(start + tensor.numel * elem_bytes) as usize
    }

    fn encode<'v>(self, tensor: &ArenaTensor, values: &'v [f32]) -> Cow<'v, [u8]> {
        match self.type_in(tensor) {
            StorageType::F32 => Cow::Borrowed(bytemuck::cast_slice(values)),
            of => Cow::Owned(of.encode(values.iter().copied())),
        }
    }
}
