//! Dispatches in chunks: many runs of elements in one dispatch, whose workgroups look up which elements are theirs.

use std::ops::Range;

use super::{Access, Dispatch, Piece, Plan, Target, WORKGROUP_SIZE, grid};

/// Most runs of elements of a piece that have dispatches of their own: beyond, looking up costs less.
const MAX_SPANS: usize = 4;

/// The choice of the dispatches of a plan that may be in chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunked {
    /// No dispatch is in chunks, but for rules that take sums over tensors, whose dispatches always are.
    Never,
    /// Dispatches are in chunks if their tensors are all of one class.
    ByClass,
    /// All dispatches of a piece that would take many are in chunks: workgroups look up the class of their tensors, too.
    Together,
}

/// The elements that a workgroup updates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk<C> {
    /// The elements, counted from the start of the parameter window.
    pub elems: Range<u32>,
    /// The class of their tensors.
    pub class: C,
    /// Their tensor, where the rule takes sums over tensors; otherwise the first of several.
    pub tensor: usize,
}

/// Elements of a piece that follow each other, of tensors of one class.
#[derive(Clone, Debug)]
pub(super) struct Span<C> {
    /// The elements, counted from the start of the piece.
    pub(super) elems: Range<u32>,
    pub(super) class: C,
    /// The first of the tensors: the only one, where the rule takes sums over tensors.
    pub(super) tensor: usize,
}

impl Plan {
    /// The most chunks that a step can take, and whether it can take any.
    #[must_use]
    pub fn max_chunks(&self) -> u64 {
        let chunks_of = |piece: &Piece| {
            let elems = Access::CHUNKS.map(|access| self.chunk_elems(piece, access));
            // A run has a short chunk, and an odd end on either side.
            let short = 3 * piece.parts.len() as u64;
            u64::from(piece.numel / elems[0]) + u64::from(piece.numel / elems[1]) + short
        };
        let is_chunked =
            |piece: &&Piece| may_be_chunked(piece) || (piece.has_sums && !piece.is_absent);
        let pieces = self.pieces.iter().filter(is_chunked);
        pieces.map(chunks_of).sum()
    }

    /// Adds dispatches in chunks, and returns what is left of the runs of elements of a piece.
    pub(super) fn add_chunks<C: Copy + PartialEq>(
        &self,
        index: usize,
        spans: Vec<Span<C>>,
        chunked: Chunked,
        dispatches: &mut Vec<(Dispatch, C)>,
        chunks: &mut Vec<Chunk<C>>,
    ) -> Vec<Span<C>> {
        let piece = &self.pieces[index];
        // Whoever takes sums looks up the tensor; random bits belong to one, which is then a class of its own.
        let (chunked, max_spans) = match piece.has_sums {
            true if chunked == Chunked::Together && !piece.storage.is_stochastic => (chunked, 0),
            true => (Chunked::ByClass, 0),
            false if may_be_chunked(piece) => (chunked, MAX_SPANS),
            false => (Chunked::Never, 0),
        };
        if chunked == Chunked::Never || spans.len() <= max_spans {
            return spans;
        }
        // Two that share a word would write it at once.
        let are_apart = |pair: &[Span<C>]| {
            let [first, second] = pair else {
                return true;
            };
            let end = piece.params.first_elem + first.elems.end;
            let is_apart = first.elems.end < second.elems.start;
            piece.storage.is_f32() || end.is_multiple_of(2) || is_apart
        };
        let are_apart = spans.windows(2).all(are_apart);
        if !are_apart && !piece.has_sums {
            return spans;
        }
        // Neighbours that share a word are in dispatches of their own.
        let side = |index: usize| if are_apart { 0 } else { index % 2 };
        let (mut left, mut together): (_, Vec<(_, Vec<_>)>) = (Vec::new(), Vec::new());
        for (index, span) in spans.into_iter().enumerate() {
            let class = (chunked == Chunked::ByClass).then_some(span.class);
            let key = (class, side(index));
            match together.iter_mut().find(|(other, _)| *other == key) {
                Some((_, spans)) => spans.push(span),
                None => together.push((key, vec![span])),
            }
        }
        for (_, spans) in together {
            if spans.len() > max_spans {
                for access in Access::CHUNKS {
                    self.add_dispatches(index, access, &spans, dispatches, chunks);
                }
            } else {
                left.extend(spans);
            }
        }
        left
    }

    /// Elements that a workgroup reaches, as far as a dispatch may.
    fn chunk_elems(&self, piece: &Piece, access: Access) -> u32 {
        let unit = piece.unit_elems(access);
        (WORKGROUP_SIZE * unit).min(self.max_dispatch_elems - self.max_dispatch_elems % unit)
    }

    /// Adds the dispatches of one access, none of more elements than the device's watchdog allows.
    fn add_dispatches<C: Copy>(
        &self,
        index: usize,
        access: Access,
        spans: &[Span<C>],
        dispatches: &mut Vec<(Dispatch, C)>,
        chunks: &mut Vec<Chunk<C>>,
    ) {
        let piece = &self.pieces[index];
        let of_access = spans.iter().flat_map(|span| {
            let (start, elems) = (piece.params.first_elem, &span.elems);
            let runs = runs(piece, access, start + elems.start..start + elems.end);
            runs.into_iter().map(move |elems| (elems, span))
        });
        let max_elems = self.chunk_elems(piece, access);
        let first_of_all = chunks.len();
        for (Range { mut start, end }, span) in of_access {
            while start < end {
                // Chunks end where words do.
                let stop = start - start % piece.unit_elems(access) + max_elems;
                let elems = start..stop.min(end);
                start = elems.end;
                chunks.push(Chunk {
                    elems,
                    class: span.class,
                    tensor: span.tensor,
                });
            }
        }
        let mut first = first_of_all;
        while first < chunks.len() {
            let mut elems = 0;
            let fits = |chunk: &&Chunk<C>| {
                elems += chunk.elems.len() as u32;
                elems <= self.max_dispatch_elems
            };
            let count = chunks[first..].iter().take_while(fits).count().max(1);
            let most = self.max_workgroups_per_dimension.saturating_pow(2);
            let count = count.min(most as usize);
            dispatches.push((
                Dispatch {
                    target: Target::Piece(index),
                    access,
                    first: first as u32,
                    grads_shift: grads_shift(piece, access),
                    count: count as u32,
                    head: 0,
                    gap: 0,
                    section: piece.state.map_or(0, |sections| {
                        let is_vec4 = !access.is_scalar();
                        let unit = if is_vec4 { piece.unit_elems(access) } else { 1 };
                        sections.section_elems / unit
                    }),
                    elems: [0, 0],
                    workgroups: grid(
                        count as u32 * WORKGROUP_SIZE,
                        self.max_workgroups_per_dimension,
                    ),
                },
                chunks[first].class,
            ));
            first += count;
        }
    }
}

/// Whether a piece may have more runs of elements than have dispatches of their own. Random bits belong to one tensor.
fn may_be_chunked(piece: &Piece) -> bool {
    !piece.is_absent && piece.parts.len() > MAX_SPANS && !piece.storage.is_stochastic
}

/// The distance from parameters to gradients, in units; with a scalar access in elements.
fn grads_shift(piece: &Piece, access: Access) -> u32 {
    let shift = piece.grads.first_elem.wrapping_sub(piece.params.first_elem);
    match access.is_scalar() {
        true => shift,
        false => (shift as i32 / piece.unit_elems(access) as i32) as u32,
    }
}

/// The elements of a run that are reached by an access: whole units, or what is left at either end.
fn runs(piece: &Piece, access: Access, elems: Range<u32>) -> Vec<Range<u32>> {
    let unit = piece.storage.unit_elems();
    let shift = piece.grads.first_elem.wrapping_sub(piece.params.first_elem);
    let start = elems.start.next_multiple_of(unit);
    let end = elems.end - elems.end % unit;
    let whole = match shift.is_multiple_of(unit) && start < end {
        true => start..end,
        false => elems.end..elems.end,
    };
    match access.is_scalar() {
        true => vec![elems.start..whole.start, whole.end..elems.end],
        false => vec![whole],
    }
}
