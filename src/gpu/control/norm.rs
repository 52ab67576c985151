//! Sums of squares of gradients: which workgroup adds up which elements, and what it binds.

use std::collections::HashMap;
use std::ops::Range;

use super::super::bound::{Bound, BufferWindow, create_bind_group};
use super::super::error::{BuildError, StepError};
use super::super::error_scope::checked;
use super::super::kernels::{BindingKind, Kernels};
use super::super::pass::{self, Call};
use super::super::scalars::UniformRing;
use super::super::staged::Staged;
use crate::plan::{Batch, Piece, Plan};
use crate::wgsl::NormVariant;

/// Invocations of a workgroup; `WORKGROUP_SIZE` in `shaders/control/norm.wgsl`. Each has a partial sum of its own.
const WORKGROUP_SIZE: u64 = 64;

/// The most that an invocation adds up: what rounds a sum has a bound.
const MAX_LANE_ELEMS: u64 = 4096;

/// The number of elements that an invocation adds up. One workgroup adds up all partial sums, so there are no more of them
/// than keep the device busy: few on a software adapter, whose invocations wait for nothing.
fn lane_elems(numel: u64, device_type: wgpu::DeviceType) -> u64 {
    let (lanes, least) = match device_type {
        wgpu::DeviceType::Cpu => (4096, 1024),
        _ => (32768, 256),
    };
    numel.div_ceil(lanes).clamp(least, MAX_LANE_ELEMS)
}

/// `wo_k` in `shaders/control/norm.wgsl`.
struct Scalars([u32; 7]);

impl AsRef<[u8]> for Scalars {
    fn as_ref(&self) -> &[u8] {
        bytemuck::bytes_of(&self.0)
    }
}

/// A dispatch, with the elements that it adds up.
#[derive(Clone, Copy, Debug)]
struct Part {
    target: Target,
    /// The first of the tensor's chunks.
    first: u32,
    count: u32,
    /// The first of the tensor's partial sums, counted from the optimizer's.
    partial: u32,
    /// Whether an earlier part of the same parameter group has these partial sums, too.
    adds: bool,
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
    /// By piece, where it may have a dispatch of its own.
    pieces: HashMap<usize, Bindings>,
    /// By batch.
    batches: Vec<Bindings>,
    chunk_elems: u64,
    /// For each chunk, which of the runs behind all chunks are its; and first and last element of each run, from the start
    /// of the piece's gradients on.
    chunks: Staged,
    /// The first step that `chunks` have been recorded with, since they last changed.
    sent_with: Option<u64>,
    parts: Vec<Part>,
    partials: u32,
    /// Whether each tensor has partial sums of its own, and which: the first, and how many.
    ranges: Option<Vec<[u32; 2]>>,
    max_workgroups: u32,
    ring: Option<UniformRing>,
    /// The buffer of partial sums that the bind groups bind.
    into: wgpu::Buffer,
}

type Bindings = (wgpu::ComputePipeline, wgpu::BindGroup);

impl Norm {
    /// Partial sums go to `into`; `by_tensor` says that each tensor has its own.
    pub(crate) fn new(
        kernels: &Kernels,
        plan: &Plan,
        bound: &Bound,
        into: &wgpu::Buffer,
        by_tensor: bool,
    ) -> Result<Self, BuildError> {
        let device = kernels.device();
        let chunk_elems = chunk_elems(kernels, plan);
        // A run for every part, and two more wherever a chunk ends: one that is cut off, and what then fits.
        let max_chunks = match by_tensor {
            true => max_chunks_by_tensor(plan, chunk_elems),
            false => max_chunks(plan, chunk_elems),
        };
        let max_runs = 2 * max_chunks + plan.parts.len() as u64;
        let dispatches = plan.pieces.len() + plan.batches.len();
        let (chunks, ring) = checked(device, || {
            let usage = wgpu::BufferUsages::STORAGE;
            let chunks = Staged::new(
                device,
                "wgpu_optim.chunks",
                8 * (max_chunks + max_runs),
                usage,
            );
            let ring = |layout| UniformRing::new(device, layout, dispatches);
            (chunks, kernels.scalars_layout().map(ring))
        })?;

        let path = kernels.scalar_path();
        let compiled = |variant: NormVariant, kinds: &[BindingKind]| {
            let uniforms = size_of::<Scalars>() as u32;
            kernels.of_control(
                NormVariant::ENTRY_POINT,
                variant.source(path),
                kinds,
                uniforms,
            )
        };
        let mut pieces = HashMap::new();
        for (index, piece) in plan.pieces.iter().enumerate() {
            let is_in_batch = piece.batched && piece.parts.len() == 1 && !by_tensor;
            if piece.is_absent || is_in_batch {
                continue;
            }
            const KINDS: [BindingKind; 4] = [
                BindingKind::Read,
                BindingKind::Read,
                BindingKind::Read,
                BindingKind::ReadWrite,
            ];
            let variant = NormVariant::new(piece.storage.grads);
            let (pipeline, layout) = compiled(variant, &KINDS)?;
            let whole = |buffer: &wgpu::Buffer| (buffer.clone(), 0, buffer.size());
            let grads = bound.grads[index].clone();
            // Where there is no whole vec4, any other buffer that has one.
            let vec4 = grads.clone().filter(|(_, _, size)| *size >= 16);
            let windows = [
                vec4.or_else(|| Some(whole(chunks.buffer()))),
                grads,
                Some(whole(chunks.buffer())),
                Some(whole(into)),
            ];
            let bind_group = bind(device, &layout, windows.into_iter().flatten());
            pieces.insert(index, (pipeline, bind_group?));
        }
        let mut batches = Vec::with_capacity(plan.batches.len());
        for batch in plan.batches.iter().filter(|_| !by_tensor) {
            let variant = NormVariant::new(plan.pieces[batch.pieces[0]].storage.grads);
            let variant = variant.over_batch(batch.pieces.len(), batch.access);
            let mut kinds = vec![BindingKind::Read; batch.pieces.len()];
            kinds.push(BindingKind::ReadWrite);
            let (pipeline, layout) = compiled(variant, &kinds)?;
            let windows = batch.pieces.iter().map(|piece| bound.grads[*piece].clone());
            let windows = windows.chain([Some((into.clone(), 0, into.size()))]);
            let bind_group = bind(device, &layout, windows.flatten())?;
            batches.push((pipeline, bind_group));
        }
        Ok(Self {
            pieces,
            batches,
            chunk_elems,
            chunks,
            sent_with: None,
            parts: Vec::new(),
            partials: 0,
            ranges: by_tensor.then(Vec::new),
            max_workgroups: kernels.device_limits().max_workgroups_per_dimension,
            ring,
            into: into.clone(),
        })
    }

    /// Whether partial sums go to this buffer.
    pub(crate) fn goes_into(&self, buffer: &wgpu::Buffer) -> bool {
        self.into == *buffer
    }

    /// The number of partial sums.
    pub(crate) fn partials(&self) -> u32 {
        self.partials
    }

    /// The partial sums of each tensor, the first and how many, if each has its own.
    pub(crate) fn ranges(&self) -> Option<&[[u32; 2]]> {
        self.ranges.as_deref()
    }

    /// The most that there can be.
    pub(crate) fn max_partials(kernels: &Kernels, plan: &Plan, by_tensor: bool) -> u64 {
        let chunk_elems = chunk_elems(kernels, plan);
        if by_tensor {
            return WORKGROUP_SIZE * max_chunks_by_tensor(plan, chunk_elems);
        }
        let batches = plan
            .batches
            .iter()
            .map(|batch| batch_chunks(plan, batch, chunk_elems));
        let mut shares = Shares::default();
        let pieces = plan.pieces.iter().map(|piece| match &piece.parts {
            _ if piece.is_absent => 0,
            parts if parts.len() == 1 && piece.batched => 0,
            // Fewer tensors that take part need no more.
            parts if parts.len() == 1 => {
                let chunks = u64::from(piece.numel).div_ceil(chunk_elems - 8);
                u64::from(
                    shares
                        .find(piece.group, piece.numel, chunks as u32, 0)
                        .is_none(),
                ) * chunks
            }
            _ => max_chunks_of(piece, chunk_elems),
        });
        WORKGROUP_SIZE * (pieces.sum::<u64>() + batches.sum::<u64>())
    }

    /// Goes over the tensors that take part.
    pub(crate) fn refresh(
        &mut self,
        plan: &Plan,
        tensors: usize,
        takes_part: impl Fn(usize) -> bool,
    ) {
        self.parts.clear();
        self.partials = 0;
        self.sent_with = None;
        let mut ranges = self.ranges.take();
        if let Some(ranges) = &mut ranges {
            ranges.clear();
            ranges.resize(tensors, [0; 2]);
        }
        let by_tensor = ranges.is_some();
        let is_whole = |piece: &Piece| {
            let mut parts = plan.parts[piece.parts.clone()].iter();
            parts.all(|part| takes_part(part.tensor))
        };
        let (mut chunks, mut all_runs) = (Vec::new(), Vec::new());
        let mut shares = Shares::default();
        for (index, piece) in plan.pieces.iter().enumerate() {
            if piece.is_absent || (piece.batched && !by_tensor && is_whole(piece)) {
                continue;
            }
            let first = chunks.len();
            let mut room = 0;
            for (tensor, mut run) in runs(plan, piece, &takes_part, by_tensor) {
                if by_tensor {
                    room = 0;
                }
                let chunks_before = chunks.len();
                while run.start < run.end {
                    if room == 0 {
                        chunks.push([all_runs.len() as u32; 2]);
                        room = self.chunk_elems;
                    }
                    // Cut where a load of 16 bytes starts, counted from the binding's start.
                    let cut = (run.start + room) / 8 * 8;
                    let end = if cut <= run.start {
                        run.end.min(run.start + 8)
                    } else {
                        run.end.min(cut)
                    };
                    all_runs.push([run.start as u32, end as u32]);
                    if let Some([_, last]) = chunks.last_mut() {
                        *last += 1;
                    }
                    room = room.saturating_sub((end - run.start).max(8));
                    run.start = end;
                }
                if let Some(ranges) = &mut ranges {
                    let sums = |chunks: usize| (chunks * WORKGROUP_SIZE as usize) as u32;
                    let [start, count] = &mut ranges[tensor];
                    if *count == 0 {
                        *start = self.partials + sums(chunks_before - first);
                    }
                    *count += sums(chunks.len() - chunks_before);
                }
            }
            let part = Part {
                target: Target::Piece(index),
                first: first as u32,
                count: (chunks.len() - first) as u32,
                partial: self.partials,
                adds: false,
                group: piece.group,
                tensor_mask: 0,
            };
            // Small tensors share their partial sums.
            let is_alone = piece.parts.len() == 1 && !by_tensor;
            let share = is_alone
                .then(|| shares.find(piece.group, piece.numel, part.count, self.partials))
                .flatten();
            self.add(part, share);
        }
        let of_chunks = chunks.len() as u32;
        let chunks = chunks
            .into_iter()
            .map(|runs| runs.map(|run| of_chunks + run));
        let chunks: Vec<_> = chunks.chain(all_runs).collect();
        self.chunks.bytes.clear();
        self.chunks
            .bytes
            .extend_from_slice(bytemuck::cast_slice(&chunks));
        self.ranges = ranges;
        for (index, batch) in plan.batches.iter().enumerate().filter(|_| !by_tensor) {
            let pieces = || batch.pieces.iter().map(|piece| &plan.pieces[*piece]);
            let bits = pieces().enumerate().filter(|(_, piece)| is_whole(piece));
            let mask = bits.fold(0, |mask, (bit, _)| mask | 1 << bit);
            if mask != 0 {
                let count = batch_chunks(plan, batch, self.chunk_elems) as u32;
                let group = plan.pieces[batch.pieces[0]].group;
                let part = Part {
                    target: Target::Batch(index),
                    first: 0,
                    count,
                    partial: self.partials,
                    adds: false,
                    group,
                    tensor_mask: batch.tensor_mask(mask),
                };
                self.add(part, None);
            }
        }
    }

    /// Adds a part whose partial sums are new, or those that it shares.
    fn add(&mut self, part: Part, share: Option<u32>) {
        match share {
            _ if part.count == 0 => {}
            Some(partial) => self.parts.push(Part {
                partial,
                adds: true,
                ..part
            }),
            None => {
                self.partials += part.count * WORKGROUP_SIZE as u32;
                self.parts.push(part);
            }
        }
    }

    /// Records what the dispatches need before their pass begins. Partial sums start at `partial`, and a parameter group is
    /// part of the norm that `norm_of` says by its index. The device is known to have done the step `reported`: until that is one which
    /// the chunks went with they go with every step.
    pub(crate) fn prepare(
        &mut self,
        device: &wgpu::Device,
        encoder: &mut wgpu::CommandEncoder,
        partial: u32,
        norm_of: &[u32],
        reported: u64,
    ) -> Result<(), StepError> {
        if self.sent_with.is_none_or(|step| reported < step) {
            self.chunks.record(device, encoder)?;
        }
        let (parts, max_workgroups) = (&self.parts, self.max_workgroups);
        let scalars_of = |part: usize| scalars(&parts[part], max_workgroups, partial, norm_of);
        pass::prepare(&mut self.ring, device, encoder, parts.len(), scalars_of)
    }

    /// Records the dispatches.
    pub(crate) fn record(&self, pass: &mut wgpu::ComputePass<'_>, partial: u32, norm_of: &[u32]) {
        let calls = self.parts.iter().map(|part| {
            let (pipeline, tensors) = match part.target {
                Target::Piece(piece) => &self.pieces[&piece],
                Target::Batch(batch) => &self.batches[batch],
            };
            Call {
                pipeline,
                tensors,
                decision: None,
                workgroups: grid(part.count, self.max_workgroups),
            }
        });
        let scalars_of =
            |part: usize| scalars(&self.parts[part], self.max_workgroups, partial, norm_of);
        pass::record(pass, self.ring.as_ref(), calls.enumerate(), scalars_of);
    }

    /// The step of this number has been recorded behind what [`prepare`](Self::prepare) did.
    pub(crate) fn set_recorded(&mut self, step: u64) {
        self.sent_with.get_or_insert(step);
    }

    /// The number of dispatches.
    pub(crate) fn dispatches(&self) -> usize {
        self.parts.len()
    }
}

/// The last partial sums of each parameter group that small tensors share: without, the sums of many tensors would not fit
/// into a binding.
#[derive(Default)]
struct Shares(HashMap<usize, Share>);

struct Share {
    partial: u32,
    /// Elements that one invocation adds up there.
    lane_elems: u64,
}

impl Shares {
    /// The partial sums that a tensor of one chunk may share. If there are none, those from `next` on may be shared by the
    /// tensors after it.
    fn find(&mut self, group: usize, numel: u32, chunks: u32, next: u32) -> Option<u32> {
        if chunks != 1 {
            return None;
        }
        // A share of a run, and an element of its ends.
        let lane_elems = u64::from(numel)
            .div_ceil(WORKGROUP_SIZE)
            .next_multiple_of(8)
            + 8;
        if let Some(share) = self.0.get_mut(&group)
            && share.lane_elems + lane_elems <= MAX_LANE_ELEMS
        {
            share.lane_elems += lane_elems;
            return Some(share.partial);
        }
        let share = Share {
            partial: next,
            lane_elems,
        };
        self.0.insert(group, share);
        None
    }
}

/// Elements of a chunk, which one workgroup adds up.
fn chunk_elems(kernels: &Kernels, plan: &Plan) -> u64 {
    let numel = plan.pieces.iter().map(|piece| u64::from(piece.numel)).sum();
    let device_type = kernels.device().adapter_info().device_type;
    (WORKGROUP_SIZE * lane_elems(numel, device_type)).next_multiple_of(8 * WORKGROUP_SIZE)
}

/// The most chunks of pieces, of which the last of each may be short, and each comes short of its room by a load at most.
fn max_chunks(plan: &Plan, chunk_elems: u64) -> u64 {
    let pieces = plan.pieces.iter();
    pieces.map(|piece| max_chunks_of(piece, chunk_elems)).sum()
}

fn max_chunks_of(piece: &Piece, chunk_elems: u64) -> u64 {
    // A run takes room for a load at least, and is cut at one.
    let room = u64::from(piece.numel) + 8 * piece.parts.len() as u64;
    room.div_ceil(chunk_elems - 8) + 1
}

/// The most chunks where no two tensors share one.
fn max_chunks_by_tensor(plan: &Plan, chunk_elems: u64) -> u64 {
    let parts = plan.parts.iter();
    let chunks = parts.map(|part| (u64::from(part.numel()) + 8).div_ceil(chunk_elems - 8) + 1);
    chunks.sum()
}

/// Workgroups over a batch.
fn batch_chunks(plan: &Plan, batch: &Batch, chunk_elems: u64) -> u64 {
    let pieces = batch.pieces.iter().map(|piece| &plan.pieces[*piece]);
    let numel: u64 = pieces.map(|piece| u64::from(piece.numel)).sum();
    numel.div_ceil(chunk_elems)
}

/// Elements of a piece that take part, as far as they follow each other, from the start of its gradients' binding on, with
/// the first tensor of each run; no two tensors share one where it is `by_tensor`.
fn runs(
    plan: &Plan,
    piece: &Piece,
    takes_part: impl Fn(usize) -> bool,
    by_tensor: bool,
) -> Vec<(usize, Range<u64>)> {
    let mut runs: Vec<(usize, Range<u64>)> = Vec::new();
    let parts = plan.parts[piece.parts.clone()].iter();
    for part in parts.filter(|part| takes_part(part.tensor)) {
        let start = u64::from(piece.grads.first_elem) + u64::from(part.start);
        let end = start + u64::from(part.numel());
        match runs.last_mut() {
            Some((_, last)) if last.end == start && !by_tensor => last.end = end,
            _ => runs.push((part.tensor, start..end)),
        }
    }
    runs
}

/// Workgroups in x and y.
fn grid(count: u32, max_per_dimension: u32) -> [u32; 2] {
    let rows = count.div_ceil(max_per_dimension).max(1);
    [count.div_ceil(rows), rows]
}

/// `wo_k` of a dispatch.
fn scalars(part: &Part, max_workgroups: u32, partial: u32, norm_of: &[u32]) -> Scalars {
    let [row, _] = grid(part.count, max_workgroups);
    Scalars([
        part.first,
        part.count,
        partial + part.partial,
        row,
        norm_of[part.group],
        part.tensor_mask,
        part.adds.into(),
    ])
}

fn bind(
    device: &wgpu::Device,
    layout: &wgpu::BindGroupLayout,
    windows: impl Iterator<Item = BufferWindow>,
) -> Result<wgpu::BindGroup, wgpu::Error> {
    let binding = (layout.clone(), windows.collect());
    checked(device, || create_bind_group(device, &binding))
}
