//! A step without a word from the host: what [`StepControl`] says, on the device.

mod norm;
mod telemetry;
mod tensor_clip;

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use super::error::{BuildError, StepError, TransferError};
use super::error_scope::checked;
use super::kernels::{BindingKind, Kernels};
use super::pass;
use super::readback;
use super::staged::Staged;
use super::submission::{Fate, Submission, Submissions};
use crate::control::{ControlRecord, ControlState, MAX_GROUP_NORMS, NonFinite, StepControl};
pub(crate) use norm::Norm;
pub(crate) use telemetry::{Counted, Mailbox, Report, ReportOf};
use telemetry::{HISTORY, RECORD_WORDS, Telemetry};
pub(crate) use tensor_clip::TensorClip;

/// The most steps that may have been skipped or dropped of those whose outcome the host does not know: a step sends its
/// scalars for so many, and where the device is behind by more it skips the step.
pub(crate) const WINDOW: u64 = 64;

/// Words of `Settings` in `shaders/control/finish.wgsl`, and of its `Verdict`.
const SETTINGS_WORDS: usize = 8 + NORMS;
const VERDICT_WORDS: usize = 2 + 2 * NORMS;

/// Bytes of a partial sum.
const PARTIAL_BYTES: u64 = 16;

/// The most norms that a control may take.
const NORMS: usize = MAX_GROUP_NORMS + 1;

/// The control of steps on the device: the kernels that decide, and their memory from step to step.
///
/// [`GpuOptimizer::step_with`](crate::GpuOptimizer::step_with) records a step under it, [`step`](Self::step) one of several
/// optimizers together. In the caller's encoder, and in one pass, the gradients' norm is taken, what becomes of the step is
/// decided, and the step is applied or skipped; nothing is submitted, mapped, polled or waited for, and nothing is
/// allocated after the first such step, but for one small buffer whenever more steps are on their way than ever before.
///
/// ```
/// use wgpu_optim::{
///     AdamConfig, AdapterRequest, Gpu, GpuControl, GpuOptimizer, Kernels, LossScale, Optimizer, StepControl, TensorBinding,
///     readback,
/// };
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default())?;
/// # let params = readback::storage_buffer(&device, &queue, "params", &[1.0, 2.0, 3.0])?;
/// # let grads = readback::storage_buffer(&device, &queue, "grads", &[65536.0, f32::INFINITY, 0.0])?;
/// let kernels = Kernels::new(&device, &queue)?;
/// let weight = TensorBinding::new("weight", &params, &grads, [3]);
/// let mut optimizer = GpuOptimizer::new(&kernels, AdamConfig::adamw(1e-3).build()?, &[weight])?;
/// let control = StepControl::builder().max_norm(1.0).loss_scale(LossScale::default()).build()?;
/// let mut control = GpuControl::new(&kernels, control)?;
///
/// // Your loss shader binds `control.loss_scale_buffer()` and multiplies the loss by it.
/// let mut encoder = device.create_command_encoder(&Default::default());
/// optimizer.step_with(&mut encoder, &mut control)?;
/// queue.submit([encoder.finish()]);
///
/// // Whenever it suits you, and for whatever has arrived by then:
/// # device.poll(wgpu_optim::wgpu::PollType::wait_indefinitely())?;
/// for record in control.read() {
///     assert!(record.found_nonfinite && record.is_skipped && record.scale == 65536.0);
/// }
/// assert_eq!(optimizer.applied_steps("weight"), Some(0));
/// # Ok(())
/// # }
/// ```
pub struct GpuControl {
    kernels: Kernels,
    context: ControlContext,
    finish: Kernel,
    /// The bindings of `finish`.
    finish_bindings: wgpu::BindGroup,
    settings: Staged,
    buffers: Buffers,
    /// The number of steps that have been prepared.
    serial: u64,
    prepared: Option<Prepared>,
    submissions: Submissions,
    /// Steps that have been recorded, without those that are known to have been dropped.
    steps: u64,
    /// The numbers of those of which nothing has arrived.
    recorded: VecDeque<(u64, Submission)>,
    /// The optimizers' counts, for the report of the last step.
    counted: Option<Vec<Counted>>,
    telemetry: Telemetry,
}

/// A step that has been prepared.
struct Prepared {
    optimizers: usize,
    number: u64,
    submission: Submission,
}

type Kernel = (wgpu::ComputePipeline, wgpu::BindGroupLayout);

struct Buffers {
    /// `Scale`, `Record` and an array of these in `finish.wgsl`.
    scale: wgpu::Buffer,
    latest: wgpu::Buffer,
    history: wgpu::Buffer,
}

/// The parts of a control that the steps of its optimizers need.
pub(crate) struct ControlContext {
    pub(crate) control: StepControl,
    /// Tells controls apart.
    pub(crate) identity: Arc<()>,
    pub(crate) check: Kernel,
    pub(crate) select: Kernel,
    pub(crate) verdict: wgpu::Buffer,
    /// The partial sums of norms.
    pub(crate) partials: wgpu::Buffer,
    /// The record of the last step, and those of the last steps.
    pub(crate) records: [wgpu::Buffer; 2],
}

/// The preparation of a step that an optimizer takes part in.
#[derive(Clone)]
pub(crate) struct StagedStep {
    pub(crate) control: Arc<()>,
    pub(crate) serial: u64,
    /// The number of the step.
    pub(crate) number: u64,
    /// The index of the optimizer's first partial sum.
    pub(crate) partial: u32,
}

/// An optimizer that a control can step: a [`GpuOptimizer`](crate::GpuOptimizer) of any rule.
pub trait Controlled: sealed::Parts {}

impl<T: sealed::Parts> Controlled for T {}

pub(crate) mod sealed {
    use crate::gpu::optimizer::Recorder;
    use crate::gpu::rules::GroupRules;

    /// An optimizer, without the type of its rules.
    pub trait Parts {
        fn parts(&mut self) -> (&dyn GroupRules, &mut Recorder);
    }
}

impl GpuControl {
    /// Builds the kernels and the buffers of a control. Submits nothing.
    ///
    /// # Errors
    /// [`BuildError`] if the device binds too few storage buffers, is lost or out of memory.
    pub fn new(kernels: &Kernels, control: StepControl) -> Result<Self, BuildError> {
        use BindingKind::{Read, ReadWrite, Uniform};
        const FINISH: [BindingKind; 6] =
            [Uniform, Read, ReadWrite, ReadWrite, ReadWrite, ReadWrite];
        const CHECK: [BindingKind; 3] = [Read, Read, ReadWrite];
        const SELECT: [BindingKind; 5] = [Read, Read, ReadWrite, ReadWrite, Read];
        let device = kernels.device();
        kernels.check_storage_buffers(FINISH.len() - 1)?;
        let source = concat!(
            include_str!("../../../shaders/control/factors.wgsl"),
            include_str!("../../../shaders/control/finish.wgsl"),
        );
        let finish = kernels.of_control("finish", source.to_owned(), &FINISH, 0)?;
        let source = include_str!("../../../shaders/control/check.wgsl").to_owned();
        let check = kernels.of_control("check_scalars", source, &CHECK, 0)?;
        let source = include_str!("../../../shaders/control/select.wgsl").to_owned();
        let select = kernels.of_control("select_scalars", source, &SELECT, 0)?;
        let state = control.initial_state();
        let control = checked(device, || {
            let usage = wgpu::BufferUsages::UNIFORM;
            let size = size_of::<[u32; SETTINGS_WORDS]>() as u64;
            let settings = Staged::new(device, "wgpu_optim.settings", size, usage);
            let buffers = Buffers::new(device);
            let context = ControlContext {
                control,
                identity: Arc::new(()),
                check,
                select,
                verdict: storage_buffer(device, "wgpu_optim.verdict", 4 * VERDICT_WORDS as u64),
                partials: storage_buffer(device, "wgpu_optim.partials", PARTIAL_BYTES),
                records: [buffers.latest.clone(), buffers.history.clone()],
            };
            let finish_bindings = bind_finish(device, &finish, &settings, &context, &buffers);
            (context, finish_bindings, settings, buffers)
        });
        let (context, finish_bindings, settings, buffers) = control?;
        let mut control = Self {
            kernels: kernels.clone(),
            context,
            finish,
            finish_bindings,
            settings,
            buffers,
            serial: 0,
            prepared: None,
            submissions: Submissions::default(),
            steps: 0,
            recorded: VecDeque::new(),
            counted: None,
            telemetry: Telemetry::default(),
        };
        let message = |error: TransferError| BuildError::Device {
            message: error.to_string(),
        };
        control.load_state(&state).map_err(message)?;
        Ok(control)
    }

    /// The settings.
    #[must_use]
    pub const fn control(&self) -> &StepControl {
        &self.context.control
    }

    /// Does something else from the next recorded step on. A dynamic loss scale that was there goes on, whatever the new one
    /// would start as; where there was none the new one starts. [`loss_scale_buffer`](Self::loss_scale_buffer) has what it
    /// starts as, or a constant scale, from the commands of the next submission on: call this before the loss is recorded, and
    /// when the steps under the control before have been submitted.
    pub fn set_control(&mut self, control: StepControl) {
        if control.loss_scale().is_none() || self.context.control.loss_scale().is_none() {
            let state = control.initial_state();
            let words = [state.scale.to_bits(), state.growth_tracker];
            let queue = self.kernels.queue();
            queue.write_buffer(&self.buffers.scale, 0, bytemuck::bytes_of(&words));
        }
        self.context.control = control;
        self.prepared = None;
    }

    /// The loss scale of the next step, the first `f32` of 16 bytes that a shader may bind as uniform or storage. In the
    /// order of the encoder: what is recorded before a step sees the scale by which that step divides.
    #[must_use]
    pub const fn loss_scale_buffer(&self) -> &wgpu::Buffer {
        &self.buffers.scale
    }

    /// The outcome of the last step, 32 bytes that a shader may bind as uniform or storage: the step's number (`u32`), norm
    /// and clip factor (`f32`), flags (`u32`; bit 0: a gradient was not finite, bit 1: the step was skipped), the scale
    /// (`f32`), and how many steps have been skipped (`u32`). Bit 2 of the flags: the step was skipped because there were no
    /// scalars for it ([`StepError::TooFarAhead`]).
    #[must_use]
    pub const fn record_buffer(&self) -> &wgpu::Buffer {
        &self.buffers.latest
    }

    /// The number of steps that have been recorded, those before a [loaded](Self::load_state) state included. One whose
    /// encoder was dropped does not count.
    #[must_use]
    pub fn steps(&self) -> u64 {
        let dropped = self.recorded.iter().filter(is_dropped);
        self.steps - dropped.count() as u64
    }

    /// Records one step of several optimizers whose gradients have one norm, and which are skipped together: one pass, and
    /// copies before and after it. The caller submits. Frozen tensors are left out of the norm, too.
    ///
    /// What has arrived of earlier steps is taken in first. The scalars of a step follow the steps that the device has
    /// applied, and the host sends them for every number that is possible: where more than 64 steps whose outcome has not
    /// arrived were skipped, the device has none and skips the step, too.
    ///
    /// # Errors
    /// [`StepError::Unread`] if an optimizer has steps under another control that have not been read of,
    /// [`StepError::UnknownGroup`], [`StepError::OtherKernels`], [`StepError::Scalars`] and [`StepError::Build`]; then no
    /// step has been recorded. [`StepError::TooFarAhead`], once, if a step had to be skipped because the device had no
    /// scalars for it.
    pub fn step(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        optimizers: &mut [&mut dyn Controlled],
    ) -> Result<(), StepError> {
        self.prepare(encoder, optimizers)?;
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("wgpu_optim.step"),
            timestamp_writes: None,
        });
        if let Some(prepared) = self.prepared.take() {
            // The pass is part of the encoder.
            let submission = prepared.submission.clone();
            self.record_prepared(&mut pass, optimizers, prepared.number, submission);
        }
        drop(pass);
        self.report(encoder);
        Ok(())
    }

    /// Records what the next [`record`](Self::record) of the same optimizers needs before its pass begins.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn prepare(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        optimizers: &mut [&mut dyn Controlled],
    ) -> Result<(), StepError> {
        self.prepared = None;
        self.settle();
        if let Some(step) = self.telemetry.take_too_far_ahead() {
            return Err(StepError::TooFarAhead { step });
        }
        let by_tensor = self.context.control.tensor_max_norm().is_some();
        let (mut unknown, mut max_partials): (Vec<&str>, _) =
            (self.context.control.groups().collect(), 0);
        for optimizer in &mut *optimizers {
            let (rules, recorder) = optimizer.parts();
            if !self.kernels.is_same(recorder.kernels()) {
                return Err(StepError::OtherKernels);
            }
            let names = || (0..rules.groups()).map(|group| rules.name(group));
            unknown.retain(|unknown| names().all(|name| name != *unknown));
            max_partials += recorder.max_partials(by_tensor);
        }
        if let Some(unknown) = unknown.first() {
            return Err(StepError::UnknownGroup {
                group: (*unknown).to_owned(),
            });
        }
        self.make_room(max_partials)?;
        self.serial += 1;
        // No two steps that may still be submitted have one number.
        let last = self.last_number();
        let mut count = 0;
        for optimizer in &mut *optimizers {
            let (rules, recorder) = optimizer.parts();
            let staged = StagedStep {
                control: Arc::clone(&self.context.identity),
                serial: self.serial,
                number: last + 1,
                partial: count,
            };
            count += recorder.stage(rules, encoder, &self.context, staged)?;
        }
        let words = settings(&self.context.control, last + 1, count);
        self.settings.bytes.clear();
        self.settings
            .bytes
            .extend_from_slice(bytemuck::bytes_of(&words));
        self.settings.record(self.kernels.device(), encoder)?;
        self.prepared = Some(Prepared {
            optimizers: optimizers.len(),
            number: last + 1,
            submission: self.submissions.of_encoder(encoder),
        });
        Ok(())
    }

    /// Records one step into a compute pass that the caller has open. Leaves its own pipeline and bind groups set.
    ///
    /// # Errors
    /// [`StepError::NotPrepared`] if there was no [`prepare`](Self::prepare) of these optimizers since the last step, the
    /// last other preparation or the last change of a learning rate, momentum, frozen tensor or of the control, or if the
    /// encoder of it was dropped; then nothing has been recorded.
    pub fn record(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        optimizers: &mut [&mut dyn Controlled],
    ) -> Result<(), StepError> {
        let is_of_step = |staged: &StagedStep| {
            Arc::ptr_eq(&staged.control, &self.context.identity) && staged.serial == self.serial
        };
        let are_prepared = optimizers
            .iter_mut()
            .all(|optimizer| optimizer.parts().1.staged().is_some_and(is_of_step));
        let prepared = self.prepared.take_if(|prepared| {
            let is_dropped = prepared.submission.fate() == Fate::Dropped;
            prepared.optimizers == optimizers.len() && are_prepared && !is_dropped
        });
        let number = prepared.ok_or(StepError::NotPrepared)?.number;
        let submission = self.submissions.of_pass(pass);
        self.record_prepared(pass, optimizers, number, submission);
        Ok(())
    }

    fn record_prepared(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        optimizers: &mut [&mut dyn Controlled],
        number: u64,
        submission: Submission,
    ) {
        for optimizer in &mut *optimizers {
            optimizer.parts().1.record_norm(pass, &self.context);
        }
        pass::record_one(pass, &self.finish.0, &self.finish_bindings);
        let recorders = optimizers.iter_mut().map(|optimizer| optimizer.parts().1);
        let counted =
            recorders.filter_map(|recorder| recorder.record_step(pass, &self.context, &submission));
        self.counted = Some(counted.collect());
        self.steps += 1;
        self.recorded.push_back((number, submission));
    }

    /// Records, behind the pass of the last step, the copies by which [`read`](Self::read) learns of it. Where the device
    /// has no memory for the buffer that they go to, a later report tells of it.
    pub fn report(&mut self, encoder: &mut wgpu::CommandEncoder) {
        let Some((counted, step)) = self.counted.take().zip(self.recorded.back()) else {
            return;
        };
        let (device, history) = (self.kernels.device(), &self.buffers.history);
        self.telemetry
            .record(device, encoder, step, history, counted);
    }

    /// Takes in what has become of the steps that were recorded.
    fn settle(&mut self) {
        self.telemetry.collect();
        let arrived = self.telemetry.last_arrived();
        self.recorded.retain(|step| {
            let is_dropped = is_dropped(&step);
            self.steps -= u64::from(is_dropped);
            !is_dropped && step.0 > arrived
        });
    }

    /// Makes sure of a buffer for so many partial sums.
    fn make_room(&mut self, count: u64) -> Result<(), BuildError> {
        let bytes = PARTIAL_BYTES * count;
        if self.context.partials.size() >= bytes {
            return Ok(());
        }
        let device = self.kernels.device();
        let label = "wgpu_optim.partials";
        self.context.partials = checked(device, || storage_buffer(device, label, bytes))?;
        let Self {
            finish,
            settings,
            context,
            buffers,
            ..
        } = &*self;
        let bind = || bind_finish(device, finish, settings, context, buffers);
        self.finish_bindings = checked(device, bind)?;
        Ok(())
    }

    /// The records that have arrived and were not returned before, oldest first. Does not wait: a step's arrives when it
    /// has been submitted and is done, and the host has had its turn (a submission, a poll, or this). Of more than 64
    /// steps since the last call the oldest are missing. A step whose encoder was dropped has no record, and no number
    /// unless later ones had been recorded by then.
    pub fn read(&mut self) -> Vec<ControlRecord> {
        // Whatever is wrong with the device shows elsewhere.
        let _ = self.kernels.device().poll(wgpu::PollType::Poll);
        self.settle();
        self.telemetry.take_records()
    }

    /// The number of recorded steps of which nothing has arrived yet.
    #[must_use]
    pub fn unread(&self) -> u64 {
        let arrived = self.telemetry.last_arrived();
        let unread = self
            .recorded
            .iter()
            .filter(|step| !is_dropped(step) && step.0 > arrived);
        unread.count() as u64
    }

    /// Copies the control's memory off the device, after everything submitted so far. Submits and waits as
    /// [`readback::download`] does, under any executor.
    ///
    /// # Errors
    /// [`TransferError`] if the device is lost or out of memory.
    pub async fn state(&self) -> Result<ControlState, TransferError> {
        let (device, queue) = (self.kernels.device(), self.kernels.queue());
        let is_dynamic = self.context.control.loss_scale().is_some();
        let regions = [(&self.buffers.scale, 0..12), (&self.buffers.latest, 0..4)];
        let bytes = readback::download_regions(device, queue, &regions).await?;
        let mut words = bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned);
        let mut next = || -> u32 { words.next().unwrap_or_default() };
        let (scale, growth_tracker) = (f32::from_bits(next()), next());
        // The device counts modulo 2^32.
        let (recorded, skipped) = (self.last_number(), self.telemetry.skipped());
        let newly_skipped = next().wrapping_sub(skipped as u32);
        let not_done = (recorded as u32).wrapping_sub(next());
        Ok(ControlState {
            scale,
            growth_tracker,
            is_dynamic,
            steps: recorded.saturating_sub(not_done.into()),
            skipped: skipped.saturating_add(newly_skipped.into()),
        })
    }

    /// Takes over what a control remembered: its loss scale, if that is dynamic here and was there, and the numbers of its
    /// records, unless steps of this one are [unread](Self::unread), whose numbers go on. Takes effect before the commands of
    /// the next submission.
    ///
    /// # Errors
    /// [`TransferError`] if the device is out of memory.
    pub fn load_state(&mut self, state: &ControlState) -> Result<(), TransferError> {
        self.settle();
        let (device, queue) = (self.kernels.device(), self.kernels.queue());
        let state = self.context.control.resumed(state);
        let upload = |buffer, words: &[u32]| {
            readback::upload_bytes(device, queue, buffer, 0, bytemuck::cast_slice(words))
        };
        let words = [state.scale.to_bits(), state.growth_tracker];
        upload(&self.buffers.scale, &words)?;
        if self.recorded.is_empty() {
            let [scale, growth_tracker] = words;
            let (steps, skipped) = (state.steps as u32, state.skipped as u32);
            upload(&self.buffers.scale, &[scale, growth_tracker, skipped])?;
            upload(&self.buffers.latest, &[steps])?;
            // A record that is there could be taken for that of a step to come.
            upload(&self.buffers.history, &[0; HISTORY * RECORD_WORDS])?;
            self.telemetry.restart(state.steps, state.skipped);
            self.steps = self.telemetry.last_arrived();
        }
        Ok(())
    }

    /// The number of the last step that was recorded, and is not known to have been dropped.
    fn last_number(&self) -> u64 {
        let last = self.recorded.back();
        last.map_or(self.telemetry.last_arrived(), |(number, _)| *number)
    }
}

/// Whether a recorded step will never be done.
fn is_dropped((_, submission): &&(u64, Submission)) -> bool {
    submission.fate() == Fate::Dropped
}

impl Buffers {
    fn new(device: &wgpu::Device) -> Self {
        use wgpu::BufferUsages as Usages;
        let buffer = |label, words: usize, usage| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size: 4 * words as u64,
                usage: Usages::STORAGE | usage,
                mapped_at_creation: false,
            })
        };
        let bindable = Usages::UNIFORM | Usages::COPY_SRC | Usages::COPY_DST;
        Self {
            scale: buffer("wgpu_optim.loss_scale", 4, bindable),
            latest: buffer("wgpu_optim.record", RECORD_WORDS, bindable),
            history: buffer(
                "wgpu_optim.history",
                HISTORY * RECORD_WORDS,
                Usages::COPY_SRC | Usages::COPY_DST,
            ),
        }
    }
}

/// A buffer that kernels alone read and write.
fn storage_buffer(device: &wgpu::Device, label: &str, size: u64) -> wgpu::Buffer {
    device.create_buffer(&wgpu::BufferDescriptor {
        label: Some(label),
        size,
        usage: wgpu::BufferUsages::STORAGE,
        mapped_at_creation: false,
    })
}

fn bind_finish(
    device: &wgpu::Device,
    (_, layout): &Kernel,
    settings: &Staged,
    context: &ControlContext,
    buffers: &Buffers,
) -> wgpu::BindGroup {
    let bound = [
        settings.buffer(),
        &context.partials,
        &buffers.scale,
        &context.verdict,
        &buffers.latest,
        &buffers.history,
    ];
    bind_whole(device, layout, &bound)
}

/// `Settings` of a step.
fn settings(control: &StepControl, step: u64, partials: u32) -> [u32; SETTINGS_WORDS] {
    let mut words = [0; SETTINGS_WORDS];
    let skips = control.nonfinite() == NonFinite::Skip;
    let loss = control.loss_scale();
    words[..4].copy_from_slice(&[
        step as u32,
        partials,
        control.norms() as u32,
        u32::from(skips)
            | u32::from(loss.is_some()) << 1
            | u32::from(control.tensor_max_norm().is_some()) << 2,
    ]);
    match loss {
        Some(loss) => {
            words[4] = (loss.growth_factor as f32).to_bits();
            words[5] = (loss.backoff_factor as f32).to_bits();
            words[6] = loss.growth_interval;
        }
        None => words[7] = control.initial_state().scale.to_bits(),
    }
    for (norm, word) in words[8..].iter_mut().enumerate() {
        let max_norm = control
            .max_norm_of(norm)
            .map_or(-1.0, |max_norm| max_norm as f32);
        *word = max_norm.to_bits();
    }
    words
}

/// Whole buffers, in the order of their bindings.
pub(crate) fn bind_whole(
    device: &wgpu::Device,
    layout: &wgpu::BindGroupLayout,
    buffers: &[&wgpu::Buffer],
) -> wgpu::BindGroup {
    let entries: Vec<_> = (0..)
        .zip(buffers)
        .map(|(binding, buffer)| wgpu::BindGroupEntry {
            binding,
            resource: buffer.as_entire_binding(),
        })
        .collect();
    device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: Some("wgpu_optim.control"),
        layout,
        entries: &entries,
    })
}

impl fmt::Debug for GpuControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GpuControl")
            .field("control", &self.context.control)
            .field("steps", &self.steps)
            .finish_non_exhaustive()
    }
}
