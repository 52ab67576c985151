//! Tensors that lie elsewhere from step to step.

use super::recorder::{ParamsPlace, sums_of};
use super::{GpuOptimizer, Recorder};
use crate::gpu::binding::{TensorBinding, check_bindings};
use crate::gpu::bound::{Bound, Buffers, absent, allocate_state, new_ring};
use crate::gpu::error::{BuildError, RebindError};
use crate::gpu::moves::{Move, Moves};
use crate::gpu::rules::GroupRules;
use crate::plan::{Part, Piece, Plan};
use crate::rules::Rule;
use crate::state::{DuplicateName, UnknownTensor};

impl<R: Rule> GpuOptimizer<R> {
    /// Binds tensors where they lie now, for engines whose pools give them other places from step to step. State, step
    /// counts and frozen tensors stay as they are. A tensor that is not among these has no place until a later call: it
    /// keeps its state, and steps leave it out as if it were frozen.
    ///
    /// Only bind groups are made whose buffers or offsets have changed. Each tensor is from now on in a piece of its
    /// own, whoever its neighbours are, and small ones still share batches. Its state moves only where it shared a piece
    /// before, or where its parameters start at another offset modulo the device's
    /// `min_storage_buffer_offset_alignment`. That is recorded into `encoder`, and into the steps after it until one is
    /// known to be done: an encoder that is dropped loses no state. Compiles what batches of other sizes need, once per
    /// device.
    ///
    /// # Errors
    /// [`RebindError`] if the optimizer has no tensor of such a name or shape, or for what [`BuildError`] says of them;
    /// then nothing has changed, and nothing has been recorded.
    pub fn rebind(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        tensors: &[TensorBinding<'_>],
    ) -> Result<(), RebindError> {
        self.recorder.rebind(&self.groups, encoder, tensors)
    }
}

impl Recorder {
    fn rebind(
        &mut self,
        rules: &dyn GroupRules,
        encoder: &mut wgpu::CommandEncoder,
        tensors: &[TensorBinding<'_>],
    ) -> Result<(), RebindError> {
        self.check_known(tensors)?;
        check_bindings(tensors)?;
        let buffers = Buffers::of(tensors);
        let layouts = buffers.layouts_of(tensors, &self.tensors, rules);
        let plan = Plan::apart(&layouts, self.kernels.device_limits());
        let plan = plan.map_err(|error| error.named(|index| self.tensors.name_of(index)));
        let plan = plan.map_err(BuildError::from)?;

        let mut state = vec![None; plan.pieces.len()];
        let mut moved = Vec::new();
        for (index, piece) in plan.pieces.iter().enumerate() {
            match self.state_of_same(&plan, piece) {
                Some(buffer) => state[index] = Some(buffer.clone()),
                None if piece.state.is_some() => moved.push(index),
                None => {}
            }
        }
        for index in &moved {
            for part in &plan.parts[plan.pieces[*index].parts.clone()] {
                self.check_moves(&plan, part)?;
            }
        }
        let fresh = allocate_state(&self.kernels, &plan, rules, &moved)?;
        for (index, buffer) in moved.iter().zip(fresh) {
            state[*index] = buffer;
        }
        let made = &self.bound.made;
        let mut bound = Bound::new(&self.kernels, rules, &buffers, &plan, &state, made)?;
        let chunks = sums_of(&self.kernels, rules, &plan, &mut bound)?;
        let targets = moved.iter().filter_map(|index| {
            let parts = &plan.parts[plan.pieces[*index].parts.clone()];
            Some((state[*index].as_ref()?, parts))
        });
        let moves = targets.flat_map(|(target, parts)| {
            parts
                .iter()
                .flat_map(|part| self.moves_to(&plan, part, target))
        });
        let moves: Vec<_> = moves.collect();
        let moves = match moves.is_empty() {
            true => None,
            false => Some(Moves::new(&self.kernels, moves)?),
        };
        if plan.max_dispatches() > self.plan.max_dispatches() {
            self.ring = new_ring(&self.kernels, &plan)?;
        }
        if let Some(mut moves) = moves {
            let submission = self.submissions.of_encoder(encoder);
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label: Some("wgpu_optim.rebind"),
                timestamp_writes: None,
            });
            // What has moved before moves on.
            self.record_moves(&mut pass, &submission);
            moves.record(&mut pass, &submission);
            self.moves.push(moves);
        }
        self.max_partials = Default::default();
        (self.plan, self.state, self.bound) = (plan, state, bound);
        self.params = ParamsPlace::all(tensors, &self.tensors);
        (self.chunks, self.controlled) = (chunks, None);
        self.tensors.set_absent(&absent(&layouts));
        self.set_stale();
        Ok(())
    }

    /// Checks that the optimizer has tensors of these names and shapes, each once.
    fn check_known(&self, tensors: &[TensorBinding<'_>]) -> Result<(), RebindError> {
        let mut seen = vec![false; self.tensors.as_slice().len()];
        for tensor in tensors {
            let name = || tensor.name.to_owned();
            let index = self.tensors.index_of(tensor.name);
            let index = index.ok_or_else(|| UnknownTensor { tensor: name() })?;
            let expected = &self.tensors.as_slice()[index].shape;
            if tensor.shape != *expected {
                return Err(RebindError::Shape {
                    tensor: name(),
                    expected: expected.clone(),
                    actual: tensor.shape.clone(),
                });
            }
            let storage = self.tensors.as_slice()[index].storage;
            for (role, expected, actual) in [
                ("params", storage.params, tensor.params_type),
                ("grads", storage.grads, tensor.grads_type),
            ] {
                if expected != actual {
                    return Err(RebindError::Stored {
                        tensor: name(),
                        role,
                        expected: expected.name(),
                        actual: actual.name(),
                    });
                }
            }
            if std::mem::replace(&mut seen[index], true) {
                return Err(BuildError::from(DuplicateName { tensor: name() }).into());
            }
        }
        Ok(())
    }

    /// The state of a piece of another plan, if a piece with the same elements in the same sections has it now.
    fn state_of_same(&self, plan: &Plan, piece: &Piece) -> Option<&wgpu::Buffer> {
        let [part] = &plan.parts[piece.parts.clone()] else {
            return None;
        };
        let mut parts = self.plan.parts_of(part.tensor).iter();
        let before = parts.find(|before| before.elems == part.elems)?;
        let alone = &self.plan.pieces[before.piece];
        let same = alone.parts.len() == 1 && alone.state == piece.state;
        self.state[before.piece].as_ref().filter(|_| same)
    }

    /// The moves that bring the state of a part of another plan into its buffer.
    fn moves_to<'o>(
        &'o self,
        plan: &'o Plan,
        to: &'o Part,
        target: &'o wgpu::Buffer,
    ) -> impl Iterator<Item = Move> + 'o {
        self.words_to(plan, to)
            .filter_map(move |(piece, from_bytes, to_bytes, size_bytes)| {
                Some(Move {
                    source: self.state[piece].clone()?,
                    target: target.clone(),
                    from_bytes,
                    to_bytes,
                    size_bytes,
                })
            })
    }

    /// The moves of the state of a part of another plan: from which piece and byte, to which byte, how many bytes.
    fn words_to<'o>(
        &'o self,
        plan: &'o Plan,
        to: &'o Part,
    ) -> impl Iterator<Item = (usize, u64, u64, u64)> + 'o {
        let codecs = self.tensors.as_slice()[to.tensor].storage.state;
        let parts = self.plan.parts_of(to.tensor).iter();
        let sections = 0..codecs.len();
        let pairs =
            parts.flat_map(move |from| sections.clone().map(move |section| (from, section)));
        pairs.filter_map(move |(from, section)| {
            let start = from.elems.start.max(to.elems.start);
            let end = from.elems.end.min(to.elems.end);
            let elem_bytes = codecs[section].elem_bytes();
            let place = |plan: &Plan, part: &Part| {
                let bytes = plan.state_bytes_of(part, section)?;
                Some(bytes.start + (start - part.elems.start) * elem_bytes)
            };
            let (from_bytes, to_bytes) = place(&self.plan, from).zip(place(plan, to))?;
            // What shares the last word is nobody's.
            let size = (end.checked_sub(start)? * elem_bytes).next_multiple_of(4);
            (size > 0).then_some((from.piece, from_bytes, to_bytes, size))
        })
    }

    /// Checks that the state of a part can move: moves are by the word.
    fn check_moves(&self, plan: &Plan, to: &Part) -> Result<(), RebindError> {
        let mut moves = self.words_to(plan, to);
        if moves.any(|(_, from, to, _)| !from.is_multiple_of(4) || !to.is_multiple_of(4)) {
            return Err(RebindError::HalfWord {
                tensor: self.tensors.as_slice()[to.tensor].name.clone(),
            });
        }
        Ok(())
    }
}
