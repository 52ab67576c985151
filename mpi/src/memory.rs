//! The whole parameters and gradients of a rank: in memory, or on its device.

use std::ops::Range;
use std::sync::Arc;

use wgpu_optim::half::slice::HalfFloatSliceExt as _;
use wgpu_optim::{
    Arena, Kernels, StorageType, TensorBinding, TensorSlice, TensorSliceMut, readback, wgpu,
};

use crate::buckets::Memory;
use crate::error::ShardError;
use crate::shares::Slice;

/// Parameters and gradients in memory.
pub(crate) struct Host<'a, 'p, 'g> {
    pub(crate) params: &'a mut [TensorSliceMut<'p>],
    pub(crate) grads: &'a [TensorSlice<'g>],
}

impl Memory for Host<'_, '_, '_> {
    type Error = ShardError;

    fn read_grads(&self, slices: &[Slice], bytes: &mut Vec<u8>) -> Result<(), ShardError> {
        for Slice { tensor, elems } in slices {
            let elems = elems.start as usize..elems.end as usize;
            bytes.extend_from_slice(match &self.grads[*tensor] {
                TensorSlice::F32(values) => bytemuck::cast_slice(&values[elems]),
                TensorSlice::Bf16(values) => bytemuck::cast_slice(values[elems].reinterpret_cast()),
                TensorSlice::F16(values) => bytemuck::cast_slice(values[elems].reinterpret_cast()),
            });
        }
        Ok(())
    }

    fn read_params(&self, slices: &[Slice], bytes: &mut Vec<u8>) -> Result<(), ShardError> {
        for Slice { tensor, elems } in slices {
            let elems = elems.start as usize..elems.end as usize;
            bytes.extend_from_slice(match &self.params[*tensor] {
                TensorSliceMut::F32(values) => bytemuck::cast_slice(&values[elems]),
                TensorSliceMut::Bf16(values) => {
                    bytemuck::cast_slice(values[elems].reinterpret_cast())
                }
                TensorSliceMut::F16(values) => {
                    bytemuck::cast_slice(values[elems].reinterpret_cast())
                }
            });
        }
        Ok(())
    }

    fn write_params(&mut self, slices: &[Slice], bytes: &[u8]) -> Result<(), ShardError> {
        let mut rest = bytes;
        for Slice { tensor, elems } in slices {
            let elems = elems.start as usize..elems.end as usize;
            let to: &mut [u8] = match &mut self.params[*tensor] {
                TensorSliceMut::F32(values) => bytemuck::cast_slice_mut(&mut values[elems]),
                TensorSliceMut::Bf16(values) => {
                    bytemuck::cast_slice_mut(values[elems].reinterpret_cast_mut())
                }
                TensorSliceMut::F16(values) => {
                    bytemuck::cast_slice_mut(values[elems].reinterpret_cast_mut())
                }
            };
            let (own, others) = rest.split_at(to.len());
            to.copy_from_slice(own);
            rest = others;
        }
        Ok(())
    }
}

/// Parameters and gradients in an arena.
#[derive(Clone)]
pub(crate) struct Device {
    pub(crate) kernels: Kernels,
    pub(crate) arena: Arc<Arena>,
}

impl Memory for Device {
    type Error = ShardError;

    fn read_grads(&self, slices: &[Slice], to: &mut Vec<u8>) -> Result<(), ShardError> {
        self.read(
            slices,
            |of| (of.grads, of.grads_offset_bytes, of.grads_type),
            to,
        )
    }

    fn read_params(&self, slices: &[Slice], to: &mut Vec<u8>) -> Result<(), ShardError> {
        self.read(
            slices,
            |of| (of.params, of.params_offset_bytes, of.params_type),
            to,
        )
    }

    fn write_params(&mut self, slices: &[Slice], bytes: &[u8]) -> Result<(), ShardError> {
        let bindings = self.arena.bindings();
        let (mut regions, mut words) = (Vec::with_capacity(slices.len()), Vec::new());
        let mut rest = bytes;
        for slice in slices {
            let binding = &bindings[slice.tensor];
            let of = binding.params_type;
            let (own, others) = rest.split_at((slice.numel() * of.bytes()) as usize);
            let region = words_of(slice, binding.params_offset_bytes, of);
            words.extend_from_slice(own);
            // What shares a tensor's last word is padding of the arena.
            words.resize(
                words.len() + (region.end - region.start) as usize - own.len(),
                0,
            );
            regions.push((binding.params, region));
            rest = others;
        }
        let (device, queue) = (self.kernels.device(), self.kernels.queue());
        Ok(readback::upload_regions(device, queue, &regions, &words)?)
    }
}

impl Device {
    fn read(
        &self,
        slices: &[Slice],
        place: impl for<'b> Fn(&TensorBinding<'b>) -> (&'b wgpu::Buffer, u64, StorageType),
        to: &mut Vec<u8>,
    ) -> Result<(), ShardError> {
        let bindings = self.arena.bindings();
        let regions: Vec<_> = slices
            .iter()
            .map(|slice| {
                let (buffer, start, of) = place(&bindings[slice.tensor]);
                (buffer, words_of(slice, start, of))
            })
            .collect();
        let (device, queue) = (self.kernels.device(), self.kernels.queue());
        let read = readback::download_regions(device, queue, &regions);
        let bytes = readback::block_on(device, read)?;
        let mut rest = &bytes[..];
        for (slice, (_, words)) in slices.iter().zip(&regions) {
            let (own, others) = rest.split_at((words.end - words.start) as usize);
            to.extend_from_slice(
                &own[..(slice.numel() * place(&bindings[slice.tensor]).2.bytes()) as usize],
            );
            rest = others;
        }
        Ok(())
    }
}

/// The words that a slice lies in, of a tensor that starts at this byte. Slices start on whole words.
fn words_of(slice: &Slice, start: u64, of: StorageType) -> Range<u64> {
    let start = start + slice.elems.start * of.bytes();
    start..start + (slice.numel() * of.bytes()).next_multiple_of(4)
}
