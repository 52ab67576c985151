//! The sums that rules take over tensors, between the two passes of a step.

use super::bound::{Pipeline, Pipelines};
use super::control::bind_whole;
use super::error::{BuildError, StepError};
use super::error_scope::checked;
use super::kernels::{BindingKind, Kernels};
use super::rules::GroupRules;
use super::staged::Staged;
use crate::plan::{Access, Chunk, Plan};
use crate::wgsl::scalars::TENSORS_GROUP;
use crate::wgsl::{KernelVariant, SUM_PARTS};

/// Bytes of the sums of a part of a chunk, and of those over a tensor: `wo_partials` and `wo_totals` in
/// `shaders/frame/step.wgsl`.
const PARTIAL_BYTES: u64 = 16;
const TOTAL_BYTES: u64 = 32;

/// Storage buffers that a pass of a rule with sums binds: parameters, gradients, state, chunks and sums; under a control its
/// blocks, too.
pub(super) const SUMS_BINDINGS: usize = 5;

/// Words of the header and of an entry in `shaders/frame/totals.wgsl`.
const ENTRY_WORDS: usize = 4;

/// The kernels that take sums, and the buffers in which these lie.
pub(super) struct Sums {
    /// By the kinds of pieces, where their rule takes sums, in the order of [`Access::CHUNKS`].
    pipelines: Vec<Option<[Pipeline; 2]>>,
    /// Adds up what the chunks of each tensor come to.
    add: wgpu::ComputePipeline,
    bindings: wgpu::BindGroup,
    inputs: Staged,
    /// Of every chunk.
    pub(super) partials: wgpu::Buffer,
    /// Of every tensor.
    pub(super) totals: wgpu::Buffer,
    max_workgroups: u32,
    workgroups: [u32; 2],
    /// Runs of chunks of one tensor, by tensor; each with its first chunk. Reused from step to step.
    runs: Vec<(usize, [u32; 2])>,
}

impl Sums {
    /// Builds what the steps of a plan need.
    pub(super) fn new(
        kernels: &Kernels,
        rules: &dyn GroupRules,
        plan: &Plan,
        of: impl Fn(KernelVariant) -> KernelVariant,
    ) -> Result<Self, BuildError> {
        use BindingKind::{Read, ReadWrite};
        let device = kernels.device();
        let source = include_str!("../../shaders/frame/totals.wgsl").to_owned();
        let (add, layout) = kernels.of_control("add_sums", source, &[Read, Read, ReadWrite], 0)?;
        let is_software = kernels.device_limits().is_software;
        let measuring = |variant| of(variant).measuring(is_software);
        let tensors = plan.tensors() as u64;
        let chunks = plan.max_chunks();
        // A tensor's chunks are in as many runs as it has parts, by each access.
        let entries = 1 + tensors + 2 * plan.parts.len() as u64;
        let storage = |label, bytes| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size: bytes,
                usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            })
        };
        let (inputs, partials, totals, bindings) = checked(device, || {
            let inputs = Staged::new(
                device,
                "wgpu_optim.sum_inputs",
                4 * ENTRY_WORDS as u64 * entries,
                wgpu::BufferUsages::STORAGE,
            );
            let partials_bytes = PARTIAL_BYTES * u64::from(SUM_PARTS) * chunks.max(1);
            let partials = storage("wgpu_optim.partial_sums", partials_bytes);
            let totals = storage("wgpu_optim.sums", TOTAL_BYTES * tensors.max(1));
            let bound = [inputs.buffer(), &partials, &totals];
            let bindings = bind_whole(device, &layout, &bound);
            (inputs, partials, totals, bindings)
        })?;
        Ok(Self {
            pipelines: Pipelines::measuring(kernels, rules, plan, measuring)?,
            add,
            bindings,
            inputs,
            partials,
            totals,
            max_workgroups: kernels.device_limits().max_workgroups_per_dimension,
            workgroups: [0, 0],
            runs: Vec::new(),
        })
    }

    /// The pipeline that takes the sums of a piece of a kind.
    pub(super) fn pipeline(&self, kind: usize, access: Access) -> Option<&wgpu::ComputePipeline> {
        let [vec4, scalar] = self.pipelines[kind].as_ref()?;
        let (pipeline, _) = if access.is_scalar() { scalar } else { vec4 };
        Some(pipeline)
    }

    /// Records the copy of what each tensor's chunks are.
    pub(super) fn prepare(
        &mut self,
        device: &wgpu::Device,
        encoder: &mut wgpu::CommandEncoder,
        chunks: &[Chunk<usize>],
        plan: &Plan,
    ) -> Result<(), StepError> {
        let has_sums = |tensor: usize| {
            let mut parts = plan.parts_of(tensor).iter();
            parts
                .next()
                .is_some_and(|part| plan.pieces[part.piece].has_sums)
        };
        let mut first = 0;
        let runs = &mut self.runs;
        runs.clear();
        for run in chunks.chunk_by(|x, y| x.tensor == y.tensor) {
            if has_sums(run[0].tensor) {
                runs.push((run[0].tensor, [first, run.len() as u32]));
            }
            first += run.len() as u32;
        }
        runs.sort_unstable();
        let tensors = runs.chunk_by(|(x, _), (y, _)| x == y);
        let count = tensors.clone().count() as u32;
        let rows = count.div_ceil(self.max_workgroups).max(1);
        self.workgroups = [count.div_ceil(rows), rows];

        let bytes = &mut self.inputs.bytes;
        bytes.clear();
        let mut push =
            |words: [u32; ENTRY_WORDS]| bytes.extend_from_slice(bytemuck::bytes_of(&words));
        push([count, self.workgroups[0], 0, 0]);
        let mut run = count;
        for of_tensor in tensors {
            let (tensor, _) = of_tensor[0];
            let parts = plan.parts_of(tensor).iter();
            let numel: u64 = parts.map(|part| u64::from(part.numel())).sum();
            let runs = of_tensor.len() as u32;
            push([run, runs, (numel as f32).to_bits(), tensor as u32]);
            run += runs;
        }
        for (_, [first, chunks]) in runs {
            push([*first, *chunks, 0, 0]);
        }
        self.inputs.record(device, encoder)
    }

    /// Records the kernel behind the dispatches that take sums, if any tensor takes part. Returns the number of dispatches.
    pub(super) fn record(&self, pass: &mut wgpu::ComputePass<'_>) -> usize {
        let [x, y] = self.workgroups;
        if x == 0 {
            return 0;
        }
        pass.set_pipeline(&self.add);
        pass.set_bind_group(TENSORS_GROUP, &self.bindings, &[]);
        pass.dispatch_workgroups(x, y, 1);
        1
    }
}
