//! The table in which workgroups look up which elements are theirs, and of which class their tensors are.

use super::bound::{Bound, Pipelines};
use super::error::{BuildError, StepError};
use super::error_scope::checked;
use super::kernels::{BehindChunks, Kernels};
use super::pass::{Call, Decision};
use super::rules::GroupRules;
use super::staged::Staged;
use super::sums::Sums;
use crate::plan::{Chunk, Dispatch, Plan, Target};
use crate::wgsl::KernelVariant;

/// Bytes of an entry, four words; `wo_chunks` in `shaders/frame/step.wgsl`.
const ENTRY_BYTES: u64 = 16;

/// A table for the chunks of any step of a plan, and what the rules that take sums need besides.
pub(super) struct ChunkTable {
    entries: Staged,
    sums: Option<Sums>,
}

/// The bindings of kernels in chunks, by what lies behind the table.
pub(super) struct ChunkBindings {
    plain: wgpu::BindGroup,
    /// Those of the pass that takes sums, and of the one behind it.
    sums: Option<[wgpu::BindGroup; 2]>,
}

impl ChunkTable {
    /// Builds the table, and compiles the variants of a plan's kernels that are in chunks, which `of` makes.
    pub(super) fn new(
        kernels: &Kernels,
        rules: &dyn GroupRules,
        plan: &Plan,
        pipelines: &mut Pipelines,
        of: impl Fn(KernelVariant) -> KernelVariant,
    ) -> Result<Self, BuildError> {
        pipelines.add_chunks(kernels, rules, plan, &of)?;
        let has_sums = plan.pieces.iter().any(|piece| piece.has_sums);
        let sums = has_sums.then(|| Sums::new(kernels, rules, plan, &of));
        let size = ENTRY_BYTES * plan.max_chunks().max(1);
        let usage = wgpu::BufferUsages::STORAGE;
        let device = kernels.device();
        let new = || Staged::new(device, "wgpu_optim.step_chunks", size, usage);
        Ok(Self {
            entries: checked(device, new)?,
            sums: sums.transpose()?,
        })
    }

    /// Makes the bindings: the table, and the blocks of a control by class if there is one.
    pub(super) fn bind(&self, kernels: &Kernels, blocks: Option<&wgpu::Buffer>) -> ChunkBindings {
        let bind = |kind, behind: Option<&wgpu::Buffer>| {
            let blocks = blocks.map(|blocks| (0, blocks));
            let table = [(1, self.entries.buffer())];
            let behind = behind.map(|buffer| (2, buffer));
            let buffers = blocks.into_iter().chain(table).chain(behind);
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
                    layout: kernels.chunks_layout(blocks.is_some(), kind),
                    entries: &entries,
                })
        };
        ChunkBindings {
            plain: bind(BehindChunks::Nothing, None),
            sums: self.sums.as_ref().map(|sums| {
                [
                    bind(BehindChunks::Partials, Some(&sums.partials)),
                    bind(BehindChunks::Totals, Some(&sums.totals)),
                ]
            }),
        }
    }

    /// Records the copy of a step's chunks, each with the index of its class.
    pub(super) fn prepare(
        &mut self,
        device: &wgpu::Device,
        encoder: &mut wgpu::CommandEncoder,
        chunks: &[Chunk<usize>],
        plan: &Plan,
    ) -> Result<(), StepError> {
        let words = chunks.iter().map(|chunk| {
            let Chunk { elems, .. } = chunk;
            [
                elems.start,
                elems.end,
                chunk.class as u32,
                chunk.tensor as u32,
            ]
        });
        self.entries.bytes.clear();
        for words in words {
            self.entries
                .bytes
                .extend_from_slice(bytemuck::bytes_of(&words));
        }
        self.entries.record(device, encoder)?;
        match &mut self.sums {
            Some(sums) => sums.prepare(device, encoder, chunks, plan),
            None => Ok(()),
        }
    }

    /// The dispatches of a step that take sums, each with its index among all.
    pub(super) fn sum_calls<'a>(
        &'a self,
        group: u32,
        bindings: &'a ChunkBindings,
        plan: &'a Plan,
        bound: &'a Bound,
        dispatches: &'a [(Dispatch, usize)],
    ) -> impl Iterator<Item = (usize, Call<'a>)> {
        let sums = self.sums.iter().zip(&bindings.sums);
        sums.flat_map(move |(sums, [bindings, _])| {
            let decision = Decision {
                group,
                bindings,
                offset_bytes: None,
            };
            let dispatches = dispatches.iter().enumerate();
            dispatches.filter_map(move |(index, (dispatch, _))| match dispatch.target {
                Target::Piece(piece) if plan.pieces[piece].has_sums => {
                    let call = Call {
                        pipeline: sums.pipeline(bound.kind_of(piece), dispatch.access)?,
                        tensors: bound.tensors_of(piece),
                        decision: Some(decision),
                        workgroups: dispatch.workgroups,
                    };
                    Some((index, call))
                }
                _ => None,
            })
        })
    }

    /// Records the kernel behind these dispatches. Returns the number of dispatches.
    pub(super) fn record_totals(&self, pass: &mut wgpu::ComputePass<'_>) -> usize {
        self.sums.as_ref().map_or(0, |sums| sums.record(pass))
    }
}

impl ChunkBindings {
    /// What a dispatch in chunks binds that updates.
    pub(super) fn of(&self, plan: &Plan, dispatch: &Dispatch) -> &wgpu::BindGroup {
        match (&self.sums, dispatch.target) {
            (Some([_, updating]), Target::Piece(piece)) if plan.pieces[piece].has_sums => updating,
            _ => &self.plain,
        }
    }
}
