//! Steps under a control: the host records what may come of them, and the device decides.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::classes::Classes;
use super::{FrameClass, GpuOptimizer, uniforms_of};
use crate::gpu::bound::ControlledPipelines;
use crate::gpu::control::sealed::{Controlled, Given, Needed, Staged as StagedStep};
use crate::gpu::control::{
    Counted, GpuControl, Mailbox, Norm, Report, ReportOf, WINDOW, bind_whole,
};
use crate::gpu::error::{BuildError, StepError};
use crate::gpu::error_scope::{LOST, checked};
use crate::gpu::kernels::{Kernels, SCALARS_GROUP, TENSORS_GROUP};
use crate::gpu::ledger::Ledger;
use crate::gpu::scalars::{CONTROL_BYTES, CONTROL_SCALARS};
use crate::gpu::staged::Staged;
use crate::gpu::submission::Submission;
use crate::plan::Target;
use crate::rules::{Groups, Rule};
use crate::state::Tensor;
use crate::storage::Key;

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
    /// What has been read of these counts, until the optimizer takes it over.
    mailbox: Arc<Mutex<Mailbox>>,
    /// The control of the last controlled step.
    control: Option<Arc<()>>,
}

impl DeviceCounts {
    fn mailbox(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
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

/// What controlled steps need beside what others do, on a plan.
pub(super) struct UnderControl {
    control: Arc<()>,
    pipelines: ControlledPipelines,
    norm: Norm,
    /// For `select.wgsl`, and what that writes.
    places: Places,
    pub(super) classes: Classes<Class>,
    /// The step that it has been staged for, if nothing has changed since.
    pub(super) staged: Option<StagedStep>,
}

/// What tensors have in common that share a dispatch, whatever the device skips.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Class {
    frame: FrameClass,
    /// How many steps have been applied, if none was skipped; if all that may be come to the same scalars, and the next one
    /// does, their phase.
    count: u64,
    is_settled: bool,
    unread: u64,
    /// Tells tensors apart that took part in different ones of the unread steps.
    history: u32,
}

impl Class {
    fn of<R: Rule>(
        groups: &Groups<R>,
        ledger: &Ledger,
        histories: Option<&[u32]>,
        index: usize,
        tensor: &Tensor,
    ) -> Self {
        let config = groups.config(tensor.group);
        let (most, unread) = (ledger.most(index), ledger.unread(index));
        let phase = config.phase(most);
        let mut others = most.saturating_sub(unread)..=most.saturating_add(1);
        let frame = FrameClass::of(index, tensor);
        let is_settled = frame.tensor.is_none() && others.all(|steps| config.phase(steps) == phase);
        Self {
            frame,
            count: if is_settled { phase } else { most },
            is_settled,
            unread: if is_settled { 0 } else { unread },
            history: match histories {
                Some(histories) if !is_settled => histories[index],
                _ => 0,
            },
        }
    }

    /// How many entries its scalars take: by how many of the last steps may have been skipped.
    fn entries(&self) -> u64 {
        self.unread.min(WINDOW) + 1
    }

    /// How many of the last steps may have been skipped for there to be an entry: any, where all come to the same scalars.
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

    fn build(&mut self, given: &Given<'_>) -> Result<(), BuildError> {
        let device = self.kernels.device();
        let tensors = self.tensors.as_slice().len();
        let counted = match &self.device_counts.counted {
            Some(counted) => counted.clone(),
            None => checked(device, || {
                device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("wgpu_optim.applied_steps"),
                    size: 4 * tensors.max(1) as u64,
                    usage: wgpu::BufferUsages::STORAGE
                        | wgpu::BufferUsages::COPY_SRC
                        | wgpu::BufferUsages::COPY_DST,
                    mapped_at_creation: false,
                })
            })?,
        };
        let pipelines = ControlledPipelines::new(
            &self.kernels,
            &self.groups,
            &self.plan,
            given.control.clips_values(),
        )?;
        let norm = Norm::new(&self.kernels, &self.plan, &self.bound, given.partials)?;
        let places = checked(device, || Places::new(&self.kernels, given, &counted, 1, 1))?;
        if self.device_counts.counted.is_none() {
            let origins: Vec<_> = (0..tensors)
                .map(|tensor| self.ledger.origin(tensor))
                .collect();
            let queue = self.kernels.queue();
            queue.write_buffer(&counted, 0, bytemuck::cast_slice(&origins));
        }
        self.device_counts.counted = Some(counted);
        self.controlled = Some(Box::new(UnderControl {
            control: given.identity.clone(),
            pipelines,
            norm,
            places,
            classes: Classes::new(),
            staged: None,
        }));
        Ok(())
    }

    /// Makes sure that the dispatches are those of the next step, and that there is room for what it says to the device.
    fn refresh_controlled(&mut self, given: &Given<'_>) -> Result<(), BuildError> {
        let (Some(under), Some(counted)) = (&mut self.controlled, &self.device_counts.counted)
        else {
            return Ok(());
        };
        let (tensors, groups, ledger) = (self.tensors.as_slice(), &self.groups, &self.ledger);
        let histories = ledger.histories();
        let takes_part = |index: usize| !tensors[index].is_left_out() && tensors[index].numel > 0;
        let class_of = |index: usize| {
            let class = || Class::of(groups, ledger, histories.as_deref(), index, &tensors[index]);
            takes_part(index).then(class)
        };
        let progress = |index: usize| {
            let history = histories.as_ref().map(|histories| histories[index]);
            (ledger.most(index), ledger.unread(index), history)
        };
        let classes = &mut under.classes;
        if classes.refresh(&self.plan, tensors.len(), class_of, progress) {
            classes.sort_by_pipeline(&self.bound, |class| class.frame.group);
            under.norm.refresh(&self.plan, takes_part);
        }
        let of_class = CLASS_WORDS + (WINDOW as usize + 1) * entry_words(groups);
        let words = HEADER_WORDS + tensors.len().div_ceil(32) + under.classes.len() * of_class;
        let inputs_bytes = 4 * words as u64;
        let blocks_bytes = BLOCK_BYTES * under.classes.len() as u64;
        if under.places.inputs.buffer().size() < inputs_bytes
            || under.places.blocks.size() < blocks_bytes
        {
            let make = || Places::new(&self.kernels, given, counted, inputs_bytes, blocks_bytes);
            under.places = checked(self.kernels.device(), make)?;
        }
        Ok(())
    }

    /// The words for `select.wgsl`.
    fn fill_inputs(&mut self, given: &Given<'_>) {
        let Some(under) = &mut self.controlled else {
            return;
        };
        let tensors = self.tensors.as_slice();
        let (groups, ledger) = (&self.groups, &self.ledger);
        let entry_words = entry_words(groups);
        let header = [under.classes.len(), tensors.len(), entry_words];

        under.places.inputs.bytes.clear();
        let mut words = Words(&mut under.places.inputs.bytes);
        header.iter().for_each(|count| words.push(*count as u32));
        let mut entries_at =
            HEADER_WORDS + under.classes.len() * CLASS_WORDS + tensors.len().div_ceil(32);
        for (class, tensor) in under.classes.iter() {
            let group = groups.name(class.frame.group);
            words.push(tensor as u32);
            words.push(ledger.most_counted(tensor));
            words.push(class.entries() as u32);
            words.push(class.most_skipped());
            words.push(entries_at as u32);
            words.push(given.control.norm_of(group) as u32);
            words.push(given.control.clip_value_of(group).to_bits());
            entries_at += class.entries() as usize * entry_words;
        }
        for tensors in tensors.chunks(32) {
            let bits = tensors.iter().enumerate();
            let bits = bits.filter(|(_, tensor)| !tensor.is_left_out());
            words.push(bits.fold(0, |word, (bit, _)| word | 1 << bit));
        }
        for (class, tensor) in under.classes.iter() {
            let config = groups.config(class.frame.group);
            for skipped in 0..class.entries() {
                let applied_steps = ledger.most(tensor).saturating_sub(skipped);
                let rounding = groups.rounding(class.frame.group);
                let Key(key) = tensors[tensor].key(rounding, applied_steps);
                key.into_iter().for_each(|word| words.push(word));
                let scalars = config.scalars(config.phase(applied_steps));
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

/// What grows with the number of classes.
struct Places {
    inputs: Staged,
    blocks: wgpu::Buffer,
    check: wgpu::BindGroup,
    select: wgpu::BindGroup,
    /// The block of a class, by dynamic offset.
    block: wgpu::BindGroup,
}

impl Places {
    fn new(
        kernels: &Kernels,
        given: &Given<'_>,
        counted: &wgpu::Buffer,
        inputs_bytes: u64,
        blocks_bytes: u64,
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
        let check = [inputs.buffer(), counted, given.verdict];
        let check = bind_whole(device, &given.check.1, &check);
        let select = [inputs.buffer(), given.verdict, counted, &blocks];
        let select = bind_whole(device, &given.select.1, &select);
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
        Self {
            inputs,
            blocks,
            check,
            select,
            block,
        }
    }
}

impl<R: Rule> Controlled for GpuOptimizer<R> {
    fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    fn has_group(&self, name: &str) -> bool {
        self.groups.by_name(name).is_some()
    }

    fn max_partials(&self) -> u64 {
        let max = || Norm::max_partials(&self.kernels, &self.plan);
        *self.max_partials.get_or_init(max)
    }

    fn begin(&mut self, given: &Given<'_>) -> Result<Needed, StepError> {
        if self.kernels.has_seen_loss() {
            return Err(StepError::Scalars {
                message: LOST.to_owned(),
            });
        }
        self.settle();
        let is_same = |control: &Arc<()>| Arc::ptr_eq(control, given.identity);
        if self.ledger.are_unread() && !self.device_counts.control.as_ref().is_some_and(is_same) {
            return Err(StepError::Unread);
        }
        let stays = |under: &UnderControl| {
            let knows_all = under.pipelines.clips_values || !given.control.clips_values();
            knows_all && is_same(&under.control) && under.norm.goes_into(given.partials)
        };
        if !self.controlled.as_deref().is_some_and(stays) {
            self.build(given)?;
        }
        self.refresh_controlled(given)?;
        let under = self.controlled.as_deref();
        Ok(Needed {
            partials: under.map_or(0, |under| under.norm.partials()),
        })
    }

    fn stage(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        given: &Given<'_>,
        staged: StagedStep,
    ) -> Result<(), StepError> {
        self.fill_inputs(given);
        if let (Some(ring), Some(under)) = (&mut self.ring, &self.controlled) {
            for (slot, (dispatch, class)) in under.classes.dispatches().iter().enumerate() {
                let tensor = under.classes.key(*class).frame.tensor;
                let scalars = [].into();
                let uniforms = uniforms_of(&scalars, Key::default(), &self.plan, dispatch, tensor);
                ring.set(slot, uniforms.as_bytes());
            }
            ring.record(self.kernels.device(), encoder)?;
        }
        let device = self.kernels.device();
        let norm_of = norm_of(&self.groups, given);
        if let Some(under) = &mut self.controlled {
            let reported = self.ledger.reported();
            under
                .norm
                .prepare(device, encoder, staged.partial, norm_of, reported)?;
            under.places.inputs.record(device, encoder)?;
            under.staged = Some(staged);
        }
        Ok(())
    }

    fn staged(&self) -> Option<&StagedStep> {
        self.controlled.as_ref()?.staged.as_ref()
    }

    fn record_norm(&self, pass: &mut wgpu::ComputePass<'_>, given: &Given<'_>) {
        let Some((under, staged)) = self.controlled.as_ref().zip(self.staged()) else {
            return;
        };
        let norm_of = norm_of(&self.groups, given);
        under.norm.record(pass, staged.partial, norm_of);
        // There are scalars for so many skipped steps: the device says where it is behind by more.
        if under.classes.iter().any(|(class, _)| class.unread > WINDOW) {
            pass.set_pipeline(&given.check.0);
            pass.set_bind_group(TENSORS_GROUP, &under.places.check, &[]);
            pass.dispatch_workgroups(1, 1, 1);
        }
    }

    fn record_step(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        given: &Given<'_>,
        submission: &Submission,
    ) -> Option<Counted> {
        let under = self.controlled.as_mut()?;
        self.moves
            .iter_mut()
            .for_each(|moves| moves.record(pass, submission));
        pass.set_pipeline(&given.select.0);
        pass.set_bind_group(TENSORS_GROUP, &under.places.select, &[]);
        pass.dispatch_workgroups(1, 1, 1);
        let mut current = None;
        let control_group = self.kernels.scalar_path().control_group();
        for (slot, (dispatch, class)) in under.classes.dispatches().iter().enumerate() {
            let (pipeline, bind_group) = match dispatch.target {
                Target::Piece(piece) => {
                    let pipelines = &under.pipelines.by_kind[self.bound.kind_of(piece)];
                    let pipeline = &pipelines.by_access[dispatch.access as usize];
                    (pipeline, &self.bound.pieces[&piece])
                }
                Target::Batch { batch, .. } => (
                    &under.pipelines.batches[batch],
                    &self.bound.batches[batch].1,
                ),
            };
            if current != Some(pipeline) {
                pass.set_pipeline(pipeline);
                current = Some(pipeline);
            }
            pass.set_bind_group(TENSORS_GROUP, bind_group, &[]);
            let block = (*class as u64 * BLOCK_BYTES) as u32;
            pass.set_bind_group(control_group, &under.places.block, &[block]);
            match &self.ring {
                Some(ring) => ring.bind(pass, SCALARS_GROUP, slot),
                None => {
                    let (scalars, key) = ([].into(), Key::default());
                    let tensor = under.classes.key(*class).frame.tensor;
                    let uniforms = uniforms_of(&scalars, key, &self.plan, dispatch, tensor);
                    pass.set_immediates(0, uniforms.as_bytes());
                }
            }
            let [x, y] = dispatch.workgroups;
            pass.dispatch_workgroups(x, y, 1);
        }
        self.recorded = under.norm.dispatches() + 1 + under.classes.dispatches().len();
        self.device_counts.control = Some(given.identity.clone());
        let step = self.ledger.record_counted(submission.clone());
        under.norm.set_recorded(step);
        self.set_unprepared();
        Some(Counted {
            counted: self.device_counts.counted.clone()?,
            tensors: self.tensors.as_slice().len(),
            step,
            mailbox: self.device_counts.mailbox.clone(),
        })
    }
}

/// Words of an entry: as many as the rule with the most scalars takes.
fn entry_words<R: Rule>(groups: &Groups<R>) -> usize {
    let scalars = groups.configs().map(|config| config.scalar_names().len());
    ENTRY_WORDS + scalars.max().unwrap_or_default()
}

/// Which norm a parameter group is part of.
fn norm_of<R: Rule>(groups: &Groups<R>, given: &Given<'_>) -> impl Fn(usize) -> u32 {
    |group| given.control.norm_of(groups.name(group)) as u32
}
