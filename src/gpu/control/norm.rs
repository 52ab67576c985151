//! Sums of squares of gradients: which workgroup adds up which elements, and what it binds.

use std::ops::Range;

use super::super::bound::{Bound, BufferWindow, create_bind_group};
use super::super::error::{BuildError, StepError};
use super::super::error_scope::checked;
use super::super::kernels::{BindingKind, Kernels, SCALARS_GROUP, TENSORS_GROUP};
use super::super::scalars::{ScalarPath, UniformRing};
use super::super::staged::Staged;
use crate::plan::{Access, Batch, Piece, Plan, WORKGROUP_SIZE};
use crate::storage::StorageType;

/// Elements of a chunk at least: a workgroup's invocations each have 16 loads of 16 bytes to add up.
const CHUNK_ELEMS: u64 = 64 * WORKGROUP_SIZE as u64;

/// Most chunks of tensors that are not cut any further: the partial sums are added up by one workgroup.
const MAX_CHUNKS: u64 = 4096;

/// Most workgroups over a batch.
const BATCH_WORKGROUPS: u32 = 4;

/// Bytes of `k` in `shaders/control/norm.wgsl`.
const SCALARS_BYTES: u32 = 24;

/// What a dispatch adds up.
#[derive(Clone, Copy, Debug)]
struct Part {
    target: Target,
    /// Its chunks.
    first: u32,
    count: u32,
    /// Its partial sums, counted from the first of the optimizer's.
    partial: u32,
    /// The parameter group.
    group: usize,
    tensor_mask: u32,
}

#[derive(Clone, Copy, Debug)]
enum Target {
    /// An index into [`Plan::pieces`].
    Piece(usize),
    /// An index into [`Plan::batches`].
    Batch(usize),
}

/// The norm of an optimizer's gradients, on its plan.
pub(crate) struct Norm {
    /// By piece and by batch, where there is one.
    pieces: Vec<Option<Bindings>>,
    batches: Vec<Bindings>,
    chunk_elems: u64,
    /// First and last element of each, from the start of the piece's gradients on.
    chunks: Staged,
    /// `chunks` has to be copied again.
    is_stale: bool,
    parts: Vec<Part>,
    partials: u32,
    max_workgroups: u32,
    ring: Option<UniformRing>,
    /// What the bind groups bind.
    into: wgpu::Buffer,
}

type Bindings = (wgpu::ComputePipeline, wgpu::BindGroup);

impl Norm {
    /// Partial sums go to `into`.
    pub(crate) fn new(
        kernels: &Kernels,
        plan: &Plan,
        bound: &Bound,
        into: &wgpu::Buffer,
    ) -> Result<Self, BuildError> {
        let device = kernels.device();
        let failed = |error: wgpu::Error| BuildError::Device {
            message: error.to_string(),
        };
        let numel: u64 = plan.pieces.iter().map(|piece| u64::from(piece.numel)).sum();
        let chunk_elems = numel.div_ceil(MAX_CHUNKS).max(CHUNK_ELEMS);
        let chunk_elems = chunk_elems.next_multiple_of(8 * u64::from(WORKGROUP_SIZE));
        // Every part may be a run of its own.
        let max_chunks = numel / chunk_elems + 2 * plan.parts.len() as u64 + 1;
        let dispatches = plan.pieces.len() + plan.batches.len();
        let (chunks, ring) = checked(device, || {
            let usage = wgpu::BufferUsages::STORAGE;
            let chunks = Staged::new(device, "wgpu_optim.chunks", 8 * max_chunks, usage);
            let ring = |layout| UniformRing::new(device, layout, dispatches);
            (chunks, kernels.scalars_layout().map(ring))
        })
        .map_err(failed)?;

        let path = kernels.scalar_path();
        let mut pieces = Vec::with_capacity(plan.pieces.len());
        for (index, piece) in plan.pieces.iter().enumerate() {
            if piece.is_absent || (piece.batched && piece.parts.len() == 1) {
                pieces.push(None);
                continue;
            }
            let source = source_of_piece(path, piece.storage.grads);
            const KINDS: [BindingKind; 4] = [
                BindingKind::Read,
                BindingKind::Read,
                BindingKind::Read,
                BindingKind::ReadWrite,
            ];
            let (pipeline, layout) = kernels.of_control("norm", source, &KINDS, SCALARS_BYTES)?;
            let whole = |buffer: &wgpu::Buffer| (buffer.clone(), 0, buffer.size());
            let grads = bound.grads[index].clone();
            // What has no whole vec4 cannot be bound as such: something else is, and not read.
            let is_short = |(_, _, bytes): &BufferWindow| *bytes < 16;
            let windows = [
                match grads.as_ref().is_some_and(is_short) {
                    true => Some(whole(chunks.buffer())),
                    false => grads.clone(),
                },
                grads,
                Some(whole(chunks.buffer())),
                Some(whole(into)),
            ];
            let bind_group = bind(device, &layout, windows.into_iter().flatten());
            pieces.push(Some((pipeline, bind_group.map_err(failed)?)));
        }
        let mut batches = Vec::with_capacity(plan.batches.len());
        for batch in &plan.batches {
            let grads = plan.pieces[batch.pieces[0]].storage.grads;
            let source = source_of_batch(path, grads, batch);
            let mut kinds = vec![BindingKind::Read; batch.pieces.len()];
            kinds.push(BindingKind::ReadWrite);
            let (pipeline, layout) = kernels.of_control("norm", source, &kinds, SCALARS_BYTES)?;
            let windows = batch.pieces.iter().map(|piece| bound.grads[*piece].clone());
            let windows = windows.chain([Some((into.clone(), 0, into.size()))]);
            let bind_group = bind(device, &layout, windows.flatten()).map_err(failed)?;
            batches.push((pipeline, bind_group));
        }
        Ok(Self {
            pieces,
            batches,
            chunk_elems,
            chunks,
            is_stale: false,
            parts: Vec::new(),
            partials: 0,
            max_workgroups: kernels.device_limits().max_workgroups_per_dimension,
            ring,
            into: into.clone(),
        })
    }

    /// Whether partial sums go to this buffer.
    pub(crate) fn goes_into(&self, buffer: &wgpu::Buffer) -> bool {
        self.into == *buffer
    }

    /// How many partial sums there are.
    pub(crate) fn partials(&self) -> u32 {
        self.partials
    }

    /// The most that there can be.
    pub(crate) fn max_partials(plan: &Plan) -> u64 {
        let numel: u64 = plan.pieces.iter().map(|piece| u64::from(piece.numel)).sum();
        let batches = plan.batches.len() as u64 * u64::from(BATCH_WORKGROUPS);
        numel / CHUNK_ELEMS + 2 * plan.parts.len() as u64 + batches + 1
    }

    /// Goes over the tensors that take part.
    pub(crate) fn refresh(&mut self, plan: &Plan, takes_part: impl Fn(usize) -> bool) {
        self.parts.clear();
        self.partials = 0;
        self.is_stale = true;
        self.chunks.bytes.clear();
        let is_whole = |piece: &Piece| {
            let mut parts = plan.parts[piece.parts.clone()].iter();
            parts.all(|part| takes_part(part.tensor))
        };
        for (index, piece) in plan.pieces.iter().enumerate() {
            if piece.is_absent || (piece.batched && is_whole(piece)) {
                continue;
            }
            let first = self.chunks.bytes.len() / 8;
            for run in runs(plan, piece, &takes_part) {
                let cuts = run.clone().step_by(self.chunk_elems as usize);
                for start in cuts {
                    // Cut where a load of 16 bytes starts, counted from the binding's start.
                    let cut = |elem: u64| elem - elem % 8;
                    let begin = if start == run.start {
                        start
                    } else {
                        cut(start)
                    };
                    let end = start + self.chunk_elems;
                    let end = if end >= run.end { run.end } else { cut(end) };
                    let chunk = [begin, end].map(|elem| elem as u32);
                    let bytes = bytemuck::bytes_of(&chunk);
                    self.chunks.bytes.extend_from_slice(bytes);
                }
            }
            let count = self.chunks.bytes.len() / 8 - first;
            self.add(
                Target::Piece(index),
                first as u32,
                count as u32,
                piece.group,
                0,
            );
        }
        for (index, batch) in plan.batches.iter().enumerate() {
            let pieces = || batch.pieces.iter().map(|piece| &plan.pieces[*piece]);
            let bits = pieces().enumerate().filter(|(_, piece)| is_whole(piece));
            let mask = bits.fold(0, |mask, (bit, _)| mask | 1 << bit);
            if mask != 0 {
                let numel: u64 = pieces().map(|piece| u64::from(piece.numel)).sum();
                let count = numel.div_ceil(CHUNK_ELEMS) as u32;
                let count = count.min(BATCH_WORKGROUPS);
                let group = plan.pieces[batch.pieces[0]].group;
                self.add(Target::Batch(index), 0, count, group, mask);
            }
        }
    }

    fn add(&mut self, target: Target, first: u32, count: u32, group: usize, tensor_mask: u32) {
        if count > 0 {
            self.parts.push(Part {
                target,
                first,
                count,
                partial: self.partials,
                group,
                tensor_mask,
            });
            self.partials += count;
        }
    }

    /// Records what the dispatches need before their pass begins. Partial sums start at `partial`, and a parameter group is
    /// part of the norm that `norm_of` says.
    pub(crate) fn prepare(
        &mut self,
        device: &wgpu::Device,
        encoder: &mut wgpu::CommandEncoder,
        partial: u32,
        norm_of: impl Fn(usize) -> u32,
    ) -> Result<(), StepError> {
        if self.is_stale {
            self.chunks.record(device, encoder)?;
            self.is_stale = false;
        }
        if let Some(ring) = &mut self.ring {
            for (slot, part) in self.parts.iter().enumerate() {
                let scalars = scalars(part, self.max_workgroups, partial, &norm_of);
                ring.set(slot, bytemuck::bytes_of(&scalars));
            }
            ring.record(device, encoder)?;
        }
        Ok(())
    }

    /// Records the dispatches.
    pub(crate) fn record(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        partial: u32,
        norm_of: impl Fn(usize) -> u32,
    ) {
        let mut current = None;
        for (slot, part) in self.parts.iter().enumerate() {
            let bindings = match part.target {
                Target::Piece(piece) => self.pieces[piece].as_ref(),
                Target::Batch(batch) => Some(&self.batches[batch]),
            };
            let Some((pipeline, bind_group)) = bindings else {
                continue;
            };
            if current != Some(pipeline) {
                pass.set_pipeline(pipeline);
                current = Some(pipeline);
            }
            pass.set_bind_group(TENSORS_GROUP, bind_group, &[]);
            match &self.ring {
                Some(ring) => ring.bind(pass, SCALARS_GROUP, slot),
                None => {
                    let scalars = scalars(part, self.max_workgroups, partial, &norm_of);
                    pass.set_immediates(0, bytemuck::bytes_of(&scalars));
                }
            }
            let [x, y] = grid(part.count, self.max_workgroups);
            pass.dispatch_workgroups(x, y, 1);
        }
    }

    /// How many there are.
    pub(crate) fn dispatches(&self) -> usize {
        self.parts.len()
    }
}

/// Elements of a piece that take part, as far as they follow each other, from the start of its gradients' binding on.
fn runs(plan: &Plan, piece: &Piece, takes_part: impl Fn(usize) -> bool) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    let parts = plan.parts[piece.parts.clone()].iter();
    for part in parts.filter(|part| takes_part(part.tensor)) {
        let start = u64::from(piece.grads.first_elem) + u64::from(part.start);
        let end = start + u64::from(part.numel());
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

/// Workgroups in x and y.
fn grid(count: u32, max_per_dimension: u32) -> [u32; 2] {
    let rows = count.div_ceil(max_per_dimension).max(1);
    [count.div_ceil(rows), rows]
}

/// `k` of a dispatch.
fn scalars(
    part: &Part,
    max_workgroups: u32,
    partial: u32,
    norm_of: impl Fn(usize) -> u32,
) -> [u32; 6] {
    let [row, _] = grid(part.count, max_workgroups);
    [
        part.first,
        part.count,
        partial + part.partial,
        row,
        norm_of(part.group),
        part.tensor_mask,
    ]
}

fn bind(
    device: &wgpu::Device,
    layout: &wgpu::BindGroupLayout,
    windows: impl Iterator<Item = BufferWindow>,
) -> Result<wgpu::BindGroup, wgpu::Error> {
    let binding = (layout.clone(), windows.collect());
    checked(device, || create_bind_group(device, &binding))
}

/// What is before the entry points, for gradients that are stored like this.
fn source(path: ScalarPath, grads: StorageType) -> String {
    let (unpack, conversion) = match grads {
        StorageType::F32 => ("add_squares(sums, words);", ""),
        StorageType::Bf16 => (
            "add_squares(sums, unpack_bf16(words.xy));\n    add_squares(sums, unpack_bf16(words.zw));",
            include_str!("../../../shaders/storage/bf16.wgsl"),
        ),
        StorageType::F16 => (
            "add_squares(sums, unpack_f16(words.xy));\n    add_squares(sums, unpack_f16(words.zw));",
            include_str!("../../../shaders/storage/f16.wgsl"),
        ),
    };
    [
        include_str!("../../../shaders/control/sums.wgsl"),
        include_str!("../../../shaders/control/norm.wgsl"),
        path.declaration(),
        // What the conversions return.
        "struct Eight {\n    low: vec4<u32>,\n    high: vec4<u32>,\n}\n\n",
        conversion,
        &format!(
            "fn add_words(sums: ptr<function, Sums>, words: vec4<u32>) {{\n    {unpack}\n}}\n\n"
        ),
    ]
    .concat()
}

fn source_of_piece(path: ScalarPath, grads: StorageType) -> String {
    let (unit, bits) = match grads {
        StorageType::F32 => (4, "grads_word[element]".to_owned()),
        of => (
            8,
            format!(
                "unpack_{}(vec2((grads_word[element / 2u] >> (16u * (element & 1u))) & 0xffffu, 0u)).x",
                of.name()
            ),
        ),
    };
    let piece = include_str!("../../../shaders/control/norm_piece.wgsl");
    format!(
        "{}const UNIT = {unit}u;\n\n{piece}\nfn bits_of(element: u32) -> u32 {{\n    return {bits};\n}}\n",
        source(path, grads)
    )
}

/// Each tensor of a batch fills its binding.
fn source_of_batch(path: ScalarPath, grads: StorageType, batch: &Batch) -> String {
    let tensors = batch.pieces.len();
    let (element, add) = match batch.access {
        Access::Scalar => ("u32", "add_squares(&sums, vec4(GRADS[i], 0u, 0u, 0u))"),
        Access::Vec4 | Access::Vec4Offset => ("vec4<u32>", "add_words(&sums, GRADS[i])"),
    };
    let (mut bindings, mut loops) = (String::new(), String::new());
    for tensor in 0..tensors {
        let grads = format!("grads_{tensor}");
        let add = add.replace("GRADS", &grads);
        bindings += &format!(
            "@group(0) @binding({tensor}) var<storage, read> {grads}: array<{element}>;\n"
        );
        loops += &format!(
            "    if (k.tensor_mask & {}u) != 0u {{\n        \
             for (var i = start; i < arrayLength(&{grads}); i += stride) {{\n            \
             {add};\n        }}\n    }}\n",
            1 << tensor
        );
    }
    format!(
        "{}{bindings}@group(0) @binding({tensors}) var<storage, read_write> partials: array<vec4<u32>>;\n\n\
         @compute @workgroup_size(WORKGROUP_SIZE)\n\
         fn norm(\n    @builtin(workgroup_id) workgroup: vec3<u32>,\n    \
         @builtin(local_invocation_index) lane: u32,\n) {{\n    \
         let start = workgroup.x * WORKGROUP_SIZE + lane;\n    \
         let stride = k.count * WORKGROUP_SIZE;\n    \
         var sums = Sums();\n{loops}    \
         let total = sum_of_workgroup(sums, lane);\n    \
         if lane == 0u {{\n        store_partial(k.partial + workgroup.x, total);\n    }}\n}}\n",
        source(path, grads)
    )
}
