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

fn build(kernels: &Kernels, tensors: &[TensorBinding<'_>]) -> Result<GpuOptimizer, BuildError> {
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    GpuOptimizer::new(kernels, config, tensors)
}
