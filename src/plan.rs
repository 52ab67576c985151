//! Tensors x device limits -> dispatches. Pure numbers: needs no device, and property tests drive it with
//! made-up limits.

use std::ops::Range;

use crate::error::PlanError;

/// Invocations per workgroup of every entry point; `WORKGROUP_SIZE` in `shaders/sgd.wgsl`.
pub const WORKGROUP_SIZE: u32 = 256;

/// Bytes of one `f32`.
pub const ELEM_BYTES: u64 = 4;

/// Elements that one invocation of a vec4 entry point updates.
const VEC4_ELEMS: u64 = 4;
const VEC4_BYTES: u64 = VEC4_ELEMS * ELEM_BYTES;

/// No driver binds more than this, whatever it says.
const MAX_BINDING_BYTES: u64 = i32::MAX as u64;

/// The device limits that shape a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLimits {
    /// Largest storage binding, in bytes.
    pub max_binding_bytes: u64,
    /// Largest buffer, in bytes.
    pub max_buffer_bytes: u64,
    /// What the byte offset of a storage binding must be a multiple of; a power of two.
    pub offset_alignment_bytes: u64,
    /// Most workgroups in one dimension of a dispatch.
    pub max_workgroups_per_dimension: u32,
}

impl From<&wgpu::Limits> for DeviceLimits {
    fn from(limits: &wgpu::Limits) -> Self {
        Self {
            max_binding_bytes: limits.max_storage_buffer_binding_size,
            max_buffer_bytes: limits.max_buffer_size,
            offset_alignment_bytes: limits.min_storage_buffer_offset_alignment.into(),
            max_workgroups_per_dimension: limits.max_compute_workgroups_per_dimension,
        }
    }
}

/// Where one tensor lies in its two buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorLayout {
    /// Number of elements; zero is allowed and plans nothing.
    pub numel: u64,
    /// Byte offset of the first parameter, a multiple of 4.
    pub params_offset_bytes: u64,
    /// Byte offset of the first gradient, a multiple of 4.
    pub grads_offset_bytes: u64,
}

/// A binding: a range of a buffer whose start is aligned as the device wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Byte offset in the buffer, a multiple of the offset alignment.
    pub offset_bytes: u64,
    /// Bytes from there to the end of the piece.
    pub size_bytes: u64,
    /// Elements between the start of the window and the first element of the piece.
    pub first_elem: u32,
}

impl Window {
    /// The window over `numel` elements from byte `start_bytes`.
    fn over(start_bytes: u64, numel: u64, alignment_bytes: u64) -> Self {
        let slack_bytes = start_bytes % alignment_bytes;
        Self {
            offset_bytes: start_bytes - slack_bytes,
            size_bytes: slack_bytes + numel * ELEM_BYTES,
            first_elem: (slack_bytes / ELEM_BYTES) as u32,
        }
    }

    /// Byte offset in the buffer of the first element of the piece.
    #[must_use]
    pub fn start_bytes(&self) -> u64 {
        self.offset_bytes + u64::from(self.first_elem) * ELEM_BYTES
    }
}

/// A run of elements of one tensor that one set of bindings reaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the tensor in the order in which the tensors were given.
    pub tensor: usize,
    /// The elements of that tensor.
    pub elems: Range<u64>,
    /// Its window in the tensor's parameter buffer.
    pub params: Window,
    /// Its window in the tensor's gradient buffer.
    pub grads: Window,
    /// Which velocity buffer holds its velocity; an index into [`Plan::velocity_buffer_bytes`].
    pub velocity_buffer: usize,
    /// Its window there.
    pub velocity: Window,
}

/// How a dispatch reaches its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// Four elements per invocation, through 16-byte loads and stores.
    Vec4,
    /// The same, but further on than the windows start.
    Vec4Offset,
    /// One element per invocation: what is left at either end of a vec4 run, and pieces whose parameters and
    /// gradients do not line up with each other modulo four elements.
    Scalar,
}

impl Access {
    /// Every access, in the order in which a step dispatches them.
    pub const ALL: [Self; 3] = [Self::Vec4, Self::Vec4Offset, Self::Scalar];

    /// Elements per invocation; the unit of a dispatch's positions and counts.
    #[must_use]
    pub const fn unit_elems(self) -> u32 {
        match self {
            Self::Vec4 | Self::Vec4Offset => 4,
            Self::Scalar => 1,
        }
    }
}

/// One dispatch over one piece or part of it. Positions and counts are in units of the access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dispatch {
    /// Index into [`Plan::pieces`].
    pub piece: usize,
    /// How it reaches its elements.
    pub access: Access,
    /// First unit in the parameter window and in the velocity window.
    pub first: u32,
    /// How much further on the first unit is in the gradient window, modulo 2^32.
    pub grads_shift: u32,
    /// Number of units updated.
    pub count: u32,
    /// Units before the gap ([`Access::Scalar`] only).
    pub head: u32,
    /// Units left out after them ([`Access::Scalar`] only).
    pub gap: u32,
    /// Workgroups in x and y.
    pub workgroups: [u32; 2],
}

impl Dispatch {
    /// Invocations in one row of the grid.
    #[must_use]
    pub fn row(&self) -> u32 {
        self.workgroups[0] * WORKGROUP_SIZE
    }
}

/// What one step does on the device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Runs of elements, in the order of the tensors; each element lies in exactly one.
    pub pieces: Vec<Piece>,
    /// Sorted by access, so that the pipeline changes at most twice in a step.
    pub dispatches: Vec<Dispatch>,
    /// Size of each velocity buffer.
    pub velocity_buffer_bytes: Vec<u64>,
}

impl Plan {
    /// Plans one step over `tensors`.
    ///
    /// A piece ends where a binding would exceed the device's limit or a dispatch its grid. Within a piece,
    /// one dispatch updates four elements per invocation, and a second one, if needed, what is left at both
    /// ends.
    ///
    /// # Errors
    /// [`PlanError`] if an offset is not a multiple of 4 bytes, a tensor ends past the address range, or the
    /// limits are too small to make progress.
    pub fn new(tensors: &[TensorLayout], limits: &DeviceLimits) -> Result<Self, PlanError> {
        let mut plan = Self::default();
        let max_piece_bytes = limits
            .max_binding_bytes
            .min(limits.max_buffer_bytes)
            .min(MAX_BINDING_BYTES);
        let alignment_bytes = limits.offset_alignment_bytes.max(VEC4_BYTES);
        // One aligned step beyond the slack in front of it.
        if max_piece_bytes < 2 * alignment_bytes {
            return Err(PlanError::LimitTooLow {
                limit: "max_storage_buffer_binding_size",
                required: 2 * alignment_bytes,
                actual: max_piece_bytes,
            });
        }
        let max_grid_units = u64::from(limits.max_workgroups_per_dimension)
            .saturating_pow(2)
            .saturating_mul(WORKGROUP_SIZE.into());
        if max_grid_units < alignment_bytes / ELEM_BYTES {
            return Err(PlanError::LimitTooLow {
                limit: "max_compute_workgroups_per_dimension",
                required: 1,
                actual: limits.max_workgroups_per_dimension.into(),
            });
        }

        for (tensor, layout) in tensors.iter().enumerate() {
            check_layout(tensor, layout)?;
            let params_slack = layout.params_offset_bytes % alignment_bytes;
            let grads_slack = layout.grads_offset_bytes % alignment_bytes;
            let in_phase = params_slack % VEC4_BYTES == grads_slack % VEC4_BYTES;
            let max_binding_elems = (max_piece_bytes - params_slack.max(grads_slack)) / ELEM_BYTES;
            let max_dispatch_elems = if in_phase {
                max_grid_units.saturating_mul(VEC4_ELEMS)
            } else {
                max_grid_units
            };
            let max_elems = max_binding_elems.min(max_dispatch_elems);
            // Whole alignment steps keep the slack the same in every piece.
            let split_elems = max_elems - max_elems % (alignment_bytes / ELEM_BYTES);

            let mut start = 0;
            while start < layout.numel {
                let rest = layout.numel - start;
                let numel = if rest <= max_elems { rest } else { split_elems };
                let params_start = layout.params_offset_bytes + start * ELEM_BYTES;
                let grads_start = layout.grads_offset_bytes + start * ELEM_BYTES;
                let (velocity_buffer, velocity_start) = plan.place_velocity(
                    params_slack,
                    numel * ELEM_BYTES,
                    alignment_bytes,
                    limits.max_buffer_bytes,
                );
                plan.pieces.push(Piece {
                    tensor,
                    elems: start..start + numel,
                    params: Window::over(params_start, numel, alignment_bytes),
                    grads: Window::over(grads_start, numel, alignment_bytes),
                    velocity_buffer,
                    velocity: Window::over(velocity_start, numel, alignment_bytes),
                });
                plan.cover_last_piece(in_phase, limits.max_workgroups_per_dimension);
                start += numel;
            }
        }
        plan.dispatches.sort_by_key(|dispatch| dispatch.access);
        Ok(plan)
    }

    /// The pieces of one tensor, in order.
    #[must_use]
    pub fn pieces_of(&self, tensor: usize) -> &[Piece] {
        let start = self.pieces.partition_point(|piece| piece.tensor < tensor);
        let end = self.pieces.partition_point(|piece| piece.tensor <= tensor);
        &self.pieces[start..end]
    }

    /// Reserves room for a piece's velocity: aligned, but `slack_bytes` past that, so that it lies in its
    /// window where the parameters lie in theirs. Returns the buffer and the byte offset of the first element.
    fn place_velocity(
        &mut self,
        slack_bytes: u64,
        size_bytes: u64,
        alignment_bytes: u64,
        max_buffer_bytes: u64,
    ) -> (usize, u64) {
        if let Some(used) = self.velocity_buffer_bytes.last_mut() {
            let start = used.next_multiple_of(alignment_bytes) + slack_bytes;
            if start + size_bytes <= max_buffer_bytes {
                *used = start + size_bytes;
                return (self.velocity_buffer_bytes.len() - 1, start);
            }
        }
        self.velocity_buffer_bytes.push(slack_bytes + size_bytes);
        (self.velocity_buffer_bytes.len() - 1, slack_bytes)
    }

    /// Adds the dispatches of the piece pushed last.
    fn cover_last_piece(&mut self, in_phase: bool, max_workgroups: u32) {
        let Some(piece) = self.pieces.last() else {
            return;
        };
        let numel = (piece.elems.end - piece.elems.start) as u32;
        let head = (VEC4_ELEMS as u32 - piece.params.first_elem % 4) % 4;
        let vec4_count = if in_phase {
            numel.saturating_sub(head) / 4
        } else {
            0
        };
        let first = piece.params.first_elem;
        let grads_shift = piece.grads.first_elem.wrapping_sub(first);
        let piece = self.pieces.len() - 1;

        if vec4_count > 0 {
            self.dispatches.push(Dispatch {
                piece,
                access: if first + head == 0 && grads_shift == 0 {
                    Access::Vec4
                } else {
                    Access::Vec4Offset
                },
                first: (first + head) / 4,
                grads_shift: (grads_shift as i32 / 4) as u32,
                count: vec4_count,
                head: 0,
                gap: 0,
                workgroups: grid(vec4_count, max_workgroups),
            });
        }
        let rest = numel - 4 * vec4_count;
        if rest > 0 {
            self.dispatches.push(Dispatch {
                piece,
                access: Access::Scalar,
                first,
                grads_shift,
                count: rest,
                head: if vec4_count > 0 { head } else { rest },
                gap: 4 * vec4_count,
                workgroups: grid(rest, max_workgroups),
            });
        }
    }
}

/// Workgroups in x and y for `units` invocations: one row if it fits, else rows of nearly equal length.
fn grid(units: u32, max_per_dimension: u32) -> [u32; 2] {
    let total = units.div_ceil(WORKGROUP_SIZE);
    let rows = total.div_ceil(max_per_dimension);
    [total.div_ceil(rows), rows]
}

fn check_layout(tensor: usize, layout: &TensorLayout) -> Result<(), PlanError> {
    for offset_bytes in [layout.params_offset_bytes, layout.grads_offset_bytes] {
        if !offset_bytes.is_multiple_of(ELEM_BYTES) {
            return Err(PlanError::Misaligned {
                tensor,
                offset_bytes,
            });
        }
        let end = layout
            .numel
            .checked_mul(ELEM_BYTES)
            .and_then(|bytes| bytes.checked_add(offset_bytes));
        if end.is_none() {
            return Err(PlanError::TooLarge {
                tensor,
                numel: layout.numel,
            });
        }
    }
    Ok(())
}
