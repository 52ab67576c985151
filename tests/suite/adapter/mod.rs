//! Tier three: a real adapter. Without one these tests fail and say how to get one.

mod arena;
#[cfg(feature = "safetensors")]
mod arena_file;
mod batches;
mod custom_rule;
mod devices;
mod embedding;
mod golden;
mod groups;
mod large;
#[cfg(target_os = "linux")]
mod memory;
mod parity;
mod pools;
mod properties;
mod rebind;
#[cfg(feature = "safetensors")]
mod rules;
mod transfers;
mod vertices;

use std::sync::LazyLock;

use wgpu_optim::wgpu;
use wgpu_optim::{
    AdapterRequest, Gpu, GpuOptimizer, Kernels, OPTIONAL_FEATURES, ScalarPath, SgdConfig,
    TensorBinding, readback,
};

/// A device and its kernels.
pub struct Bench {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub kernels: Kernels,
}

/// The adapter that the machine has to have.
pub fn gpu() -> &'static Gpu {
    static GPU: LazyLock<Gpu> = LazyLock::new(open_gpu);
    &GPU
}

/// The same adapter by an instance of its own.
pub fn open_gpu() -> Gpu {
    let request = AdapterRequest {
        // `cargo xtask test --all-adapters` runs these tests once for each.
        backends: wgpu::Backends::from_env().unwrap_or(wgpu::Backends::PRIMARY),
        ..AdapterRequest::default()
    };
    Gpu::open_blocking(&request).unwrap_or_else(|error| {
        panic!(
            "{error}. These tests need a wgpu adapter; a software one will do: `cargo xtask test` \
             installs Mesa's on Debian and Ubuntu (package mesa-vulkan-drivers)"
        )
    })
}

impl Bench {
    /// The shared device of each path of the scalars that the adapter has.
    pub fn both() -> impl Iterator<Item = &'static Self> {
        static BEST: LazyLock<Bench> = LazyLock::new(|| Bench::with(OPTIONAL_FEATURES));
        static UNIFORMS: LazyLock<Bench> = LazyLock::new(|| Bench::with(wgpu::Features::empty()));
        [&*BEST, &*UNIFORMS].into_iter()
    }

    pub fn best() -> &'static Self {
        Self::both().next().unwrap()
    }

    /// A device of its own with the adapter's limits and these of the optional features.
    pub fn with(optional: wgpu::Features) -> Self {
        Self::open(optional, gpu().adapter.limits())
    }

    /// A device of its own.
    pub fn open(optional: wgpu::Features, required_limits: wgpu::Limits) -> Self {
        Self::open_on(&gpu().adapter, optional, required_limits)
    }

    /// A device of this adapter.
    pub fn open_on(
        adapter: &wgpu::Adapter,
        optional: wgpu::Features,
        required_limits: wgpu::Limits,
    ) -> Self {
        let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            required_features: adapter.features() & optional,
            required_limits,
            ..Default::default()
        }))
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

    pub fn download(&self, buffer: &wgpu::Buffer) -> Vec<f32> {
        let numel = buffer.size() / 4;
        readback::download_blocking(&self.device, &self.queue, buffer, 0, numel).unwrap()
    }

    pub fn encoder(&self) -> wgpu::CommandEncoder {
        self.device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
    }

    /// Records one step into an encoder of its own and submits it.
    pub fn step(&self, optimizer: &mut GpuOptimizer) {
        let mut encoder = self.encoder();
        optimizer.step(&mut encoder).unwrap();
        self.queue.submit([encoder.finish()]);
    }

    pub fn velocity(&self, optimizer: &GpuOptimizer, tensor: usize) -> Option<Vec<f32>> {
        let state = readback::block_on(&self.device, optimizer.state()).unwrap();
        state.tensors[tensor]
            .slot("momentum_buffer")
            .map(<[f32]>::to_vec)
    }

    /// An optimizer over one tensor that fills its two buffers.
    pub fn optimizer(
        &self,
        config: SgdConfig,
        params: &wgpu::Buffer,
        grads: &wgpu::Buffer,
    ) -> GpuOptimizer {
        GpuOptimizer::new(&self.kernels, config, &[whole("theta", params, grads)]).unwrap()
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

#[test]
fn an_adapter_is_there() {
    let info = gpu().adapter.get_info();
    println!("{} ({:?}, {})", info.name, info.backend, info.driver_info);
}

#[test]
fn both_paths_of_the_scalars_are_tested_where_the_adapter_has_immediates() {
    let paths: Vec<_> = Bench::both()
        .map(|bench| bench.kernels.scalar_path())
        .collect();
    assert_eq!(paths[1], ScalarPath::Uniforms);
    if gpu()
        .adapter
        .features()
        .contains(wgpu::Features::IMMEDIATES)
    {
        assert_eq!(paths[0], ScalarPath::Immediates);
    }
}

#[test]
fn an_adapter_that_is_not_there_is_said_with_what_there_is() {
    let request = AdapterRequest {
        name: Some("no such adapter".into()),
        ..Default::default()
    };
    let error = Gpu::open_blocking(&request).unwrap_err().to_string();
    assert!(error.contains("no such adapter") && error.contains(&gpu().adapter.get_info().name));
}
