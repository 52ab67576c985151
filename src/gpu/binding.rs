//! Tensors in the caller's buffers, and what must hold of them.

use super::error::BuildError;
use crate::state::{TensorSpec, numel};
use crate::storage::StorageType;

/// One named tensor in buffers that the caller owns.
///
/// The elements lie one after the other: `f32`, unless [`params_type`](Self::params_type) and
/// [`grads_type`](Self::grads_type) say otherwise. Where they have 16 bits, a buffer reaches to the end of the four
/// bytes that the last one lies in. Parameters are read and written, gradients only read. Both buffers need
/// `BufferUsages::STORAGE` and belong to the device of the kernels (wgpu cannot tell a buffer of another
/// `wgpu::Instance` from one of this). Several tensors may share a buffer, and a tensor's parameters and gradients may,
/// as pools of engines have them; the parameters must not overlap each other or any tensor's gradients. In one buffer
/// their bindings must not overlap either: the later of both starts behind the end of the other, on the device's
/// `min_storage_buffer_offset_alignment`. The kernel then binds the gradients for writing, because WebGPU refuses a
/// buffer that is bound for writing and for reading in one dispatch, and still never writes them.
#[derive(Clone, Debug)]
pub struct TensorBinding<'a> {
    /// Name, used in errors and states; unique within an optimizer.
    pub name: &'a str,
    /// Buffer of the parameters.
    pub params: &'a wgpu::Buffer,
    /// The storage type of the parameters.
    pub params_type: StorageType,
    /// Byte offset of the first parameter, a multiple of an element's.
    pub params_offset_bytes: u64,
    /// Buffer of the gradients.
    pub grads: &'a wgpu::Buffer,
    /// The storage type of the gradients.
    pub grads_type: StorageType,
    /// Byte offset of the first gradient, a multiple of an element's.
    pub grads_offset_bytes: u64,
    /// The tensor's shape, first dimension first; its elements may be none.
    pub shape: Vec<usize>,
    /// Elements after the tensor that belong to nobody, in both buffers; a step may write them. Tensors that follow
    /// each other, padding included, are updated together. Zero where in doubt.
    pub padding_elems: u64,
}

impl<'a> TensorBinding<'a> {
    /// A tensor at the start of its two buffers, without padding.
    #[must_use]
    pub fn new(
        name: &'a str,
        params: &'a wgpu::Buffer,
        grads: &'a wgpu::Buffer,
        shape: impl Into<Vec<usize>>,
    ) -> Self {
        Self {
            name,
            params,
            params_type: StorageType::F32,
            params_offset_bytes: 0,
            grads,
            grads_type: StorageType::F32,
            grads_offset_bytes: 0,
            shape: shape.into(),
            padding_elems: 0,
        }
    }

    /// Returns the tensor with parameters of another storage type.
    #[must_use]
    pub const fn params_type(mut self, params_type: StorageType) -> Self {
        self.params_type = params_type;
        self
    }

    /// Returns the tensor with gradients of another storage type.
    #[must_use]
    pub const fn grads_type(mut self, grads_type: StorageType) -> Self {
        self.grads_type = grads_type;
        self
    }

    /// Returns the tensor with its first parameter at another byte offset, a multiple of an element's.
    #[must_use]
    pub const fn params_at(mut self, offset_bytes: u64) -> Self {
        self.params_offset_bytes = offset_bytes;
        self
    }

    /// Returns the tensor with its first gradient at another byte offset, a multiple of an element's.
    #[must_use]
    pub const fn grads_at(mut self, offset_bytes: u64) -> Self {
        self.grads_offset_bytes = offset_bytes;
        self
    }

    /// Number of elements, the product of the shape; the largest number where that does not fit.
    #[must_use]
    pub fn numel(&self) -> u64 {
        numel(&self.shape)
    }

    /// Bytes from the first element to the end of the padding, if that fits into the address range.
    fn extent_bytes(&self, of: StorageType) -> Option<u64> {
        self.numel()
            .checked_add(self.padding_elems)?
            .checked_mul(of.bytes())
    }

    /// The tensor's name, shape and types, wherever it lies.
    pub(crate) fn spec(&self) -> TensorSpec {
        TensorSpec::new(self.name, self.shape.clone())
            .params_type(self.params_type)
            .grads_type(self.grads_type)
    }
}

/// Checks each tensor alone, then all of them against each other.
pub(crate) fn check_bindings(tensors: &[TensorBinding<'_>]) -> Result<(), BuildError> {
    tensors.iter().try_for_each(check_binding)?;
    check_overlap(tensors)
}

fn check_binding(tensor: &TensorBinding<'_>) -> Result<(), BuildError> {
    let name = || tensor.name.to_owned();
    for (role, buffer, of, offset_bytes) in [
        (
            "params",
            tensor.params,
            tensor.params_type,
            tensor.params_offset_bytes,
        ),
        (
            "grads",
            tensor.grads,
            tensor.grads_type,
            tensor.grads_offset_bytes,
        ),
    ] {
        if !buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
            return Err(BuildError::MissingUsage {
                tensor: name(),
                role,
                required: wgpu::BufferUsages::STORAGE,
                actual: buffer.usage(),
            });
        }
        if !offset_bytes.is_multiple_of(of.bytes()) {
            return Err(BuildError::Misaligned {
                tensor: name(),
                role,
                offset_bytes,
                elem_bytes: of.bytes(),
            });
        }
        let end = tensor
            .extent_bytes(of)
            .and_then(|bytes| bytes.checked_add(offset_bytes)?.checked_next_multiple_of(4));
        if end.is_none_or(|end| end > buffer.size()) {
            return Err(BuildError::OutOfBounds {
                tensor: name(),
                role,
                offset_bytes,
                numel: tensor.numel().saturating_add(tensor.padding_elems),
                storage: of.name(),
                buffer_bytes: buffer.size(),
            });
        }
    }
    Ok(())
}

/// A slice of a buffer, for the overlap check.
#[derive(Clone, Copy)]
struct Slice<'a> {
    buffer: &'a wgpu::Buffer,
    start: u64,
    end: u64,
    tensor: &'a str,
    writes: bool,
}

/// Parameters are written, so nothing else may lie where they lie; gradients may share.
fn check_overlap(tensors: &[TensorBinding<'_>]) -> Result<(), BuildError> {
    let mut slices: Vec<_> = tensors
        .iter()
        .filter(|tensor| tensor.numel() > 0)
        .flat_map(|tensor| {
            let slice = |buffer, of, start: u64, writes| Slice {
                buffer,
                start,
                end: start + tensor.extent_bytes(of).unwrap_or(u64::MAX - start),
                tensor: tensor.name,
                writes,
            };
            let (params, grads) = (tensor.params_offset_bytes, tensor.grads_offset_bytes);
            [
                slice(tensor.params, tensor.params_type, params, true),
                slice(tensor.grads, tensor.grads_type, grads, false),
            ]
        })
        .collect();
    slices.sort_by(|x, y| (x.buffer, x.start).cmp(&(y.buffer, y.start)));

    // The slices so far in the same buffer that reach furthest: of all, and of those that are written.
    let (mut furthest, mut furthest_written): (Option<Slice<'_>>, Option<Slice<'_>>) = (None, None);
    for slice in slices {
        let clash = |before: Slice<'_>| before.buffer == slice.buffer && before.end > slice.start;
        let before = if slice.writes {
            furthest
        } else {
            furthest_written
        };
        if let Some(before) = before.filter(|before| clash(*before)) {
            let (written, other) = if slice.writes {
                (slice, before)
            } else {
                (before, slice)
            };
            return Err(BuildError::Overlap {
                tensor: written.tensor.to_owned(),
                role: if other.writes { "params" } else { "grads" },
                other: other.tensor.to_owned(),
            });
        }
        let further = |before: Option<Slice<'_>>| {
            before.is_none_or(|b| b.buffer != slice.buffer || b.end <= slice.end)
        };
        if further(furthest) {
            furthest = Some(slice);
        }
        if slice.writes && further(furthest_written) {
            furthest_written = Some(slice);
        }
    }
    Ok(())
}
