//! The plan of a step: tensors and device limits become pieces of memory, batches and dispatches.
//!
//! It is arithmetic on numbers alone and needs no device. For tools, and for hosts other than wgpu: these types change with
//! every version.

mod chunks;
mod cut;
mod error;

use std::ops::Range;

use chunks::Span;
pub use chunks::{Chunk, Chunked};
use cut::{Room, check_layout};
pub use error::PlanError;

use crate::storage::{Codec, Codecs, Storage};

/// Invocations per workgroup of the entry points over a piece; `wo_WORKGROUP_SIZE` in `shaders/frame/step.wgsl`.
pub const WORKGROUP_SIZE: u32 = 256;

/// Invocations per workgroup of the entry points over a batch: fewer, so that small tensors occupy several cores.
pub const BATCH_WORKGROUP_SIZE: u32 = 128;

/// Bytes of one `f32`.
pub const ELEM_BYTES: u64 = 4;

/// Bytes of one load or store of a vec4 entry point.
const VEC4_BYTES: u64 = 16;

/// The largest unit of an entry point.
const MAX_UNIT_ELEMS: u32 = 8;

/// Most pieces in a batch: with ten, a dispatch costs each no more than its elements do.
pub(crate) const MAX_BATCH_PIECES: u32 = 10;

/// The device limits that shape a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLimits {
    /// Largest storage binding, in bytes.
    pub max_binding_bytes: u64,
    /// Largest buffer, in bytes.
    pub max_buffer_bytes: u64,
    /// The alignment of a storage binding's byte offset; a power of two.
    pub offset_alignment_bytes: u64,
    /// Most storage buffers bound at once.
    pub max_storage_buffers: u32,
    /// Most workgroups in one dimension of a dispatch.
    pub max_workgroups_per_dimension: u32,
    /// Most elements in one dispatch, so that a slow adapter's watchdog does not take a long one for a hang; eight
    /// at least.
    pub max_dispatch_elems: u64,
    /// Whether the device is the host's processor, on which an invocation has costs of its own.
    pub is_software: bool,
}

/// A position in one of several buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The buffer, by any numbering of the caller's.
    pub buffer: usize,
    /// Byte offset in it, a multiple of 4.
    pub offset_bytes: u64,
}

/// The place of one tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TensorLayout {
    /// Number of elements; zero is allowed and plans nothing.
    pub numel: u64,
    /// The first parameter.
    pub params: Place,
    /// The first gradient.
    pub grads: Place,
    /// Elements after the tensor that belong to nobody, in the parameter buffer and in the gradient buffer: a
    /// dispatch may run over them.
    pub padding_elems: u64,
    /// The parameter group that the tensor is in, by any numbering of the caller's. Groups share no dispatch, so they share
    /// no piece.
    pub group: usize,
    /// The types in which its values are stored, and the sections of its state, as in its whole group; without any it gets
    /// no state.
    pub storage: Storage,
    /// It lies nowhere yet, whatever `params` and `grads` say: it has a piece for its state, and no dispatch reaches it.
    pub is_absent: bool,
    /// Whether its group's rule takes sums over tensors, so that its workgroups have to know their tensor.
    pub has_sums: bool,
}

impl TensorLayout {
    /// Whether `next` starts where this one and its padding end, in both buffers, is in the same group and stored alike.
    fn is_followed_by(&self, next: &Self) -> bool {
        let extent_elems = self.numel + self.padding_elems;
        let follows = |place: Place, next: Place, elem_bytes: u64| {
            let end = place.offset_bytes + extent_elems * elem_bytes;
            next.buffer == place.buffer && next.offset_bytes == end
        };
        let kind = |layout: &Self| (layout.group, layout.storage, layout.has_sums);
        let present = !self.is_absent && !next.is_absent;
        present
            && kind(self) == kind(next)
            && follows(self.params, next.params, self.storage.params.bytes())
            && follows(self.grads, next.grads, self.storage.grads.bytes())
    }
}

/// A binding: a range of a buffer whose start is aligned as the device wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Byte offset in the buffer, a multiple of the offset alignment.
    pub offset_bytes: u64,
    /// Bytes from there to the end of the piece, whole words.
    pub size_bytes: u64,
    /// Elements between the start of the window and the first element of the piece.
    pub first_elem: u32,
}

impl Window {
    /// The window over `numel` elements from byte `start_bytes`.
    fn over(start_bytes: u64, numel: u64, elem_bytes: u64, alignment_bytes: u64) -> Self {
        let slack_bytes = start_bytes % alignment_bytes;
        Self {
            offset_bytes: start_bytes - slack_bytes,
            size_bytes: words(slack_bytes + numel * elem_bytes),
            first_elem: (slack_bytes / elem_bytes) as u32,
        }
    }

    /// Whether the two share a byte, in one buffer.
    fn overlaps(&self, other: &Self) -> bool {
        let end = |window: &Self| window.offset_bytes + window.size_bytes;
        self.offset_bytes < end(other) && other.offset_bytes < end(self)
    }
}

/// Bytes, rounded up to what may be bound.
const fn words(bytes: u64) -> u64 {
    bytes.next_multiple_of(4)
}

/// The state of a piece: sections of one buffer, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sections {
    /// Elements between the start of each and the first element of the piece: as many as in the parameters' window.
    pub first_elem: u32,
    /// Number of elements of the piece.
    pub numel: u32,
    /// Elements from the start of one to the start of the next, a multiple of the kernel's unit.
    pub section_elems: u32,
    /// The codec of each, those of the rule's slots first.
    pub codecs: Codecs,
}

impl Sections {
    /// The state of a piece, if it has any.
    fn new(first_elem: u32, numel: u32, storage: &Storage) -> Option<Self> {
        (!storage.state.is_empty()).then(|| Self {
            first_elem,
            numel,
            section_elems: (first_elem + numel).next_multiple_of(storage.unit_elems()),
            codecs: storage.state,
        })
    }

    /// Bytes of all sections: the last one ends with the piece.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        let end = |section: usize| {
            let elem_bytes = self.codecs[section].elem_bytes();
            words(self.start_bytes(section) + u64::from(self.numel) * elem_bytes)
        };
        self.codecs.len().checked_sub(1).map_or(0, end)
    }

    /// Byte offset of the piece's first element in a section.
    #[must_use]
    pub fn start_bytes(&self, section: usize) -> u64 {
        let elem_bytes = self.codecs[section].elem_bytes();
        self.range_bytes(section).start + u64::from(self.first_elem) * elem_bytes
    }

    /// The bytes of a section, from the start of the binding on; the last one ends with the piece.
    pub(crate) fn range_bytes(&self, section: usize) -> Range<u64> {
        let bytes = |codec: &Codec| u64::from(self.section_elems) * codec.elem_bytes();
        let start = self.codecs[..section].iter().map(bytes).sum();
        let end = start + bytes(&self.codecs[section]);
        match section + 1 == self.codecs.len() {
            true => {
                start
                    ..start
                        + u64::from(self.first_elem + self.numel)
                            * self.codecs[section].elem_bytes()
            }
            false => start..end,
        }
    }
}

/// A run of elements that one set of bindings reaches: a tensor, part of one, or neighbours of one group that follow
/// each other in both buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Number of elements, padding between tensors included.
    pub numel: u32,
    /// The parameter group of its tensors.
    pub group: usize,
    /// The types in which its tensors are stored.
    pub storage: Storage,
    /// Buffer of the parameters.
    pub params_buffer: usize,
    /// The window of the piece in the parameter buffer.
    pub params: Window,
    /// Buffer of the gradients.
    pub grads_buffer: usize,
    /// The window of the piece in the gradient buffer.
    pub grads: Window,
    /// The sections of its state, in a buffer that is the piece's own: one that pieces shared would have to be synchronized
    /// between their dispatches. None where the rule keeps none.
    pub state: Option<Sections>,
    /// The tensors in it, an index range of [`Plan::parts`].
    pub parts: Range<usize>,
    /// Whether it is in one of [`Plan::batches`].
    pub batched: bool,
    /// Whether its tensor lies nowhere yet, so that there is nothing to bind.
    pub is_absent: bool,
    /// Whether its rule takes sums over tensors: all of its dispatches are in chunks.
    pub has_sums: bool,
    /// Whether an invocation of its vec4 entry points updates two vec4 that follow each other: on software adapters,
    /// where both share the costs of an invocation, in `f32`.
    pub in_vec4_pairs: bool,
}

impl Piece {
    /// Storage buffers that it binds.
    fn bindings(&self) -> u32 {
        if self.state.is_some() { 3 } else { 2 }
    }

    /// Elements that one invocation of an entry point updates; the unit of a dispatch's positions and counts.
    #[must_use]
    pub fn unit_elems(&self, access: Access) -> u32 {
        access.unit_elems(&self.storage)
    }

    /// The access of a batch to its elements, if it can be in one: a batch leaves no ends to a second dispatch, and has one
    /// key to random bits.
    fn batch_access(&self) -> Option<Access> {
        let fills_units = self.numel.is_multiple_of(self.storage.unit_elems());
        let access = if fills_units {
            Access::Vec4
        } else {
            Access::Scalar
        };
        (!self.storage.is_stochastic).then_some(access)
    }

    /// Invocations over all of it in a batch; the last may have one element where the others have two.
    fn batch_units(&self, access: Access) -> u32 {
        self.numel.div_ceil(self.unit_elems(access))
    }

    /// Whether parameters and gradients lie in one buffer, which a dispatch then binds for writing throughout: WebGPU
    /// refuses one that is bound for writing here and for reading there.
    #[must_use]
    pub const fn in_one_buffer(&self) -> bool {
        self.params_buffer == self.grads_buffer
    }

    /// Whether WebGPU lets one dispatch bind both, of which each is in one buffer or none is: what is written is bound
    /// once, and not read through another binding.
    fn may_be_bound_with(&self, other: &Self) -> bool {
        if self.in_one_buffer() {
            return self.grads_buffer != other.grads_buffer || !self.grads.overlaps(&other.grads);
        }
        self.params_buffer != other.grads_buffer && self.grads_buffer != other.params_buffer
    }
}

/// Small pieces of one group in different places, each with bindings of its own, that share a dispatch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Two pieces or more, indices into [`Plan::pieces`].
    pub pieces: Vec<usize>,
    /// The access to the elements, [`Access::Vec4`] or [`Access::Scalar`].
    pub access: Access,
    /// Bit i says whether piece i has an odd number of elements, so that the last of two that share a word is not its own.
    pub odd: u32,
}

impl Batch {
    /// The bits that kernels read: which pieces take part, and from bit 16 on which are of an odd number of elements.
    pub(crate) const fn tensor_mask(&self, mask: u32) -> u32 {
        mask | self.odd << 16
    }
}

/// The elements of one tensor in one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Index of the tensor in the order in which the tensors were given.
    pub tensor: usize,
    /// The elements of that tensor.
    pub elems: Range<u64>,
    /// The piece; an index into [`Plan::pieces`].
    pub piece: usize,
    /// The first element's position in the piece.
    pub start: u32,
    /// Elements after the last one that belong to nobody and lie in the piece.
    pub padding: u32,
}

impl Part {
    /// Number of elements.
    #[must_use]
    pub fn numel(&self) -> u32 {
        (self.elems.end - self.elems.start) as u32
    }
}

/// The access of a dispatch to its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// Four elements per unit, through 16-byte loads and stores; eight where something is stored in 16 bits.
    Vec4,
    /// As [`Vec4`](Self::Vec4), but further on than the windows start.
    Vec4Offset,
    /// The elements at either end of a vec4 run, and pieces whose parameters and gradients do not line up with each other
    /// modulo its unit: one element per invocation, or the two that may share a word where something is stored in 16
    /// bits.
    Scalar,
    /// Units as by [`Vec4Offset`](Self::Vec4Offset), in chunks: each workgroup looks up which elements are its.
    Vec4Chunks,
    /// Units as by [`Scalar`](Self::Scalar), in chunks.
    ScalarChunks,
}

impl Access {
    /// Every access to one run of elements, in the order in which a step dispatches them.
    pub const ALL: [Self; 3] = [Self::Vec4, Self::Vec4Offset, Self::Scalar];

    /// Both accesses in chunks.
    pub const CHUNKS: [Self; 2] = [Self::Vec4Chunks, Self::ScalarChunks];

    /// The access in chunks to the same items.
    #[must_use]
    pub const fn in_chunks(self) -> Self {
        match self {
            Self::Vec4 | Self::Vec4Offset | Self::Vec4Chunks => Self::Vec4Chunks,
            Self::Scalar | Self::ScalarChunks => Self::ScalarChunks,
        }
    }

    /// Whether workgroups look up which elements are theirs.
    #[must_use]
    pub const fn is_chunked(self) -> bool {
        matches!(self, Self::Vec4Chunks | Self::ScalarChunks)
    }

    /// Whether elements are reached by the word.
    #[must_use]
    pub const fn is_scalar(self) -> bool {
        matches!(self, Self::Scalar | Self::ScalarChunks)
    }

    /// Elements per invocation over what is stored like this; the unit of a dispatch's positions and counts.
    #[must_use]
    pub fn unit_elems(self, storage: &Storage) -> u32 {
        match self {
            _ if !self.is_scalar() => storage.unit_elems(),
            _ if storage.is_f32() => 1,
            _ => 2,
        }
    }
}

/// The piece or batch that a dispatch binds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// An index into [`Plan::pieces`].
    Piece(usize),
    /// Whole pieces of a batch.
    Batch {
        /// Index into [`Plan::batches`].
        batch: usize,
        /// Bit i says whether piece i of the batch is updated.
        mask: u32,
    },
}

/// One dispatch over one piece or part of it, or over a batch. Positions and counts are in units of the access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dispatch {
    /// The piece or batch that it binds.
    pub target: Target,
    /// The access to the elements.
    pub access: Access,
    /// First unit in the parameter window and in the first section of the state; in chunks the first of these.
    pub first: u32,
    /// The distance to the first unit in the gradient window, modulo 2^32; [`Access::Scalar`] counts elements.
    pub grads_shift: u32,
    /// Number of units updated, or of chunks; in a batch, of the largest piece.
    pub count: u32,
    /// Units before the gap ([`Access::Scalar`] only).
    pub head: u32,
    /// Units left out after them ([`Access::Scalar`] only).
    pub gap: u32,
    /// Units from one section of the state to the next, elements with [`Access::Scalar`]; zero where there are none, and
    /// in a batch, whose tensors each have their own.
    pub section: u32,
    /// The elements that it may update, counted from the start of the parameter window. At either end a unit of two may
    /// hold one that it leaves as it is.
    pub elems: [u32; 2],
    /// Workgroups in x and y: an invocation for each unit, or for two where a piece is in pairs of vec4; a workgroup for each
    /// chunk.
    pub workgroups: [u32; 2],
}

impl Dispatch {
    /// Invocations in one row of the grid, or workgroups where these have chunks.
    #[must_use]
    pub fn row(&self) -> u32 {
        let workgroup_size = match self.target {
            _ if self.access.is_chunked() => 1,
            Target::Piece(_) => WORKGROUP_SIZE,
            Target::Batch { .. } => BATCH_WORKGROUP_SIZE,
        };
        self.workgroups[0] * workgroup_size
    }
}

/// Tensors in the order of memory, cut into pieces, the small ones among them in batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The runs of memory that are bound together.
    pub pieces: Vec<Piece>,
    /// Tensors in pieces, in the order of the pieces; each element of each tensor lies in exactly one.
    pub parts: Vec<Part>,
    /// Small pieces that are updated together; each piece is in one at most.
    pub batches: Vec<Batch>,
    /// The parts of each tensor, an index range of `parts`.
    tensor_parts: Vec<Range<usize>>,
    max_workgroups_per_dimension: u32,
    is_software: bool,
    /// No piece has more than `u32` elements.
    max_dispatch_elems: u32,
}

impl Plan {
    /// Cuts tensors into pieces.
    ///
    /// Tensors are taken in the order of their parameters in memory, whatever the order in which they were given.
    /// Neighbours of one group that follow each other in the parameter buffer and in the gradient buffer share a
    /// piece; a piece ends where a binding would exceed the device's limit or a dispatch its grid. Small pieces that
    /// start where a binding may start share batches.
    ///
    /// # Errors
    /// [`PlanError`] if an offset is not a multiple of 4 bytes, a tensor ends past the address range, or the
    /// limits are too small to make progress.
    pub fn new(tensors: &[TensorLayout], limits: &DeviceLimits) -> Result<Self, PlanError> {
        Self::of_runs(tensors, limits, TensorLayout::is_followed_by)
    }

    /// Cuts tensors into pieces of their own, whoever their neighbours are: for tensors that move, and may have
    /// others at the next step. Batches are as in [`new`](Self::new).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn apart(tensors: &[TensorLayout], limits: &DeviceLimits) -> Result<Self, PlanError> {
        Self::of_runs(tensors, limits, |_, _| false)
    }

    /// Cuts runs of tensors of which each one and the next may share a piece.
    fn of_runs(
        tensors: &[TensorLayout],
        limits: &DeviceLimits,
        may_share: impl Fn(&TensorLayout, &TensorLayout) -> bool,
    ) -> Result<Self, PlanError> {
        let sections = tensors
            .iter()
            .map(|tensor| tensor.storage.state.len())
            .max();
        let is_f32 = tensors.iter().all(|tensor| tensor.storage.is_f32());
        let shortest_bytes = if is_f32 { ELEM_BYTES } else { 2 };
        let room = Room::new(limits, sections.unwrap_or(0), shortest_bytes)?;
        for (tensor, layout) in tensors.iter().enumerate() {
            check_layout(tensor, layout)?;
        }
        let mut order: Vec<usize> = (0..tensors.len())
            .filter(|tensor| tensors[*tensor].numel > 0)
            .collect();
        // With the keys beside each other: tensors in random order lie far apart.
        order.sort_by_cached_key(|tensor| (tensors[*tensor].params, *tensor));

        let mut plan = Self {
            pieces: Vec::new(),
            parts: Vec::with_capacity(order.len()),
            batches: Vec::new(),
            tensor_parts: vec![0..0; tensors.len()],
            max_workgroups_per_dimension: limits.max_workgroups_per_dimension,
            is_software: limits.is_software,
            max_dispatch_elems: u32::try_from(limits.max_dispatch_elems)
                .unwrap_or(u32::MAX)
                .max(MAX_UNIT_ELEMS),
        };
        for run in order.chunk_by(|x, y| may_share(&tensors[*x], &tensors[*y])) {
            plan.add_run(tensors, run, &room)?;
        }
        plan.add_batches(limits.max_storage_buffers);
        Ok(plan)
    }

    /// The number of tensors that have been planned.
    #[must_use]
    pub const fn tensors(&self) -> usize {
        self.tensor_parts.len()
    }

    /// Whether a rule takes sums over tensors.
    #[must_use]
    pub fn has_sums(&self) -> bool {
        self.pieces.iter().any(|piece| piece.has_sums)
    }

    /// The parts of one tensor, in order.
    #[must_use]
    pub fn parts_of(&self, tensor: usize) -> &[Part] {
        &self.parts[self.tensor_parts[tensor].clone()]
    }

    /// Bytes of all state buffers together.
    #[must_use]
    pub fn state_bytes(&self) -> u64 {
        let sections = self.pieces.iter().filter_map(|piece| piece.state);
        sections.map(|sections| sections.size_bytes()).sum()
    }

    /// The bytes of a part's elements of a section in its piece's state buffer; none where there is no such section.
    #[must_use]
    pub fn state_bytes_of(&self, part: &Part, section: usize) -> Option<Range<u64>> {
        let sections = self.pieces[part.piece].state?;
        let elem_bytes = sections.codecs.get(section)?.elem_bytes();
        let start = sections.start_bytes(section) + u64::from(part.start) * elem_bytes;
        Some(start..start + u64::from(part.numel()) * elem_bytes)
    }

    /// The dispatches of one step: those of pieces sorted by access, so that the pipeline changes at most twice, then
    /// those of batches.
    ///
    /// `class_of` says of each tensor what sets it apart from its neighbours: neighbours of one class share a
    /// dispatch, and so do pieces of a batch; `None` leaves a tensor out.
    pub fn dispatches<C: Copy + PartialEq>(
        &self,
        class_of: impl Fn(usize) -> Option<C>,
    ) -> Vec<(Dispatch, C)> {
        self.dispatches_by(Chunked::Never, class_of).0
    }

    /// The [dispatches](Self::dispatches) of one step, of which a piece that would take many takes few in
    /// [chunks](Access::Vec4Chunks); these come with their tensors' classes.
    pub fn dispatches_by<C: Copy + PartialEq>(
        &self,
        chunked: Chunked,
        class_of: impl Fn(usize) -> Option<C>,
    ) -> (Vec<(Dispatch, C)>, Vec<Chunk<C>>) {
        let (mut dispatches, mut chunks) = (Vec::new(), Vec::new());
        for (index, piece) in self.pieces.iter().enumerate() {
            if piece.is_absent {
                continue;
            }
            if piece.batched && self.class_of_whole(piece, &class_of).is_some() {
                continue;
            }
            let spans = self.spans(piece, &class_of);
            let spans = self.add_chunks(index, spans, chunked, &mut dispatches, &mut chunks);
            for span in spans {
                let Range { mut start, end } = span.elems;
                while start < end {
                    let stop = self.end_of_dispatch(piece, start, end);
                    let covering = self.cover(index, start..stop).into_iter().flatten();
                    dispatches.extend(covering.map(|dispatch| (dispatch, span.class)));
                    start = stop;
                }
            }
        }
        dispatches.sort_by_key(|(dispatch, _)| dispatch.access);
        for (index, batch) in self.batches.iter().enumerate() {
            let pieces = batch.pieces.iter().map(|piece| &self.pieces[*piece]);
            let classes: Vec<_> = pieces.map(|p| self.class_of_whole(p, &class_of)).collect();
            for (position, class) in classes.iter().enumerate() {
                if let (Some(of_all), false) = (class, classes[..position].contains(class)) {
                    let same = (position..classes.len()).filter(|other| classes[*other] == *class);
                    let mask = same.fold(0, |mask, position| mask | 1 << position);
                    dispatches.push((self.over_batch(index, mask), *of_all));
                }
            }
        }
        (dispatches, chunks)
    }

    /// The elements of a piece that take part: neighbours of one class together, with the padding between and behind them.
    fn spans<C: Copy + PartialEq>(
        &self,
        piece: &Piece,
        class_of: impl Fn(usize) -> Option<C>,
    ) -> Vec<Span<C>> {
        let mut spans: Vec<Span<C>> = Vec::new();
        for part in &self.parts[piece.parts.clone()] {
            let Some(class) = class_of(part.tensor) else {
                continue;
            };
            // What lies behind a tensor is no part of a sum over it.
            let padding = if piece.has_sums { 0 } else { part.padding };
            let elems = part.start..part.start + part.numel() + padding;
            match spans.last_mut() {
                Some(last)
                    if last.class == class && last.elems.end == part.start && !piece.has_sums =>
                {
                    last.elems.end = elems.end;
                }
                _ => spans.push(Span {
                    elems,
                    class,
                    tensor: part.tensor,
                }),
            }
        }
        spans
    }

    /// The most dispatches that a step can take, whatever the classes.
    #[must_use]
    pub fn max_dispatches(&self) -> usize {
        // Every part may be of a class of its own (a batch only takes fewer), and each full dispatch may come short of the
        // ceiling by all but one element of a unit.
        let full = |piece: &Piece| {
            piece.numel / (self.max_dispatch_elems - (piece.storage.unit_elems() - 1))
        };
        let cuts: usize = self.pieces.iter().map(|piece| full(piece) as usize).sum();
        2 * (self.parts.len() + cuts)
    }

    /// The end of a dispatch that starts at `start` and respects the ceiling: the end of a vec4, or `end`.
    fn end_of_dispatch(&self, piece: &Piece, start: u32, end: u32) -> u32 {
        if end - start <= self.max_dispatch_elems {
            return end;
        }
        let stop = start + self.max_dispatch_elems;
        stop - (piece.params.first_elem + stop) % piece.storage.unit_elems()
    }

    /// The class of a piece, if all its tensors are of one and none is left out.
    fn class_of_whole<C: Copy + PartialEq>(
        &self,
        piece: &Piece,
        class_of: impl Fn(usize) -> Option<C>,
    ) -> Option<C> {
        let mut parts = self.parts[piece.parts.clone()].iter();
        let class = class_of(parts.next()?.tensor)?;
        parts
            .all(|part| class_of(part.tensor) == Some(class))
            .then_some(class)
    }

    /// The dispatch over some pieces of a batch.
    fn over_batch(&self, batch: usize, mask: u32) -> Dispatch {
        let Batch { pieces, access, .. } = &self.batches[batch];
        // They are sorted by size.
        let largest = &self.pieces[pieces[mask.ilog2() as usize]];
        let count = largest.batch_units(*access);
        Dispatch {
            target: Target::Batch { batch, mask },
            access: *access,
            first: 0,
            grads_shift: 0,
            count,
            head: 0,
            gap: 0,
            section: 0,
            elems: [0, largest.numel],
            workgroups: [count.div_ceil(BATCH_WORKGROUP_SIZE), 1],
        }
    }

    /// The vec4 dispatch and the scalar dispatch that together cover elements of a piece.
    fn cover(&self, piece: usize, elems: Range<u32>) -> [Option<Dispatch>; 2] {
        let windows = &self.pieces[piece];
        let unit_elems = windows.storage.unit_elems();
        let numel = elems.end - elems.start;
        let first = windows.params.first_elem + elems.start;
        let grads_shift = windows
            .grads
            .first_elem
            .wrapping_sub(windows.params.first_elem);
        let head = (unit_elems - first % unit_elems) % unit_elems;
        let vec4_count = if grads_shift.is_multiple_of(unit_elems) {
            numel.saturating_sub(head) / unit_elems
        } else {
            0
        };
        let invocations = if windows.in_vec4_pairs {
            vec4_count.div_ceil(2)
        } else {
            vec4_count
        };
        let section_elems = windows.state.map_or(0, |sections| sections.section_elems);
        let vec4 = Dispatch {
            target: Target::Piece(piece),
            access: if first + head == 0 && grads_shift == 0 {
                Access::Vec4
            } else {
                Access::Vec4Offset
            },
            first: (first + head) / unit_elems,
            grads_shift: (grads_shift as i32 / unit_elems as i32) as u32,
            count: vec4_count,
            head: 0,
            gap: 0,
            section: section_elems / unit_elems,
            elems: [first, first + numel],
            workgroups: grid(invocations, self.max_workgroups_per_dimension),
        };
        let scalar_elems = windows.unit_elems(Access::Scalar);
        let first_unit = first / scalar_elems;
        let units = (first + numel).div_ceil(scalar_elems) - first_unit;
        let gap = vec4_count * (unit_elems / scalar_elems);
        let scalar = Dispatch {
            target: Target::Piece(piece),
            access: Access::Scalar,
            first: first_unit,
            grads_shift,
            count: units - gap,
            head: match vec4_count {
                0 => units,
                _ => (first + head) / scalar_elems - first_unit,
            },
            gap,
            section: section_elems,
            elems: [first, first + numel],
            workgroups: grid(units - gap, self.max_workgroups_per_dimension),
        };
        [vec4, scalar].map(|dispatch| (dispatch.count > 0).then_some(dispatch))
    }
}

/// Workgroups in x and y for so many invocations: one row if it fits, else rows of nearly equal length.
fn grid(invocations: u32, max_per_dimension: u32) -> [u32; 2] {
    let total = invocations.div_ceil(WORKGROUP_SIZE);
    let rows = total.div_ceil(max_per_dimension).max(1);
    [total.div_ceil(rows), rows]
}
