//! Where a rank's whole parameters and gradients lie: in memory, or on its device.

use wgpu_optim::half::slice::HalfFloatSliceExt as _;
use wgpu_optim::{Rule, TensorSlice, TensorSliceMut};

use crate::buckets::Memory;
use crate::error::ShardError;
use crate::share::GpuShare;
use crate::shares::{Shares, Slice};

/// Where the reduced gradients of a share go.
pub(crate) struct Reduced<'a> {
    shares: &'a Shares,
    rank: usize,
    grads: &'a mut [Vec<f32>],
}

impl<'a> Reduced<'a> {
    pub(crate) fn of(shares: &'a Shares, rank: usize, grads: &'a mut [Vec<f32>]) -> Self {
        Self {
            shares,
            rank,
            grads,
        }
    }

    fn take(&mut self, slices: &[Slice], mut grads: &[f64]) {
        for slice in slices {
            let own = self.shares.of_tensor(self.rank, slice.tensor);
            let start = (slice.elems.start - own.start) as usize;
            let (of_slice, rest) = grads.split_at(slice.numel() as usize);
            let to = &mut self.grads[slice.tensor][start..start + of_slice.len()];
            for (to, grad) in to.iter_mut().zip(of_slice) {
                *to = *grad as f32;
            }
            grads = rest;
        }
    }
}

/// Parameters and gradients in memory.
pub(crate) struct Host<'a, 'p, 'g> {
    pub(crate) params: &'a mut [TensorSliceMut<'p>],
    pub(crate) grads: &'a [TensorSlice<'g>],
    pub(crate) reduced: Reduced<'a>,
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

    fn take_grads(&mut self, slices: &[Slice], grads: &[f64]) -> Result<(), ShardError> {
        self.reduced.take(slices, grads);
        Ok(())
    }
}

/// Parameters and gradients in an arena.
pub(crate) struct Device<'a, R: Rule> {
    pub(crate) share: &'a GpuShare<R>,
    pub(crate) reduced: Reduced<'a>,
}

impl<R: Rule> Memory for Device<'_, R> {
    type Error = ShardError;

    fn read_grads(&self, slices: &[Slice], bytes: &mut Vec<u8>) -> Result<(), ShardError> {
        self.share.read_grads(slices, bytes)
    }

    fn read_params(&self, slices: &[Slice], bytes: &mut Vec<u8>) -> Result<(), ShardError> {
        self.share.read_params(slices, bytes)
    }

    fn write_params(&mut self, slices: &[Slice], bytes: &[u8]) -> Result<(), ShardError> {
        self.share.write_params(slices, bytes)
    }

    fn take_grads(&mut self, slices: &[Slice], grads: &[f64]) -> Result<(), ShardError> {
        self.reduced.take(slices, grads);
        Ok(())
    }
}
