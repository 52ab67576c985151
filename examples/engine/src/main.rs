//! `cargo run --release -p engine -- [CHECKPOINT] [STEPS]`: kill it at any moment and start it again, and it goes on bit for bit.

use std::env;
use std::path::Path;

use anyhow::Result;
use wgpu::BufferUsages as Usages;
use wgpu_optim::readback::block_on;
use wgpu_optim::state::Checkpoint;
use wgpu_optim::{
    AdamConfig, AdapterRequest, Gpu, GpuControl, GpuOptimizer, Kernels, Metrics, Optimizer,
    ParamGroups, StepControl, TensorBinding, schedule, wgpu,
};

const LAYERS: usize = 10;
const CHECKPOINT_EVERY: u64 = 100;
/// From one tensor's loss to the next: where a binding may start.
const LOSS_BYTES: u64 = 256;

/// A weight or a bias in buffers of its own.
struct Tensor {
    name: String,
    shape: Vec<usize>,
    params: wgpu::Buffer,
    grads: wgpu::Buffer,
}

fn main() -> Result<()> {
    let mut args = env::args().skip(1);
    let path = args.next().unwrap_or_else(|| "engine.safetensors".into());
    let steps: u64 = args.next().map_or(Ok(1000), |steps| steps.parse())?;

    let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default())?;
    let buffer = |label: &str, size: u64, usage: Usages| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size,
            usage: usage | Usages::COPY_SRC | Usages::COPY_DST,
            mapped_at_creation: false,
        })
    };
    let new_tensor = |name: String, shape: Vec<usize>| {
        let bytes = 4 * shape.iter().product::<usize>() as u64;
        let params = buffer(&name, bytes, Usages::STORAGE);
        let grads = buffer(&name, bytes, Usages::STORAGE);
        Tensor {
            name,
            shape,
            params,
            grads,
        }
    };
    let tensors: Vec<Tensor> = (0..LAYERS)
        .flat_map(|layer| {
            let width = 16 + 8 * layer;
            let weight = new_tensor(format!("{layer}.weight"), vec![width, width + 8]);
            [weight, new_tensor(format!("{layer}.bias"), vec![width])]
        })
        .collect();
    let losses = buffer("losses", LOSS_BYTES * tensors.len() as u64, Usages::STORAGE);
    let frame = buffer("frame", 4, Usages::UNIFORM);

    // The engine's own pass: one bind group a tensor.
    let module = device.create_shader_module(wgpu::include_wgsl!("backward.wgsl"));
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some("backward"),
        layout: None,
        module: &module,
        entry_point: None,
        compilation_options: wgpu::PipelineCompilationOptions::default(),
        cache: None,
    });
    let loss_of = |index: usize| LOSS_BYTES * index as u64;
    let bind = |(index, tensor): (usize, &Tensor)| {
        let loss = wgpu::BufferBinding {
            buffer: &losses,
            offset: loss_of(index),
            size: wgpu::BufferSize::new(4),
        };
        let resources = [
            frame.as_entire_binding(),
            tensor.params.as_entire_binding(),
            tensor.grads.as_entire_binding(),
            wgpu::BindingResource::Buffer(loss),
        ];
        let entries = (0..).zip(resources);
        let entries = entries.map(|(binding, resource)| wgpu::BindGroupEntry { binding, resource });
        device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("backward"),
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries.collect::<Vec<_>>(),
        })
    };
    let bind_groups: Vec<_> = tensors.iter().enumerate().map(bind).collect();

    // The optimizer: AdamW, no decay on biases, clipped by the norm over all tensors.
    let kernels = Kernels::new(&device, &queue)?;
    let config = AdamConfig::adamw(1e-2).build()?;
    let no_decay = AdamConfig::adamw(1e-2).weight_decay(0.0).build()?;
    let groups =
        ParamGroups::new(config).with("biases", no_decay, |name| name.ends_with("bias"))?;
    let bindings = tensors.iter().map(|tensor| {
        TensorBinding::new(&tensor.name, &tensor.params, &tensor.grads, &*tensor.shape)
    });
    let bindings: Vec<_> = bindings.collect();
    let mut optimizer = GpuOptimizer::with_groups(&kernels, &groups, &bindings)?;
    let mut control = GpuControl::new(&kernels, StepControl::builder().max_norm(10.0).build()?)?;
    let mut metrics = Metrics::new(&device, &queue, tensors.len())?;
    let losses: Vec<_> = (0..tensors.len())
        .map(|index| (&losses, loss_of(index)))
        .collect();

    if Path::new(&path).exists() {
        let checkpoint = Checkpoint::load(&path)?;
        let load = optimizer.load_checkpoint(&checkpoint, Some(&mut control));
        block_on(&device, load)?;
        println!("resumed at step {}", optimizer.steps());
    }
    while optimizer.steps() < steps {
        let step = optimizer.steps();
        optimizer.set_lr(schedule::with_warmup(step, 50, |step| {
            schedule::cosine_decay(step, steps - 50, 1e-2, 1e-4)
        }))?;
        queue.write_buffer(&frame, 0, bytemuck::bytes_of(&(step as u32)));
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&pipeline);
        for bind_group in &bind_groups {
            pass.set_bind_group(0, bind_group, &[]);
            pass.dispatch_workgroups(1, 1, 1);
        }
        drop(pass);
        optimizer.step_with(&mut encoder, &mut control)?;
        metrics.record(&mut encoder, optimizer.steps(), &losses)?;
        queue.submit([encoder.finish()]);

        if optimizer.steps().is_multiple_of(CHECKPOINT_EVERY) || optimizer.steps() == steps {
            block_on(&device, optimizer.checkpoint(Some(&control)))?.save(&path)?;
        }
        for metric in metrics.read() {
            println!(
                "step {}: loss {:.4}",
                metric.step,
                metric.values.iter().sum::<f32>()
            );
        }
    }
    Ok(())
}
