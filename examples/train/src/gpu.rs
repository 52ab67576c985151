//! The training loop in an engine's own words: its device, its buffers, its passes, and the optimizer in its encoder.

use std::cell::Cell;

use anyhow::{Context as _, Result, anyhow, bail};
use wgpu_optim::readback::{block_on, download_blocking};
use wgpu_optim::wgpu::{self, util::DeviceExt as _};
use wgpu_optim::{AnyRule, Arena, Gpu, GpuOptimizer, Kernels};

use crate::task::{Batch, Losses, Start, Task};
use crate::training::{Device, Run};

/// As in `model.wgsl`.
const WORKGROUP_SIZE: u32 = 64;

/// A device with a task on it: all that runs share.
#[derive(Debug)]
pub struct Engine<'t> {
    task: &'t Task,
    name: String,
    gpu: Gpu,
    kernels: Kernels,
    /// Parameters and gradients. The model's kernels read the ones and write the others where they lie.
    arena: Arena,
    order: wgpu::Buffer,
    losses: wgpu::Buffer,
    layers: Vec<LayerPipelines>,
    loss: wgpu::ComputePipeline,
    bindings: wgpu::BindGroup,
    /// Bytes from one batch to the next.
    batch_stride: u32,
    submissions: Cell<usize>,
}

/// What a layer needs of the shader.
#[derive(Debug)]
struct LayerPipelines {
    forward: wgpu::ComputePipeline,
    backward: wgpu::ComputePipeline,
    gradient: wgpu::ComputePipeline,
    inputs: u32,
    outputs: u32,
}

impl<'t> Engine<'t> {
    /// Compiles the model for a device and puts the data there.
    ///
    /// # Errors
    /// If the task does not fit the device, or the device fails.
    pub fn new(gpu: Gpu, task: &'t Task) -> Result<Self> {
        let Gpu { device, queue, .. } = &gpu;
        let kernels = Kernels::new(device, queue)?; // once per device, shared by its optimizers
        let arena = Arena::new(device, queue, task.model.tensors())?;
        let ([params], [grads]) = (arena.params(), arena.grads()) else {
            bail!("the parameters do not fit one buffer of this device");
        };

        // Whoever does not want wgpu to panic on a mistake of its own has it reported.
        let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let widest: usize = task.model.layers.iter().map(|layer| layer.outputs).sum();
        let per_row = 4 * (task.data.rows() * widest) as u64;
        let batches: Vec<_> = task.batches().collect();
        let order_bytes = 4 * (task.data.rows() + task.epochs * task.data.train_rows) as u64;
        let buffer = |label, size| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size,
                usage: wgpu::BufferUsages::STORAGE
                    | wgpu::BufferUsages::COPY_SRC
                    | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        };
        let order = buffer("train.order", order_bytes);
        let losses = buffer("train.losses", 4 * batches.len() as u64);
        let activations = buffer("train.activations", per_row);
        let deltas = buffer("train.deltas", per_row);
        let dataset = device.create_buffer_init(&wgpu::util::BufferInitDescriptor {
            label: Some("train.dataset"),
            contents: bytemuck::cast_slice(&task.data.values),
            usage: wgpu::BufferUsages::STORAGE,
        });
        // Every batch there will be, so that the loop has nothing to upload.
        let batch_stride = device.limits().min_uniform_buffer_offset_alignment;
        let batch_stride = batch_stride.max(size_of::<Batch>() as u32);
        let mut contents = vec![0; batches.len() * batch_stride as usize];
        for (entry, batch) in contents.chunks_mut(batch_stride as usize).zip(&batches) {
            entry[..size_of::<Batch>()].copy_from_slice(bytemuck::bytes_of(batch));
        }
        let batches = device.create_buffer_init(&wgpu::util::BufferInitDescriptor {
            label: Some("train.batches"),
            contents: &contents,
            usage: wgpu::BufferUsages::UNIFORM,
        });

        let layout = bindings_layout(device);
        let batch = wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: &batches,
            offset: 0,
            size: wgpu::BufferSize::new(size_of::<Batch>() as u64),
        });
        let buffers = [
            &dataset,
            &order,
            params,
            grads,
            &activations,
            &deltas,
            &losses,
        ];
        let resources = buffers.map(|buffer| buffer.as_entire_binding());
        let resources = [batch].into_iter().chain(resources);
        let entry = |(binding, resource)| wgpu::BindGroupEntry { binding, resource };
        let entries: Vec<_> = (0..).zip(resources).map(entry).collect();
        let bindings = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("train.bindings"),
            layout: &layout,
            entries: &entries,
        });
        let (layers, loss) = pipelines(device, &layout, task, &arena);
        if let Some(error) = pollster::block_on(scope.pop()) {
            return Err(anyhow!(error)).context("the device refuses the model");
        }

        Ok(Self {
            task,
            name: gpu.adapter.get_info().name,
            kernels,
            arena,
            order,
            losses,
            layers,
            loss,
            bindings,
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

    /// How often runs have submitted work.
    #[must_use]
    pub fn submissions(&self) -> usize {
        self.submissions.get()
    }

    /// A run from this start.
    ///
    /// # Errors
    /// If the device fails.
    pub fn run(&self, rule: &AnyRule, start: &Start, evaluates: bool) -> Result<EngineRun<'_>> {
        self.arena.upload_all_params(&start.params)?;
        let order = bytemuck::cast_slice(&start.order);
        self.gpu.queue.write_buffer(&self.order, 0, order);
        Ok(EngineRun {
            engine: self,
            optimizer: GpuOptimizer::new(&self.kernels, rule.clone(), &self.arena.bindings())?,
            steps: 0,
            evaluates,
            last_epoch: None,
            this_epoch: None,
        })
    }

    /// Records the loss of a batch and what each prediction weighs in it.
    fn record_loss(&self, pass: &mut wgpu::ComputePass<'_>, batch: Batch) {
        pass.set_bind_group(0, &self.bindings, &[batch.slot * self.batch_stride]);
        for layer in &self.layers {
            dispatch(pass, &layer.forward, batch.rows * layer.outputs);
        }
        dispatch(pass, &self.loss, 1);
    }

    /// Records forward and backward of a batch: its gradients go where the optimizer reads them.
    fn record_gradients(&self, encoder: &mut wgpu::CommandEncoder, batch: Batch) {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("train.gradients"),
            timestamp_writes: None,
        });
        self.record_loss(&mut pass, batch);
        for (index, layer) in self.layers.iter().enumerate().rev() {
            dispatch(
                &mut pass,
                &layer.gradient,
                (layer.inputs + 1) * layer.outputs,
            );
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
        for batch in self.task.evaluation(epoch) {
            self.record_loss(&mut pass, batch);
        }
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

    fn start<'d>(
        &'d self,
        rule: &AnyRule,
        start: &'d Start,
        evaluates: bool,
    ) -> Result<Box<dyn Run + 'd>> {
        Ok(Box::new(self.run(rule, start, evaluates)?))
    }
}

/// A run on the device. There is one at a time: it starts in the engine's only arena.
pub struct EngineRun<'e> {
    engine: &'e Engine<'e>,
    optimizer: GpuOptimizer<AnyRule>,
    steps: usize,
    evaluates: bool,
    /// The last submissions of this epoch and of the one before.
    this_epoch: Option<wgpu::SubmissionIndex>,
    last_epoch: Option<wgpu::SubmissionIndex>,
}

impl EngineRun<'_> {
    /// What steps.
    #[must_use]
    pub const fn optimizer(&self) -> &GpuOptimizer<AnyRule> {
        &self.optimizer
    }

    /// The gradients of the last step, in the model's order.
    ///
    /// # Errors
    /// If the device fails.
    pub fn grads(&self) -> Result<Vec<Vec<f32>>> {
        let (gpu, arena) = (&self.engine.gpu, &self.engine.arena);
        let of = |tensor: &wgpu_optim::ArenaTensor| {
            let buffer = &arena.grads()[tensor.buffer];
            let (offset, numel) = (tensor.offset_bytes, tensor.numel);
            Ok(download_blocking(
                &gpu.device,
                &gpu.queue,
                buffer,
                offset,
                numel,
            )?)
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
}

impl Run for EngineRun<'_> {
    /// One encoder, one submit; nothing is read back.
    fn step(&mut self) -> Result<()> {
        let (engine, task) = (self.engine, self.engine.task);
        let mut encoder =
            engine
                .gpu
                .device
                .create_command_encoder(&wgpu::CommandEncoderDescriptor {
                    label: Some("train.batch"),
                });
        if self.evaluates && self.steps == 0 {
            engine.record_evaluation(&mut encoder, 0);
        }
        engine.record_gradients(&mut encoder, task.batch(self.steps));
        self.optimizer.step(&mut encoder)?;
        self.steps += 1;
        let ends_epoch = self.steps.is_multiple_of(task.steps_per_epoch());
        if self.evaluates && ends_epoch {
            engine.record_evaluation(&mut encoder, self.steps / task.steps_per_epoch());
        }
        self.this_epoch = Some(engine.submit(encoder));

        if ends_epoch {
            // The device may be an epoch behind, not more: what is recorded takes memory.
            let last_epoch = std::mem::replace(&mut self.last_epoch, self.this_epoch.clone());
            engine.wait_for(last_epoch)?;
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        self.engine.wait_for(self.this_epoch.take())
    }

    fn losses(&self) -> Result<Losses> {
        let (Gpu { device, queue, .. }, losses) = (&self.engine.gpu, &self.engine.losses);
        let slots = download_blocking(device, queue, losses, 0, losses.size() / 4)?;
        Ok(self.engine.task.losses(&slots, self.steps, self.evaluates))
    }
}

fn dispatch(pass: &mut wgpu::ComputePass<'_>, pipeline: &wgpu::ComputePipeline, invocations: u32) {
    pass.set_pipeline(pipeline);
    pass.dispatch_workgroups(invocations.div_ceil(WORKGROUP_SIZE), 1, 1);
}

/// In the order of `model.wgsl`: a batch, what is read, what is written.
fn bindings_layout(device: &wgpu::Device) -> wgpu::BindGroupLayout {
    let read = wgpu::BufferBindingType::Storage { read_only: true };
    let write = wgpu::BufferBindingType::Storage { read_only: false };
    let batch = wgpu::BufferBindingType::Uniform;
    let types = [batch, read, read, read, write, write, write, write];
    let entry = |(binding, ty)| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty,
            has_dynamic_offset: ty == batch,
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

/// Those of each layer, and of the loss behind the last.
fn pipelines(
    device: &wgpu::Device,
    layout: &wgpu::BindGroupLayout,
    task: &Task,
    arena: &Arena,
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
    let mut constants = [("", 0.0); 9];
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
        ];
        layers.push(LayerPipelines {
            forward: pipeline("forward", &constants),
            backward: pipeline("backward", &constants),
            gradient: pipeline("gradient", &constants),
            inputs: layer.inputs as u32,
            outputs: layer.outputs as u32,
        });
        inputs_at = outputs_at;
        outputs_at += task.data.rows() * layer.outputs;
    }
    (layers, pipeline("loss", &constants))
}
