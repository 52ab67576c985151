//! The GPU optimizer: tensors, state, `step(encoder)`.

mod classes;
mod controlled;
mod rebind;
mod transfer;

use std::fmt;
use std::sync::OnceLock;

use crate::gpu::binding::{TensorBinding, check_bindings};
use crate::gpu::bound::{Bound, Buffers, absent, allocate_state, new_ring};
use crate::gpu::error::{BuildError, StepError};
use crate::gpu::error_scope::LOST;
use crate::gpu::fill::Fill;
use crate::gpu::kernels::{Kernels, SCALARS_GROUP, TENSORS_GROUP};
use crate::gpu::ledger::Ledger;
use crate::gpu::moves::Moves;
use crate::gpu::scalars::{UniformRing, Uniforms, WideScalars};
use crate::gpu::signature::check_signature;
use crate::gpu::source::check_scalars;
use crate::gpu::submission::{Fate, Submission, Submissions};
use crate::plan::{Dispatch, Plan, Target};
use crate::rules::sgd::SgdConfig;
use crate::rules::{ConfigError, GroupError, Groups, ParamGroups, Rule, Scalars, Slot, Start};
use crate::state::{Tensor, TensorSpec, Tensors, UnknownTensor};
use crate::storage::Key;
use classes::Classes;
use controlled::{DeviceCounts, UnderControl};
pub use transfer::StateSlice;

/// The update of a [`Rule`] over tensors on the GPU, recorded into the caller's encoder.
///
/// Holds the state (a velocity, say) and the applied-step counts. [`step`](Self::step) records; it never submits, polls,
/// maps, compiles, or allocates GPU memory after the first step.
///
/// A step whose encoder is dropped, or finished and its command buffer dropped, has never happened: parameters, state,
/// counts and random bits go on as if it had not been recorded. Steps that were recorded after it and before it was
/// dropped keep the scalars that they were recorded with: a bias correction may be one step ahead there.
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
    ledger: Ledger,
    /// Whether a tensor was frozen or thawed since the last step.
    is_refrozen: bool,
    submissions: Submissions,
    plan: Plan,
    /// One per piece of the plan, where its rule keeps slots.
    state: Vec<Option<wgpu::Buffer>>,
    bound: Bound,
    /// State on its way into other buffers.
    moves: Vec<Moves>,
    /// The kernel by which state is made of the parameters anew.
    fill: Option<Fill>,
    classes: Classes<Class>,
    /// The encoder that has the scalars of the next step.
    prepared: Option<Submission>,
    /// On the uniform path only.
    ring: Option<UniformRing>,
    device_counts: DeviceCounts,
    /// The most partial sums that a norm of its gradients can have.
    max_partials: OnceLock<u64>,
    /// From the first step under a control on.
    controlled: Option<Box<UnderControl>>,
    /// Dispatches of the last recorded step.
    recorded: usize,
}

/// What tensors have in common that share a dispatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Class {
    frame: FrameClass,
    /// As their rule counts steps.
    phase: u64,
}

/// The part of it that the scalars of the frame depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct FrameClass {
    group: usize,
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
        let is_of_params = |slot: &Slot| slot.start == Start::Params;
        let has_masters = host_tensors.as_slice().iter().any(Tensor::has_masters);
        let fills = has_masters
            || groups
                .configs()
                .any(|config| config.slots().kept().any(is_of_params));
        let fill = match fills {
            true => Some(Fill::new(kernels)?),
            false => None,
        };
        let ring = new_ring(kernels, &plan)?;
        host_tensors.set_absent(&absent(&layouts));
        Ok(Self {
            max_partials: OnceLock::new(),
            kernels: kernels.clone(),
            groups,
            ledger: Ledger::new(host_tensors.as_slice().len()),
            tensors: host_tensors,
            is_refrozen: true,
            submissions: Submissions::default(),
            plan,
            state,
            bound,
            moves: Vec::new(),
            fill,
            classes: Classes::new(),
            prepared: None,
            ring,
            device_counts: DeviceCounts::default(),
            controlled: None,
            recorded: 0,
        })
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

    /// How many steps have been recorded, whatever was frozen: the position in a schedule. One whose encoder was dropped
    /// does not count.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.ledger.steps()
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

    /// How many steps have been applied to a tensor: those recorded, without those whose encoder was dropped, and of those
    /// under a control the ones that are known to have been applied, by what has been read so far
    /// ([`GpuControl::read`](crate::GpuControl::read), later steps, [`state`](Self::state)).
    #[must_use]
    pub fn applied_steps(&self, tensor: &str) -> Option<u64> {
        let index = self.tensors.index_of(tensor)?;
        Some(
            self.ledger
                .known_by(index, self.device_counts.report_of(index)),
        )
    }

    /// Tensors have changed otherwise than by a step.
    fn set_stale(&mut self) {
        self.is_refrozen = true;
        self.set_recounted();
    }

    /// Counts have changed otherwise than by a step.
    fn set_recounted(&mut self) {
        self.classes.set_stale();
        if let Some(under) = &mut self.controlled {
            under.classes.set_stale();
        }
        self.set_unprepared();
    }

    /// What has been recorded for the next step does not hold any more.
    fn set_unprepared(&mut self) {
        self.prepared = None;
        if let Some(under) = &mut self.controlled {
            under.staged = None;
        }
    }

    /// Takes over what has become of recorded steps, as far as that is known by now.
    fn settle(&mut self) {
        if std::mem::take(&mut self.is_refrozen) {
            let tensors = self.tensors.as_slice().iter();
            let taking_part = tensors.map(|tensor| !tensor.is_left_out());
            self.ledger.set_taking_part(taking_part);
        }
        self.learn();
        if self.ledger.settle() {
            self.set_recounted();
        }
        if self.moves.iter().any(Moves::are_made) {
            // Moves are made in their order.
            let made = self.moves.iter().rposition(Moves::are_made);
            self.moves.drain(..=made.unwrap_or(0));
        }
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
        let submission = self.submissions.of_encoder(encoder);
        self.prepare_for(encoder, &submission)?;
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("wgpu_optim.step"),
            timestamp_writes: None,
        });
        self.record_dispatches(&mut pass, submission);
        Ok(())
    }

    /// Records what the next [`record`](Self::record) needs before its pass begins: on a device without immediates
    /// the copy of the scalars, else nothing.
    ///
    /// # Errors
    /// [`StepError::Scalars`] as [`step`](Self::step); then nothing has been recorded.
    pub fn prepare(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<(), StepError> {
        if self.ring.is_none() {
            return self.refresh();
        }
        let submission = self.submissions.of_encoder(encoder);
        self.prepare_for(encoder, &submission)
    }

    fn prepare_for(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        submission: &Submission,
    ) -> Result<(), StepError> {
        self.refresh()?;
        if let Some(ring) = &mut self.ring {
            if self.kernels.has_seen_loss() {
                return Err(StepError::Scalars {
                    message: LOST.to_owned(),
                });
            }
            let dispatches = self.classes.dispatches().iter().enumerate();
            for (slot, (dispatch, class)) in dispatches {
                let (groups, tensors) = (&self.groups, &self.tensors);
                let class = self.classes.key(*class);
                let uniforms = uniforms(groups, tensors, &self.ledger, &self.plan, dispatch, class);
                ring.set(slot, uniforms.as_bytes());
            }
            ring.record(self.kernels.device(), encoder)?;
        }
        self.prepared = Some(submission.clone());
        Ok(())
    }

    /// Records one step into a compute pass that the caller has open. Leaves its own pipeline and bind groups set.
    ///
    /// With immediates any number of steps may go into one pass, and [`prepare`](Self::prepare) is not needed.
    /// Without, each step needs a `prepare` before the pass begins, after the last change of learning rate,
    /// momentum or frozen tensors.
    ///
    /// # Errors
    /// [`StepError::NotPrepared`] on a device without immediates if that `prepare` is missing, or its encoder was dropped;
    /// then nothing has been recorded.
    pub fn record(&mut self, pass: &mut wgpu::ComputePass<'_>) -> Result<(), StepError> {
        let is_prepared = |prepared: &Submission| prepared.fate() != Fate::Dropped;
        if self.ring.is_some() && !self.prepared.as_ref().is_some_and(is_prepared) {
            return Err(StepError::NotPrepared);
        }
        if self.ring.is_none() {
            self.refresh()?;
        }
        let submission = self.submissions.of_pass(pass);
        self.record_dispatches(pass, submission);
        Ok(())
    }

    /// Records the dispatches of the step that has been prepared.
    fn record_dispatches(&mut self, pass: &mut wgpu::ComputePass<'_>, submission: Submission) {
        self.moves
            .iter_mut()
            .for_each(|moves| moves.record(pass, &submission));
        let mut current = None;
        for (slot, (dispatch, class)) in self.classes.dispatches().iter().enumerate() {
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
                    let class = self.classes.key(*class);
                    let uniforms = uniforms(groups, tensors, &self.ledger, plan, dispatch, class);
                    pass.set_immediates(0, uniforms.as_bytes());
                }
            }
            let [x, y] = dispatch.workgroups;
            pass.dispatch_workgroups(x, y, 1);
        }
        self.set_unprepared();
        self.recorded = self.classes.dispatches().len();
        self.ledger.record(submission);
    }

    /// Makes sure that the host knows how many steps have been applied, and that the dispatches are those of the next step.
    fn refresh(&mut self) -> Result<(), StepError> {
        self.settle();
        if self.ledger.are_unread() {
            return Err(StepError::Unread);
        }
        let (tensors, groups, ledger) = (self.tensors.as_slice(), &self.groups, &self.ledger);
        let class_of = |index: usize| {
            let tensor = &tensors[index];
            (!tensor.is_left_out()).then(|| Class {
                frame: FrameClass::of(index, tensor),
                phase: groups.config(tensor.group).phase(ledger.most(index)),
            })
        };
        let progress = |index| ledger.most(index);
        let classes = &mut self.classes;
        if classes.refresh(&self.plan, tensors.len(), class_of, progress) {
            classes.sort_by_pipeline(&self.bound, |class| class.frame.group);
        }
        Ok(())
    }
}

impl FrameClass {
    fn of(index: usize, tensor: &Tensor) -> Self {
        Self {
            group: tensor.group,
            tensor: tensor.storage.is_stochastic.then_some(index),
        }
    }
}

/// The scalars of a dispatch over tensors of a class.
fn uniforms<R: Rule>(
    groups: &Groups<R>,
    tensors: &Tensors,
    ledger: &Ledger,
    plan: &Plan,
    dispatch: &Dispatch,
    class: &Class,
) -> Uniforms {
    let scalars = groups.config(class.frame.group).scalars(class.phase);
    let key = class.frame.tensor.map_or_else(Key::default, |index| {
        let rounding = groups.rounding(class.frame.group);
        tensors.as_slice()[index].key(rounding, ledger.most(index))
    });
    uniforms_of(&scalars, key, plan, dispatch, class.frame.tensor)
}

/// A rule's scalars, and behind them those of the frame.
fn uniforms_of(
    scalars: &Scalars,
    key: Key,
    plan: &Plan,
    dispatch: &Dispatch,
    tensor: Option<usize>,
) -> Uniforms {
    let piece = match dispatch.target {
        Target::Piece(piece) => piece,
        Target::Batch { batch, .. } => plan.batches[batch].pieces[0],
    };
    let piece = &plan.pieces[piece];
    let wide = (!piece.storage.is_f32()).then(|| {
        let mut parts = plan.parts[piece.parts.clone()].iter();
        let part = parts.find(|part| tensor == Some(part.tensor));
        let index = part.map(|part| {
            let before = part.start + piece.params.first_elem;
            (part.elems.start as u32).wrapping_sub(before)
        });
        WideScalars {
            index: index.unwrap_or(0),
            key,
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
