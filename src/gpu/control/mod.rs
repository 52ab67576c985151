//! A step without a word from the host: what [`StepControl`] says, on the device.

mod norm;
mod telemetry;

use std::fmt;
use std::sync::Arc;

use super::error::{BuildError, KernelError, StepError, TransferError};
use super::error_scope::checked;
use super::kernels::{BindingKind, Kernels, TENSORS_GROUP};
use super::readback;
use super::staged::Staged;
use crate::control::{ControlRecord, ControlState, MAX_GROUP_NORMS, NonFinite, StepControl};
pub(crate) use norm::Norm;
pub use norm::NormVariant;
pub(crate) use telemetry::{Counted, Mailbox};
use telemetry::{HISTORY, RECORD_WORDS, Telemetry};

/// So many steps may be skipped that nobody has read of: what a step sends of its scalars ends there, and further steps are
/// skipped, too.
pub(crate) const WINDOW: u64 = 64;

/// Words of `Settings` in `shaders/control/finish.wgsl`, and of its `Verdict`.
const SETTINGS_WORDS: usize = 12 + NORMS;
const VERDICT_WORDS: usize = 2 + 2 * NORMS;

/// Most norms that are told apart.
const NORMS: usize = MAX_GROUP_NORMS + 1;

/// What a step's control remembers on the device, and the kernels that decide.
///
/// [`GpuOptimizer::step_with`](crate::GpuOptimizer::step_with) records a step under it, [`step`](Self::step) one of several
/// optimizers together. In the caller's encoder, and in one pass, the gradients' norm is taken, what becomes of the step is
/// decided, and the step is applied or skipped; nothing is submitted, mapped, polled or waited for, and nothing is
/// allocated after the first such step, but for one small buffer whenever more steps are on their way than ever before.
///
/// ```
/// use wgpu_optim::{
///     AdamConfig, AdapterRequest, Gpu, GpuControl, GpuOptimizer, Kernels, LossScale, StepControl, TensorBinding, readback,
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
    control: StepControl,
    /// Tells controls apart.
    identity: Arc<()>,
    finish: Kernel,
    select: Kernel,
    settings: Staged,
    buffers: Buffers,
    /// What there are partial sums of, and what `finish` binds.
    sums: Option<(wgpu::Buffer, wgpu::BindGroup)>,
    /// Where the partial sums of each optimizer start in the step that has been prepared.
    prepared: Vec<u32>,
    /// What goes with the report of the last step.
    counted: Vec<Counted>,
    /// Steps that have been recorded.
    steps: u64,
    telemetry: Telemetry,
}

/// What a control gives an optimizer, without borrowing all of it.
macro_rules! given {
    ($control:ident, $partials:ident) => {
        Given {
            control: &$control.control,
            identity: &$control.identity,
            select: &$control.select,
            verdict: &$control.buffers.verdict,
            partials: $partials,
            skipped: $control.telemetry.skipped(),
        }
    };
}

type Kernel = (wgpu::ComputePipeline, wgpu::BindGroupLayout);

struct Buffers {
    /// `Scale`, `Verdict`, `Record` and an array of these in `finish.wgsl`.
    scale: wgpu::Buffer,
    verdict: wgpu::Buffer,
    latest: wgpu::Buffer,
    history: wgpu::Buffer,
}

/// An optimizer that a control can step: a [`GpuOptimizer`](crate::GpuOptimizer) of any rule.
pub trait Controlled: sealed::Controlled {}

impl<T: sealed::Controlled> Controlled for T {}

pub(crate) mod sealed {
    use super::{Counted, Kernels, StepControl, StepError};
    use std::sync::Arc;

    /// What a control gives an optimizer.
    pub struct Given<'c> {
        pub(crate) control: &'c StepControl,
        pub(crate) identity: &'c Arc<()>,
        pub(crate) select: &'c super::Kernel,
        pub(crate) verdict: &'c wgpu::Buffer,
        pub(crate) partials: &'c wgpu::Buffer,
        /// How many steps the host knows to have been skipped.
        pub(crate) skipped: u64,
    }

    /// What an optimizer needs of a step.
    #[derive(Clone, Copy)]
    pub struct Needed {
        pub(crate) partials: u32,
        /// How many steps had been skipped when it was last read which of its own were.
        pub(crate) skipped: u64,
    }

    /// The parts of a step under a control, in their order.
    pub trait Controlled {
        fn kernels(&self) -> &Kernels;
        /// The most partial sums that its gradients can have.
        fn max_partials(&self) -> u64;
        /// Builds what it does not have yet, and says what takes part.
        fn begin(&mut self, given: &Given<'_>) -> Result<Needed, StepError>;
        /// Records copies; partial sums start at `partial`.
        fn stage(
            &mut self,
            encoder: &mut wgpu::CommandEncoder,
            given: &Given<'_>,
            partial: u32,
        ) -> Result<(), StepError>;
        /// Whether nothing has changed since [`stage`](Self::stage).
        fn is_prepared(&self) -> bool;
        fn record_norm(&self, pass: &mut wgpu::ComputePass<'_>, given: &Given<'_>, partial: u32);
        fn record_step(&mut self, pass: &mut wgpu::ComputePass<'_>, given: &Given<'_>);
        /// What the device counts, and how many steps have been recorded; none before the first step.
        fn counted(&self) -> Option<Counted>;
    }
}

use sealed::Given;

impl GpuControl {
    /// Builds the kernels and the buffers of a control. Submits nothing.
    ///
    /// # Errors
    /// [`BuildError`] if the device binds too few storage buffers, is lost or out of memory.
    pub fn new(kernels: &Kernels, control: StepControl) -> Result<Self, BuildError> {
        use BindingKind::{Read, ReadWrite, Uniform};
        const FINISH: [BindingKind; 6] =
            [Uniform, Read, ReadWrite, ReadWrite, ReadWrite, ReadWrite];
        const SELECT: [BindingKind; 4] = [Read, Read, ReadWrite, ReadWrite];
        let device = kernels.device();
        let storage_buffers = device.limits().max_storage_buffers_per_shader_stage;
        let required = FINISH.len() as u32 - 1;
        if storage_buffers < required {
            return Err(KernelError::LimitTooLow {
                limit: "max_storage_buffers_per_shader_stage",
                required: required.into(),
                actual: storage_buffers.into(),
            }
            .into());
        }
        let source = include_str!("../../../shaders/control/finish.wgsl").to_owned();
        let finish = kernels.of_control("finish", source, &FINISH, 0)?;
        let source = include_str!("../../../shaders/control/select.wgsl").to_owned();
        let select = kernels.of_control("select_scalars", source, &SELECT, 0)?;
        let (settings, buffers) = checked(device, || {
            let usage = wgpu::BufferUsages::UNIFORM;
            let size = size_of::<[u32; SETTINGS_WORDS]>() as u64;
            let settings = Staged::new(device, "wgpu_optim.settings", size, usage);
            (settings, Buffers::new(device))
        })
        .map_err(|error| BuildError::Device {
            message: error.to_string(),
        })?;
        let state = control.initial_state();
        let control = Self {
            kernels: kernels.clone(),
            control,
            identity: Arc::new(()),
            finish,
            select,
            settings,
            buffers,
            sums: None,
            prepared: Vec::new(),
            counted: Vec::new(),
            steps: 0,
            telemetry: Telemetry::default(),
        };
        let message = |error: TransferError| BuildError::Device {
            message: error.to_string(),
        };
        control.load_state(&state).map_err(message)?;
        Ok(control)
    }

    /// What is done.
    #[must_use]
    pub const fn control(&self) -> &StepControl {
        &self.control
    }

    /// Does something else from the next recorded step on. A loss scale that was there goes on, whatever the new one would
    /// start as.
    pub fn set_control(&mut self, control: StepControl) {
        self.control = control;
    }

    /// The loss scale of the next step, the first `f32` of 16 bytes that a shader may bind as uniform or storage. In the
    /// order of the encoder: what is recorded before a step sees the scale by which that step divides.
    #[must_use]
    pub const fn loss_scale_buffer(&self) -> &wgpu::Buffer {
        &self.buffers.scale
    }

    /// What the last step came to, 32 bytes that a shader may bind as uniform or storage: the step's number (`u32`), norm
    /// and clip factor (`f32`), flags (`u32`; bit 0: a gradient was not finite, bit 1: the step was skipped), the scale
    /// (`f32`), and how many steps have been skipped (`u32`).
    #[must_use]
    pub const fn record_buffer(&self) -> &wgpu::Buffer {
        &self.buffers.latest
    }

    /// How many steps have been recorded.
    #[must_use]
    pub const fn steps(&self) -> u64 {
        self.steps
    }

    /// Records one step of several optimizers whose gradients have one norm, and which are skipped together: one pass, and
    /// copies before and after it. The caller submits. Frozen tensors are left out of the norm, too.
    ///
    /// # Errors
    /// [`StepError::Unread`] if an optimizer has steps under another control that have not been read of,
    /// [`StepError::OtherKernels`], [`StepError::Scalars`] and [`StepError::Build`]; then no step has been recorded.
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
        self.record(&mut pass, optimizers)?;
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
        let mut of_device = optimizers.iter().map(|optimizer| optimizer.kernels());
        if of_device.any(|kernels| !self.kernels.is_same(kernels)) {
            return Err(StepError::OtherKernels);
        }
        let max_partials = optimizers.iter().map(|optimizer| optimizer.max_partials());
        self.make_room(max_partials.sum())?;
        let Some((partials, _)) = &self.sums else {
            return Ok(());
        };
        let given = given!(self, partials);
        self.prepared.clear();
        let (mut count, mut skipped) = (0, given.skipped);
        for optimizer in &mut *optimizers {
            let needed = optimizer.begin(&given)?;
            optimizer.stage(encoder, &given, count)?;
            self.prepared.push(count);
            count += needed.partials;
            skipped = skipped.min(needed.skipped);
        }
        let words = settings(&self.control, self.steps + 1, count, skipped + WINDOW - 1);
        self.settings.bytes.clear();
        self.settings
            .bytes
            .extend_from_slice(bytemuck::bytes_of(&words));
        self.settings.record(self.kernels.device(), encoder)
    }

    /// Records one step into a compute pass that the caller has open. Leaves its own pipeline and bind groups set.
    ///
    /// # Errors
    /// [`StepError::NotPrepared`] if there was no [`prepare`](Self::prepare) of these optimizers since the last step or the
    /// last change of a learning rate, momentum or frozen tensor; then nothing has been recorded.
    pub fn record(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        optimizers: &mut [&mut dyn Controlled],
    ) -> Result<(), StepError> {
        let Some((partials, finish)) = &self.sums else {
            return Err(StepError::NotPrepared);
        };
        let are_prepared = optimizers.iter().all(|optimizer| optimizer.is_prepared());
        if optimizers.is_empty() || self.prepared.len() != optimizers.len() || !are_prepared {
            return Err(StepError::NotPrepared);
        }
        let given = given!(self, partials);
        for (optimizer, first) in optimizers.iter().zip(&self.prepared) {
            optimizer.record_norm(pass, &given, *first);
        }
        pass.set_pipeline(&self.finish.0);
        pass.set_bind_group(TENSORS_GROUP, finish, &[]);
        pass.dispatch_workgroups(1, 1, 1);
        self.counted.clear();
        for optimizer in &mut *optimizers {
            optimizer.record_step(pass, &given);
            self.counted.extend(optimizer.counted());
        }
        self.steps += 1;
        self.prepared.clear();
        Ok(())
    }

    /// Records, behind the pass of the last step, the copies by which [`read`](Self::read) learns of it.
    pub fn report(&mut self, encoder: &mut wgpu::CommandEncoder) {
        if self.counted.is_empty() {
            return;
        }
        let counted = std::mem::take(&mut self.counted);
        let (device, history) = (self.kernels.device(), &self.buffers.history);
        self.telemetry
            .record(device, encoder, self.steps, history, counted);
    }

    /// Makes sure of a buffer for so many partial sums.
    fn make_room(&mut self, count: u64) -> Result<(), BuildError> {
        let bytes = 16 * count.max(1);
        if self
            .sums
            .as_ref()
            .is_some_and(|(partials, _)| partials.size() >= bytes)
        {
            return Ok(());
        }
        let device = self.kernels.device();
        let made = checked(device, || {
            let partials = device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("wgpu_optim.partials"),
                size: bytes,
                usage: wgpu::BufferUsages::STORAGE,
                mapped_at_creation: false,
            });
            let bind_group = bind_whole(
                device,
                &self.finish.1,
                &[
                    self.settings.buffer(),
                    &partials,
                    &self.buffers.scale,
                    &self.buffers.verdict,
                    &self.buffers.latest,
                    &self.buffers.history,
                ],
            );
            (partials, bind_group)
        });
        let made = made.map_err(|error| BuildError::Device {
            message: error.to_string(),
        })?;
        self.sums = Some(made);
        Ok(())
    }

    /// The records that have arrived and were not returned before, oldest first. Does not wait: a step's arrives when it
    /// has been submitted and is done, and the host has had its turn (a submission, a poll, or this). Of more than 64
    /// steps since the last call the oldest may be missing. Optimizers learn by this what was applied.
    pub fn read(&mut self) -> Vec<ControlRecord> {
        // Whatever is wrong with the device shows elsewhere.
        let _ = self.kernels.device().poll(wgpu::PollType::Poll);
        self.telemetry.read()
    }

    /// How many of the recorded steps have not been read of.
    #[must_use]
    pub const fn unread(&self) -> u64 {
        self.steps - self.telemetry.last_read()
    }

    /// What the control remembers, after everything submitted so far. Submits and waits as
    /// [`readback::download`] does, under any executor.
    ///
    /// # Errors
    /// [`TransferError`] if the device is lost or out of memory.
    pub async fn state(&self) -> Result<ControlState, TransferError> {
        let (device, queue) = (self.kernels.device(), self.kernels.queue());
        let take = |bytes: &[u8]| {
            let mut words = bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned);
            let mut next = || words.next().unwrap_or_default();
            ControlState {
                scale: f32::from_bits(next()),
                growth_tracker: next(),
            }
        };
        readback::read(device, queue, &self.buffers.scale, 0, 2, take).await
    }

    /// Takes over what a control remembered. Takes effect before the commands of the next submission.
    ///
    /// # Errors
    /// [`TransferError`] if the device is out of memory.
    pub fn load_state(&self, state: &ControlState) -> Result<(), TransferError> {
        let (device, queue) = (self.kernels.device(), self.kernels.queue());
        let words = [state.scale.to_bits(), state.growth_tracker];
        let bytes = bytemuck::bytes_of(&words);
        readback::upload_bytes(device, queue, &self.buffers.scale, 0, bytes)
    }
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
            verdict: buffer("wgpu_optim.verdict", VERDICT_WORDS, Usages::empty()),
            latest: buffer("wgpu_optim.record", RECORD_WORDS, bindable),
            history: buffer(
                "wgpu_optim.history",
                HISTORY * RECORD_WORDS,
                Usages::COPY_SRC,
            ),
        }
    }
}

/// `Settings` of a step.
fn settings(
    control: &StepControl,
    step: u64,
    partials: u32,
    most_skipped: u64,
) -> [u32; SETTINGS_WORDS] {
    let mut words = [0; SETTINGS_WORDS];
    let skips = control.nonfinite() == NonFinite::Skip;
    let loss = control.loss_scale();
    words[..5].copy_from_slice(&[
        step as u32,
        partials,
        control.norms() as u32,
        u32::from(skips) | u32::from(loss.is_some()) << 1,
        most_skipped as u32,
    ]);
    match loss {
        Some(loss) => {
            words[5] = (loss.growth_factor as f32).to_bits();
            words[6] = (loss.backoff_factor as f32).to_bits();
            words[7] = loss.growth_interval;
        }
        None => words[8] = control.initial_state().scale.to_bits(),
    }
    for (norm, word) in words[12..].iter_mut().enumerate() {
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
            .field("control", &self.control)
            .field("steps", &self.steps)
            .finish_non_exhaustive()
    }
}
