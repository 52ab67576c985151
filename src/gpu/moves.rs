//! State that moves into other buffers, whichever encoders are dropped.
//!
//! A copy that is recorded once is lost with its encoder, and one that is recorded twice undoes the steps between. So the
//! moves of one `rebind` are kernels that look at a word on the device first, and the last of them sets it: they are
//! recorded in front of every step until one of these is known to be done.

use super::bound::create_bind_group;
use super::error::BuildError;
use super::error_scope::checked;
use super::kernels::{BindingKind, Kernels};
use super::readback::Downloaded;
use super::submission::{Fate, Submission};
use crate::plan::WORKGROUP_SIZE;
use crate::wgsl::scalars::TENSORS_GROUP;

/// A run of words that moves from one buffer to another.
pub(super) struct Move {
    pub(super) source: wgpu::Buffer,
    pub(super) target: wgpu::Buffer,
    pub(super) from_bytes: u64,
    pub(super) to_bytes: u64,
    pub(super) size_bytes: u64,
}

/// Moves that are made together.
pub(super) struct Moves {
    moves: Vec<Move>,
    copy: wgpu::ComputePipeline,
    /// The bindings and the workgroups of each.
    copies: Vec<(wgpu::BindGroup, [u32; 2])>,
    mark: wgpu::ComputePipeline,
    mark_bindings: wgpu::BindGroup,
    is_made: wgpu::Buffer,
    /// The submissions that they have been recorded into.
    submissions: Vec<Submission>,
}

impl Moves {
    /// Builds what the moves need.
    pub(super) fn new(kernels: &Kernels, moves: Vec<Move>) -> Result<Self, BuildError> {
        use BindingKind::{Read, ReadWrite, Uniform};
        const COPY: [BindingKind; 4] = [Read, ReadWrite, Uniform, Read];
        let device = kernels.device();
        let source = include_str!("../../shaders/frame/move.wgsl").to_owned();
        let (copy, copy_layout) = kernels.of_control("move_state", source, &COPY, 0)?;
        let source = include_str!("../../shaders/frame/mark.wgsl").to_owned();
        let (mark, mark_layout) = kernels.of_control("mark_moved", source, &[ReadWrite], 0)?;
        let max_workgroups = kernels.device_limits().max_workgroups_per_dimension;
        let created = checked(device, || {
            let is_made = device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("wgpu_optim.is_moved"),
                size: 4,
                usage: wgpu::BufferUsages::STORAGE
                    | wgpu::BufferUsages::COPY_SRC
                    | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            });
            let whole = |buffer: &wgpu::Buffer| (buffer.clone(), 0, buffer.size());
            let copies = moves.iter().map(|this| {
                let count = (this.size_bytes / 4) as u32;
                let workgroups = count.div_ceil(WORKGROUP_SIZE).max(1);
                let rows = workgroups.div_ceil(max_workgroups);
                let columns = workgroups.div_ceil(rows);
                let words = [
                    (this.from_bytes / 4) as u32,
                    (this.to_bytes / 4) as u32,
                    count,
                    columns * WORKGROUP_SIZE,
                ];
                let uniforms = device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("wgpu_optim.move"),
                    size: size_of_val(&words) as u64,
                    usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
                    mapped_at_creation: false,
                });
                kernels
                    .queue()
                    .write_buffer(&uniforms, 0, bytemuck::bytes_of(&words));
                let windows = [&this.source, &this.target, &uniforms, &is_made].map(whole);
                let bind_group = create_bind_group(device, &(copy_layout.clone(), windows.into()));
                (bind_group, [columns, rows])
            });
            let copies: Vec<_> = copies.collect();
            let mark = create_bind_group(device, &(mark_layout, vec![whole(&is_made)]));
            (copies, mark, is_made)
        });
        let (copies, mark_bindings, is_made) = created?;
        Ok(Self {
            moves,
            copy,
            copies,
            mark,
            mark_bindings,
            is_made,
            submissions: Vec::new(),
        })
    }

    /// Records the moves in front of what is submitted with them; they do nothing where they have been made.
    pub(super) fn record(&mut self, pass: &mut wgpu::ComputePass<'_>, submission: &Submission) {
        pass.set_pipeline(&self.copy);
        for (bind_group, [x, y]) in &self.copies {
            pass.set_bind_group(TENSORS_GROUP, bind_group, &[]);
            pass.dispatch_workgroups(*x, *y, 1);
        }
        pass.set_pipeline(&self.mark);
        pass.set_bind_group(TENSORS_GROUP, &self.mark_bindings, &[]);
        pass.dispatch_workgroups(1, 1, 1);
        self.submissions
            .retain(|submission| submission.fate() != Fate::Dropped);
        self.submissions.push(submission.clone());
    }

    /// The buffers that tell whether they have been made, and those that they move from and to.
    pub(super) fn buffers(&self) -> impl Iterator<Item = &wgpu::Buffer> {
        let moves = self.moves.iter();
        let moved = moves.flat_map(|moves| [&moves.source, &moves.target]);
        moved.chain([&self.is_made])
    }

    /// Makes the moves in copies of the buffers, unless the device has made them.
    pub(super) fn make(&self, bytes: &mut Downloaded<'_>) {
        let is_made = bytes.get(&self.is_made);
        if is_made.is_none_or(|word| word.iter().any(|byte| *byte != 0)) {
            return;
        }
        for Move {
            source,
            target,
            from_bytes,
            to_bytes,
            size_bytes,
        } in &self.moves
        {
            let run = |start: u64| start as usize..(start + size_bytes) as usize;
            let moved = bytes
                .get(source)
                .map(|source| source[run(*from_bytes)].to_vec());
            if let Some((target, moved)) = bytes.get_mut(target).zip(moved) {
                target[run(*to_bytes)].copy_from_slice(&moved);
            }
        }
    }

    /// Calls them off, before the commands of the next submission: the state is overwritten.
    pub(super) fn cancel(&self, queue: &wgpu::Queue) {
        queue.write_buffer(&self.is_made, 0, &1_u32.to_ne_bytes());
    }

    /// Whether the device has made them.
    pub(super) fn are_made(&self) -> bool {
        let mut submissions = self.submissions.iter();
        submissions.any(|submission| submission.fate() == Fate::Done)
    }
}
