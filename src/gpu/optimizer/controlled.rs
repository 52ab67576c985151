//! Steps under a control: the host records what may come of them, and the device decides.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Class, GpuOptimizer, sort_by_pipeline, uniforms_of};
use crate::gpu::bound::ControlledPipelines;
use crate::gpu::control::sealed::{Controlled, Given, Needed};
use crate::gpu::control::{Counted, GpuControl, Mailbox, Norm, WINDOW, bind_whole};
use crate::gpu::error::{BuildError, StepError};
use crate::gpu::error_scope::{LOST, checked};
use crate::gpu::kernels::{Kernels, SCALARS_GROUP, TENSORS_GROUP};
use crate::gpu::scalars::{CONTROL_BYTES, CONTROL_SCALARS};
use crate::gpu::staged::Staged;
use crate::plan::{Dispatch, Target};
use crate::rules::{Groups, Rule};
use crate::state::{Tensor, Tensors};
use crate::storage::{Key, Masters};

/// Bytes from one class's block to the next; `BLOCK` in `shaders/control/select.wgsl`.
const BLOCK_BYTES: u64 = 256;

/// Words of the header and of a class there.
const HEADER_WORDS: usize = 4;
const CLASS_WORDS: usize = 6;

/// Words before a rule's scalars in an entry: what else follows the applied steps.
const ENTRY_WORDS: usize = CONTROL_SCALARS.len() - 4;

/// What the device counts of an optimizer, and what the host knows of that.
#[derive(Default)]
pub(super) struct Counts {
    /// Of each tensor, how many steps have been applied to it.
    applied: Option<wgpu::Buffer>,
    mailbox: Arc<Mutex<Mailbox>>,
    epoch: u64,
    /// The control of the last controlled step.
    control: Option<Arc<()>>,
    /// How many steps of that had been skipped when counts were last learnt.
    skipped: u64,
}

impl Counts {
    fn mailbox(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts are said anew: what is on its way is of no use.
    pub(super) fn forget(&mut self) {
        self.epoch += 1;
        let mailbox = Mailbox {
            epoch: self.epoch,
            latest: None,
        };
        *self.mailbox() = mailbox;
    }
}

/// What controlled steps need beside what others do, on a plan.
pub(super) struct UnderControl {
    control: Arc<()>,
    pipelines: ControlledPipelines,
    norm: Norm,
    /// For `select.wgsl`, and what that writes.
    inputs: Staged,
    blocks: wgpu::Buffer,
    select: wgpu::BindGroup,
    /// One class's block, by dynamic offset.
    block: wgpu::BindGroup,
    classes: Vec<ClassAt>,
    dispatches: Vec<(Dispatch, usize)>,
    pub(super) is_stale: bool,
    /// The next step has been staged, and nothing has changed since.
    pub(super) is_staged: bool,
}

/// What tensors have in common that share a dispatch, whatever the device skips.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shared {
    group: usize,
    /// How many steps have been applied, if none was skipped; if all that may be come to the same scalars, and the next one
    /// does, their phase.
    count: u64,
    is_settled: bool,
    unread: u64,
    lineage: u64,
    /// How many of the unread steps ago masters were fresh.
    fresh: Option<u64>,
    /// The tensor, where something is rounded by random bits of its own.
    tensor: Option<usize>,
}

/// A class, by one of its tensors.
#[derive(Clone, Copy)]
struct ClassAt {
    tensor: usize,
    shared: Shared,
}

impl Shared {
    fn of<R: Rule>(groups: &Groups<R>, index: usize, tensor: &Tensor) -> Self {
        let config = groups.config(tensor.group);
        let unread = tensor.unread.min(tensor.applied_steps);
        let phase = config.phase(tensor.applied_steps);
        let is_stochastic = tensor.storage.is_stochastic;
        let fresh = tensor
            .fresh_at
            .filter(|_| tensor.storage.masters == Masters::F32);
        let fresh = fresh.and_then(|at| tensor.applied_steps.checked_sub(at));
        let fresh = fresh.filter(|ago| *ago <= unread);
        let others = [
            tensor.applied_steps - unread,
            tensor.applied_steps.saturating_add(1),
        ];
        let lasts = others.iter().all(|steps| config.phase(*steps) == phase);
        let is_settled = lasts && fresh.is_none() && !is_stochastic;
        Self {
            group: tensor.group,
            count: if is_settled {
                phase
            } else {
                tensor.applied_steps
            },
            is_settled,
            unread: if is_settled { 0 } else { unread },
            lineage: if is_settled { 0 } else { tensor.lineage },
            fresh,
            tensor: is_stochastic.then_some(index),
        }
    }

    /// What the frame has to know; what follows the applied steps comes from the device.
    fn of_frame(&self) -> Class {
        Class {
            group: self.group,
            phase: 0,
            is_fresh: false,
            tensor: self.tensor,
        }
    }

    /// How many entries its scalars take: by how many of the last steps may have been skipped.
    fn entries(&self) -> u64 {
        self.unread.min(WINDOW - 1) + 1
    }

    /// Whether it stays the same from step to step.
    fn as_it_was(&self, before: &Self) -> bool {
        self.is_settled == before.is_settled && (!self.is_settled || self.count == before.count)
    }
}

impl<R: Rule> GpuOptimizer<R> {
    /// Records one step under a control: as [`step`](Self::step), but the device decides whether it is applied, and what
    /// becomes of the gradients before; see [`GpuControl`] and [`StepControl`](crate::StepControl). One pass, with a copy
    /// of what the device may need before it and of what it counted after it. The caller submits.
    ///
    /// The scalars of the step follow the steps that the device has applied. The first such step builds what it needs.
    /// After 64 skipped steps that nobody has [read](GpuControl::read) of, all others are skipped, too.
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
        let letter = self.counts.mailbox().latest.take();
        if let Some(letter) = letter {
            let may_share = self.tensors.learn(&letter.recorded, &letter.applied);
            self.counts.skipped = letter.skipped;
            self.stale = true;
            if let Some(under) = &mut self.controlled {
                under.is_stale |= may_share;
            }
        }
    }

    /// Steps applied to a tensor, as far as the host knows.
    pub(super) fn known_steps(&self, index: usize) -> u64 {
        let tensor = &self.tensors.as_slice()[index];
        match &self.counts.mailbox().latest {
            Some(letter) => {
                let recorded = letter.recorded[index];
                recorded.saturating_sub(crate::state::skipped(recorded, letter.applied[index]))
            }
            None => tensor.applied_steps - tensor.unread.min(tensor.applied_steps),
        }
    }

    /// What the optimizer remembers by the device's own counts, if the host does not know them.
    pub(super) async fn counted_tensors(&self) -> Result<Option<Tensors>, crate::TransferError> {
        let Some(applied) = self
            .counts
            .applied
            .as_ref()
            .filter(|_| self.tensors.are_unread())
        else {
            return Ok(None);
        };
        let (device, queue) = (self.kernels.device(), self.kernels.queue());
        let tensors = self.tensors.as_slice().len();
        let take = |bytes: &[u8]| -> Vec<u32> {
            let words = bytes.chunks_exact(4);
            words.map(bytemuck::pod_read_unaligned).collect()
        };
        let words = tensors as u64;
        let applied = crate::readback::read(device, queue, applied, 0, words, take).await?;
        let mut tensors = self.tensors.clone();
        let recorded: Vec<_> = tensors.recorded().collect();
        tensors.learn(&recorded, &applied);
        Ok(Some(tensors))
    }

    fn build(&mut self, given: &Given<'_>) -> Result<(), BuildError> {
        let device = self.kernels.device();
        let failed = |error: wgpu::Error| BuildError::Device {
            message: error.to_string(),
        };
        let tensors = self.tensors.as_slice().len();
        let applied = match &self.counts.applied {
            Some(applied) => applied.clone(),
            None => checked(device, || {
                device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("wgpu_optim.applied_steps"),
                    size: 4 * tensors.max(1) as u64,
                    usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
                    mapped_at_creation: false,
                })
            })
            .map_err(failed)?,
        };
        let pipelines = ControlledPipelines::new(
            &self.kernels,
            &self.groups,
            &self.plan,
            given.control.clips_values(),
        )?;
        let norm = Norm::new(&self.kernels, &self.plan, &self.bound, given.partials)?;
        let places = checked(device, || Places::new(&self.kernels, given, &applied, 1, 1));
        let places = places.map_err(failed)?;
        self.counts.applied = Some(applied);
        self.controlled = Some(Box::new(UnderControl {
            control: given.identity.clone(),
            pipelines,
            norm,
            inputs: places.inputs,
            blocks: places.blocks,
            select: places.select,
            block: places.block,
            classes: Vec::new(),
            dispatches: Vec::new(),
            is_stale: true,
            is_staged: false,
        }));
        Ok(())
    }

    /// The dispatches of a step, and their classes.
    fn refresh_controlled(&mut self, given: &Given<'_>) -> Result<(), BuildError> {
        let Some(under) = &mut self.controlled else {
            return Ok(());
        };
        let tensors = self.tensors.as_slice();
        let settled_anew = |class: &ClassAt| {
            let tensor = &tensors[class.tensor];
            !Shared::of(&self.groups, class.tensor, tensor).as_it_was(&class.shared)
        };
        let may_merge = under.classes.len() > 1 && under.classes.iter().any(settled_anew);
        if !under.is_stale && !may_merge {
            return Ok(());
        }
        let mut classes: Vec<ClassAt> = Vec::new();
        let mut seen = HashMap::new();
        let class_of = |(tensor, host): (usize, &Tensor)| {
            if host.is_left_out() || host.numel == 0 {
                return None;
            }
            let shared = Shared::of(&self.groups, tensor, host);
            Some(*seen.entry(shared).or_insert_with(|| {
                classes.push(ClassAt { tensor, shared });
                classes.len() - 1
            }))
        };
        let of_tensor: Vec<_> = tensors.iter().enumerate().map(class_of).collect();
        let takes_part = |tensor: usize| of_tensor[tensor].is_some();
        under.norm.refresh(&self.plan, takes_part);
        under.dispatches = self.plan.dispatches(|tensor| of_tensor[tensor]);
        let group_of = |class: &usize| classes[*class].shared.group;
        sort_by_pipeline(&mut under.dispatches, &self.bound, group_of);

        let of_class = CLASS_WORDS + WINDOW as usize * entry_words(&self.groups);
        let words = HEADER_WORDS + tensors.len().div_ceil(32) + 2 * tensors.len();
        let words = words + classes.len() * of_class;
        let (inputs_bytes, blocks_bytes) = (4 * words as u64, BLOCK_BYTES * classes.len() as u64);
        if let Some(applied) = &self.counts.applied
            && (under.inputs.buffer().size() < inputs_bytes || under.blocks.size() < blocks_bytes)
        {
            let make = || Places::new(&self.kernels, given, applied, inputs_bytes, blocks_bytes);
            let places = checked(self.kernels.device(), make);
            let places = places.map_err(|error| BuildError::Device {
                message: error.to_string(),
            })?;
            under.inputs = places.inputs;
            under.blocks = places.blocks;
            under.select = places.select;
            under.block = places.block;
        }
        under.classes = classes;
        under.is_stale = false;
        Ok(())
    }

    /// The words for `select.wgsl`.
    fn fill_inputs(&mut self, given: &Given<'_>) {
        let Some(under) = &mut self.controlled else {
            return;
        };
        let tensors = self.tensors.as_slice();
        let entry_words = entry_words(&self.groups);
        let recounted = || {
            tensors
                .iter()
                .enumerate()
                .filter(|(_, tensor)| tensor.is_recounted)
        };
        let counts = recounted().count();
        let header = [under.classes.len(), tensors.len(), counts, entry_words];

        under.inputs.bytes.clear();
        let mut words = Words(&mut under.inputs.bytes);
        header.iter().for_each(|count| words.push(*count as u32));
        let mut entries_at =
            HEADER_WORDS + header[0] * CLASS_WORDS + tensors.len().div_ceil(32) + 2 * counts;
        for class in &mut under.classes {
            let tensor = &tensors[class.tensor];
            class.shared = Shared::of(&self.groups, class.tensor, tensor);
            let group = self.groups.name(tensor.group);
            words.push(class.tensor as u32);
            words.push(tensor.applied_steps as u32);
            words.push(class.shared.entries() as u32);
            words.push(entries_at as u32);
            words.push(given.control.norm_of(group) as u32);
            words.push(given.control.clip_value_of(group).to_bits());
            entries_at += class.shared.entries() as usize * entry_words;
        }
        for tensors in tensors.chunks(32) {
            let bits = tensors.iter().enumerate();
            let bits = bits.filter(|(_, tensor)| !tensor.is_left_out());
            words.push(bits.fold(0, |word, (bit, _)| word | 1 << bit));
        }
        for (index, tensor) in recounted() {
            words.push(index as u32);
            words.push(tensor.applied_steps as u32);
        }
        for class in &under.classes {
            let tensor = &tensors[class.tensor];
            let config = self.groups.config(tensor.group);
            for skipped in 0..class.shared.entries() {
                let applied_steps = tensor.applied_steps.saturating_sub(skipped);
                let key = tensor.key_at(self.groups.rounding(tensor.group), applied_steps);
                let Key([x, y]) = key;
                words.push((class.shared.fresh == Some(skipped)).into());
                words.push(x);
                words.push(y);
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

/// Little-endian or not, as the device's host is.
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
    select: wgpu::BindGroup,
    block: wgpu::BindGroup,
}

impl Places {
    fn new(
        kernels: &Kernels,
        given: &Given<'_>,
        applied: &wgpu::Buffer,
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
        let select = [inputs.buffer(), given.verdict, applied, &blocks];
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
            select,
            block,
        }
    }
}

impl<R: Rule> Controlled for GpuOptimizer<R> {
    fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    fn max_partials(&self) -> u64 {
        Norm::max_partials(&self.kernels, &self.plan)
    }

    fn begin(&mut self, given: &Given<'_>) -> Result<Needed, StepError> {
        if self.kernels.has_seen_loss() {
            return Err(StepError::Scalars {
                message: LOST.to_owned(),
            });
        }
        self.learn();
        let is_same = |control: &Arc<()>| Arc::ptr_eq(control, given.identity);
        if self.tensors.are_unread() && !self.counts.control.as_ref().is_some_and(is_same) {
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
        let norm = self
            .controlled
            .as_ref()
            .map_or(0, |under| under.norm.partials());
        Ok(Needed {
            partials: norm,
            skipped: match self.tensors.are_unread() {
                true => self.counts.skipped,
                false => given.skipped,
            },
        })
    }

    fn stage(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        given: &Given<'_>,
        partial: u32,
    ) -> Result<(), StepError> {
        self.fill_inputs(given);
        if let (Some(ring), Some(under)) = (&mut self.ring, &self.controlled) {
            let (groups, tensors, plan) = (&self.groups, &self.tensors, &self.plan);
            for (slot, (dispatch, class)) in under.dispatches.iter().enumerate() {
                let class = under.classes[*class].shared.of_frame();
                let uniforms = uniforms_of(&[].into(), groups, tensors, plan, dispatch, &class);
                ring.set(slot, uniforms.as_bytes());
            }
            ring.record(self.kernels.device(), encoder)?;
        }
        let device = self.kernels.device();
        let norm_of = norm_of(&self.groups, given);
        if let Some(under) = &mut self.controlled {
            under.norm.prepare(device, encoder, partial, norm_of)?;
            under.inputs.record(device, encoder)?;
            under.is_staged = true;
        }
        Ok(())
    }

    fn is_prepared(&self) -> bool {
        self.controlled
            .as_ref()
            .is_some_and(|under| under.is_staged)
    }

    fn record_norm(&self, pass: &mut wgpu::ComputePass<'_>, given: &Given<'_>, partial: u32) {
        if let Some(under) = &self.controlled {
            under
                .norm
                .record(pass, partial, norm_of(&self.groups, given));
        }
    }

    fn record_step(&mut self, pass: &mut wgpu::ComputePass<'_>, given: &Given<'_>) {
        let Some(under) = &mut self.controlled else {
            return;
        };
        under.norm.set_recorded();
        pass.set_pipeline(&given.select.0);
        pass.set_bind_group(TENSORS_GROUP, &under.select, &[]);
        pass.dispatch_workgroups(1, 1, 1);
        let mut current = None;
        let control_group = self.kernels.scalar_path().control_group();
        for (slot, (dispatch, class)) in under.dispatches.iter().enumerate() {
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
            pass.set_bind_group(control_group, &under.block, &[block]);
            match &self.ring {
                Some(ring) => ring.bind(pass, SCALARS_GROUP, slot),
                None => {
                    let (groups, tensors, plan) = (&self.groups, &self.tensors, &self.plan);
                    let class = under.classes[*class].shared.of_frame();
                    let uniforms = uniforms_of(&[].into(), groups, tensors, plan, dispatch, &class);
                    pass.set_immediates(0, uniforms.as_bytes());
                }
            }
            let [x, y] = dispatch.workgroups;
            pass.dispatch_workgroups(x, y, 1);
        }
        self.recorded = under.norm.dispatches() + 1 + under.dispatches.len();
        self.set_unprepared();
        self.counts.control = Some(given.identity.clone());
        self.tensors.set_told();
        self.tensors.count_controlled_step();
        self.stale = true;
    }

    fn counted(&self) -> Option<Counted> {
        Some(Counted {
            applied: self.counts.applied.clone()?,
            tensors: self.tensors.as_slice().len(),
            recorded: self.tensors.recorded().collect(),
            mailbox: self.counts.mailbox.clone(),
            epoch: self.counts.epoch,
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
