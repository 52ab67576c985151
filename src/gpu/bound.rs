//! A plan on a device: its pipelines, the buffers that they are bound to, and those of its state.

use std::collections::HashMap;
use std::ops::Range;

use super::binding::TensorBinding;
use super::error::BuildError;
use super::error_scope::checked;
use super::kernels::Kernels;
use super::readback::MAPS_AT_CREATION;
use super::rules::GroupRules;
use super::scalars::UniformRing;
use crate::plan::{Access, Batch, Dispatch, Piece, Place, Plan, Target, TensorLayout, Window};
use crate::state::{Section, Tensor, Tensors};
use crate::storage::{Precision, SectionValues, Storage, StorageType};
use crate::wgsl::{KernelError, KernelVariant};

/// The pipelines of a plan, of one variant of its kernels.
pub(super) struct Pipelines {
    /// The pipelines of each kind of piece, in the order of [`Access::ALL`].
    by_kind: Vec<[Pipeline; 3]>,
    /// The pipelines of the plan's batches.
    by_batch: Vec<Pipeline>,
    /// The pipelines of each kind of piece, in the order of [`Access::CHUNKS`], if steps may be in chunks.
    by_chunks: Vec<[Pipeline; 2]>,
}

/// A pipeline with the layout of what it binds.
pub(super) type Pipeline = (wgpu::ComputePipeline, wgpu::BindGroupLayout);

/// The pipelines of a plan, and the buffers that they are bound to.
pub(super) struct Bound {
    pub(super) pipelines: Pipelines,
    /// The kind of each piece, an index into the pipelines.
    kinds: Vec<usize>,
    /// Bindings of each piece that may have a dispatch of its own: a tensor that is alone in a piece of a batch has none.
    pieces: HashMap<usize, wgpu::BindGroup>,
    /// Bindings of each batch of the plan.
    batches: Vec<wgpu::BindGroup>,
    /// The gradients of each piece that has a place.
    pub(super) grads: Vec<Option<BufferWindow>>,
    /// All bind groups, in the order of what they bind.
    pub(super) made: Vec<(Binding, wgpu::BindGroup)>,
}

/// The buffers of a bind group, and its layout.
pub(super) type Binding = (wgpu::BindGroupLayout, Vec<BufferWindow>);

/// A buffer from a byte offset on, so many bytes.
pub(super) type BufferWindow = (wgpu::Buffer, u64, u64);

impl Bound {
    /// Builds what is not in `made` already.
    pub(super) fn new(
        kernels: &Kernels,
        rules: &dyn GroupRules,
        buffers: &Buffers<'_>,
        plan: &Plan,
        state: &[Option<wgpu::Buffer>],
        made: &[(Binding, wgpu::BindGroup)],
    ) -> Result<Self, BuildError> {
        let device = kernels.device();
        let (_, kinds) = kinds(rules, &plan.pieces);
        let mut bound = Self {
            pipelines: Pipelines::new(kernels, rules, plan, |variant| variant)?,
            kinds,
            pieces: HashMap::new(),
            batches: Vec::with_capacity(plan.batches.len()),
            grads: plan
                .pieces
                .iter()
                .map(|piece| buffers.grads(piece))
                .collect(),
            made: Vec::with_capacity(plan.pieces.len()),
        };
        checked(device, || {
            let mut bind = |layout: &wgpu::BindGroupLayout, pieces: &[usize]| {
                let binding = (layout.clone(), buffers.windows(plan, state, pieces));
                let bind_group = match made.binary_search_by(|(made, _)| made.cmp(&binding)) {
                    Ok(index) => made[index].1.clone(),
                    Err(_) => create_bind_group(device, &binding),
                };
                bound.made.push((binding, bind_group.clone()));
                bind_group
            };
            for (index, piece) in plan.pieces.iter().enumerate() {
                if !piece.is_absent && (!piece.batched || piece.parts.len() > 1) {
                    let [(_, layout), ..] = &bound.pipelines.by_kind[bound.kinds[index]];
                    bound.pieces.insert(index, bind(layout, &[index]));
                }
            }
            for ((_, layout), batch) in bound.pipelines.by_batch.iter().zip(&plan.batches) {
                bound.batches.push(bind(layout, &batch.pieces));
            }
        })?;
        bound.made.sort_unstable();
        Ok(bound)
    }

    /// The bindings of a piece with dispatches of its own.
    pub(super) fn tensors_of(&self, piece: usize) -> &wgpu::BindGroup {
        &self.pieces[&piece]
    }

    /// The kind of a piece: pieces of one kind share pipelines.
    pub(super) fn kind_of(&self, piece: usize) -> usize {
        self.kinds[piece]
    }

    /// The pipeline of a dispatch, among those of a variant of the plan's kernels, and what it binds.
    pub(super) fn of_dispatch<'b>(
        &'b self,
        pipelines: &'b Pipelines,
        dispatch: &Dispatch,
    ) -> (&'b wgpu::ComputePipeline, &'b wgpu::BindGroup) {
        match dispatch.target {
            Target::Piece(piece) => {
                let kind = self.kinds[piece];
                let (pipeline, _) = match dispatch.access {
                    Access::Vec4Chunks => &pipelines.by_chunks[kind][0],
                    Access::ScalarChunks => &pipelines.by_chunks[kind][1],
                    access => &pipelines.by_kind[kind][access as usize],
                };
                (pipeline, &self.pieces[&piece])
            }
            Target::Batch { batch, .. } => (&pipelines.by_batch[batch].0, &self.batches[batch]),
        }
    }
}

impl Pipelines {
    /// Compiles what is not compiled yet: the variant of every kernel of a plan that `of` makes.
    pub(super) fn new(
        kernels: &Kernels,
        rules: &dyn GroupRules,
        plan: &Plan,
        of: impl Fn(KernelVariant) -> KernelVariant,
    ) -> Result<Self, BuildError> {
        let (kinds, _) = kinds(rules, &plan.pieces);
        let of_kind = |kind: &Kind| {
            // By every access: which ones a step needs depends on what is frozen, and a step compiles nothing.
            let of_access = |access| kernels.pipeline(of(kind.variant(rules, access)));
            let [vec4, vec4_offset, scalar] = Access::ALL.map(of_access);
            Ok([vec4?, vec4_offset?, scalar?])
        };
        let of_batch = |batch: &Batch| {
            let first = &plan.pieces[batch.pieces[0]];
            let variant = rules.variant(first.group, batch.access, batch.pieces.len());
            let variant = variant.stored(first.storage);
            kernels.pipeline(of(variant.in_one_buffer(first.in_one_buffer())))
        };
        let by_kind: Result<_, KernelError> = kinds.iter().map(of_kind).collect();
        let by_batch: Result<_, KernelError> = plan.batches.iter().map(of_batch).collect();
        Ok(Self {
            by_kind: by_kind?,
            by_batch: by_batch?,
            by_chunks: Vec::new(),
        })
    }

    /// Compiles the variants of a plan's kernels that are in chunks.
    pub(super) fn add_chunks(
        &mut self,
        kernels: &Kernels,
        rules: &dyn GroupRules,
        plan: &Plan,
        of: impl Fn(KernelVariant) -> KernelVariant,
    ) -> Result<(), KernelError> {
        let (kinds, _) = kinds(rules, &plan.pieces);
        let of_kind = |kind: &Kind| {
            let of_access = |access| kernels.pipeline(of(kind.variant(rules, access)));
            let [vec4, scalar] = Access::CHUNKS.map(of_access);
            Ok([vec4?, scalar?])
        };
        self.by_chunks = kinds.iter().map(of_kind).collect::<Result<_, _>>()?;
        Ok(())
    }

    /// Compiles the variants of a plan's kernels that take sums, by kind of piece and in the order of [`Access::CHUNKS`].
    pub(super) fn measuring(
        kernels: &Kernels,
        rules: &dyn GroupRules,
        plan: &Plan,
        of: impl Fn(KernelVariant) -> KernelVariant,
    ) -> Result<Vec<Option<[Pipeline; 2]>>, KernelError> {
        let (kinds, _) = kinds(rules, &plan.pieces);
        let of_kind = |kind: &Kind| {
            if !rules.has_sums(kind.group) {
                return Ok(None);
            }
            let of_access = |access| kernels.pipeline(of(kind.variant(rules, access)));
            let [vec4, scalar] = Access::CHUNKS.map(of_access);
            Ok(Some([vec4?, scalar?]))
        };
        kinds.iter().map(of_kind).collect()
    }
}

/// The properties that pieces have in common that share pipelines.
#[derive(Clone, Copy, PartialEq)]
struct Kind {
    group: usize,
    in_one_buffer: bool,
    in_vec4_pairs: bool,
    storage: Storage,
}

impl Kind {
    /// The kernel that reaches the elements of such a piece by `access`.
    fn variant(&self, rules: &dyn GroupRules, access: Access) -> KernelVariant {
        let variant = rules.variant(self.group, access, 1).stored(self.storage);
        let variant = variant.in_one_buffer(self.in_one_buffer);
        variant.in_vec4_pairs(self.in_vec4_pairs)
    }
}

/// The kinds of pieces, and of each piece which it is. A group without pieces has one too, so that what is wrong with its
/// rule is found.
fn kinds(rules: &dyn GroupRules, pieces: &[Piece]) -> (Vec<Kind>, Vec<usize>) {
    let mut kinds: Vec<Kind> = Vec::new();
    let mut index_of = |kind: Kind| {
        let index = kinds.iter().position(|other| *other == kind);
        index.unwrap_or_else(|| {
            kinds.push(kind);
            kinds.len() - 1
        })
    };
    let kind_of = |piece: &Piece| Kind {
        group: piece.group,
        in_one_buffer: !piece.is_absent && piece.in_one_buffer(),
        in_vec4_pairs: piece.in_vec4_pairs,
        storage: piece.storage,
    };
    let of_pieces = pieces.iter().map(|piece| index_of(kind_of(piece)));
    let of_pieces = of_pieces.collect();
    for group in 0..rules.groups() {
        if pieces.iter().all(|piece| piece.group != group) {
            let (of, slots) = (StorageType::F32, rules.slots(group));
            index_of(Kind {
                group,
                in_one_buffer: false,
                in_vec4_pairs: false,
                storage: Storage::new(of, of, slots.kept_names(), &Precision::default()),
            });
        }
    }
    (kinds, of_pieces)
}

/// Marks the tensors that have no place.
pub(super) fn absent(layouts: &[TensorLayout]) -> Vec<bool> {
    layouts.iter().map(|layout| layout.is_absent).collect()
}

/// On the uniform path, a ring with room for the dispatches of any step.
pub(super) fn new_ring(kernels: &Kernels, plan: &Plan) -> Result<Option<UniformRing>, BuildError> {
    let device = kernels.device();
    let new = |layout| UniformRing::new(device, layout, plan.max_dispatches());
    Ok(checked(device, || kernels.scalars_layout().map(new))?)
}

/// A buffer for each of some pieces whose rule keeps slots, with what they start as.
pub(super) fn allocate_state(
    kernels: &Kernels,
    plan: &Plan,
    rules: &dyn GroupRules,
    pieces: &[usize],
) -> Result<Vec<Option<wgpu::Buffer>>, BuildError> {
    let (device, queue) = (kernels.device(), kernels.queue());
    let pieces = || pieces.iter().map(|index| &plan.pieces[*index]);
    let buffers: Vec<Option<wgpu::Buffer>> = checked(device, || {
        let allocate = |piece: &Piece| {
            let sections = piece.state?;
            let slots = rules.slots(piece.group);
            let mut all = Section::all(&slots, &piece.storage);
            Some(device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("wgpu_optim.state"),
                size: sections.size_bytes(),
                usage: wgpu::BufferUsages::STORAGE
                    | wgpu::BufferUsages::COPY_SRC
                    | wgpu::BufferUsages::COPY_DST,
                // A new buffer is zero.
                mapped_at_creation: MAPS_AT_CREATION
                    && !all.all(|section| section.starts_at_zero()),
            }))
        };
        pieces().map(allocate).collect()
    })
    .map_err(|error| match error {
        wgpu::Error::OutOfMemory { .. } => BuildError::OutOfMemory {
            bytes: pieces()
                .filter_map(|piece| Some(piece.state?.size_bytes()))
                .sum(),
        },
        error => error.into(),
    })?;
    for (piece, buffer) in pieces().zip(&buffers) {
        let slots = rules.slots(piece.group);
        let (Some(sections), Some(buffer)) = (piece.state, buffer) else {
            continue;
        };
        let all = || Section::all(&slots, &piece.storage);
        if all().all(|section| section.starts_at_zero()) {
            continue;
        }
        // Whole sections: a single value of 16 bits may start within a word.
        let sections = all().enumerate().map(|(index, section)| {
            let Range { start, end } = sections.range_bytes(index);
            let numel = (end - start) / section.codec.elem_bytes();
            let value = section.start.value();
            let values = SectionValues::filled(section.codec, value, numel as usize);
            // The last may end within a word.
            let mut bytes = values.into_bytes();
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            (start, bytes)
        });
        if !MAPS_AT_CREATION {
            for (start, bytes) in sections {
                queue.write_buffer(buffer, start, &bytes);
            }
            continue;
        }
        let mapped = buffer.get_mapped_range_mut(..);
        let mut mapped = mapped.map_err(|error| BuildError::Device {
            message: error.to_string(),
        })?;
        for (start, bytes) in sections {
            let start = start as usize;
            mapped
                .slice(start..start + bytes.len())
                .copy_from_slice(&bytes);
        }
        drop(mapped);
        buffer.unmap();
    }
    Ok(buffers)
}

/// The callers' buffers, each once, numbered for the planner.
pub(super) struct Buffers<'a>(Vec<&'a wgpu::Buffer>);

impl<'a> Buffers<'a> {
    pub(super) fn of(tensors: &[TensorBinding<'a>]) -> Self {
        let mut buffers: Vec<_> = tensors.iter().flat_map(|t| [t.params, t.grads]).collect();
        buffers.sort_unstable();
        buffers.dedup();
        Self(buffers)
    }

    /// The layout of each of the optimizer's tensors: a tensor that is not among these has no place.
    pub(super) fn layouts_of(
        &self,
        tensors: &[TensorBinding<'_>],
        host: &Tensors,
        rules: &dyn GroupRules,
    ) -> Vec<TensorLayout> {
        let absent = |host: &Tensor| TensorLayout {
            numel: host.numel,
            group: host.group,
            storage: host.storage,
            is_absent: true,
            has_sums: rules.has_sums(host.group),
            ..TensorLayout::default()
        };
        let mut layouts: Vec<_> = host.as_slice().iter().map(absent).collect();
        for tensor in tensors {
            if let Some(index) = host.index_of(tensor.name) {
                let absent = layouts[index];
                layouts[index] = self.layout_of(tensor, absent);
            }
        }
        layouts
    }

    /// The layout of a tensor that has had no place.
    fn layout_of(&self, tensor: &TensorBinding<'_>, absent: TensorLayout) -> TensorLayout {
        let place = |buffer: &wgpu::Buffer, offset_bytes| Place {
            buffer: self.0.partition_point(|other| *other < buffer),
            offset_bytes,
        };
        TensorLayout {
            params: place(tensor.params, tensor.params_offset_bytes),
            grads: place(tensor.grads, tensor.grads_offset_bytes),
            padding_elems: tensor.padding_elems,
            is_absent: false,
            ..absent
        }
    }

    fn window(&self, buffer: usize, window: Window) -> BufferWindow {
        let buffer = self.0[buffer].clone();
        (buffer, window.offset_bytes, window.size_bytes)
    }

    /// The gradients of a piece, if it has a place.
    fn grads(&self, piece: &Piece) -> Option<BufferWindow> {
        (!piece.is_absent).then(|| self.window(piece.grads_buffer, piece.grads))
    }

    /// The windows that pieces bind together: all their parameters, then all their gradients, then all their states.
    fn windows(
        &self,
        plan: &Plan,
        state: &[Option<wgpu::Buffer>],
        pieces: &[usize],
    ) -> Vec<BufferWindow> {
        let window = |buffer, window| self.window(buffer, window);
        let pieces = || pieces.iter().map(|index| (*index, &plan.pieces[*index]));
        let params = pieces().map(|(_, piece)| window(piece.params_buffer, piece.params));
        let grads = pieces().map(|(_, piece)| window(piece.grads_buffer, piece.grads));
        let state = pieces().filter_map(|(index, piece)| {
            let buffer = state[index].clone()?;
            Some((buffer, 0, piece.state?.size_bytes()))
        });
        params.chain(grads).chain(state).collect()
    }
}

pub(super) fn create_bind_group(
    device: &wgpu::Device,
    (layout, windows): &Binding,
) -> wgpu::BindGroup {
    let entries: Vec<_> = (0..)
        .zip(windows)
        .map(|(binding, (buffer, offset, size))| wgpu::BindGroupEntry {
            binding,
            resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer,
                offset: *offset,
                size: wgpu::BufferSize::new(*size),
            }),
        })
        .collect();
    device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: Some("wgpu_optim.tensors"),
        layout,
        entries: &entries,
    })
}
