//! The training loop in an engine's own words: its device, its buffers, its passes, and the optimizer in its encoder.

use std::cell::Cell;

use anyhow::{Context as _, Result, bail};
use wgpu_optim::control::ControlRecord;
use wgpu_optim::readback::{block_on, download_blocking};
use wgpu_optim::wgpu::util::DeviceExt as _;
use wgpu_optim::{
    AnyRule, Arena, Gpu, GpuControl, GpuOptimizer, Kernels, StorageType, storage, wgpu,
};

use crate::task::{Batch, Losses, Start, Task};
use crate::training::{Device, Gradients, Outcome, Run, Started};

/// Invocations in a workgroup, as in `model.wgsl`.
const WORKGROUP_SIZE: u32 = 64;

/// A device with a task on it: all that runs share.
#[derive(Debug)]
pub struct Engine<'t> {
    task: &'t Task,
    gradients: Gradients,
    name: String,
    gpu: Gpu,
    kernels: Kernels,
    /// Parameters and gradients. The model's kernels read the ones and write the others where they lie.
    arena: Arena,
    buffers: Buffers,
    layers: Vec<LayerPipelines>,
    loss: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
    /// Bytes from one batch to the next.
    batch_stride: u32,
    submissions: Cell<usize>,
}

/// The buffers that the model's kernels read and write beside the arena.
#[derive(Debug)]
struct Buffers {
    /// All batches of a run, so that the loop has nothing to upload.
    batches: wgpu::Buffer,
    dataset: wgpu::Buffer,
    order: wgpu::Buffer,
    activations: wgpu::Buffer,
    deltas: wgpu::Buffer,
    losses: wgpu::Buffer,
    /// 1, where no control has a loss scale.
    no_scale: wgpu::Buffer,
}

/// The pipelines of a layer, and the sizes that their dispatches need.
#[derive(Debug)]
struct LayerPipelines {
    forward: wgpu::ComputePipeline,
    backward: wgpu::ComputePipeline,
    gradient: wgpu::ComputePipeline,
    inputs: u32,
    outputs: u32,
    gradient_words: u32,
}

impl<'t> Engine<'t> {
    /// Compiles the model for a device and puts the data there.
    ///
    /// # Errors
    /// If the task does not fit the device, or the device fails.
    pub fn new(gpu: Gpu, task: &'t Task) -> Result<Self> {
        Self::with_gradients(gpu, task, Gradients::default())
    }

    /// Makes an engine whose gradients are stored and controlled otherwise.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_gradients(gpu: Gpu, task: &'t Task, gradients: Gradients) -> Result<Self> {
        if gradients.stored_as == StorageType::Bf16 {
            bail!("the model writes gradients as f32 or f16");
        }
        let Gpu { device, queue, .. } = &gpu;
        let kernels = Kernels::new(device, queue)?; // once per device, shared by its optimizers
        let arena = Arena::builder().grads_type(gradients.stored_as);
        let arena = arena.build(device, queue, task.model.tensors())?;
        if arena.params().len() != 1 {
            bail!("the parameters do not fit one buffer of this device");
        }

        let batches: Vec<_> = task.batches().collect();
        // Dynamic offsets are aligned.
        let alignment = device.limits().min_uniform_buffer_offset_alignment;
        let batch_stride = alignment.max(size_of::<Batch>() as u32);
        if batches.len() as u64 * u64::from(batch_stride) > u64::from(u32::MAX) {
            bail!("{} batches are too many for one buffer", batches.len());
        }
        let (buffers, layout, layers, loss) = checked(device, || {
            let buffers = Buffers::new(device, task, &batches, batch_stride);
            let layout = bindings_layout(device);
            let (layers, loss) = pipelines(device, &layout, task, &arena, gradients.stored_as);
            (buffers, layout, layers, loss)
        })
        .context("the device refuses the model")?;
        Ok(Self {
            task,
            gradients,
            name: gpu.adapter.get_info().name,
            kernels,
            arena,
            buffers,
            layers,
            loss,
            layout,
            batch_stride,
            submissions: Cell::new(0),
            gpu,
        })
    }

    /// Parameters and gradients as they are.
    #[must_use]
    pub const fn arena(&self) -> &Arena {
        &self.arena
    }

    /// The device.
    #[must_use]
    pub const fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The number of submissions of all runs.
    #[must_use]
    pub fn submissions(&self) -> usize {
        self.submissions.get()
    }

    /// A run from this start.
    ///
    /// # Errors
    /// If the device fails.
    pub fn run(&self, rule: &AnyRule, start: &Start, evaluates: bool) -> Result<EngineRun<'_>> {
        let optimizer = GpuOptimizer::new(&self.kernels, rule.clone(), &self.arena.bindings())?;
        self.arena.upload_all_params(&start.params)?;
        let order = bytemuck::cast_slice(&start.order);
        self.gpu.queue.write_buffer(&self.buffers.order, 0, order);
        let control = self.gradients.control.clone();
        let control = control.map(|control| GpuControl::new(&self.kernels, control));
        let control = control.transpose()?;
        let scale = control.as_ref().map(GpuControl::loss_scale_buffer);
        let scale = scale.unwrap_or(&self.buffers.no_scale);
        let bindings = checked(&self.gpu.device, || self.bind(scale))?;
        Ok(EngineRun {
            engine: self,
            optimizer,
            control,
            records: Vec::new(),
            bindings,
            steps: 0,
            evaluates,
            last_epoch: None,
            this_epoch: None,
        })
    }

    fn encoder(&self) -> wgpu::CommandEncoder {
        let device = &self.gpu.device;
        device.create_command_encoder(&wgpu::CommandEncoderDescriptor {
            label: Some("train.batch"),
        })
    }

    /// Binds the buffers in the order of `model.wgsl`.
    fn bind(&self, scale: &wgpu::Buffer) -> wgpu::BindGroup {
        let (buffers, arena) = (&self.buffers, &self.arena);
        let batch = wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: &buffers.batches,
            offset: 0,
            size: wgpu::BufferSize::new(size_of::<Batch>() as u64),
        });
        let whole = [
            &buffers.dataset,
            &buffers.order,
            &arena.params()[0],
            &arena.grads()[0],
            &buffers.activations,
            &buffers.deltas,
            &buffers.losses,
            scale,
        ];
        let whole = whole.map(|buffer| buffer.as_entire_binding());
        let entry = |(binding, resource)| wgpu::BindGroupEntry { binding, resource };
        let entries: Vec<_> = (0..)
            .zip([batch].into_iter().chain(whole))
            .map(entry)
            .collect();
        self.gpu
            .device
            .create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some("train.bindings"),
                layout: &self.layout,
                entries: &entries,
            })
    }

    /// The only place from which a run submits.
    fn submit(&self, encoder: wgpu::CommandEncoder) -> wgpu::SubmissionIndex {
        self.submissions.set(self.submissions.get() + 1);
        self.gpu.queue.submit([encoder.finish()])
    }

    fn wait_for(&self, submission: Option<wgpu::SubmissionIndex>) -> Result<()> {
        if submission.is_some() {
            self.gpu.device.poll(wgpu::PollType::Wait {
                submission_index: submission,
                timeout: None,
            })?;
        }
        Ok(())
    }
}

impl Device for Engine<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn start<'d>(&'d self, rule: &AnyRule, from: &'d Start, evaluates: bool) -> Started<'d> {
        Ok(Box::new(self.run(rule, from, evaluates)?))
    }
}

/// A run on the device. There is one at a time: it starts in the engine's only arena.
pub struct EngineRun<'e> {
    engine: &'e Engine<'e>,
    optimizer: GpuOptimizer<AnyRule>,
    control: Option<GpuControl>,
    records: Vec<ControlRecord>,
    bindings: wgpu::BindGroup,
    steps: usize,
    evaluates: bool,
    /// The last submissions of this epoch and of the one before.
    this_epoch: Option<wgpu::SubmissionIndex>,
    last_epoch: Option<wgpu::SubmissionIndex>,
}

impl EngineRun<'_> {
    /// The optimizer of the run.
    #[must_use]
    pub const fn optimizer(&self) -> &GpuOptimizer<AnyRule> {
        &self.optimizer
    }

    /// The records of the controlled steps, as far as they have arrived; where the device is behind, the last ones are
    /// missing.
    #[must_use]
    pub fn records(&self) -> &[ControlRecord] {
        &self.records
    }

    /// The gradients of the last step as they are stored, in the model's order.
    ///
    /// # Errors
    /// If the device fails.
    pub fn grads(&self) -> Result<Vec<Vec<f32>>> {
        let (gpu, arena) = (&self.engine.gpu, &self.engine.arena);
        let of = |tensor: &wgpu_optim::gpu::ArenaTensor| {
            let (stored_as, numel) = (self.engine.gradients.stored_as, tensor.numel);
            let (buffer, offset) = (
                &arena.grads()[tensor.buffer],
                arena.grads_offset_bytes(tensor),
            );
            let words = (numel * stored_as.bytes()).div_ceil(4);
            let words = download_blocking(&gpu.device, &gpu.queue, buffer, offset, words)?;
            if stored_as == StorageType::F32 {
                return Ok(words);
            }
            let mut grads = vec![0.0; numel as usize];
            storage::unpack(stored_as, bytemuck::cast_slice(&words), &mut grads);
            Ok(grads)
        };
        arena.tensors().iter().map(of).collect()
    }

    /// The parameters, in the model's order.
    ///
    /// # Errors
    /// If the device fails.
    pub fn params(&self) -> Result<Vec<Vec<f32>>> {
        let download = self.engine.arena.download_all_params();
        Ok(block_on(&self.engine.gpu.device, download)?)
    }

    /// Records the loss of a batch and what each prediction weighs in it.
    fn record_loss(&self, pass: &mut wgpu::ComputePass<'_>, batch: Batch) {
        let (bindings, engine) = (&self.bindings, self.engine);
        pass.set_bind_group(0, bindings, &[batch.slot * engine.batch_stride]);
        for layer in &engine.layers {
            dispatch(pass, &layer.forward, batch.rows * layer.outputs);
        }
        dispatch(pass, &engine.loss, 1);
    }

    /// Records forward and backward of a batch: its gradients go where the optimizer reads them.
    fn record_gradients(&self, encoder: &mut wgpu::CommandEncoder, batch: Batch) {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("train.gradients"),
            timestamp_writes: None,
        });
        self.record_loss(&mut pass, batch);
        for (index, layer) in self.engine.layers.iter().enumerate().rev() {
            dispatch(&mut pass, &layer.gradient, layer.gradient_words);
            if index > 0 {
                dispatch(&mut pass, &layer.backward, batch.rows * layer.inputs);
            }
        }
    }

    /// Records the losses over all rows after so many epochs; they stay on the device until the run is over.
    fn record_evaluation(&self, encoder: &mut wgpu::CommandEncoder, epoch: usize) {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("train.evaluation"),
            timestamp_writes: None,
        });
        for batch in self.engine.task.evaluation(epoch) {
            self.record_loss(&mut pass, batch);
        }
    }

    /// Takes over the records that have arrived, and waits for none. The optimizer learns by it, too, how many of its
    /// steps were applied.
    fn read_records(&mut self) {
        if let Some(control) = &mut self.control {
            self.records.extend(control.read());
        }
    }
}

impl Run for EngineRun<'_> {
    /// Records a step in one encoder and submits it once; nothing is uploaded and nothing read back.
    fn step(&mut self) -> Result<()> {
        let (engine, task) = (self.engine, self.engine.task);
        let mut encoder = engine.encoder();
        if self.evaluates && self.steps == 0 {
            self.record_evaluation(&mut encoder, 0);
        }

        // Forward and backward: the gradients, where the optimizer reads them.
        self.record_gradients(&mut encoder, task.batch(self.steps));
        // The optimizer: the parameters, where the next forward reads them. Under a control it unscales and clips, or skips
        // the step and sets the scale that the next backward reads.
        match &mut self.control {
            None => self.optimizer.step(&mut encoder)?,
            Some(control) => self.optimizer.step_with(&mut encoder, control)?,
        }

        self.steps += 1;
        let (epoch, within) = (
            self.steps / task.steps_per_epoch(),
            self.steps % task.steps_per_epoch(),
        );
        if self.evaluates && within == 0 {
            self.record_evaluation(&mut encoder, epoch);
        }
        self.this_epoch = Some(engine.submit(encoder));
        self.read_records();

        if within == 0 {
            // The device may be an epoch behind, not more: what is recorded takes memory.
            let last_epoch = std::mem::replace(&mut self.last_epoch, self.this_epoch.clone());
            engine.wait_for(last_epoch)?;
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        self.engine.wait_for(self.this_epoch.take())?;
        self.read_records();
        Ok(())
    }

    fn losses(&self) -> Result<Losses> {
        let (Gpu { device, queue, .. }, losses) = (&self.engine.gpu, &self.engine.buffers.losses);
        let slots = download_blocking(device, queue, losses, 0, losses.size() / 4)?;
        Ok(self.engine.task.losses(&slots, self.steps, self.evaluates))
    }

    fn outcome(&self) -> Result<Option<Outcome>> {
        let Some(control) = &self.control else {
            return Ok(None);
        };
        let Gpu { device, queue, .. } = &self.engine.gpu;
        // Of the last step, whichever records have arrived.
        let record = download_blocking(device, queue, control.record_buffer(), 0, 6)?;
        Ok(Some(Outcome {
            skipped: record[5].to_bits().into(),
            scale: record[4],
        }))
    }
}

fn dispatch(pass: &mut wgpu::ComputePass<'_>, pipeline: &wgpu::ComputePipeline, invocations: u32) {
    pass.set_pipeline(pipeline);
    pass.dispatch_workgroups(invocations.div_ceil(WORKGROUP_SIZE), 1, 1);
}

/// Runs `create` and returns the first error that the device reports meanwhile, which else would be wgpu's panic.
fn checked<T>(device: &wgpu::Device, create: impl FnOnce() -> T) -> Result<T> {
    let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
    let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let created = create();
    let errors = [validation, memory].map(|scope| pollster::block_on(scope.pop()));
    match errors.into_iter().flatten().next() {
        Some(error) => Err(error.into()),
        None => Ok(created),
    }
}

impl Buffers {
    fn new(device: &wgpu::Device, task: &Task, batches: &[Batch], stride: u32) -> Self {
        let empty = |label, numel: usize| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size: 4 * numel as u64,
                usage: wgpu::BufferUsages::STORAGE
                    | wgpu::BufferUsages::COPY_SRC
                    | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        };
        let filled = |label, contents, usage| {
            device.create_buffer_init(&wgpu::util::BufferInitDescriptor {
                label: Some(label),
                contents,
                usage,
            })
        };
        let mut entries = vec![0; batches.len() * stride as usize];
        for (entry, batch) in entries.chunks_mut(stride as usize).zip(batches) {
            entry[..size_of::<Batch>()].copy_from_slice(bytemuck::bytes_of(batch));
        }
        let values = bytemuck::cast_slice(&task.data.values);
        let rows = task.data.rows();
        let units: usize = task.model.layers.iter().map(|layer| layer.outputs).sum();
        Self {
            batches: filled("train.batches", &entries, wgpu::BufferUsages::UNIFORM),
            dataset: filled("train.dataset", values, wgpu::BufferUsages::STORAGE),
            order: empty("train.order", rows + task.epochs * task.data.train_rows),
            activations: empty("train.activations", rows * units),
            deltas: empty("train.deltas", rows * units),
            losses: empty("train.losses", batches.len()),
            no_scale: filled(
                "train.no_scale",
                bytemuck::bytes_of(&1.0_f32),
                wgpu::BufferUsages::UNIFORM,
            ),
        }
    }
}

/// The layout of the bindings, in the order of `model.wgsl`: a batch, buffers to read, buffers to write, the loss
/// scale.
fn bindings_layout(device: &wgpu::Device) -> wgpu::BindGroupLayout {
    let read = wgpu::BufferBindingType::Storage { read_only: true };
    let write = wgpu::BufferBindingType::Storage { read_only: false };
    let uniform = wgpu::BufferBindingType::Uniform;
    let types = [
        uniform, read, read, read, write, write, write, write, uniform,
    ];
    let entry = |(binding, ty)| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty,
            has_dynamic_offset: binding == 0,
            min_binding_size: None,
        },
        count: None,
    };
    let entries: Vec<_> = (0..).zip(types).map(entry).collect();
    device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: Some("train.bindings"),
        entries: &entries,
    })
}

/// Makes the pipelines of each layer and that of the loss.
fn pipelines(
    device: &wgpu::Device,
    layout: &wgpu::BindGroupLayout,
    task: &Task,
    arena: &Arena,
    grads_type: StorageType,
) -> (Vec<LayerPipelines>, wgpu::ComputePipeline) {
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some("train.model"),
        source: wgpu::ShaderSource::Wgsl(include_str!("model.wgsl").into()),
    });
    let layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label: Some("train.model"),
        bind_group_layouts: &[Some(layout)],
        immediate_size: 0,
    });
    let pipeline = |entry_point, constants: &[(&str, f64)]| {
        device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(entry_point),
            layout: Some(&layout),
            module: &module,
            entry_point: Some(entry_point),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants,
                ..Default::default()
            },
            cache: None,
        })
    };
    let last = task.model.layers.len() - 1;
    // Where a layer's rows start among all activations.
    let mut inputs_at = 0;
    let mut outputs_at = 0;
    let mut layers = Vec::new();
    let mut constants = [("", 0.0); 10];
    let grads_per_word = 4 / grads_type.bytes() as usize;
    let tensors = arena.tensors().chunks_exact(2);
    for (index, (layer, tensors)) in task.model.layers.iter().zip(tensors).enumerate() {
        let elems = |tensor: usize| (tensors[tensor].offset_bytes / 4) as f64;
        constants = [
            ("columns", task.data.columns as f64),
            ("inputs", layer.inputs as f64),
            ("outputs", layer.outputs as f64),
            ("is_first", f64::from(index == 0)),
            ("is_last", f64::from(index == last)),
            ("weight_at", elems(0)),
            ("bias_at", elems(1)),
            ("inputs_at", inputs_at as f64),
            ("outputs_at", outputs_at as f64),
            ("grads_per_word", grads_per_word as f64),
        ];
        let words = |elems: usize| elems.div_ceil(grads_per_word) as u32;
        layers.push(LayerPipelines {
            forward: pipeline("forward", &constants),
            backward: pipeline("backward", &constants),
            gradient: pipeline("gradient", &constants),
            inputs: layer.inputs as u32,
            outputs: layer.outputs as u32,
            gradient_words: words(layer.inputs * layer.outputs) + words(layer.outputs),
        });
        inputs_at = outputs_at;
        outputs_at += task.data.rows() * layer.outputs;
    }
    (layers, pipeline("loss", &constants))
}
