//! The recorder of an optimizer: everything but its rules' configurations.

use std::sync::OnceLock;

use super::classes::Classes;
use super::controlled::{DeviceCounts, UnderControl};
use crate::gpu::binding::{TensorBinding, check_bindings};
use crate::gpu::bound::{Bound, Buffers, absent, allocate_state, new_ring};
use crate::gpu::chunks::{ChunkBindings, ChunkTable};
use crate::gpu::control::StagedStep;
use crate::gpu::error::{BuildError, StepError};
use crate::gpu::error_scope::{LOST, checked};
use crate::gpu::fill::Fill;
use crate::gpu::kernels::Kernels;
use crate::gpu::ledger::Ledger;
use crate::gpu::moves::Moves;
use crate::gpu::pass::{self, Call, Decision};
use crate::gpu::rules::GroupRules;
use crate::gpu::scalars::UniformRing;
use crate::gpu::submission::{Fate, Submission, Submissions};
use crate::gpu::sums::SUMS_BINDINGS;
use crate::plan::{Chunked, Dispatch, Plan, Target};
use crate::rules::Scalars;
use crate::state::{Section, Tensor, Tensors};
use crate::storage::Key;
use crate::wgsl::scalars::{Uniforms, WideScalars};

/// Records the steps of an optimizer into encoders, whatever its rules are.
pub struct Recorder {
    pub(super) kernels: Kernels,
    pub(super) tensors: Tensors,
    pub(super) ledger: Ledger,
    /// Whether a tensor was frozen or thawed since the last step.
    is_refrozen: bool,
    pub(super) submissions: Submissions,
    pub(super) plan: Plan,
    /// The parameters of each tensor that lies somewhere.
    pub(super) params: Vec<Option<ParamsPlace>>,
    /// One per piece of the plan, where its rule keeps slots.
    pub(super) state: Vec<Option<wgpu::Buffer>>,
    pub(super) bound: Bound,
    /// State on its way into other buffers.
    pub(super) moves: Vec<Moves>,
    /// The kernel by which state is made of the parameters anew.
    pub(super) fill: Option<Fill>,
    classes: Classes<Class>,
    /// The table of dispatches in chunks and its bindings: from the first frozen tensor on, or where a rule takes sums.
    pub(super) chunks: Option<(ChunkTable, ChunkBindings)>,
    /// The number of times that tensors or counts have changed otherwise than by a step.
    pub(super) revision: u64,
    pub(super) prepared: Prepared,
    /// On the uniform path only.
    pub(super) ring: Option<UniformRing>,
    pub(super) device_counts: DeviceCounts,
    /// The most partial sums that a norm of its gradients can have, and that those of its tensors can.
    pub(super) max_partials: [OnceLock<u64>; 2],
    /// From the first step under a control on.
    pub(super) controlled: Option<Box<UnderControl>>,
    /// Dispatches of the last recorded step.
    pub(super) recorded: usize,
}

/// Where the parameters of a tensor start.
#[derive(Clone, Debug)]
pub(super) struct ParamsPlace {
    pub(super) buffer: wgpu::Buffer,
    pub(super) offset_bytes: u64,
}

impl ParamsPlace {
    /// The places of all tensors, of which these have one.
    pub(super) fn all(bindings: &[TensorBinding<'_>], tensors: &Tensors) -> Vec<Option<Self>> {
        let mut places = vec![None; tensors.as_slice().len()];
        for binding in bindings {
            if let Some(index) = tensors.index_of(binding.name) {
                places[index] = Some(Self {
                    buffer: binding.params.clone(),
                    offset_bytes: binding.params_offset_bytes,
                });
            }
        }
        places
    }
}

/// The next step, as far as it has been prepared.
pub(super) enum Prepared {
    /// Not at all, or something has changed since.
    Nothing,
    /// A step without a control: an encoder has its scalars.
    Step(Submission),
    /// A step under a control.
    Controlled(StagedStep),
}

/// The key of tensors that share a dispatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Class {
    frame: FrameClass,
    /// The phase of their rule.
    phase: u64,
}

/// The part of a class that the scalars of the frame depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct FrameClass {
    pub(super) group: usize,
    /// The tensor, where something is rounded by random bits of its own.
    pub(super) tensor: Option<usize>,
}

impl Recorder {
    /// The recorder of some tensors, of which these have a place, whose names are known.
    pub(super) fn new(
        kernels: &Kernels,
        rules: &dyn GroupRules,
        mut tensors: Tensors,
        bindings: &[TensorBinding<'_>],
    ) -> Result<Self, BuildError> {
        check_bindings(bindings)?;
        if kernels.is_lost() {
            return Err(BuildError::Device {
                message: LOST.to_owned(),
            });
        }
        let buffers = Buffers::of(bindings);
        let layouts = buffers.layouts_of(bindings, &tensors, rules);
        let plan = Plan::new(&layouts, kernels.device_limits());
        let plan = plan.map_err(|error| error.named(|index| tensors.name_of(index)))?;
        if plan.has_sums() {
            kernels.check_storage_buffers(SUMS_BINDINGS)?;
        }
        let all: Vec<_> = (0..plan.pieces.len()).collect();
        let state = allocate_state(kernels, &plan, rules, &all)?;
        let mut bound = Bound::new(kernels, rules, &buffers, &plan, &state, &[])?;
        let chunks = sums_of(kernels, rules, &plan, &mut bound)?;
        let has_any_of_params = |tensor: &Tensor| {
            let slots = rules.slots(tensor.group);
            Section::all(&slots, &tensor.storage).any(|section| section.is_of_params())
        };
        let fill = match tensors.as_slice().iter().any(has_any_of_params) {
            true => Some(Fill::new(kernels)?),
            false => None,
        };
        let ring = new_ring(kernels, &plan)?;
        tensors.set_absent(&absent(&layouts));
        Ok(Self {
            max_partials: Default::default(),
            kernels: kernels.clone(),
            ledger: Ledger::new(tensors.as_slice().len()),
            params: ParamsPlace::all(bindings, &tensors),
            tensors,
            is_refrozen: true,
            submissions: Submissions::default(),
            plan,
            state,
            bound,
            moves: Vec::new(),
            fill,
            classes: Classes::new(),
            chunks,
            revision: 0,
            prepared: Prepared::Nothing,
            ring,
            device_counts: DeviceCounts::default(),
            controlled: None,
            recorded: 0,
        })
    }

    pub(crate) fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// Tensors have changed otherwise than by a step.
    pub(super) fn set_stale(&mut self) {
        self.is_refrozen = true;
        self.set_recounted();
    }

    /// Counts have changed otherwise than by a step.
    pub(super) fn set_recounted(&mut self) {
        self.revision += 1;
        self.prepared = Prepared::Nothing;
    }

    /// Builds what steps need that leave tensors out, so that these do not split the dispatches of a piece into many.
    pub(super) fn build_chunks(&mut self, rules: &dyn GroupRules) {
        if self.chunks.is_some() || self.plan.max_chunks() == 0 || !self.kernels.can_chunk() {
            return;
        }
        // Where it cannot be built dispatches are split.
        self.chunks = build_chunks(&self.kernels, rules, &self.plan, &mut self.bound).ok();
    }

    /// Takes over what has become of recorded steps, as far as that is known by now.
    pub(super) fn settle(&mut self) {
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

    /// Records one step and, on a device without immediates, the copy of its scalars before it.
    pub(super) fn step(
        &mut self,
        rules: &dyn GroupRules,
        encoder: &mut wgpu::CommandEncoder,
    ) -> Result<(), StepError> {
        let submission = self.submissions.of_encoder(encoder);
        self.prepare_for(rules, encoder, &submission)?;
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("wgpu_optim.step"),
            timestamp_writes: None,
        });
        self.record_dispatches(rules, &mut pass, submission);
        Ok(())
    }

    /// Records what a step needs before its pass begins.
    pub(super) fn prepare(
        &mut self,
        rules: &dyn GroupRules,
        encoder: &mut wgpu::CommandEncoder,
    ) -> Result<(), StepError> {
        if self.ring.is_none() && self.chunks.is_none() {
            return self.refresh(rules, Chunked::Never);
        }
        let submission = self.submissions.of_encoder(encoder);
        self.prepare_for(rules, encoder, &submission)
    }

    fn prepare_for(
        &mut self,
        rules: &dyn GroupRules,
        encoder: &mut wgpu::CommandEncoder,
        submission: &Submission,
    ) -> Result<(), StepError> {
        let chunked = match &self.chunks {
            Some(_) => Chunked::ByClass,
            None => Chunked::Never,
        };
        self.refresh(rules, chunked)?;
        let copies = self.ring.is_some() || !self.classes.chunks().is_empty();
        if copies && self.kernels.has_seen_loss() {
            return Err(StepError::Scalars {
                message: LOST.to_owned(),
            });
        }
        let (tensors, ledger) = (&self.tensors, &self.ledger);
        let (plan, classes) = (&self.plan, &self.classes);
        let uniforms_of = |call| uniforms(rules, tensors, ledger, plan, classes, call);
        let (device, calls) = (self.kernels.device(), classes.dispatches().len());
        pass::prepare(&mut self.ring, device, encoder, calls, uniforms_of)?;
        if let Some((table, _)) = &mut self.chunks {
            table.prepare(device, encoder, classes.chunks(), plan)?;
        }
        self.prepared = Prepared::Step(submission.clone());
        Ok(())
    }

    /// Records a step into a pass that is open.
    pub(super) fn record(
        &mut self,
        rules: &dyn GroupRules,
        pass: &mut wgpu::ComputePass<'_>,
    ) -> Result<(), StepError> {
        match &self.prepared {
            Prepared::Step(prepared) if prepared.fate() != Fate::Dropped => {}
            // Nobody has sent chunks.
            _ if self.ring.is_none() && !self.plan.has_sums() => {
                self.refresh(rules, Chunked::Never)?;
            }
            _ => return Err(StepError::NotPrepared),
        }
        let submission = self.submissions.of_pass(pass);
        self.record_dispatches(rules, pass, submission);
        Ok(())
    }

    /// Records the dispatches of the step that has been prepared.
    fn record_dispatches(
        &mut self,
        rules: &dyn GroupRules,
        pass: &mut wgpu::ComputePass<'_>,
        submission: Submission,
    ) {
        self.record_moves(pass, &submission);
        let bound = &self.bound;
        let (tensors, ledger) = (&self.tensors, &self.ledger);
        let (plan, classes) = (&self.plan, &self.classes);
        let uniforms_of = |call| uniforms(rules, tensors, ledger, plan, classes, call);
        let group = self.kernels.scalar_path().control_group();
        let chunks = self.chunks.as_ref();
        let dispatches = classes.dispatches();
        let calls = dispatches.iter().map(|(dispatch, _)| {
            let (pipeline, tensors) = bound.of_dispatch(&bound.pipelines, dispatch);
            let chunks = chunks.filter(|_| dispatch.access.is_chunked());
            Call {
                pipeline,
                tensors,
                decision: chunks.map(|(_, bindings)| Decision {
                    group,
                    bindings: bindings.of(plan, dispatch),
                    offset_bytes: None,
                }),
                workgroups: dispatch.workgroups,
            }
        });
        let ring = self.ring.as_ref();
        let sums = chunks.map_or(0, |(table, bindings)| {
            let calls = table.sum_calls(group, bindings, plan, bound, dispatches);
            pass::record(pass, ring, calls, uniforms_of) + table.record_totals(pass)
        });
        let recorded = pass::record(pass, ring, calls.enumerate(), uniforms_of);
        self.prepared = Prepared::Nothing;
        self.recorded = sums + recorded;
        self.ledger.record(submission);
    }

    /// Records the moves of state that are still to be made, in front of what is recorded next.
    pub(super) fn record_moves(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        submission: &Submission,
    ) {
        for moves in &mut self.moves {
            moves.record(pass, submission);
        }
    }

    /// Makes sure that the host knows how many steps have been applied, and that the dispatches are those of the next step.
    fn refresh(&mut self, rules: &dyn GroupRules, chunked: Chunked) -> Result<(), StepError> {
        self.settle();
        if self.ledger.are_unread() {
            return Err(StepError::Unread);
        }
        let (tensors, ledger) = (self.tensors.as_slice(), &self.ledger);
        let class_of = |index: usize| {
            let tensor = &tensors[index];
            (!tensor.is_left_out()).then(|| Class {
                frame: FrameClass::of(index, tensor),
                phase: rules.phase(tensor.group, ledger.most(index)),
            })
        };
        let progress = |index| ledger.most(index);
        let classes = &mut self.classes;
        let (plan, count) = (&self.plan, tensors.len());
        if classes.refresh(self.revision, plan, count, chunked, class_of, progress) {
            classes.sort_by_pipeline(&self.bound, |class| class.frame.group);
        }
        Ok(())
    }
}

/// Builds the table of a plan in chunks, and compiles their kernels.
fn build_chunks(
    kernels: &Kernels,
    rules: &dyn GroupRules,
    plan: &Plan,
    bound: &mut Bound,
) -> Result<(ChunkTable, ChunkBindings), BuildError> {
    let pipelines = &mut bound.pipelines;
    let table = ChunkTable::new(kernels, rules, plan, pipelines, |variant| variant)?;
    let bindings = checked(kernels.device(), || table.bind(kernels, None))?;
    Ok((table, bindings))
}

/// Builds the table of a plan in chunks, where a rule takes sums.
pub(super) fn sums_of(
    kernels: &Kernels,
    rules: &dyn GroupRules,
    plan: &Plan,
    bound: &mut Bound,
) -> Result<Option<(ChunkTable, ChunkBindings)>, BuildError> {
    if !plan.has_sums() {
        return Ok(None);
    }
    build_chunks(kernels, rules, plan, bound).map(Some)
}

impl FrameClass {
    pub(super) fn of(index: usize, tensor: &Tensor) -> Self {
        Self {
            group: tensor.group,
            tensor: tensor.storage.is_stochastic.then_some(index),
        }
    }
}

/// The scalars of a dispatch.
fn uniforms(
    rules: &dyn GroupRules,
    tensors: &Tensors,
    ledger: &Ledger,
    plan: &Plan,
    classes: &Classes<Class>,
    dispatch: usize,
) -> Uniforms {
    let (dispatch, class) = &classes.dispatches()[dispatch];
    let Class { frame, phase } = classes.key(*class);
    let scalars = rules.scalars(frame.group, *phase);
    let key = frame.tensor.map_or_else(Key::default, |index| {
        let rounding = rules.rounding(frame.group);
        tensors.as_slice()[index].key(rounding, ledger.most(index))
    });
    uniforms_of(&scalars, key, plan, dispatch, frame.tensor)
}

/// A rule's scalars, and behind them those of the frame.
pub(super) fn uniforms_of(
    scalars: &Scalars,
    key: Key,
    plan: &Plan,
    dispatch: &Dispatch,
    tensor: Option<usize>,
) -> Uniforms {
    let (piece, tensor_mask) = match dispatch.target {
        Target::Piece(piece) => (piece, 0),
        Target::Batch { batch, mask } => {
            let batch = &plan.batches[batch];
            (batch.pieces[0], batch.tensor_mask(mask))
        }
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
    Uniforms::new(scalars, dispatch, tensor_mask, wide)
}
