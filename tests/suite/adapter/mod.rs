//! Tier three: a real adapter. Without one these tests fail and say how to get one.
//!
//! `cargo xtask web-test` runs them in a browser, but for those that block a thread, start a process, or are about
//! limits below WebGPU's own, which no browser gives.

mod arena;
#[cfg(feature = "safetensors")]
mod arena_file;
mod batches;
#[cfg(target_arch = "wasm32")]
mod browser;
#[cfg(all(feature = "safetensors", not(target_arch = "wasm32")))]
mod checkpoint;
mod control;
#[cfg(feature = "safetensors")]
mod control_golden;
mod custom_rule;
mod devices;
mod embedding;
#[cfg(not(target_arch = "wasm32"))]
mod executors;
mod golden;
mod groups;
#[cfg(not(target_arch = "wasm32"))]
mod large;
#[cfg(target_os = "linux")]
mod memory;
mod metrics;
#[cfg(not(target_arch = "wasm32"))]
mod null_hardware;
mod packing;
mod parity;
mod pools;
#[cfg(not(target_arch = "wasm32"))]
mod properties;
mod rebind;
#[cfg(feature = "safetensors")]
mod rules;
#[cfg(not(target_arch = "wasm32"))]
mod sequences;
mod shared;
#[cfg(feature = "safetensors")]
mod storage;
#[cfg(feature = "safetensors")]
mod sums;
mod transfers;
mod vec4_pairs;
mod vertices;
#[cfg(not(target_arch = "wasm32"))]
mod wrapped_rule;

use std::future::Future;

use wgpu_optim::oracle::{Oracle, Roundoff, Textbook};
use wgpu_optim::wgsl::ScalarPath;
use wgpu_optim::{
    AdapterRequest, Arena, Gpu, GpuControl, GpuOptimizer, Kernels, Optimizer, Rule, SgdConfig,
    TensorBinding, readback, wgpu,
};

use crate::cases::values;

/// A test that waits for the device: on its thread, and in a browser as a page does.
#[cfg(not(target_arch = "wasm32"))]
pub use pollster::test as gpu_test;
#[cfg(target_arch = "wasm32")]
pub use wasm_bindgen_test::wasm_bindgen_test as gpu_test;

/// The adapter that the machine has to have.
pub use shared::gpu;

/// A device and its kernels.
pub struct Bench {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub kernels: Kernels,
}

fn request() -> AdapterRequest {
    AdapterRequest {
        // `cargo xtask test --all-adapters` runs these tests once for each.
        backends: wgpu::Backends::from_env().unwrap_or(wgpu::Backends::PRIMARY),
        ..AdapterRequest::default()
    }
}

/// The same adapter by an instance of its own.
pub async fn adapter_of_its_own() -> wgpu::Adapter {
    let mut adapters = wgpu_optim::gpu::adapters(request().backends).await;
    let infos: Vec<_> = adapters.iter().map(wgpu::Adapter::get_info).collect();
    adapters.swap_remove(request().best_first(&infos)[0])
}

/// The same adapter by an instance of its own, with a device.
pub async fn open_gpu() -> Gpu {
    Gpu::open(&request()).await.unwrap_or_else(|error| {
        panic!(
            "{error}. These tests need a wgpu adapter; a software one will do: `cargo xtask test` \
             installs Mesa's on Debian and Ubuntu (package mesa-vulkan-drivers)"
        )
    })
}

impl Bench {
    /// The shared device of each path of the scalars that the adapter has.
    pub async fn both() -> impl Iterator<Item = &'static Self> {
        shared::benches().await.into_iter()
    }

    pub async fn best() -> &'static Self {
        Self::both().await.next().unwrap()
    }

    /// A device of its own with the adapter's limits and these of the optional features.
    pub async fn with(optional: wgpu::Features) -> Self {
        Self::open(optional, gpu().await.adapter.limits()).await
    }

    /// A device of its own.
    pub async fn open(optional: wgpu::Features, required_limits: wgpu::Limits) -> Self {
        // A browser's adapter gives one device.
        #[cfg(target_arch = "wasm32")]
        let adapter = &adapter_of_its_own().await;
        #[cfg(not(target_arch = "wasm32"))]
        let adapter = &gpu().await.adapter;
        Self::open_on(adapter, optional, required_limits).await
    }

    /// A device of this adapter.
    pub async fn open_on(
        adapter: &wgpu::Adapter,
        optional: wgpu::Features,
        required_limits: wgpu::Limits,
    ) -> Self {
        let (device, queue) = adapter
            .request_device(&wgpu::DeviceDescriptor {
                required_features: adapter.features() & optional,
                required_limits,
                ..Default::default()
            })
            .await
            .unwrap();
        Self::new(device, queue)
    }

    pub fn new(device: wgpu::Device, queue: wgpu::Queue) -> Self {
        let kernels = Kernels::new(&device, &queue).unwrap();
        Self {
            device,
            queue,
            kernels,
        }
    }

    pub fn buffer(&self, numel: usize) -> wgpu::Buffer {
        self.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: 4 * numel as u64,
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_SRC
                | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    }

    pub fn buffer_of(&self, data: &[f32]) -> wgpu::Buffer {
        let buffer = self.buffer(data.len());
        self.upload(&buffer, data);
        buffer
    }

    pub fn upload(&self, buffer: &wgpu::Buffer, data: &[f32]) {
        readback::upload(&self.device, &self.queue, buffer, 0, data).unwrap();
    }

    /// A buffer of these bytes, which are whole words.
    pub fn buffer_of_words(&self, bytes: &[u8]) -> wgpu::Buffer {
        let buffer = self.buffer(bytes.len() / 4);
        self.queue.write_buffer(&buffer, 0, bytes);
        buffer
    }

    pub async fn bytes(&self, buffer: &wgpu::Buffer) -> Vec<u8> {
        bytemuck::cast_slice(&self.download(buffer).await).to_vec()
    }

    /// Waits for a transfer, natively on this thread.
    pub async fn wait<F: Future>(&self, transfer: F) -> F::Output {
        #[cfg(target_arch = "wasm32")]
        return transfer.await;
        #[cfg(not(target_arch = "wasm32"))]
        readback::block_on(&self.device, transfer)
    }

    pub async fn download(&self, buffer: &wgpu::Buffer) -> Vec<f32> {
        let numel = buffer.size() / 4;
        let download = readback::download(&self.device, &self.queue, buffer, 0, numel);
        self.wait(download).await.unwrap()
    }

    pub fn encoder(&self) -> wgpu::CommandEncoder {
        self.device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
    }

    /// Records one step into an encoder of its own and submits it.
    pub fn step<R: Rule>(&self, optimizer: &mut GpuOptimizer<R>) {
        let mut encoder = self.encoder();
        optimizer.step(&mut encoder).unwrap();
        self.queue.submit([encoder.finish()]);
    }

    pub async fn velocity(&self, optimizer: &GpuOptimizer, tensor: usize) -> Option<Vec<f32>> {
        let state = self.wait(optimizer.state()).await.unwrap();
        state.tensors[tensor].slot("momentum_buffer")
    }

    /// An optimizer over one tensor that fills its two buffers.
    pub fn optimizer<R: Rule>(
        &self,
        rule: R,
        params: &wgpu::Buffer,
        grads: &wgpu::Buffer,
    ) -> GpuOptimizer<R> {
        GpuOptimizer::new(&self.kernels, rule, &[whole("theta", params, grads)]).unwrap()
    }

    /// A tensor of so many elements, of which every step has the same gradient.
    pub fn follow<R: Textbook>(&self, rule: R, numel: usize) -> Followed<'_, R> {
        let (start, gradient) = (values(1, numel), values(2, numel));
        let (params, grads) = (self.buffer_of(&start), self.buffer_of(&gradient));
        Followed {
            bench: self,
            optimizer: self.optimizer(rule, &params, &grads),
            oracle: Oracle::new(&start, Roundoff::WGSL),
            start,
            gradient,
            params,
            grads,
        }
    }
}

/// A tensor `theta` on a device with its optimizer, and the oracle that follows it.
pub struct Followed<'b, R: Rule = SgdConfig> {
    bench: &'b Bench,
    pub start: Vec<f32>,
    pub gradient: Vec<f32>,
    pub params: wgpu::Buffer,
    pub grads: wgpu::Buffer,
    pub optimizer: GpuOptimizer<R>,
    pub oracle: Oracle<R>,
}

impl<R: Textbook> Followed<'_, R> {
    pub fn step_with(&mut self, encoder: &mut wgpu::CommandEncoder, control: &mut GpuControl) {
        self.optimizer.step_with(encoder, control).unwrap();
    }

    /// The step of the oracle that is to have been made on the device, too.
    pub fn expect_step(&mut self) {
        self.oracle.step(self.optimizer.config(), &self.gradient);
    }

    pub async fn check(&self) {
        let params = self.bench.download(&self.params).await;
        self.oracle.check_params(&params).unwrap();
    }
}

/// Tensors of an arena, with parameters and gradients for each.
pub struct Tensors {
    pub shapes: [(&'static str, Vec<usize>); 3],
    pub starts: [Vec<f32>; 3],
    pub grads: [Vec<f32>; 3],
}

impl Tensors {
    pub fn new(shapes: [(&'static str, Vec<usize>); 3]) -> Self {
        let numels = shapes.each_ref().map(|(_, shape)| shape.iter().product());
        Self {
            starts: numels.map(|numel: usize| values(numel as u64, numel)),
            grads: numels.map(|numel: usize| values(1 + numel as u64, numel)),
            shapes,
        }
    }

    pub fn upload(&self, arena: &Arena) {
        arena.upload_all_params(&self.starts).unwrap();
        arena.upload_all_grads(&self.grads).unwrap();
    }
}

/// A tensor that fills its two buffers.
pub fn whole<'a>(
    name: &'a str,
    params: &'a wgpu::Buffer,
    grads: &'a wgpu::Buffer,
) -> TensorBinding<'a> {
    TensorBinding::new(name, params, grads, [params.size() as usize / 4])
}

/// Runs a test in a process of its own, which has these variables, too.
#[cfg(not(target_arch = "wasm32"))]
fn in_own_process(test: &str, variables: &[(&str, &str)]) {
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout) + String::from_utf8_lossy(&child.stderr);
    assert!(
        child.status.success() && output.contains("1 passed"),
        "{output}"
    );
}

/// Tensors of so many elements, with parameters and gradients from these elements of the buffers on.
fn bindings_at<'a>(
    names: &'a [String],
    (params, grads): (&'a wgpu::Buffer, &'a wgpu::Buffer),
    places: impl Iterator<Item = (usize, [usize; 2])>,
) -> Vec<TensorBinding<'a>> {
    let binding = |(name, (numel, starts)): (&'a String, (usize, [usize; 2]))| {
        let [params_bytes, grads_bytes] = starts.map(|start| 4 * start as u64);
        TensorBinding::new(name, params, grads, [numel])
            .params_at(params_bytes)
            .grads_at(grads_bytes)
    };
    names.iter().zip(places).map(binding).collect()
}

#[gpu_test]
async fn an_adapter_is_there() {
    let info = gpu().await.adapter.get_info();
    println!("{} ({:?}, {})", info.name, info.backend, info.driver_info);
}

#[gpu_test]
async fn both_paths_of_the_scalars_are_tested_where_the_adapter_has_immediates() {
    let paths: Vec<_> = Bench::both()
        .await
        .map(|bench| bench.kernels.scalar_path())
        .collect();
    assert_eq!(paths.last(), Some(&ScalarPath::Uniforms));
    let features = gpu().await.adapter.features();
    if features.contains(wgpu::Features::IMMEDIATES) {
        assert_eq!(paths[0], ScalarPath::Immediates);
    }
}

#[gpu_test]
async fn an_adapter_that_is_not_there_is_said_with_what_there_is() {
    let request = AdapterRequest {
        name: Some("no such adapter".into()),
        ..Default::default()
    };
    let error = Gpu::open(&request).await.unwrap_err().to_string();
    let name = gpu().await.adapter.get_info().name;
    assert!(
        error.contains("no such adapter") && error.contains(&name),
        "{error}"
    );
}
