//! Adapter and device choice for programs that have no engine of their own.

use super::error::GpuError;
use crate::plan::DeviceLimits;

/// Optional device features that the kernels use where they are there.
pub const OPTIONAL_FEATURES: wgpu::Features = wgpu::Features::IMMEDIATES;

/// A request for an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterRequest {
    /// Only adapters whose name holds this text, in any case.
    pub name: Option<String>,
    /// Only adapters of these backends; Vulkan, Metal, DX12 and the browser's WebGPU by default.
    pub backends: wgpu::Backends,
    /// `LowPower` prefers an integrated GPU to a discrete one; anything else prefers the discrete one.
    pub power_preference: wgpu::PowerPreference,
    /// Whether a software adapter will do where there is no other.
    pub allow_software: bool,
    /// Features for the device beside the [`OPTIONAL_FEATURES`], where the adapter has them; none by default.
    pub features: wgpu::Features,
}

impl Default for AdapterRequest {
    /// Any adapter: hardware first, a software one allowed.
    fn default() -> Self {
        Self {
            name: None,
            backends: wgpu::Backends::PRIMARY,
            power_preference: wgpu::PowerPreference::HighPerformance,
            allow_software: true,
            features: wgpu::Features::empty(),
        }
    }
}

/// A device opened with all that its adapter offers for this work.
#[derive(Clone, Debug)]
pub struct Gpu {
    /// The adapter.
    pub adapter: wgpu::Adapter,
    /// The device, with the adapter's own limits and those of the [`OPTIONAL_FEATURES`] that it has.
    pub device: wgpu::Device,
    /// The device's queue.
    pub queue: wgpu::Queue,
}

impl Gpu {
    /// Opens the best adapter that fits `request` and gives a device.
    ///
    /// # Errors
    /// [`GpuError::NoAdapter`] if none fits, [`GpuError::NoDevice`] of the best one if none gives a device.
    pub async fn open(request: &AdapterRequest) -> Result<Self, GpuError> {
        let available = adapters_for(request).await;
        let infos: Vec<_> = available.iter().map(wgpu::Adapter::get_info).collect();
        let mut refusal = None;
        for index in request.best_first(&infos) {
            match Self::of(available[index].clone(), request.features).await {
                Ok(gpu) => return Ok(gpu),
                Err(error) => refusal = refusal.or(Some(error)),
            }
        }
        Err(refusal.unwrap_or_else(|| request.no_adapter(&infos)))
    }

    /// Opens this adapter, with those of `features` and of the [`OPTIONAL_FEATURES`] that it has. A browser's gives one
    /// device: for another, ask for an adapter again.
    ///
    /// # Errors
    /// [`GpuError::NoDevice`] if it gives no device.
    pub async fn of(adapter: wgpu::Adapter, features: wgpu::Features) -> Result<Self, GpuError> {
        let (device, queue) = adapter
            .request_device(&wgpu::DeviceDescriptor {
                label: Some("wgpu_optim.device"),
                required_features: adapter.features() & (OPTIONAL_FEATURES | features),
                required_limits: adapter.limits(),
                ..Default::default()
            })
            .await
            .map_err(|error| GpuError::NoDevice {
                adapter: adapter.get_info().name,
                message: error.to_string(),
            })?;
        Ok(Self {
            adapter,
            device,
            queue,
        })
    }

    /// [`open`](Self::open) for native programs.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    #[cfg(not(target_arch = "wasm32"))]
    pub fn open_blocking(request: &AdapterRequest) -> Result<Self, GpuError> {
        pollster::block_on(Self::open(request))
    }
}

impl AdapterRequest {
    /// The indices of those adapters that fit, the best one first; `backends` and `features` aside.
    #[must_use]
    pub fn best_first(&self, adapters: &[wgpu::AdapterInfo]) -> Vec<usize> {
        let fits = |index: &usize| self.accepts(&adapters[*index]);
        let mut fitting: Vec<_> = (0..adapters.len()).filter(fits).collect();
        // Stable: among equals the order stays.
        fitting.sort_by_key(|index| self.rank(&adapters[*index]));
        fitting
    }

    fn accepts(&self, info: &wgpu::AdapterInfo) -> bool {
        let named = self.name.as_ref().is_none_or(|name| {
            let name = name.to_lowercase();
            info.name.to_lowercase().contains(&name)
        });
        named && (self.allow_software || info.device_type != wgpu::DeviceType::Cpu)
    }

    /// Lower is better: the kind of device first, then GL after the backends made for compute.
    fn rank(&self, info: &wgpu::AdapterInfo) -> (u8, bool) {
        let low_power = self.power_preference == wgpu::PowerPreference::LowPower;
        let kind = match info.device_type {
            wgpu::DeviceType::DiscreteGpu if low_power => 1,
            wgpu::DeviceType::IntegratedGpu if low_power => 0,
            wgpu::DeviceType::DiscreteGpu => 0,
            wgpu::DeviceType::IntegratedGpu => 1,
            wgpu::DeviceType::VirtualGpu => 2,
            wgpu::DeviceType::Other => 3,
            wgpu::DeviceType::Cpu => 4,
        };
        (kind, info.backend == wgpu::Backend::Gl)
    }

    fn no_adapter(&self, available: &[wgpu::AdapterInfo]) -> GpuError {
        let mut request = String::new();
        if let Some(name) = &self.name {
            request += &format!(" with {name:?} in its name");
        }
        if !self.allow_software {
            request += " that is hardware";
        }
        let names: Vec<_> = available.iter().map(|info| info.name.as_str()).collect();
        GpuError::NoAdapter {
            request,
            available: if names.is_empty() {
                "none".to_owned()
            } else {
                names.join(", ")
            },
        }
    }
}

/// The adapters among which a request chooses. A browser shows one adapter, and has to be told which is preferred.
async fn adapters_for(request: &AdapterRequest) -> Vec<wgpu::Adapter> {
    if cfg!(not(target_arch = "wasm32")) {
        return adapters(request.backends).await;
    }
    let Some(instance) = instance(request.backends) else {
        return Vec::new();
    };
    let options = wgpu::RequestAdapterOptions {
        power_preference: request.power_preference,
        ..Default::default()
    };
    instance
        .request_adapter(&options)
        .await
        .into_iter()
        .collect()
}

/// Every adapter of the machine on these backends, as far as the build has them; in a browser the one that it shows.
pub async fn adapters(backends: wgpu::Backends) -> Vec<wgpu::Adapter> {
    match instance(backends) {
        Some(instance) => instance.enumerate_adapters(backends).await,
        None => Vec::new(),
    }
}

/// An instance without any backend panics; a build without one has no adapters.
fn instance(backends: wgpu::Backends) -> Option<wgpu::Instance> {
    if wgpu::Instance::enabled_backend_features().is_empty() {
        return None;
    }
    Some(wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends,
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    }))
}

/// Elements of a dispatch on adapters that may be slow: 1.3 GB of traffic, an eighth of a second at 10 GB/s,
/// where watchdogs wait two seconds.
const MAX_DISPATCH_ELEMS_IF_SLOW: u64 = 1 << 26;

impl DeviceLimits {
    /// The limits that [`Kernels`](crate::Kernels) plan with on a device, or on one that an adapter with these limits gives: on
    /// software and integrated adapters, and on those that do not say what they are, as a browser's, with a ceiling of
    /// 2^26 on the elements of a dispatch.
    #[must_use]
    pub fn of(limits: &wgpu::Limits, device_type: wgpu::DeviceType) -> Self {
        let max_dispatch_elems = match device_type {
            wgpu::DeviceType::DiscreteGpu | wgpu::DeviceType::VirtualGpu => u64::MAX,
            // Browsers do not say what they have.
            _ => MAX_DISPATCH_ELEMS_IF_SLOW,
        };
        Self {
            max_dispatch_elems,
            is_software: device_type == wgpu::DeviceType::Cpu,
            ..Self::from(limits)
        }
    }
}

impl From<&wgpu::Limits> for DeviceLimits {
    /// The limits of a GPU, with no ceiling on the elements of a dispatch.
    fn from(limits: &wgpu::Limits) -> Self {
        Self {
            max_binding_bytes: limits.max_storage_buffer_binding_size,
            max_buffer_bytes: limits.max_buffer_size,
            offset_alignment_bytes: limits.min_storage_buffer_offset_alignment.into(),
            max_storage_buffers: limits.max_storage_buffers_per_shader_stage,
            max_workgroups_per_dimension: limits.max_compute_workgroups_per_dimension,
            max_dispatch_elems: u64::MAX,
            is_software: false,
        }
    }
}
