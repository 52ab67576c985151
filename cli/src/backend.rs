//! Which device a command computes on, and why.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, anyhow};
use serde::{Deserialize, Serialize};
use wgpu_optim::wgpu;
use wgpu_optim::{AdapterRequest, Gpu};

use crate::Failure;
use crate::args::{CommonArgs, DeviceArg};

/// How to get an adapter on a machine that has none.
pub const NO_ADAPTER_HINT: &str =
    "a software adapter will do: on Debian and Ubuntu, install mesa-vulkan-drivers";

/// What devices get for the benchmark's sake, where their adapters have it.
const MEASURING: wgpu::Features = wgpu::Features::TIMESTAMP_QUERY;

/// The device of a command.
pub enum Backend {
    Gpu(OpenGpu),
    Cpu,
}

/// The chosen device, and why it was chosen.
pub struct Choice {
    pub backend: Backend,
    pub reason: String,
}

impl Choice {
    /// For commands that update a model: `auto` is a hardware GPU, else the CPU twin, which beats a software
    /// adapter.
    pub fn for_updates(common: &CommonArgs) -> Result<Self, Failure> {
        let hardware_only = common.device == DeviceArg::Auto && common.adapter.is_none();
        Self::new(common, !hardware_only)
    }

    /// The adapters to measure (every one that fits, if `all`), and why these; none for the CPU alone.
    pub fn all_for_measurements(
        common: &CommonArgs,
        all: bool,
    ) -> Result<(Vec<OpenGpu>, String), Failure> {
        if !all || common.device == DeviceArg::Cpu {
            let Self { backend, reason } = Self::for_measurements(common)?;
            return Ok(match backend {
                Backend::Gpu(open) => (vec![open], reason),
                Backend::Cpu => (Vec::new(), reason),
            });
        }
        let backends = wgpu::Backends::from_env().unwrap_or(wgpu::Backends::all());
        let mut opened = Vec::new();
        for adapter in pollster::block_on(wgpu_optim::adapters(backends)) {
            let name = adapter.get_info().name.to_lowercase();
            let wanted = common.adapter.as_ref();
            if wanted.is_none_or(|text| name.contains(&text.to_lowercase())) {
                let gpu =
                    pollster::block_on(Gpu::of(adapter, MEASURING)).map_err(Failure::failed)?;
                opened.push(OpenGpu::new(gpu));
            }
        }
        if opened.is_empty() && (common.device == DeviceArg::Gpu || common.adapter.is_some()) {
            return Err(anyhow!("no such adapter; {NO_ADAPTER_HINT}").into());
        }
        let reason = match opened.len() {
            0 => "no adapter found".to_owned(),
            _ => "every adapter of this machine".to_owned(),
        };
        Ok((opened, reason))
    }

    /// For measurements: `auto` is whatever adapter there is.
    pub fn for_measurements(common: &CommonArgs) -> Result<Self, Failure> {
        Self::new(common, true)
    }

    fn new(common: &CommonArgs, allow_software: bool) -> Result<Self, Failure> {
        if common.device == DeviceArg::Cpu {
            if let Some(name) = &common.adapter {
                return Err(
                    anyhow!("--adapter {name} asks for a GPU, and --device cpu for none").into(),
                );
            }
            return Ok(Self {
                backend: Backend::Cpu,
                reason: "asked for with --device cpu".to_owned(),
            });
        }
        let request = AdapterRequest {
            name: common.adapter.clone(),
            backends: backends(),
            allow_software,
            features: MEASURING,
            ..AdapterRequest::default()
        };
        match Gpu::open_blocking(&request) {
            Ok(gpu) => Ok(Self {
                reason: match (common.device, &common.adapter) {
                    (_, Some(name)) => format!("asked for with --adapter {name}"),
                    (DeviceArg::Gpu, None) => "asked for with --device gpu".to_owned(),
                    _ => "the best adapter of this machine".to_owned(),
                },
                backend: Backend::Gpu(OpenGpu::new(gpu)),
            }),
            // What was asked for by name or kind must be there; `auto` takes what there is.
            Err(error) if common.device == DeviceArg::Gpu || common.adapter.is_some() => {
                Err(anyhow!("{error}; {NO_ADAPTER_HINT}").into())
            }
            Err(error) => Ok(Self {
                backend: Backend::Cpu,
                reason: error.to_string(),
            }),
        }
    }
}

/// The backends to look for adapters on: `WGPU_BACKEND`, else Vulkan, Metal and DX12.
pub fn backends() -> wgpu::Backends {
    wgpu::Backends::from_env().unwrap_or(wgpu::Backends::PRIMARY)
}

/// What an adapter says of itself.
#[derive(Debug, Serialize, Deserialize)]
pub struct Adapter {
    pub name: String,
    pub backend: String,
    pub device_type: String,
    pub driver: String,
}

impl Adapter {
    pub fn of(adapter: &wgpu::Adapter) -> Self {
        let info = adapter.get_info();
        Self {
            driver: format!("{} {}", info.driver, info.driver_info)
                .trim()
                .to_owned(),
            name: info.name,
            backend: info.backend.to_string(),
            device_type: format!("{:?}", info.device_type),
        }
    }

    /// How it is called in reports.
    pub fn full_name(&self) -> String {
        format!("{} ({})", self.name, self.backend)
    }
}

/// A device whose uncaptured errors are kept instead of wgpu's panic.
pub struct OpenGpu {
    pub gpu: Gpu,
    errors: Arc<Mutex<Option<String>>>,
}

impl OpenGpu {
    fn new(gpu: Gpu) -> Self {
        let errors = Arc::new(Mutex::new(None));
        let keep = Arc::clone(&errors);
        gpu.device
            .on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
                log::error!("{error}");
                let mut first = keep.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert(error.to_string());
            }));
        Self { gpu, errors }
    }

    pub fn name(&self) -> String {
        Adapter::of(&self.gpu.adapter).full_name()
    }

    /// Waits until everything submitted so far is done.
    pub fn finish(&self) -> Result<(), Failure> {
        self.gpu
            .device
            .poll(wgpu::PollType::wait_indefinitely())
            .context("the device did not finish")
            .map_err(Failure::Failed)?;
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        match errors.take() {
            Some(error) => Err(Failure::Failed(anyhow!("the device reported: {error}"))),
            None => Ok(()),
        }
    }
}

/// Name of the CPU twin in reports.
pub fn cpu_name() -> String {
    format!("CPU twin ({} threads)", rayon::current_num_threads())
}
