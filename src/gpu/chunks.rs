//! The table in which workgroups look up which elements are theirs, and of which class their tensors are.

use super::error::{BuildError, StepError};
use super::error_scope::checked;
use super::kernels::Kernels;
use super::staged::Staged;
use crate::plan::{Chunk, Plan};

/// Bytes of an entry, four words; `wo_chunks` in `shaders/frame/step.wgsl`.
const ENTRY_BYTES: u64 = 16;

/// A table for the chunks of any step of a plan.
pub(super) struct ChunkTable(Staged);

impl ChunkTable {
    pub(super) fn new(kernels: &Kernels, plan: &Plan) -> Result<Self, BuildError> {
        let size = ENTRY_BYTES * plan.max_chunks().max(1);
        let usage = wgpu::BufferUsages::STORAGE;
        let device = kernels.device();
        let new = || Staged::new(device, "wgpu_optim.step_chunks", size, usage);
        Ok(Self(checked(device, new)?))
    }

    /// Makes the bindings of kernels in chunks: the table, and the blocks of a control by class if there is one.
    pub(super) fn bind(&self, kernels: &Kernels, blocks: Option<&wgpu::Buffer>) -> wgpu::BindGroup {
        let table = self.0.buffer();
        let blocks = blocks.map(|blocks| (0, blocks));
        let buffers = blocks.into_iter().chain([(1, table)]);
        let entries: Vec<_> = buffers
            .map(|(binding, buffer)| wgpu::BindGroupEntry {
                binding,
                resource: buffer.as_entire_binding(),
            })
            .collect();
        kernels
            .device()
            .create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some("wgpu_optim.chunks"),
                layout: kernels.chunks_layout(blocks.is_some()),
                entries: &entries,
            })
    }

    /// Records the copy of a step's chunks, each with the index of its class.
    pub(super) fn prepare(
        &mut self,
        device: &wgpu::Device,
        encoder: &mut wgpu::CommandEncoder,
        chunks: &[Chunk<usize>],
    ) -> Result<(), StepError> {
        let words = chunks
            .iter()
            .map(|chunk| [chunk.elems.start, chunk.elems.end, chunk.class as u32, 0]);
        self.0.bytes.clear();
        for words in words {
            self.0.bytes.extend_from_slice(bytemuck::bytes_of(&words));
        }
        self.0.record(device, encoder)
    }
}
