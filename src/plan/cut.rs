//! The cut of runs of tensors into pieces, and the gathering of small pieces into batches.

use super::{
    BATCH_WORKGROUP_SIZE, Batch, DeviceLimits, MAX_BATCH_PIECES, Part, Piece, Plan, PlanError,
    Sections, TensorLayout, VEC4_BYTES, WORKGROUP_SIZE, Window,
};
use crate::storage::StorageType;

/// Most elements of a piece that joins a batch. On software adapters, where a dispatch costs as much as ten thousand
/// elements, batches win up to here; on any, larger pieces fill a GPU by themselves.
const MAX_BATCHED_ELEMS: u32 = 8192;

/// No driver binds more than this, whatever it says.
const MAX_BINDING_BYTES: u64 = i32::MAX as u64;

/// The room that the limits leave for a piece.
pub(super) struct Room {
    max_piece_bytes: u64,
    alignment_bytes: u64,
    max_grid_units: u64,
}

impl Room {
    /// For pieces of at most so many sections, whose elements take so many bytes at least.
    pub(super) fn new(
        limits: &DeviceLimits,
        sections: usize,
        shortest_bytes: u64,
    ) -> Result<Self, PlanError> {
        let room = Self {
            max_piece_bytes: limits
                .max_binding_bytes
                .min(limits.max_buffer_bytes)
                .min(MAX_BINDING_BYTES),
            alignment_bytes: limits.offset_alignment_bytes.max(VEC4_BYTES),
            max_grid_units: u64::from(limits.max_workgroups_per_dimension)
                .saturating_pow(2)
                .saturating_mul(WORKGROUP_SIZE.into()),
        };
        // One aligned step of what is shortest beyond the slack in front of it, in every section of what is longest.
        let step_elems = room.alignment_bytes / shortest_bytes;
        let required = 2 * step_elems * StorageType::F32.bytes() * sections.max(1) as u64;
        if room.max_piece_bytes < required {
            return Err(PlanError::LimitTooLow {
                limit: "max_storage_buffer_binding_size",
                required,
                actual: room.max_piece_bytes,
            });
        }
        if room.max_grid_units < step_elems {
            return Err(PlanError::LimitTooLow {
                limit: "max_compute_workgroups_per_dimension",
                required: 1,
                actual: limits.max_workgroups_per_dimension.into(),
            });
        }
        Ok(room)
    }

    /// The number of the `numel` elements that fit into one piece that starts at these offsets.
    fn fitting(&self, numel: u64, params_bytes: u64, grads_bytes: u64, like: &TensorLayout) -> u64 {
        let storage = &like.storage;
        let unit_elems = u64::from(storage.unit_elems());
        let slacks = [
            params_bytes % self.alignment_bytes / storage.params.bytes(),
            grads_bytes % self.alignment_bytes / storage.grads.bytes(),
        ];
        let in_binding = |elem_bytes| self.max_piece_bytes / elem_bytes;
        // Every section starts with the slack of the parameters, and ends with a unit but for the last.
        let max_section_elems = match storage.state.len() {
            0 => u64::MAX,
            1 => in_binding(storage.state_bytes()),
            _ => in_binding(storage.state_bytes()) / unit_elems * unit_elems,
        };
        let max_binding_elems = (in_binding(storage.params.bytes()).min(max_section_elems)
            - slacks[0])
            .min(in_binding(storage.grads.bytes()) - slacks[1]);
        let max_dispatch_elems = if slacks[0] % unit_elems == slacks[1] % unit_elems {
            self.max_grid_units.saturating_mul(unit_elems)
        } else {
            self.max_grid_units
        };
        let max_elems = max_binding_elems.min(max_dispatch_elems);
        if numel <= max_elems {
            numel
        } else {
            // Whole alignment steps, of what is shortest, keep the slack the same in every piece.
            let shortest = storage.params.bytes().min(storage.grads.bytes());
            max_elems - max_elems % (self.alignment_bytes / shortest)
        }
    }
}

impl Plan {
    /// Cuts neighbouring tensors, which follow each other, into pieces.
    pub(super) fn add_run(
        &mut self,
        tensors: &[TensorLayout],
        run: &[usize],
        room: &Room,
    ) -> Result<(), PlanError> {
        let first = &tensors[run[0]];
        let run_numel: u64 = run
            .iter()
            .map(|t| tensors[*t].numel + tensors[*t].padding_elems)
            .sum();
        let mut start = 0;
        // The tensor being cut, and how much of it lies in earlier pieces.
        let (mut member, mut done) = (0, 0);
        while start < run_numel && member < run.len() {
            let storage = first.storage;
            let params_start = first.params.offset_bytes + start * storage.params.bytes();
            let grads_start = first.grads.offset_bytes + start * storage.grads.bytes();
            let numel = room.fitting(run_numel - start, params_start, grads_start, first);
            let parts_start = self.parts.len();
            // Tensors, or what is left of the first, until the piece is full.
            let mut position = 0;
            while member < run.len() && position < numel {
                let layout = &tensors[run[member]];
                let here = (layout.numel.saturating_sub(done)).min(numel - position);
                let extent = (layout.numel + layout.padding_elems - done).min(numel - position);
                if here > 0 {
                    let part = self.parts.len();
                    let parts = &mut self.tensor_parts[run[member]];
                    *parts = if done == 0 {
                        part..part + 1
                    } else {
                        parts.start..part + 1
                    };
                    self.parts.push(Part {
                        tensor: run[member],
                        elems: done..done + here,
                        piece: self.pieces.len(),
                        start: position as u32,
                        padding: (extent - here) as u32,
                    });
                }
                position += extent;
                done += extent;
                if done == layout.numel + layout.padding_elems {
                    (member, done) = (member + 1, 0);
                }
            }
            start += numel;
            // Nothing but padding needs no bindings.
            if parts_start == self.parts.len() {
                continue;
            }
            let window = |bytes, of: StorageType| {
                Window::over(bytes, numel, of.bytes(), room.alignment_bytes)
            };
            let params = window(params_start, storage.params);
            let piece = Piece {
                numel: numel as u32,
                group: first.group,
                storage,
                params_buffer: first.params.buffer,
                params,
                grads_buffer: first.grads.buffer,
                grads: window(grads_start, storage.grads),
                state: Sections::new(params.first_elem, numel as u32, &storage),
                parts: parts_start..self.parts.len(),
                batched: false,
                is_absent: first.is_absent,
                has_sums: first.has_sums,
                in_vec4_pairs: self.is_software && storage.is_f32(),
            };
            if !piece.is_absent && piece.in_one_buffer() && piece.params.overlaps(&piece.grads) {
                let end = if params_start < grads_start {
                    params_start + numel * storage.params.bytes()
                } else {
                    grads_start + numel * storage.grads.bytes()
                };
                return Err(PlanError::TooClose {
                    tensor: self.parts[parts_start].tensor,
                    params_offset_bytes: params_start,
                    grads_offset_bytes: grads_start,
                    least_offset_bytes: end.next_multiple_of(room.alignment_bytes),
                });
            }
            self.pieces.push(piece);
        }
        Ok(())
    }

    /// Puts small pieces that begin with their bindings into batches, as many in each as the limits allow. Like goes
    /// with like in size, because each invocation goes through all pieces of its batch.
    pub(super) fn add_batches(&mut self, max_storage_buffers: u32) {
        let room = self
            .max_workgroups_per_dimension
            .saturating_mul(BATCH_WORKGROUP_SIZE);
        let joins = |piece: &Piece| {
            let Some(access) = piece.batch_access() else {
                return false;
            };
            let first_elems = piece.params.first_elem + piece.grads.first_elem;
            !piece.is_absent
                && !piece.has_sums
                && first_elems == 0
                && piece.batch_units(access) <= room
                && piece.numel <= MAX_BATCHED_ELEMS
        };
        let kind = |piece: &Piece| {
            let (shares, storage) = (piece.in_one_buffer(), piece.storage);
            let access = piece.batch_access();
            (piece.group, piece.bindings(), access, shares, storage)
        };
        let pieces = self.pieces.iter().enumerate();
        let mut waiting: Vec<_> = pieces
            .filter(|(_, piece)| joins(piece))
            .map(|(index, piece)| (kind(piece), piece.numel, index))
            .collect();
        waiting.sort_unstable();
        let waiting: Vec<_> = waiting.into_iter().map(|(.., index)| index).collect();

        let mut waiting = waiting.as_slice();
        while let [first, ..] = waiting {
            let first = &self.pieces[*first];
            let max_pieces = (max_storage_buffers / first.bindings()).clamp(1, MAX_BATCH_PIECES);
            let (access, mut numel, mut size) = (first.batch_access(), 0, 0);
            for piece in waiting.iter().take(max_pieces as usize) {
                let piece = &self.pieces[*piece];
                numel += piece.numel;
                let mut others = waiting[..size].iter().map(|other| &self.pieces[*other]);
                if kind(piece) != kind(first)
                    || numel > self.max_dispatch_elems
                    || !others.all(|other| piece.may_be_bound_with(other))
                {
                    break;
                }
                size += 1;
            }
            let (batch, rest) = waiting.split_at(size.max(1));
            if let Some(access) = access.filter(|_| batch.len() > 1) {
                for piece in batch {
                    self.pieces[*piece].batched = true;
                }
                let is_odd = |piece: &usize| self.pieces[*piece].numel % 2;
                let odd = (0..).zip(batch).map(|(bit, piece)| is_odd(piece) << bit);
                self.batches.push(Batch {
                    odd: odd.sum(),
                    pieces: batch.to_vec(),
                    access,
                });
            }
            waiting = rest;
        }
    }
}

pub(super) fn check_layout(tensor: usize, layout: &TensorLayout) -> Result<(), PlanError> {
    let storage = layout.storage;
    for (place, elem_bytes) in [
        (layout.params, storage.params.bytes()),
        (layout.grads, storage.grads.bytes()),
    ] {
        if !place.offset_bytes.is_multiple_of(elem_bytes) {
            return Err(PlanError::Misaligned {
                tensor,
                offset_bytes: place.offset_bytes,
                elem_bytes,
            });
        }
        let end = layout
            .numel
            .checked_add(layout.padding_elems)
            .and_then(|numel| numel.checked_mul(elem_bytes))
            .and_then(|bytes| bytes.checked_add(place.offset_bytes));
        if end.is_none() {
            return Err(PlanError::TooLarge {
                tensor,
                numel: layout.numel,
            });
        }
    }
    Ok(())
}
