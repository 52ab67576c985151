//! Tier two: `Device::noop` runs all of wgpu's validation and executes no shader.

mod allocations;
mod bindings;
mod control;
mod kernels;
mod rebind;

use wgpu_optim::{BuildError, GpuOptimizer, Kernels, SgdConfig, TensorBinding, wgpu};

const STORAGE: wgpu::BufferUsages = wgpu::BufferUsages::STORAGE;

fn device(limits: wgpu::Limits, features: wgpu::Features) -> (wgpu::Device, wgpu::Queue) {
    wgpu::Device::noop(&wgpu::DeviceDescriptor {
        required_features: features,
        required_limits: limits,
        ..Default::default()
    })
}

fn kernels() -> Kernels {
    let (device, queue) = device(wgpu::Limits::default(), wgpu::Features::empty());
    Kernels::new(&device, &queue).unwrap()
}

fn buffer(kernels: &Kernels, size: u64, usage: wgpu::BufferUsages) -> wgpu::Buffer {
    kernels.device().create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size,
        usage,
        mapped_at_creation: false,
    })
}

fn tensor<'a>(
    name: &'a str,
    (params, params_offset_bytes): (&'a wgpu::Buffer, u64),
    (grads, grads_offset_bytes): (&'a wgpu::Buffer, u64),
    numel: u64,
) -> TensorBinding<'a> {
    TensorBinding::new(name, params, grads, [numel as usize])
        .params_at(params_offset_bytes)
        .grads_at(grads_offset_bytes)
}

/// Tensors that each fill buffers of their own.
struct Apart {
    names: Vec<String>,
    buffers: Vec<wgpu::Buffer>,
}

impl Apart {
    fn new(kernels: &Kernels, tensors: usize, numel: u64) -> Self {
        Self {
            names: (0..tensors).map(|index| index.to_string()).collect(),
            buffers: (0..2 * tensors)
                .map(|_| buffer(kernels, 4 * numel, STORAGE))
                .collect(),
        }
    }

    fn bindings(&self) -> Vec<TensorBinding<'_>> {
        let pairs = self.names.iter().zip(self.buffers.chunks(2));
        pairs
            .map(|(name, pair)| {
                let numel = pair[0].size() as usize / 4;
                TensorBinding::new(name, &pair[0], &pair[1], [numel])
            })
            .collect()
    }
}

fn build(kernels: &Kernels, tensors: &[TensorBinding<'_>]) -> Result<GpuOptimizer, BuildError> {
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    GpuOptimizer::new(kernels, config, tensors)
}
