//! Steps under a control: the host records what may come of them, and the device decides.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::classes::Classes;
use super::recorder::{FrameClass, Prepared, uniforms_of};
use super::{GpuOptimizer, Recorder};
use crate::control::{MAX_GROUP_NORMS, StepControl};
use crate::gpu::bound::Pipelines;
use crate::gpu::chunks::{ChunkBindings, ChunkTable};
use crate::gpu::control::sealed::Parts;
use crate::gpu::control::{
    ControlContext, Counted, GpuControl, Mailbox, Norm, Report, ReportOf, StagedStep, TensorClip,
    WINDOW, bind_whole,
};
use crate::gpu::error::{BuildError, StepError};
use crate::gpu::error_scope::{LOST, checked};
use crate::gpu::kernels::Kernels;
use crate::gpu::ledger::Ledger;
use crate::gpu::pass::{self, Call, Decision};
use crate::gpu::rules::GroupRules;
use crate::gpu::staged::Staged;
use crate::gpu::submission::Submission;
use crate::gpu::sums::SUMS_BINDINGS;
use crate::plan::{Chunked, Plan};
use crate::rules::Rule;
use crate::state::Tensor;
use crate::storage::Key;
use crate::wgsl::KernelVariant;
use crate::wgsl::scalars::{CONTROL_BYTES, CONTROL_SCALARS, Uniforms};

/// Bytes from one class's block to the next; `BLOCK` in `shaders/control/select.wgsl`.
const BLOCK_BYTES: u64 = 256;

/// Words of the header and of a class there.
const HEADER_WORDS: usize = 3;
const CLASS_WORDS: usize = 7;

/// Words before a rule's scalars in an entry: what else follows the applied steps.
const ENTRY_WORDS: usize = CONTROL_SCALARS.len() - 4;

/// The device's counts of an optimizer's steps under a control.
#[derive(Default)]
pub(super) struct DeviceCounts {
    /// The number of steps that have been applied to each tensor; from the first such step on.
    pub(super) counted: Option<wgpu::Buffer>,
    /// The reports of these counts that have arrived, until the recorder takes them over.
    mailbox: Arc<Mutex<Mailbox>>,
    /// The control of the last controlled step.
    control: Option<Arc<()>>,
}

impl DeviceCounts {
    fn mailbox(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The buffer of the counts, which is made at the first step under a control.
    fn buffer(&mut self, kernels: &Kernels, ledger: &Ledger) -> Result<wgpu::Buffer, BuildError> {
        if let Some(counted) = &self.counted {
            return Ok(counted.clone());
        }
        let origins = ledger.origins();
        let device = kernels.device();
        let counted = checked(device, || {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("wgpu_optim.applied_steps"),
                size: 4 * origins.len().max(1) as u64,
                usage: wgpu::BufferUsages::STORAGE
                    | wgpu::BufferUsages::COPY_SRC
                    | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        })?;
        let queue = kernels.queue();
        queue.write_buffer(&counted, 0, bytemuck::cast_slice(&origins));
        Ok(self.counted.insert(counted).clone())
    }

    /// The count of a tensor in the last report that has not been taken over.
    pub(super) fn report_of(&self, tensor: usize) -> Option<u32> {
        self.mailbox().last().map(|report| report.counted[tensor])
    }

    /// Somebody has looked, when these steps were done.
    pub(super) fn tell(&self, done: Vec<u64>, counted: Vec<u32>) {
        self.mailbox().push(Report {
            of: ReportOf::Steps(done),
            counted,
        });
    }

    /// Has the device count from elsewhere for tensors whose counts have been set.
    pub(super) fn restart(&self, queue: &wgpu::Queue, set: &[Option<u64>], ledger: &Ledger) {
        if let Some(counted) = &self.counted {
            for tensor in (0..set.len()).filter(|tensor| set[*tensor].is_some()) {
                let origin = ledger.origin(tensor).to_ne_bytes();
                queue.write_buffer(counted, 4 * tensor as u64, &origin);
            }
        }
    }
}

/// The part of a recorder that only steps under a control need.
pub(super) struct UnderControl {
    control: Arc<()>,
    pipelines: Pipelines,
    /// Whether they know of a largest gradient.
    clips_values: bool,
    norm: Norm,
    /// The norm of each parameter group.
    norm_of: Vec<u32>,
    /// The kernel that clips tensors one by one, where that is asked for.
    tensor_clip: Option<TensorClip>,
    /// For `select.wgsl`, and what that writes.
    places: Places,
    /// The table of dispatches in chunks, where there may be some.
    chunks: Option<ChunkTable>,
    classes: Classes<Class>,
    entries: Entries,
}

/// The place of each class's entries among those that are sent. Classes that differ only in the tensor that is clipped by
/// itself have the same, once.
#[derive(Default)]
struct Entries {
    /// The first entry of each class.
    starts: Vec<usize>,
    /// A class of those that share entries, in the order in which these are sent.
    classes: Vec<usize>,
}

impl Entries {
    fn lay_out(&mut self, classes: &Classes<Class>) {
        let shared = |class: usize| Class {
            clipped: None,
            ..*classes.key(class)
        };
        self.classes.clear();
        self.classes.extend(0..classes.len());
        self.classes.sort_unstable_by_key(|class| shared(*class));
        self.starts.resize(classes.len(), 0);
        let (mut start, mut end, mut last) = (0, 0, None);
        self.classes.retain(|class| {
            let key = shared(*class);
            let is_first = last != Some(key);
            if is_first {
                (start, last) = (end, Some(key));
                end += key.entries() as usize;
            }
            self.starts[*class] = start;
            is_first
        });
    }
}

/// The key of tensors that share a dispatch, whatever the device skips.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Class {
    frame: FrameClass,
    /// The tensor, where it is clipped by itself.
    clipped: Option<usize>,
    /// The number of steps that have been applied, if none was skipped; if all that may be come to the same scalars, and the
    /// next one does, their phase.
    count: u64,
    is_settled: bool,
    unread: u64,
    /// Tells tensors apart that took part in different ones of the unread steps.
    history: u32,
}

impl Class {
    fn of(
        rules: &dyn GroupRules,
        ledger: &Ledger,
        histories: Option<&[u32]>,
        control: &StepControl,
        index: usize,
        tensor: &Tensor,
    ) -> Self {
        let (most, unread) = (ledger.most(index), ledger.unread(index));
        let phase_of = |steps| rules.phase(tensor.group, steps);
        let phase = phase_of(most);
        let mut others = most.saturating_sub(unread)..=most.saturating_add(1);
        let frame = FrameClass::of(index, tensor);
        let is_settled = frame.tensor.is_none() && others.all(|steps| phase_of(steps) == phase);
        let max_norm = control.tensor_max_norm_of(rules.name(tensor.group));
        Self {
            frame,
            clipped: max_norm.map(|_| index),
            count: if is_settled { phase } else { most },
            is_settled,
            unread: if is_settled { 0 } else { unread },
            history: match histories {
                Some(histories) if !is_settled => histories[index],
                _ => 0,
            },
        }
    }

    /// The number of entries for its scalars: by how many of the last steps may have been skipped.
    fn entries(&self) -> u64 {
        self.unread.min(WINDOW) + 1
    }

    /// The most of the last steps that may have been skipped for there to be an entry: any, where all come to the same scalars.
    fn most_skipped(&self) -> u32 {
        match self.is_settled {
            true => i32::MAX as u32,
            false => (self.entries() - 1) as u32,
        }
    }
}

impl<R: Rule> GpuOptimizer<R> {
    /// Records one step under a control: as [`step`](Self::step), but the device decides whether it is applied, and what
    /// becomes of the gradients before; see [`GpuControl`] and [`StepControl`](crate::StepControl). One pass, with a copy
    /// of what the device may need before it and of what it counted after it. The caller submits.
    ///
    /// The scalars of the step follow the steps that the device has applied. The first such step builds what it needs.
    ///
    /// # Errors
    /// As [`GpuControl::step`].
    pub fn step_with(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        control: &mut GpuControl,
    ) -> Result<(), StepError> {
        control.step(encoder, &mut [self])
    }
}

impl<R: Rule> Parts for GpuOptimizer<R> {
    fn parts(&mut self) -> (&dyn GroupRules, &mut Recorder) {
        (&self.groups, &mut self.recorder)
    }
}

impl Recorder {
    /// Takes over what has been read of the device's counts.
    pub(super) fn learn(&mut self) {
        let reports = std::mem::take(&mut *self.device_counts.mailbox());
        for report in &reports {
            match &report.of {
                ReportOf::Step(step) => self.ledger.learn_report(*step, &report.counted),
                ReportOf::Steps(done) => self.ledger.learn(done, &report.counted),
            }
        }
    }

    /// The most partial sums that a norm of the gradients can have, or that those of all tensors can.
    pub(crate) fn max_partials(&self, by_tensor: bool) -> u64 {
        let max = || Norm::max_partials(&self.kernels, &self.plan, by_tensor);
        *self.max_partials[usize::from(by_tensor)].get_or_init(max)
    }

    /// The step under a control that has been prepared, if nothing has changed since.
    pub(crate) fn staged(&self) -> Option<&StagedStep> {
        match &self.prepared {
            Prepared::Controlled(staged) => Some(staged),
            _ => None,
        }
    }

    /// Records the copies that a step under a control needs, and builds what is not there yet. Returns the number of partial
    /// sums of its norm.
    pub(crate) fn stage(
        &mut self,
        rules: &dyn GroupRules,
        encoder: &mut wgpu::CommandEncoder,
        context: &ControlContext,
        staged: StagedStep,
    ) -> Result<u32, StepError> {
        if self.kernels.has_seen_loss() {
            return Err(StepError::Scalars {
                message: LOST.to_owned(),
            });
        }
        self.settle();
        let is_same = |control: &Arc<()>| Arc::ptr_eq(control, &context.identity);
        if self.ledger.are_unread() && !self.device_counts.control.as_ref().is_some_and(is_same) {
            return Err(StepError::Unread);
        }
        let counted = self.device_counts.buffer(&self.kernels, &self.ledger)?;
        let mut under = match self.controlled.take() {
            Some(under) if under.goes_with(context) => under,
            _ => Box::new(UnderControl::new(self, rules, context, &counted)?),
        };
        let staged_step = under.stage(self, rules, encoder, context, &staged, &counted);
        let partials = under.norm.partials();
        self.controlled = Some(under);
        staged_step?;
        self.prepared = Prepared::Controlled(staged);
        Ok(partials)
    }

    /// Records what comes before the decision of a staged step.
    pub(crate) fn record_norm(&self, pass: &mut wgpu::ComputePass<'_>, context: &ControlContext) {
        let Some((under, staged)) = self.controlled.as_ref().zip(self.staged()) else {
            return;
        };
        under.norm.record(pass, staged.partial, &under.norm_of);
        // There are scalars for so many skipped steps: the device says where it is behind by more.
        if under.classes.iter().any(|(class, _)| class.unread > WINDOW) {
            pass::record_one(pass, &context.check.0, &under.places.check);
        }
    }

    /// Records a staged step behind the decision. Returns what the device counts of it.
    pub(crate) fn record_step(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        context: &ControlContext,
        submission: &Submission,
    ) -> Option<Counted> {
        self.record_moves(pass, submission);
        let (under, counted) = self
            .controlled
            .as_mut()
            .zip(self.device_counts.counted.clone())?;
        if let Some(clip) = &under.tensor_clip {
            clip.record(pass);
        }
        pass::record_one(pass, &context.select.0, &under.places.select);
        let (bound, group) = (&self.bound, self.kernels.scalar_path().control_group());
        let (plan, dispatches) = (&self.plan, under.classes.dispatches());
        let calls = dispatches.iter().map(|(dispatch, class)| {
            let (pipeline, tensors) = bound.of_dispatch(&under.pipelines, dispatch);
            Call {
                pipeline,
                tensors,
                decision: match &under.places.chunks {
                    Some(bindings) if dispatch.access.is_chunked() => Some(Decision {
                        group,
                        bindings: bindings.of(plan, dispatch),
                        offset_bytes: None,
                    }),
                    _ => Some(Decision {
                        group,
                        bindings: &under.places.block,
                        offset_bytes: Some((*class as u64 * BLOCK_BYTES) as u32),
                    }),
                },
                workgroups: dispatch.workgroups,
            }
        });
        let uniforms_of = |call| under.uniforms(plan, call);
        let ring = self.ring.as_ref();
        let chunks = under.chunks.as_ref().zip(under.places.chunks.as_ref());
        let sums = chunks.map_or(0, |(table, bindings)| {
            let calls = table.sum_calls(group, bindings, plan, bound, dispatches);
            pass::record(pass, ring, calls, uniforms_of) + table.record_totals(pass)
        });
        let recorded = pass::record(pass, ring, calls.enumerate(), uniforms_of);
        let of_control = 1 + usize::from(under.tensor_clip.is_some());
        self.recorded = under.norm.dispatches() + of_control + sums + recorded;
        self.device_counts.control = Some(context.identity.clone());
        let step = self.ledger.record_counted(submission.clone());
        under.norm.set_recorded(step);
        self.prepared = Prepared::Nothing;
        Some(Counted {
            counted,
            tensors: self.tensors.as_slice().len(),
            step,
            mailbox: self.device_counts.mailbox.clone(),
        })
    }
}

impl UnderControl {
    fn new(
        recorder: &Recorder,
        rules: &dyn GroupRules,
        context: &ControlContext,
        counted: &wgpu::Buffer,
    ) -> Result<Self, BuildError> {
        let (kernels, plan) = (&recorder.kernels, &recorder.plan);
        let clips_values = context.control.clips_values();
        let controlled = |variant: KernelVariant| variant.controlled(clips_values);
        let mut pipelines = Pipelines::new(kernels, rules, plan, controlled)?;
        if plan.has_sums() {
            kernels.check_storage_buffers(SUMS_BINDINGS + 1)?;
        }
        let table = || ChunkTable::new(kernels, rules, plan, &mut pipelines, controlled);
        let can_chunk = plan.max_chunks() > 0 && kernels.can_chunk();
        let chunks = can_chunk.then(table).transpose()?;
        let by_tensor = context.control.tensor_max_norm().is_some();
        let tensors = recorder.tensors.as_slice().len();
        let tensor_clip = by_tensor.then(|| TensorClip::new(kernels, context, tensors));
        let tensor_clip = tensor_clip.transpose()?;
        Ok(Self {
            control: context.identity.clone(),
            pipelines,
            clips_values,
            norm: Norm::new(kernels, plan, &recorder.bound, &context.partials, by_tensor)?,
            norm_of: Vec::new(),
            places: checked(kernels.device(), || {
                let clip = tensor_clip.as_ref();
                Places::new(kernels, context, counted, clip, chunks.as_ref(), [0; 2])
            })?,
            tensor_clip,
            chunks,
            classes: Classes::new(),
            entries: Entries::default(),
        })
    }

    /// Whether it has been built for this control, as that is now.
    fn goes_with(&self, context: &ControlContext) -> bool {
        let knows_all = self.clips_values || !context.control.clips_values();
        let is_same = Arc::ptr_eq(&self.control, &context.identity);
        let by_tensor = context.control.tensor_max_norm().is_some();
        let clips_tensors = self.tensor_clip.is_some() == by_tensor;
        knows_all && clips_tensors && is_same && self.norm.goes_into(&context.partials)
    }

    /// Records the copies of the next step.
    fn stage(
        &mut self,
        recorder: &mut Recorder,
        rules: &dyn GroupRules,
        encoder: &mut wgpu::CommandEncoder,
        context: &ControlContext,
        staged: &StagedStep,
        counted: &wgpu::Buffer,
    ) -> Result<(), StepError> {
        self.refresh(recorder, rules, context, counted)?;
        self.fill_inputs(recorder, rules, context);
        let norms = (0..rules.groups()).map(|group| context.control.norm_of(rules.name(group)));
        self.norm_of.clear();
        self.norm_of.extend(norms.map(|norm| norm as u32));

        let (device, calls) = (recorder.kernels.device(), self.classes.dispatches().len());
        let uniforms_of = |call| self.uniforms(&recorder.plan, call);
        pass::prepare(&mut recorder.ring, device, encoder, calls, uniforms_of)?;
        let reported = recorder.ledger.reported();
        self.norm
            .prepare(device, encoder, staged.partial, &self.norm_of, reported)?;
        if let Some((clip, ranges)) = self.tensor_clip.as_mut().zip(self.norm.ranges()) {
            let tensors = recorder.tensors.as_slice().iter().zip(ranges);
            let ranges = tensors.map(|(tensor, range)| {
                let group = rules.name(tensor.group);
                let max_norm = context.control.tensor_max_norm_of(group);
                max_norm.map_or([0; 2], |_| *range)
            });
            clip.prepare(device, encoder, context, staged, ranges)?;
        }
        if let Some(chunks) = &mut self.chunks {
            chunks.prepare(device, encoder, self.classes.chunks(), &recorder.plan)?;
        }
        self.places.inputs.record(device, encoder)
    }

    /// The scalars of a dispatch that do not depend on the decision.
    fn uniforms(&self, plan: &Plan, dispatch: usize) -> Uniforms {
        let (dispatch, class) = &self.classes.dispatches()[dispatch];
        let tensor = self.classes.key(*class).frame.tensor;
        uniforms_of(&[].into(), Key::default(), plan, dispatch, tensor)
    }

    /// Makes sure that the dispatches are those of the next step, and that there is room for what it says to the device.
    fn refresh(
        &mut self,
        recorder: &Recorder,
        rules: &dyn GroupRules,
        context: &ControlContext,
        counted: &wgpu::Buffer,
    ) -> Result<(), BuildError> {
        let (tensors, ledger) = (recorder.tensors.as_slice(), &recorder.ledger);
        let (plan, revision) = (&recorder.plan, recorder.revision);
        let histories = ledger.histories();
        let takes_part = |index: usize| !tensors[index].is_left_out() && tensors[index].numel > 0;
        let class_of = |index: usize| {
            let histories = histories.as_deref();
            let tensor = &tensors[index];
            let class = || Class::of(rules, ledger, histories, &context.control, index, tensor);
            takes_part(index).then(class)
        };
        let progress = |index: usize| {
            let history = histories.as_ref().map(|histories| histories[index]);
            (ledger.most(index), ledger.unread(index), history)
        };
        let classes = &mut self.classes;
        let chunked = match self.chunks {
            Some(_) => Chunked::Together,
            None => Chunked::Never,
        };
        if classes.refresh(revision, plan, tensors.len(), chunked, class_of, progress) {
            classes.sort_by_pipeline(&recorder.bound, |class| class.frame.group);
            self.norm.refresh(plan, tensors.len(), takes_part);
        }
        self.entries.lay_out(classes);
        let entries = (WINDOW as usize + 1) * self.entries.classes.len();
        let words = entries_at(classes.len(), tensors.len()) + entries * entry_words(rules);
        let inputs_bytes = 4 * words as u64;
        let blocks_bytes = BLOCK_BYTES * classes.len() as u64;
        let places = &self.places;
        if places.inputs.buffer().size() < inputs_bytes || places.blocks.size() < blocks_bytes {
            let kernels = &recorder.kernels;
            let (clip, chunks) = (self.tensor_clip.as_ref(), self.chunks.as_ref());
            let bytes = [inputs_bytes, blocks_bytes];
            let make = || Places::new(kernels, context, counted, clip, chunks, bytes);
            self.places = checked(kernels.device(), make)?;
        }
        Ok(())
    }

    /// The words for `select.wgsl`.
    fn fill_inputs(
        &mut self,
        recorder: &Recorder,
        rules: &dyn GroupRules,
        context: &ControlContext,
    ) {
        let (tensors, ledger) = (recorder.tensors.as_slice(), &recorder.ledger);
        let entry_words = entry_words(rules);
        let header = [self.classes.len(), tensors.len(), entry_words];

        self.places.inputs.bytes.clear();
        let mut words = Words(&mut self.places.inputs.bytes);
        header.iter().for_each(|count| words.push(*count as u32));
        let entries_at = entries_at(self.classes.len(), tensors.len());
        for ((class, tensor), start) in self.classes.iter().zip(&self.entries.starts) {
            let group = rules.name(class.frame.group);
            words.push(tensor as u32);
            words.push(ledger.most_counted(tensor));
            words.push(class.entries() as u32);
            words.push(class.most_skipped());
            words.push((entries_at + start * entry_words) as u32);
            words.push(match class.clipped {
                Some(tensor) => (MAX_GROUP_NORMS + 1 + tensor) as u32,
                None => context.control.norm_of(group) as u32,
            });
            words.push(context.control.clip_value_of(group).to_bits());
        }
        for tensors in tensors.chunks(32) {
            let bits = tensors.iter().enumerate();
            let bits = bits.filter(|(_, tensor)| !tensor.is_left_out());
            words.push(bits.fold(0, |word, (bit, _)| word | 1 << bit));
        }
        for class in &self.entries.classes {
            let (class, tensor) = (self.classes.key(*class), self.classes.tensor(*class));
            let group = class.frame.group;
            for skipped in 0..class.entries() {
                let applied_steps = ledger.most(tensor).saturating_sub(skipped);
                let rounding = rules.rounding(group);
                let Key(key) = tensors[tensor].key(rounding, applied_steps);
                key.into_iter().for_each(|word| words.push(word));
                let scalars = rules.scalars(group, rules.phase(group, applied_steps));
                let scalars = scalars.as_slice();
                scalars
                    .iter()
                    .for_each(|scalar| words.push(scalar.to_bits()));
                (ENTRY_WORDS + scalars.len()..entry_words).for_each(|_| words.push(0));
            }
        }
    }
}

/// Appends words as the device reads them.
struct Words<'b>(&'b mut Vec<u8>);

impl Words<'_> {
    fn push(&mut self, word: u32) {
        self.0.extend_from_slice(&word.to_ne_bytes());
    }
}

/// Buffers and bindings that grow with the number of classes.
struct Places {
    inputs: Staged,
    blocks: wgpu::Buffer,
    check: wgpu::BindGroup,
    select: wgpu::BindGroup,
    /// The block of a class, by dynamic offset.
    block: wgpu::BindGroup,
    /// All blocks, with the table of dispatches in chunks.
    chunks: Option<ChunkBindings>,
}

impl Places {
    fn new(
        kernels: &Kernels,
        context: &ControlContext,
        counted: &wgpu::Buffer,
        tensor_clip: Option<&TensorClip>,
        chunks: Option<&ChunkTable>,
        [inputs_bytes, blocks_bytes]: [u64; 2],
    ) -> Self {
        let device = kernels.device();
        let inputs_bytes = inputs_bytes.max(4 * HEADER_WORDS as u64);
        let storage = wgpu::BufferUsages::STORAGE;
        let inputs = Staged::new(device, "wgpu_optim.inputs", inputs_bytes, storage);
        let blocks = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("wgpu_optim.blocks"),
            size: blocks_bytes.max(BLOCK_BYTES),
            usage: storage | wgpu::BufferUsages::UNIFORM,
            mapped_at_creation: false,
        });
        let check = [inputs.buffer(), counted, &context.verdict];
        let check = bind_whole(device, &context.check.1, &check);
        // Where no tensor is clipped by itself nobody reads its factors.
        let factors = tensor_clip.map_or(&context.verdict, |clip| &clip.factors);
        let select = [inputs.buffer(), &context.verdict, counted, &blocks, factors];
        let select = bind_whole(device, &context.select.1, &select);
        let block = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("wgpu_optim.block"),
            layout: kernels.control_layout(),
            entries: &[wgpu::BindGroupEntry {
                binding: 0,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: &blocks,
                    offset: 0,
                    size: wgpu::BufferSize::new(CONTROL_BYTES.into()),
                }),
            }],
        });
        let chunks = chunks.map(|table| table.bind(kernels, Some(&blocks)));
        Self {
            inputs,
            blocks,
            check,
            select,
            block,
            chunks,
        }
    }
}

/// Words before the first entry: the header, the classes, and a bit for each tensor.
const fn entries_at(classes: usize, tensors: usize) -> usize {
    HEADER_WORDS + classes * CLASS_WORDS + tensors.div_ceil(32)
}

/// Words of an entry: as many as the rule with the most scalars takes.
fn entry_words(rules: &dyn GroupRules) -> usize {
    let scalars = (0..rules.groups()).map(|group| rules.scalar_count(group));
    ENTRY_WORDS + scalars.max().unwrap_or_default()
}
