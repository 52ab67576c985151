//! The GPU optimizer: tensors, state, `step(encoder)`.

mod controlled;

use std::fmt;
use std::ops::Range;

use crate::gpu::binding::{TensorBinding, check_bindings};
use crate::gpu::bound::{Bound, Buffers, absent, allocate_state, new_ring};
use crate::gpu::error::{BuildError, RebindError, StepError};
use crate::gpu::error_scope::LOST;
use crate::gpu::kernels::{Kernels, SCALARS_GROUP, TENSORS_GROUP};
use crate::gpu::readback;
use crate::gpu::scalars::{UniformRing, Uniforms, WideScalars};
use crate::gpu::signature::check_signature;
use crate::gpu::source::check_scalars;
use crate::plan::{Dispatch, ELEM_BYTES, Part, Piece, Plan, Target};
use crate::rules::sgd::SgdConfig;
use crate::rules::{ConfigError, GroupError, Groups, ParamGroups, Rule, Scalars};
use controlled::{Counts, UnderControl};

use crate::state::{
    DuplicateName, OptimizerState, StateError, TensorSpec, TensorState, Tensors, UnknownTensor,
};
use crate::storage::{Key, MASTER_PARAMS, Masters, PARAMS_REST, StorageType, rest};

/// The update of a [`Rule`] over tensors on the GPU, recorded into the caller's encoder.
///
/// Holds the state (a velocity, say) and the applied-step counts. [`step`](Self::step) records; it never submits, polls,
/// maps, compiles, or allocates GPU memory after the first step. A host-side step count moves when a step is
/// recorded, so an encoder that holds a step has to be submitted.
///
/// ```
/// use wgpu_optim::{AdapterRequest, Gpu, GpuOptimizer, Kernels, SgdConfig, TensorBinding, readback};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default())?;
/// // Your own buffers, or:
/// let params = readback::storage_buffer(&device, &queue, "params", &[1.0, 2.0, 3.0])?;
/// let grads = readback::storage_buffer(&device, &queue, "grads", &[1.0, 0.0, -1.0])?;
///
/// let kernels = Kernels::new(&device, &queue)?; // once per device
/// let config = SgdConfig::builder(0.5).momentum(0.9).build()?;
/// let weight = TensorBinding::new("weight", &params, &grads, [3]);
/// let mut optimizer = GpuOptimizer::new(&kernels, config, &[weight])?;
///
/// let mut encoder = device.create_command_encoder(&Default::default());
/// optimizer.step(&mut encoder)?;
/// queue.submit([encoder.finish()]);
///
/// let weight = readback::download_blocking(&device, &queue, &params, 0, 3)?;
/// assert_eq!(weight, [0.5, 2.0, 3.5]);
/// # Ok(())
/// # }
/// ```
pub struct GpuOptimizer<R: Rule = SgdConfig> {
    kernels: Kernels,
    groups: Groups<R>,
    tensors: Tensors,
    plan: Plan,
    /// One per piece of the plan, where its rule keeps slots.
    state: Vec<Option<wgpu::Buffer>>,
    bound: Bound,
    /// The dispatches of a step.
    dispatches: Vec<(Dispatch, Class)>,
    /// A tensor has been frozen, let go on, or had its first step since `dispatches` was made.
    stale: bool,
    /// The scalars of the next step have been recorded.
    prepared: bool,
    /// On the uniform path only.
    ring: Option<UniformRing>,
    counts: Counts,
    /// From the first step under a control on.
    controlled: Option<Box<UnderControl>>,
    /// Dispatches of the last recorded step.
    recorded: usize,
}

/// Some elements of a slot of a tensor's state, in a buffer of the optimizer's with the usages `COPY_SRC` and `COPY_DST`.
#[derive(Clone, Debug)]
pub struct StateSlice<'o> {
    /// Which elements of the tensor.
    pub elems: Range<u64>,
    /// The buffer they lie in.
    pub buffer: &'o wgpu::Buffer,
    /// Byte offset of the first of them there.
    pub offset_bytes: u64,
    /// What they are stored as.
    pub storage: StorageType,
}

/// What tensors have in common that share a dispatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Class {
    group: usize,
    /// As their rule counts steps.
    phase: u64,
    /// Their masters start as their parameters.
    is_fresh: bool,
    /// The tensor, where something is rounded by random bits of its own.
    tensor: Option<usize>,
}

impl<R: Rule> GpuOptimizer<R> {
    /// Checks every tensor, plans the dispatches, allocates the state as its slots start and builds bind groups and
    /// pipelines. Submits nothing.
    ///
    /// # Errors
    /// [`BuildError`] naming the tensor, what was expected and what was given; nothing is left behind.
    pub fn new(
        kernels: &Kernels,
        config: R,
        tensors: &[TensorBinding<'_>],
    ) -> Result<Self, BuildError> {
        Self::with_groups(kernels, &ParamGroups::new(config), tensors)
    }

    /// The same with parameter groups. Neighbours in memory share a dispatch if they share a group.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_groups(
        kernels: &Kernels,
        groups: &ParamGroups<R>,
        tensors: &[TensorBinding<'_>],
    ) -> Result<Self, BuildError> {
        let specs = tensors.iter().map(TensorBinding::spec);
        let host_tensors = Tensors::new(groups, specs)?;
        Self::bind(kernels, groups, host_tensors, tensors)
    }

    /// An optimizer of tensors, by name and shape, that lie nowhere yet: [`rebind`](Self::rebind) says where they are.
    /// Until then steps do nothing, and a state can be loaded.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn unbound(
        kernels: &Kernels,
        groups: &ParamGroups<R>,
        tensors: impl IntoIterator<Item: Into<TensorSpec>>,
    ) -> Result<Self, BuildError> {
        Self::bind(kernels, groups, Tensors::new(groups, tensors)?, &[])
    }

    /// An optimizer of some tensors, of which these have a place, whose names are known.
    fn bind(
        kernels: &Kernels,
        groups: &ParamGroups<R>,
        mut host_tensors: Tensors,
        tensors: &[TensorBinding<'_>],
    ) -> Result<Self, BuildError> {
        check_bindings(tensors)?;
        if kernels.is_lost() {
            return Err(BuildError::Device {
                message: LOST.to_owned(),
            });
        }
        let groups = groups.groups();
        let buffers = Buffers::of(tensors);
        let layouts = buffers.layouts_of(tensors, &host_tensors);
        let plan = Plan::new(&layouts, kernels.device_limits());
        let plan = plan.map_err(|error| error.named(|index| host_tensors.name_of(index)))?;
        groups.configs().try_for_each(check_scalars)?;
        groups.configs().try_for_each(check_signature)?;
        let all: Vec<_> = (0..plan.pieces.len()).collect();
        let state = allocate_state(kernels, &plan, &groups, &all)?;
        let bound = Bound::new(kernels, &groups, &buffers, &plan, &state, &[])?;
        let ring = new_ring(kernels, &plan)?;
        host_tensors.set_absent(&absent(&layouts));
        Ok(Self {
            kernels: kernels.clone(),
            groups,
            tensors: host_tensors,
            plan,
            state,
            bound,
            dispatches: Vec::new(),
            stale: true,
            prepared: false,
            ring,
            counts: Counts::default(),
            controlled: None,
            recorded: 0,
        })
    }

    /// Binds tensors where they lie now, for engines whose pools give them other places from step to step. State, step
    /// counts and frozen tensors stay as they are. A tensor that is not among these has no place until a later call: it
    /// keeps its state, and steps leave it out as if it were frozen.
    ///
    /// Only bind groups are made whose buffers or offsets have changed. Each tensor is from now on in a piece of its
    /// own, whoever its neighbours are, and small ones still share batches. Its state moves, by copies recorded into
    /// `encoder`, only where it shared a piece before, or where its parameters start at another offset modulo the
    /// device's `min_storage_buffer_offset_alignment`. Submit `encoder` before the next step, or record that step into
    /// it. Compiles what batches of other sizes need, once per device.
    ///
    /// # Errors
    /// [`RebindError`] if the optimizer has no tensor of such a name or shape, or for what [`BuildError`] says of them;
    /// then nothing has changed, and nothing has been recorded.
    pub fn rebind(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        tensors: &[TensorBinding<'_>],
    ) -> Result<(), RebindError> {
        self.check_known(tensors)?;
        check_bindings(tensors)?;
        let buffers = Buffers::of(tensors);
        let layouts = buffers.layouts_of(tensors, &self.tensors);
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
        let fresh = allocate_state(&self.kernels, &plan, &self.groups, &moved)?;
        for (index, buffer) in moved.iter().zip(fresh) {
            state[*index] = buffer;
        }
        let made = &self.bound.made;
        let bound = Bound::new(&self.kernels, &self.groups, &buffers, &plan, &state, made)?;
        if plan.max_dispatches() > self.plan.max_dispatches() {
            self.ring = new_ring(&self.kernels, &plan)?;
        }
        for index in moved {
            for to in &plan.parts[plan.pieces[index].parts.clone()] {
                self.move_state(encoder, &plan, to, state[index].as_ref());
            }
        }
        (self.plan, self.state, self.bound) = (plan, state, bound);
        self.controlled = None;
        self.tensors.set_absent(&absent(&layouts));
        self.stale = true;
        self.prepared = false;
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

    /// The copies that bring the state of a part of another plan into its buffer: from which piece and byte, to which
    /// byte, how many.
    fn moves_to<'o>(
        &'o self,
        plan: &'o Plan,
        to: &'o Part,
    ) -> impl Iterator<Item = (usize, u64, u64, u64)> + 'o {
        let tensor = &self.tensors.as_slice()[to.tensor];
        let sections = tensor.slots as u32 + u32::from(tensor.has_masters());
        let parts = self.plan.parts_of(to.tensor).iter();
        let pairs = parts.flat_map(move |from| (0..sections).map(move |slot| (from, slot)));
        pairs.filter_map(move |(from, slot)| {
            let start = from.elems.start.max(to.elems.start);
            let end = from.elems.end.min(to.elems.end);
            let elem_bytes = plan.pieces[to.piece].state?.elem_bytes(slot);
            let place = |plan: &Plan, part: &Part| {
                let offset = plan.state_offset_bytes(part, slot)?;
                Some(offset + (start - part.elems.start) * elem_bytes)
            };
            let (from_bytes, to_bytes) = place(&self.plan, from).zip(place(plan, to))?;
            // What shares the last word is nobody's.
            let size = (end.checked_sub(start)? * elem_bytes).next_multiple_of(4);
            (size > 0).then_some((from.piece, from_bytes, to_bytes, size))
        })
    }

    /// Checks that the state of a part can move: copies are by the word.
    fn check_moves(&self, plan: &Plan, to: &Part) -> Result<(), RebindError> {
        let mut moves = self.moves_to(plan, to);
        if moves.any(|(_, from, to, _)| !from.is_multiple_of(4) || !to.is_multiple_of(4)) {
            return Err(RebindError::HalfWord {
                tensor: self.tensors.as_slice()[to.tensor].name.clone(),
            });
        }
        Ok(())
    }

    /// Records the copies that bring the state of a part of another plan into its buffer.
    fn move_state(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        plan: &Plan,
        to: &Part,
        buffer: Option<&wgpu::Buffer>,
    ) {
        for (piece, from, to, size) in self.moves_to(plan, to) {
            if let Some((source, target)) = self.state[piece].as_ref().zip(buffer) {
                encoder.copy_buffer_to_buffer(source, from, target, to, size);
            }
        }
    }

    /// The configuration, with the hyper-parameters of the next step; that of the default group where there are
    /// several.
    #[must_use]
    pub fn config(&self) -> &R {
        self.groups.default_config()
    }

    /// The configuration of one group.
    #[must_use]
    pub fn group_config(&self, group: &str) -> Option<&R> {
        self.groups.by_name(group)
    }

    /// Sets the learning rate of the steps recorded from now on, in every group by its ratio to the default group's.
    /// A group without a ratio ([`ParamGroups::with`]) keeps its own.
    ///
    /// # Errors
    /// [`ConfigError`] as [`Rule::with_lr`]; every learning rate stays as it was.
    pub fn set_lr(&mut self, lr: f64) -> Result<(), ConfigError> {
        self.set_unprepared();
        self.groups.set_lr(lr)
    }

    /// Sets the learning rate of one group, until [`set_lr`](Self::set_lr) sets it again by its ratio.
    ///
    /// # Errors
    /// [`GroupError`] if there is no such group, or as [`Rule::with_lr`]; the learning rate stays as it was.
    pub fn set_group_lr(&mut self, group: &str, lr: f64) -> Result<(), GroupError> {
        self.set_unprepared();
        self.groups.set_group_lr(group, lr)
    }

    /// Sets the momentum of the steps recorded from now on, in every group that has momentum; of Adam that is `beta1`.
    ///
    /// # Errors
    /// [`ConfigError`] as [`Rule::with_momentum`]; every momentum stays as it was.
    pub fn set_momentum(&mut self, momentum: f64) -> Result<(), ConfigError> {
        self.set_unprepared();
        self.groups.set_momentum(momentum)
    }

    /// How many steps have been recorded, whatever was frozen: the position in a schedule.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.tensors.steps()
    }

    /// Freezes a tensor, or lets it go on: a frozen tensor is left as it is by the steps recorded from now on,
    /// state and step count included.
    ///
    /// # Errors
    /// [`UnknownTensor`] if no tensor has this name.
    pub fn set_frozen(&mut self, tensor: &str, frozen: bool) -> Result<(), UnknownTensor> {
        if self.tensors.set_frozen(tensor, frozen)? {
            self.set_stale();
        }
        Ok(())
    }

    /// How many steps have been applied to a tensor: those recorded, and of those under a control the ones that are known
    /// to have been applied, by what [`GpuControl::read`](crate::GpuControl::read) has returned so far.
    #[must_use]
    pub fn applied_steps(&self, tensor: &str) -> Option<u64> {
        let index = self.tensors.index_of(tensor)?;
        Some(self.known_steps(index))
    }

    fn set_stale(&mut self) {
        self.stale = true;
        self.set_unprepared();
        if let Some(under) = &mut self.controlled {
            under.is_stale = true;
        }
    }

    /// What has been recorded for the next step does not hold any more.
    fn set_unprepared(&mut self) {
        self.prepared = false;
        if let Some(under) = &mut self.controlled {
            under.is_staged = false;
        }
    }

    /// Where a slot of a tensor's state lies, in runs of its elements, so that a program can save it or put another in
    /// its place within an encoder of its own. Nothing where the rule keeps no such slot, or there is no such tensor.
    /// [`MASTER_PARAMS`] are a slot where they are `f32`.
    pub fn state_slices(&self, tensor: &str, slot: &str) -> impl Iterator<Item = StateSlice<'_>> {
        let slot = self.tensors.get(tensor).and_then(|tensor| {
            let slots = self.groups.config(tensor.group).slots();
            let masters = tensor.storage.masters == Masters::F32;
            let mut kept = slots.kept();
            let position = kept.position(|kept| kept.name == slot);
            position.or((masters && slot == MASTER_PARAMS).then_some(tensor.slots))
        });
        let parts = self
            .tensors
            .index_of(tensor)
            .map(|tensor| self.plan.parts_of(tensor));
        let parts = parts.into_iter().flatten();
        parts.filter_map(move |part| {
            Some(StateSlice {
                elems: part.elems.clone(),
                buffer: self.state[part.piece].as_ref()?,
                offset_bytes: self.plan.state_offset_bytes(part, slot? as u32)?,
                storage: match self.plan.pieces[part.piece].state?.slots {
                    slots if slots == slot? as u32 => StorageType::F32,
                    _ => self.plan.pieces[part.piece].storage.state,
                },
            })
        })
    }

    /// Says how many steps have been applied to a tensor: what goes with a state that was put in another's place.
    ///
    /// # Errors
    /// [`UnknownTensor`] if no tensor has this name.
    pub fn set_applied_steps(&mut self, tensor: &str, steps: u64) -> Result<(), UnknownTensor> {
        self.learn();
        self.tensors.set_applied_steps(tensor, steps)?;
        self.counts.forget();
        self.set_stale();
        Ok(())
    }

    /// How the tensors are cut into pieces.
    #[must_use]
    pub const fn plan(&self) -> &Plan {
        &self.plan
    }

    /// How many dispatches the last recorded step took.
    #[must_use]
    pub fn dispatches(&self) -> usize {
        self.recorded
    }

    /// Records one step into `encoder`: one compute pass (and, where the device has no immediates, one copy of
    /// the scalars before it). The caller submits.
    ///
    /// Steps recorded one after the other apply one after the other, each with the learning rate that was set
    /// when it was recorded, in one encoder or in several submitted in that order.
    ///
    /// # Errors
    /// [`StepError::Scalars`] on a device without immediates that is lost or out of memory; then nothing has
    /// been recorded. With immediates a step cannot fail.
    pub fn step(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<(), StepError> {
        self.prepare(encoder)?;
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("wgpu_optim.step"),
            timestamp_writes: None,
        });
        self.record(&mut pass)
    }

    /// Records what the next [`record`](Self::record) needs before its pass begins: on a device without immediates
    /// the copy of the scalars, else nothing.
    ///
    /// # Errors
    /// [`StepError::Scalars`] as [`step`](Self::step); then nothing has been recorded.
    pub fn prepare(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<(), StepError> {
        self.check_counts()?;
        self.refresh_dispatches();
        if let Some(ring) = &mut self.ring {
            if self.kernels.has_seen_loss() {
                return Err(StepError::Scalars {
                    message: LOST.to_owned(),
                });
            }
            let (groups, tensors, plan) = (&self.groups, &self.tensors, &self.plan);
            for (slot, (dispatch, class)) in self.dispatches.iter().enumerate() {
                let uniforms = uniforms(groups, tensors, plan, dispatch, class);
                ring.set(slot, uniforms.as_bytes());
            }
            ring.record(self.kernels.device(), encoder)?;
        }
        self.prepared = true;
        Ok(())
    }

    /// Records one step into a compute pass that the caller has open. Leaves its own pipeline and bind groups set.
    ///
    /// With immediates any number of steps may go into one pass, and [`prepare`](Self::prepare) is not needed.
    /// Without, each step needs a `prepare` before the pass begins, after the last change of learning rate,
    /// momentum or frozen tensors.
    ///
    /// # Errors
    /// [`StepError::NotPrepared`] on a device without immediates if that `prepare` is missing; then nothing has
    /// been recorded.
    pub fn record(&mut self, pass: &mut wgpu::ComputePass<'_>) -> Result<(), StepError> {
        if self.ring.is_some() && !self.prepared {
            return Err(StepError::NotPrepared);
        }
        self.check_counts()?;
        self.refresh_dispatches();
        let mut current = None;
        for (slot, (dispatch, class)) in self.dispatches.iter().enumerate() {
            let (pipeline, bind_group) = match dispatch.target {
                Target::Piece(piece) => {
                    let pipelines = self.bound.pipelines_of(piece);
                    let pipeline = &pipelines.by_access[dispatch.access as usize];
                    (pipeline, &self.bound.pieces[&piece])
                }
                Target::Batch { batch, .. } => {
                    let (pipeline, bind_group) = &self.bound.batches[batch];
                    (pipeline, bind_group)
                }
            };
            if current != Some(pipeline) {
                pass.set_pipeline(pipeline);
                current = Some(pipeline);
            }
            pass.set_bind_group(TENSORS_GROUP, bind_group, &[]);
            match &self.ring {
                Some(ring) => ring.bind(pass, SCALARS_GROUP, slot),
                None => {
                    let (groups, tensors, plan) = (&self.groups, &self.tensors, &self.plan);
                    let uniforms = uniforms(groups, tensors, plan, dispatch, class);
                    pass.set_immediates(0, uniforms.as_bytes());
                }
            }
            let [x, y] = dispatch.workgroups;
            pass.dispatch_workgroups(x, y, 1);
        }
        for (_, class) in &mut self.dispatches {
            let config = self.groups.config(class.group);
            let next = config.phase(class.phase.saturating_add(1));
            // Where a phase lasts, tensors meet that were in different ones.
            self.stale |= next != class.phase && config.phase(next.saturating_add(1)) == next;
            class.phase = next;
            // Those meet that had masters already.
            self.stale |= std::mem::take(&mut class.is_fresh);
        }
        self.set_unprepared();
        self.recorded = self.dispatches.len();
        self.tensors.count_step();
        if let Some(under) = &mut self.controlled {
            under.is_stale = true;
            self.counts.forget();
        }
        Ok(())
    }

    /// Makes sure that the host knows how many steps have been applied.
    fn check_counts(&mut self) -> Result<(), StepError> {
        if self.tensors.are_unread() {
            self.learn();
            if self.tensors.are_unread() {
                return Err(StepError::Unread);
            }
        }
        Ok(())
    }

    /// Makes the list of dispatches anew if something has changed since the last step.
    fn refresh_dispatches(&mut self) {
        if !self.stale {
            return;
        }
        let tensors = self.tensors.as_slice();
        let groups = &self.groups;
        self.dispatches = self.plan.dispatches(|index| {
            let tensor = &tensors[index];
            (!tensor.is_left_out()).then(|| Class {
                group: tensor.group,
                phase: groups.config(tensor.group).phase(tensor.applied_steps),
                is_fresh: tensor.storage.masters == Masters::F32 && tensor.has_fresh_masters(),
                tensor: tensor.storage.is_stochastic.then_some(index),
            })
        });
        sort_by_pipeline(&mut self.dispatches, &self.bound, |class| class.group);
        self.stale = false;
    }

    /// Copies what the optimizer remembers off the device, after everything submitted so far. Submits and
    /// waits as [`readback::download`] does, under any executor.
    ///
    /// # Errors
    /// [`StateError::Transfer`] if the device is lost or out of memory.
    pub async fn state(&self) -> Result<OptimizerState<R>, StateError> {
        let (device, queue) = (self.kernels.device(), self.kernels.queue());
        let mut states = Vec::with_capacity(self.state.len());
        for buffer in &self.state {
            states.push(match buffer {
                Some(buffer) => {
                    let words = buffer.size() / ELEM_BYTES;
                    readback::read(device, queue, buffer, 0, words, <[u8]>::to_vec).await?
                }
                None => Vec::new(),
            });
        }
        let slot_of = |tensor: usize, slot: usize| {
            let values_of = |part: &Part| {
                let sections = self.plan.pieces[part.piece].state?;
                let offset_bytes = self.plan.state_offset_bytes(part, slot as u32)? as usize;
                let numel = part.numel() as usize;
                let elem_bytes = sections.elem_bytes(slot as u32) as usize;
                let size = numel * elem_bytes;
                let bytes = &states[part.piece][offset_bytes..offset_bytes + size];
                let is_rests = slot == sections.slots as usize && elem_bytes == 2;
                Some(if is_rests {
                    rest::decode(bytes)
                } else if elem_bytes == 2 {
                    sections.storage.state.decode(bytes)
                } else {
                    StorageType::F32.decode(bytes)
                })
            };
            let parts = self.plan.parts_of(tensor).iter();
            parts.filter_map(values_of).flatten().collect()
        };
        let counted = self.counted_tensors().await?;
        let tensors = counted.as_ref().unwrap_or(&self.tensors);
        Ok(tensors.state(&self.groups, slot_of))
    }

    /// Takes over a saved state of the same tensors. A slot that it comes without starts fresh, masters as the
    /// parameters at the next step. Takes effect before the commands of the next submission.
    ///
    /// Masters have to go with the parameters: of those that are `f32` the next step makes the parameters, and rests are
    /// what the parameters leave. Where rests are kept, a state that has [`MASTER_PARAMS`] will do, too.
    ///
    /// # Errors
    /// [`StateError`] if the state belongs to another form or to other tensors, by name or shape; then nothing has changed.
    /// [`StateError::Transfer`] if the device fails half-way; then the state is undefined.
    pub fn load_state(&mut self, state: &OptimizerState<R>) -> Result<(), StateError> {
        let matched = self.tensors.match_state(state, &self.groups)?;
        for index in 0..self.plan.pieces.len() {
            self.load_piece(index, &matched)?;
        }
        self.tensors.restore_counts(state.steps, &matched);
        self.counts.forget();
        self.set_stale();
        Ok(())
    }

    /// Uploads the state of a piece.
    fn load_piece(&self, index: usize, matched: &[&TensorState]) -> Result<(), StateError> {
        let (device, queue) = (self.kernels.device(), self.kernels.queue());
        let piece = &self.plan.pieces[index];
        let Some((buffer, sections)) = self.state[index].as_ref().zip(piece.state) else {
            return Ok(());
        };
        // Neighbours share words of 16-bit values, so those go up in one.
        let mut whole = vec![
            0_u8;
            if piece.storage.is_f32() {
                0
            } else {
                buffer.size() as usize
            }
        ];
        for part in &self.plan.parts[piece.parts.clone()] {
            let entry = matched[part.tensor];
            let elems = part.elems.start as usize..part.elems.end as usize;
            let slots = self.groups.config(piece.group).slots();
            let kept = slots.kept().map(|slot| (slot.name, slot.start));
            let masters = (piece.storage.masters.slot(), 0.0);
            let sections = kept.chain([masters]).take(sections.len() as usize);
            for (slot, (name, start)) in (0..).zip(sections) {
                let Some(offset) = self.plan.state_offset_bytes(part, slot) else {
                    continue;
                };
                let fresh;
                let values = match entry.slot(name) {
                    Some(saved) => &saved[elems.clone()],
                    None => {
                        fresh = vec![start; elems.len()];
                        &fresh
                    }
                };
                if piece.storage.is_f32() {
                    readback::upload(device, queue, buffer, offset, values)?;
                    continue;
                }
                let masters = entry.slot(MASTER_PARAMS).map(|saved| &saved[elems.clone()]);
                let bytes = match name {
                    PARAMS_REST => match masters {
                        Some(masters) => rest::encode(rest::of_masters(masters)),
                        None => rest::encode(rest::of_values(values)),
                    },
                    MASTER_PARAMS => StorageType::F32.encode(values.iter().copied()),
                    _ => piece.storage.state.encode(values.iter().copied()),
                };
                whole[offset as usize..offset as usize + bytes.len()].copy_from_slice(&bytes);
            }
        }
        if !whole.is_empty() {
            readback::upload_bytes(device, queue, buffer, 0, &whole)?;
        }
        Ok(())
    }
}

/// Puts dispatches in an order in which each pipeline is set once; batches come by group already.
fn sort_by_pipeline<C>(
    dispatches: &mut [(Dispatch, C)],
    bound: &Bound,
    group_of: impl Fn(&C) -> usize,
) {
    dispatches.sort_by_key(|(dispatch, class)| match dispatch.target {
        Target::Piece(piece) => Some((dispatch.access, group_of(class), bound.kind_of(piece))),
        Target::Batch { .. } => None,
    });
}

/// The scalars of a dispatch over tensors of a class.
fn uniforms<R: Rule>(
    groups: &Groups<R>,
    tensors: &Tensors,
    plan: &Plan,
    dispatch: &Dispatch,
    class: &Class,
) -> Uniforms {
    let scalars = groups.config(class.group).scalars(class.phase);
    uniforms_of(&scalars, groups, tensors, plan, dispatch, class)
}

/// Those of the frame behind a rule's.
fn uniforms_of<R: Rule>(
    scalars: &Scalars,
    groups: &Groups<R>,
    tensors: &Tensors,
    plan: &Plan,
    dispatch: &Dispatch,
    class: &Class,
) -> Uniforms {
    let piece = match dispatch.target {
        Target::Piece(piece) => piece,
        Target::Batch { batch, .. } => plan.batches[batch].pieces[0],
    };
    let piece = &plan.pieces[piece];
    let wide = (!piece.storage.is_f32()).then(|| {
        let tensor = class.tensor.map(|index| &tensors.as_slice()[index]);
        let parts = plan.parts[piece.parts.clone()].iter();
        let index = parts
            .filter(|part| class.tensor == Some(part.tensor))
            .map(|part| {
                let before = part.start + piece.params.first_elem;
                (part.elems.start as u32).wrapping_sub(before)
            });
        WideScalars {
            is_fresh: class.is_fresh,
            index: { index }.next().unwrap_or(0),
            key: tensor.map_or_else(Key::default, |tensor| {
                tensor.key(groups.rounding(class.group))
            }),
        }
    });
    Uniforms::new(scalars, dispatch, wide)
}

impl<R: Rule> fmt::Debug for GpuOptimizer<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GpuOptimizer")
            .field("groups", &self.groups)
            .field("tensors", &self.tensors.as_slice().len())
            .field("pieces", &self.plan.pieces.len())
            .finish_non_exhaustive()
    }
}
