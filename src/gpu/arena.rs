//! Many tensors in few buffers, laid out so that one dispatch updates them all.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::binding::TensorBinding;
use super::error::{ArenaError, TransferError};
use super::error_scope::{LOST, checked, is_lost};
use super::readback::{self, Region};
use crate::plan::{ELEM_BYTES, Place, TensorLayout};
use crate::rules::{ParamGroups, Rule};
use crate::state::DuplicateName;
use crate::storage::{Storage, StorageType};

/// Named tensors side by side in a parameter buffer and a gradient buffer of the same layout (more than one of
/// each where a buffer may not be that large).
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
    params_type: StorageType,
    grads_type: StorageType,
    /// Bytes of the parameters in each buffer.
    buffer_bytes: Vec<u64>,
    /// Whether `grads` are the buffers of `params`, and the gradients come after the parameters there.
    is_pooled: bool,
    /// What stands in its file beside the tensors.
    #[cfg(feature = "safetensors")]
    pub(crate) file_metadata: Vec<(String, String)>,
}

/// A tensor of an [`Arena`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaTensor {
    /// Its name.
    pub name: String,
    /// Its shape, first dimension first.
    pub shape: Vec<usize>,
    /// Number of elements, the product of the shape.
    pub numel: u64,
    /// Which of the arena's buffers it lies in, the same for parameters and gradients.
    pub buffer: usize,
    /// Byte offset of its first parameter there, aligned for a binding; of its first gradient see
    /// [`Arena::grads_offset_bytes`].
    pub offset_bytes: u64,
    /// Elements between its end and the next tensor's start.
    pub padding_elems: u64,
}

impl ArenaTensor {
    fn check_len(&self, values: &[f32]) -> Result<(), ArenaError> {
        if values.len() as u64 == self.numel {
            return Ok(());
        }
        Err(ArenaError::Length {
            tensor: self.name.clone(),
            expected: self.numel,
            actual: values.len() as u64,
        })
    }
}

impl Arena {
    /// Lays out tensors of these names and shapes and allocates their buffers. Submits nothing.
    ///
    /// # Errors
    /// [`ArenaError`] if a name comes twice, a tensor is larger than a buffer of this device may be, or the device
    /// is out of memory.
    pub fn new<N: Into<String>, S: Into<Vec<usize>>>(
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        tensors: impl IntoIterator<Item = (N, S)>,
    ) -> Result<Self, ArenaError> {
        let layout = ArenaLayout::new(tensors, &device.limits())?;
        Self::allocate(device, queue, layout, false)
    }

    /// The same with parameters and gradients of these types. What is uploaded and downloaded is `f32`, rounded to the
    /// nearest and unpacked on the host.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn stored_as<N: Into<String>, S: Into<Vec<usize>>>(
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        tensors: impl IntoIterator<Item = (N, S)>,
        params_type: StorageType,
        grads_type: StorageType,
    ) -> Result<Self, ArenaError> {
        let limits = device.limits();
        let layout = ArenaLayout::stored_as(tensors, params_type, grads_type, &limits)?;
        Self::allocate(device, queue, layout, false)
    }

    /// The same with the tensors of each parameter group side by side, so that a group takes one dispatch per
    /// binding's worth of elements.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_groups<R: Rule, N: Into<String>, S: Into<Vec<usize>>>(
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        groups: &ParamGroups<R>,
        tensors: impl IntoIterator<Item = (N, S)>,
    ) -> Result<Self, ArenaError> {
        let named = tensors
            .into_iter()
            .map(|(name, shape)| (name.into(), shape.into()));
        let group_of = |name: &str| groups.index_of(name);
        let (tensors, types) = (named.collect(), [StorageType::F32; 2]);
        let layout = ArenaLayout::in_order(tensors, group_of, types, &device.limits())?;
        Self::allocate(device, queue, layout, false)
    }

    /// The same with the gradients behind the parameters in one buffer, as engines have them that keep everything in
    /// pools: [`grads`](Self::grads) are then the buffers of [`params`](Self::params).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn pooled<N: Into<String>, S: Into<Vec<usize>>>(
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        tensors: impl IntoIterator<Item = (N, S)>,
    ) -> Result<Self, ArenaError> {
        let limits = device.limits();
        let half = wgpu::Limits {
            max_buffer_size: limits.max_buffer_size / 2,
            ..limits
        };
        let layout = ArenaLayout::new(tensors, &half)?;
        Self::allocate(device, queue, layout, true)
    }

    fn allocate(
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        layout: ArenaLayout,
        is_pooled: bool,
    ) -> Result<Self, ArenaError> {
        let sizes = &layout.buffer_bytes;
        let [params_bytes, grads_bytes] =
            [layout.params_type, layout.grads_type].map(StorageType::bytes);
        let grads_sizes: Vec<_> = sizes
            .iter()
            .map(|size| size / params_bytes * grads_bytes)
            .collect();
        let regions = if is_pooled { 2 } else { 1 };
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
                        size: regions * *size,
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
                    bytes: layout.buffer_bytes.iter().chain(&grads_sizes).sum(),
                },
                error => ArenaError::Device {
                    message: error.to_string(),
                },
            })
        };
        let params: Vec<_> = allocate("wgpu_optim.arena.params", sizes)?;
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
            params_type: layout.params_type,
            grads_type: layout.grads_type,
            buffer_bytes: layout.buffer_bytes,
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

    /// The gradient buffers, of as many elements; of a [`pooled`](Self::pooled) arena those of the parameters.
    #[must_use]
    pub fn grads(&self) -> &[wgpu::Buffer] {
        &self.grads
    }

    /// Where a tensor's gradients start in their buffer, in bytes.
    #[must_use]
    pub fn grads_offset_bytes(&self, tensor: &ArenaTensor) -> u64 {
        let elems = tensor.offset_bytes / self.params_type.bytes();
        self.grads_start_bytes(tensor.buffer) + elems * self.grads_type.bytes()
    }

    /// Where the gradients start in each gradient buffer, in bytes: zero, but in a [`pooled`](Self::pooled) arena.
    #[must_use]
    pub fn grads_start_bytes(&self, buffer: usize) -> u64 {
        if self.is_pooled {
            self.buffer_bytes[buffer]
        } else {
            0
        }
    }

    /// The parameters' regions, one in each buffer: the buffer, and their bytes there.
    fn params_regions(&self) -> Regions<'_> {
        let regions = self.params.iter().zip(&self.buffer_bytes);
        Regions {
            regions: regions.map(|(buffer, bytes)| (buffer, 0..*bytes)).collect(),
            of: self.params_type,
        }
    }

    /// The gradients' regions.
    fn grads_regions(&self) -> Regions<'_> {
        let regions = self.grads.iter().zip(&self.buffer_bytes).enumerate();
        let region = |(index, (buffer, bytes)): (usize, (_, &u64))| {
            let start = self.grads_start_bytes(index);
            let elems = bytes / self.params_type.bytes();
            (buffer, start..start + elems * self.grads_type.bytes())
        };
        Regions {
            regions: regions.map(region).collect(),
            of: self.grads_type,
        }
    }

    /// A tensor's bytes in a region of values of this type.
    fn bytes_of(&self, tensor: &ArenaTensor, of: StorageType) -> Range<usize> {
        let start = tensor.offset_bytes / self.params_type.bytes() * of.bytes();
        start as usize..(start + tensor.numel * of.bytes()) as usize
    }

    /// The tensors as the planner wants them, for a rule that keeps so many slots, where they are stored like this; the
    /// gradient buffers are numbered after the parameter buffers.
    #[must_use]
    pub fn layouts(&self, slots: u32, storage: Storage) -> Vec<TensorLayout> {
        layouts(&self.tensors, self.params.len(), slots, storage)
    }

    /// Every tensor for an optimizer.
    #[must_use]
    pub fn bindings(&self) -> Vec<TensorBinding<'_>> {
        let tensors = self.tensors.iter();
        tensors
            .map(|tensor| TensorBinding {
                name: &tensor.name,
                params: &self.params[tensor.buffer],
                params_type: self.params_type,
                params_offset_bytes: tensor.offset_bytes,
                grads: &self.grads[tensor.buffer],
                grads_type: self.grads_type,
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
        self.upload(&self.params_regions(), tensor, values)
    }

    /// Writes one tensor's gradients; see [`readback::upload`].
    ///
    /// # Errors
    /// As [`upload_params`](Self::upload_params).
    pub fn upload_grads(&self, tensor: &str, values: &[f32]) -> Result<(), ArenaError> {
        self.upload(&self.grads_regions(), tensor, values)
    }

    /// Writes all parameters, tensor by tensor in order, in one transfer per buffer. Submits the copies: they take
    /// effect after everything submitted so far.
    ///
    /// # Errors
    /// [`ArenaError`] if `values` has more or fewer tensors than the arena or one of them has another length, or the
    /// device is lost or out of memory; then nothing has been written.
    pub fn upload_all_params(&self, values: &[impl AsRef<[f32]>]) -> Result<(), ArenaError> {
        self.upload_all(&self.params_regions(), values)
    }

    /// Writes all gradients, as [`upload_all_params`](Self::upload_all_params) does the parameters.
    ///
    /// # Errors
    /// As [`upload_all_params`](Self::upload_all_params).
    pub fn upload_all_grads(&self, values: &[impl AsRef<[f32]>]) -> Result<(), ArenaError> {
        self.upload_all(&self.grads_regions(), values)
    }

    /// Reads one tensor's parameters; see [`readback::download`].
    ///
    /// # Errors
    /// [`ArenaError`] if there is no such tensor, or the device is lost or out of memory.
    pub async fn download_params(&self, tensor: &str) -> Result<Vec<f32>, ArenaError> {
        let tensor = self.tensor(tensor)?;
        let buffer = &self.params[tensor.buffer];
        let bytes = self.bytes_of(tensor, self.params_type);
        let words = (bytes.len() as u64).div_ceil(ELEM_BYTES);
        let decode = |words: &[u8]| self.params_type.decode(&words[..bytes.len()]);
        let (device, queue, start) = (&self.device, &self.queue, bytes.start as u64);
        Ok(readback::read(device, queue, buffer, start, words, decode).await?)
    }

    /// Reads all parameters, tensor by tensor in order, in one transfer per buffer; see [`readback::download`].
    ///
    /// # Errors
    /// [`ArenaError`] if the device is lost or out of memory.
    pub async fn download_all_params(&self) -> Result<Vec<Vec<f32>>, ArenaError> {
        let mut values = vec![Vec::new(); self.tensors.len()];
        for (index, buffer) in self.params.iter().enumerate() {
            let numel = self.buffer_bytes[index] / ELEM_BYTES;
            let split = |bytes: &[u8]| {
                let tensors = self.tensors.iter().zip(&mut values);
                for (tensor, values) in tensors.filter(|(tensor, _)| tensor.buffer == index) {
                    let of = self.params_type;
                    *values = of.decode(&bytes[self.bytes_of(tensor, of)]);
                }
            };
            readback::read(&self.device, &self.queue, buffer, 0, numel, split).await?;
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

    fn upload(
        &self,
        regions: &Regions<'_>,
        tensor: &str,
        values: &[f32],
    ) -> Result<(), ArenaError> {
        let tensor = self.tensor(tensor)?;
        tensor.check_len(values)?;
        let (buffer, region) = &regions.regions[tensor.buffer];
        let start = region.start + self.bytes_of(tensor, regions.of).start as u64;
        let (device, queue) = (&self.device, &self.queue);
        match regions.of {
            StorageType::F32 => readback::upload(device, queue, buffer, start, values)?,
            of => {
                let mut bytes = of.encode(values.iter().copied());
                // What shares the last word is padding.
                bytes.resize(bytes.len().next_multiple_of(4), 0);
                readback::upload_bytes(device, queue, buffer, start, &bytes)?;
            }
        }
        Ok(())
    }

    fn upload_all(
        &self,
        regions: &Regions<'_>,
        values: &[impl AsRef<[f32]>],
    ) -> Result<(), ArenaError> {
        if values.len() != self.tensors.len() {
            return Err(ArenaError::TensorCount {
                expected: self.tensors.len(),
                actual: values.len(),
            });
        }
        for (tensor, values) in self.tensors.iter().zip(values) {
            tensor.check_len(values.as_ref())?;
        }
        let bytes = values.iter().map(|values| match regions.of {
            StorageType::F32 => Cow::Borrowed(bytemuck::cast_slice(values.as_ref())),
            of => Cow::Owned(of.encode(values.as_ref().iter().copied())),
        });
        Ok(self.overwrite(regions, bytes)?)
    }

    /// Writes the bytes of every parameter, tensor by tensor in order.
    #[cfg(feature = "safetensors")]
    pub(crate) fn overwrite_params<'b>(
        &self,
        bytes: impl Iterator<Item = &'b [u8]>,
    ) -> Result<(), TransferError> {
        self.overwrite(&self.params_regions(), bytes.map(Cow::Borrowed))
    }

    fn overwrite<'b>(
        &self,
        regions: &Regions<'_>,
        bytes: impl Iterator<Item = Cow<'b, [u8]>>,
    ) -> Result<(), TransferError> {
        readback::overwrite(&self.device, &self.queue, &regions.regions, |mapped| {
            for (tensor, bytes) in self.tensors.iter().zip(bytes) {
                let place = self.bytes_of(tensor, regions.of);
                mapped[tensor.buffer].slice(place).copy_from_slice(&bytes);
            }
        })
    }
}

/// All parameters or all gradients.
struct Regions<'a> {
    regions: Vec<Region<'a>>,
    of: StorageType,
}

/// Where the tensors of an [`Arena`] lie: pure numbers, for planning without a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaLayout {
    /// The tensors, in the order in which they were given.
    pub tensors: Vec<ArenaTensor>,
    /// What the parameters are stored as.
    pub params_type: StorageType,
    /// What the gradients are stored as.
    pub grads_type: StorageType,
    /// Size of each parameter buffer; the gradient buffer beside it has room for as many elements.
    pub buffer_bytes: Vec<u64>,
}

impl ArenaLayout {
    /// Lays tensors of these names and shapes out one after the other, each where a binding may start, in as few
    /// buffers as hold them.
    ///
    /// ```
    /// use wgpu_optim::{ArenaLayout, plan::{DeviceLimits, Plan}, wgpu};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let limits = wgpu::Limits::default();
    /// let tensors = (0..1000).map(|index| (index.to_string(), vec![10, 100]));
    /// let layout = ArenaLayout::new(tensors, &limits)?;
    /// let plan = Plan::new(&layout.tensor_layouts(1), &DeviceLimits::from(&limits))?;
    /// assert_eq!(plan.dispatches(|_| Some(())).len(), 1);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ArenaError`] if a name comes twice or a tensor is larger than a buffer may be.
    pub fn new<N: Into<String>, S: Into<Vec<usize>>>(
        tensors: impl IntoIterator<Item = (N, S)>,
        limits: &wgpu::Limits,
    ) -> Result<Self, ArenaError> {
        Self::stored_as(tensors, StorageType::F32, StorageType::F32, limits)
    }

    /// The same for parameters and gradients of these types.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn stored_as<N: Into<String>, S: Into<Vec<usize>>>(
        tensors: impl IntoIterator<Item = (N, S)>,
        params_type: StorageType,
        grads_type: StorageType,
        limits: &wgpu::Limits,
    ) -> Result<Self, ArenaError> {
        let named = tensors
            .into_iter()
            .map(|(name, shape)| (name.into(), shape.into()));
        Self::in_order(named.collect(), |_| 0, [params_type, grads_type], limits)
    }

    /// The tensors as the planner wants them, for a rule that keeps so many slots (one for momentum) as `f32`, without
    /// masters; the gradient buffers are numbered after the parameter buffers.
    #[must_use]
    pub fn tensor_layouts(&self, slots: u32) -> Vec<TensorLayout> {
        let storage = Storage {
            params: self.params_type,
            grads: self.grads_type,
            ..Storage::F32
        };
        layouts(&self.tensors, self.buffer_bytes.len(), slots, storage)
    }

    /// In the order of their ranks in memory, and in the order given in the list.
    fn in_order(
        tensors: Vec<(String, Vec<usize>)>,
        rank: impl Fn(&str) -> usize,
        [params_type, grads_type]: [StorageType; 2],
        limits: &wgpu::Limits,
    ) -> Result<Self, ArenaError> {
        let (shortest, longest) = match [params_type.bytes(), grads_type.bytes()] {
            [params, grads] if params < grads => (params, grads),
            [params, grads] => (grads, params),
        };
        let mut in_memory: Vec<_> = (0..tensors.len()).collect();
        in_memory.sort_by_cached_key(|index| rank(&tensors[*index].0));
        // A vec4 at least of what is shortest, so that neighbours lie in step modulo its elements.
        let alignment = u64::from(limits.min_storage_buffer_offset_alignment).max(4 * ELEM_BYTES);
        let alignment_elems = alignment / shortest;
        let fresh = |(name, shape): (String, Vec<usize>)| ArenaTensor {
            name,
            shape,
            numel: 0,
            buffer: 0,
            offset_bytes: 0,
            padding_elems: 0,
        };
        let mut laid_out: Vec<_> = tensors.into_iter().map(fresh).collect();
        let mut names = HashSet::with_capacity(laid_out.len());
        if let Some(twice) = laid_out.iter().find(|t| !names.insert(t.name.as_str())) {
            return Err(DuplicateName {
                tensor: twice.name.clone(),
            }
            .into());
        }
        // In elements.
        let mut sizes = vec![0_u64];
        for index in in_memory {
            let tensor = &mut laid_out[index];
            let mut dims = tensor.shape.iter();
            let numel = dims.try_fold(1_u64, |numel, dim| numel.checked_mul(*dim as u64));
            let elems = numel.and_then(|numel| numel.checked_next_multiple_of(alignment_elems));
            let size = elems.and_then(|elems| elems.checked_mul(longest));
            let fitting = size.filter(|size| *size <= limits.max_buffer_size);
            let (Some(numel), Some(elems), Some(_)) = (numel, elems, fitting) else {
                return Err(ArenaError::TooLarge {
                    tensor: tensor.name.clone(),
                    bytes: size.unwrap_or(u64::MAX),
                    max_buffer_bytes: limits.max_buffer_size,
                });
            };
            if (sizes[sizes.len() - 1] + elems) * longest > limits.max_buffer_size {
                sizes.push(0);
            }
            tensor.numel = numel;
            tensor.buffer = sizes.len() - 1;
            tensor.offset_bytes = sizes[tensor.buffer] * params_type.bytes();
            tensor.padding_elems = elems - numel;
            sizes[tensor.buffer] += elems;
        }
        // A buffer of nothing cannot be bound, but an empty arena is still an arena.
        let bytes = |elems: u64| elems.max(alignment_elems) * params_type.bytes();
        Ok(Self {
            tensors: laid_out,
            params_type,
            grads_type,
            buffer_bytes: sizes.into_iter().map(bytes).collect(),
        })
    }
}

/// Tensors of an arena with so many parameter buffers, behind which its gradient buffers are counted.
fn layouts(
    tensors: &[ArenaTensor],
    buffers: usize,
    slots: u32,
    storage: Storage,
) -> Vec<TensorLayout> {
    let layout = |tensor: &ArenaTensor| {
        let elems = tensor.offset_bytes / storage.params.bytes();
        let place = |buffer, of: StorageType| Place {
            buffer,
            offset_bytes: elems * of.bytes(),
        };
        TensorLayout {
            numel: tensor.numel,
            params: place(tensor.buffer, storage.params),
            grads: place(buffers + tensor.buffer, storage.grads),
            padding_elems: tensor.padding_elems,
            slots,
            storage,
            ..TensorLayout::default()
        }
    };
    tensors.iter().map(layout).collect()
}
