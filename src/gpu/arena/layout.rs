//! The layout of an arena: the places of its tensors.

use std::collections::HashSet;

use super::Arena;
use crate::gpu::error::ArenaError;
use crate::plan::{ELEM_BYTES, Place, TensorLayout};
use crate::rules::{ParamGroups, Rule, Slots};
use crate::state::{DuplicateName, TensorSpec};
use crate::storage::{Precision, Storage, StorageType};

/// A tensor of an [`Arena`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaTensor {
    /// The tensor's name.
    pub name: String,
    /// The tensor's shape, first dimension first.
    pub shape: Vec<usize>,
    /// Number of elements, the product of the shape.
    pub numel: u64,
    /// The storage type of its parameters.
    pub params_type: StorageType,
    /// The storage type of its gradients.
    pub grads_type: StorageType,
    /// The number of the arena's buffer that it lies in, the same for parameters and gradients.
    pub buffer: usize,
    /// Byte offset of its first parameter there, aligned for a binding; of its first gradient see
    /// [`Arena::grads_offset_bytes`].
    pub offset_bytes: u64,
    /// Elements between its end and the next tensor's start.
    pub padding_elems: u64,
}

impl ArenaTensor {
    /// Elements before it in its buffer.
    pub(super) fn offset_elems(&self) -> u64 {
        self.offset_bytes / self.params_type.bytes()
    }

    pub(super) fn check_len(&self, values: &[f32]) -> Result<(), ArenaError> {
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

/// A parameter buffer of an [`Arena`], and the gradient buffer beside it: tensors of one type each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArenaBuffer {
    /// Elements of each, padding included.
    pub elems: u64,
    /// The storage type of the parameters.
    pub params_type: StorageType,
    /// The storage type of the gradients.
    pub grads_type: StorageType,
}

impl ArenaBuffer {
    /// Bytes of the parameters.
    #[must_use]
    pub const fn params_bytes(&self) -> u64 {
        self.elems * self.params_type.bytes()
    }

    /// Bytes of the gradients.
    #[must_use]
    pub const fn grads_bytes(&self) -> u64 {
        self.elems * self.grads_type.bytes()
    }

    /// Bytes of both together.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.params_bytes() + self.grads_bytes()
    }
}

/// The places of the tensors of an [`Arena`]: pure numbers, for planning without a device; made by
/// [`ArenaBuilder::layout`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaLayout {
    /// The tensors, in the order in which they were given.
    pub tensors: Vec<ArenaTensor>,
    /// The buffers, one at least.
    pub buffers: Vec<ArenaBuffer>,
}

impl ArenaLayout {
    /// The tensors as the planner wants them, for a rule with these slots, with this precision; the gradient buffers are
    /// numbered after the parameter buffers.
    #[must_use]
    pub fn layouts(&self, slots: &Slots, precision: &Precision) -> Vec<TensorLayout> {
        layouts(&self.tensors, self.buffers.len(), slots, precision)
    }
}

/// The settings of an [`Arena`]. Tensors of one type of parameters and gradients lie one after the other, each where a
/// binding may start, in as few buffers as hold them.
///
/// ```
/// use wgpu_optim::{AdapterRequest, Arena, Gpu, ParamGroups, SgdConfig, StorageType, TensorSpec};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default())?;
/// let config = SgdConfig::builder(0.1).momentum(0.9);
/// let groups = ParamGroups::new(config.weight_decay(0.01).build()?)
///     .with("no_decay", config.build()?, |name| name.ends_with("bias"))?;
/// let weight = |name| TensorSpec::new(name, [64, 64]).params_type(StorageType::Bf16);
/// let tensors = [weight("0.weight"), TensorSpec::new("0.bias", [64]), weight("1.weight")];
///
/// let arena = Arena::builder().groups(&groups).build(&device, &queue, tensors)?;
/// assert_eq!(arena.params().len(), 2, "one of bf16, one of f32");
/// # Ok(())
/// # }
/// ```
#[derive(Default)]
pub struct ArenaBuilder<'g> {
    group_of: Option<GroupOf<'g>>,
    pub(super) grads_type: Option<StorageType>,
    is_pooled: bool,
}

/// The parameter group of a tensor, by its name.
type GroupOf<'g> = Box<dyn Fn(&str) -> usize + 'g>;

impl<'g> ArenaBuilder<'g> {
    /// Lays the tensors of each parameter group side by side, so that a group takes one dispatch per binding's worth of
    /// elements.
    #[must_use]
    pub fn groups<R: Rule>(self, groups: &'g ParamGroups<R>) -> Self {
        Self {
            group_of: Some(Box::new(|name| groups.index_of(name))),
            ..self
        }
    }

    /// Stores all gradients in one type, whatever the tensors' specifications say: those of a file say `f32`.
    #[must_use]
    pub fn grads_type(self, grads_type: StorageType) -> Self {
        Self {
            grads_type: Some(grads_type),
            ..self
        }
    }

    /// Lays the gradients behind the parameters in one buffer, as engines have them that keep everything in pools:
    /// [`Arena::grads`] are then the buffers of [`Arena::params`].
    #[must_use]
    pub fn pooled(self) -> Self {
        Self {
            is_pooled: true,
            ..self
        }
    }

    /// Lays out tensors and allocates their buffers. Submits nothing.
    ///
    /// # Errors
    /// As [`Arena::new`].
    pub fn build(
        &self,
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        tensors: impl IntoIterator<Item: Into<TensorSpec>>,
    ) -> Result<Arena, ArenaError> {
        let layout = self.layout(tensors, &device.limits())?;
        Arena::allocate(device, queue, layout, self.is_pooled)
    }

    /// Lays out tensors on a device with these limits.
    ///
    /// ```
    /// use wgpu_optim::{Arena, Precision, Rule as _, SgdConfig, plan::{DeviceLimits, Plan}, wgpu};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let config = SgdConfig::builder(0.1).momentum(0.9).build()?;
    /// let limits = wgpu::Limits::default();
    /// let tensors = (0..1000).map(|index| (index.to_string(), [10, 100]));
    /// let layout = Arena::builder().layout(tensors, &limits)?;
    /// let plan = Plan::new(&layout.layouts(&config.slots(), &Precision::default()), &DeviceLimits::from(&limits))?;
    /// assert_eq!(plan.dispatches(|_| Some(())).len(), 1);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ArenaError`] if a name comes twice or a tensor is larger than a buffer may be.
    pub fn layout(
        &self,
        tensors: impl IntoIterator<Item: Into<TensorSpec>>,
        limits: &wgpu::Limits,
    ) -> Result<ArenaLayout, ArenaError> {
        let fresh = |spec: TensorSpec| ArenaTensor {
            name: spec.name,
            shape: spec.shape,
            numel: 0,
            params_type: spec.params_type,
            grads_type: self.grads_type.unwrap_or(spec.grads_type),
            buffer: 0,
            offset_bytes: 0,
            padding_elems: 0,
        };
        let tensors = tensors.into_iter().map(Into::into);
        let mut tensors: Vec<_> = tensors.map(fresh).collect();
        let mut names = HashSet::with_capacity(tensors.len());
        if let Some(twice) = tensors.iter().find(|t| !names.insert(t.name.as_str())) {
            return Err(DuplicateName {
                tensor: twice.name.clone(),
            }
            .into());
        }
        let mut in_memory: Vec<_> = (0..tensors.len()).collect();
        in_memory.sort_by_cached_key(|index| {
            let tensor = &tensors[*index];
            let group = self.group_of.as_ref().map(|of| of(&tensor.name));
            (tensor.params_type, tensor.grads_type, group)
        });
        let mut buffers: Vec<ArenaBuffer> = Vec::new();
        for index in in_memory {
            self.place(&mut tensors[index], &mut buffers, limits)?;
        }
        if buffers.is_empty() {
            buffers.push(ArenaBuffer {
                elems: 0,
                params_type: StorageType::F32,
                grads_type: self.grads_type.unwrap_or_default(),
            });
        }
        for buffer in &mut buffers {
            // A buffer of nothing cannot be bound, but an empty arena is still an arena.
            buffer.elems = buffer.elems.max(alignment_elems(buffer, limits));
        }
        Ok(ArenaLayout { tensors, buffers })
    }

    /// Places a tensor behind those before it, in another buffer where it does not fit or is of other types.
    fn place(
        &self,
        tensor: &mut ArenaTensor,
        buffers: &mut Vec<ArenaBuffer>,
        limits: &wgpu::Limits,
    ) -> Result<(), ArenaError> {
        let alone = ArenaBuffer {
            elems: 0,
            params_type: tensor.params_type,
            grads_type: tensor.grads_type,
        };
        let alignment_elems = alignment_elems(&alone, limits);
        // Bytes of an element in the largest buffer that has to hold it.
        let elem_bytes = match self.is_pooled {
            true => tensor.params_type.bytes() + tensor.grads_type.bytes(),
            false => tensor.params_type.bytes().max(tensor.grads_type.bytes()),
        };
        let mut dims = tensor.shape.iter();
        let numel = dims.try_fold(1_u64, |numel, dim| numel.checked_mul(*dim as u64));
        let elems = numel.and_then(|numel| numel.checked_next_multiple_of(alignment_elems));
        let size = elems.and_then(|elems| elems.checked_mul(elem_bytes));
        let fitting = size.filter(|size| *size <= limits.max_buffer_size);
        let (Some(numel), Some(elems), Some(_)) = (numel, elems, fitting) else {
            return Err(ArenaError::TooLarge {
                tensor: tensor.name.clone(),
                bytes: size.unwrap_or(u64::MAX),
                max_buffer_bytes: limits.max_buffer_size,
            });
        };
        let has_room = |buffer: &ArenaBuffer| {
            let is_alike = ArenaBuffer {
                elems: 0,
                ..*buffer
            } == alone;
            is_alike && (buffer.elems + elems) * elem_bytes <= limits.max_buffer_size
        };
        if !buffers.last().is_some_and(has_room) {
            buffers.push(alone);
        }
        tensor.buffer = buffers.len() - 1;
        let buffer = &mut buffers[tensor.buffer];
        tensor.numel = numel;
        tensor.offset_bytes = buffer.params_bytes();
        tensor.padding_elems = elems - numel;
        buffer.elems += elems;
        Ok(())
    }
}

/// Elements from one place where a tensor may start to the next: where a binding may start, and after a vec4 at least of
/// what is shortest, so that neighbours lie in step modulo its elements.
fn alignment_elems(buffer: &ArenaBuffer, limits: &wgpu::Limits) -> u64 {
    let alignment = u64::from(limits.min_storage_buffer_offset_alignment).max(4 * ELEM_BYTES);
    let [params, grads] = [buffer.params_type, buffer.grads_type].map(StorageType::bytes);
    alignment / params.min(grads)
}

/// Tensors of an arena with so many parameter buffers, behind which its gradient buffers are counted.
pub(super) fn layouts(
    tensors: &[ArenaTensor],
    buffers: usize,
    slots: &Slots,
    precision: &Precision,
) -> Vec<TensorLayout> {
    let layout = |tensor: &ArenaTensor| TensorLayout {
        numel: tensor.numel,
        params: Place {
            buffer: tensor.buffer,
            offset_bytes: tensor.offset_bytes,
        },
        grads: Place {
            buffer: buffers + tensor.buffer,
            offset_bytes: tensor.offset_elems() * tensor.grads_type.bytes(),
        },
        padding_elems: tensor.padding_elems,
        storage: Storage::new(
            tensor.params_type,
            tensor.grads_type,
            slots.kept_names(),
            precision,
        ),
        ..TensorLayout::default()
    };
    tensors.iter().map(layout).collect()
}
