//! Which adapter is taken.

use wgpu_optim::AdapterRequest;
use wgpu_optim::wgpu::{self, Backend, DeviceType, PowerPreference};

use crate::test;

fn adapter(name: &str, device_type: DeviceType, backend: Backend) -> wgpu::AdapterInfo {
    wgpu::AdapterInfo {
        name: name.to_owned(),
        ..wgpu::AdapterInfo::new(device_type, backend)
    }
}

#[test]
fn the_best_adapter_that_fits_comes_first() {
    let adapters = [
        adapter("llvmpipe", DeviceType::Cpu, Backend::Vulkan),
        adapter("Card A", DeviceType::DiscreteGpu, Backend::Gl),
        adapter("Chip", DeviceType::IntegratedGpu, Backend::Vulkan),
        adapter("Card A", DeviceType::DiscreteGpu, Backend::Vulkan),
        adapter("Card B", DeviceType::DiscreteGpu, Backend::Vulkan),
    ];
    let any = AdapterRequest::default();
    assert_eq!(any.best_first(&adapters), [3, 4, 1, 2, 0]);
    let hardware = AdapterRequest {
        allow_software: false,
        power_preference: PowerPreference::LowPower,
        ..any.clone()
    };
    assert_eq!(hardware.best_first(&adapters), [2, 3, 4, 1]);
    let named = |name: &str| AdapterRequest {
        name: Some(name.to_owned()),
        ..any.clone()
    };
    assert_eq!(named("card b").best_first(&adapters), [4]);
    assert_eq!(named("card").best_first(&adapters), [3, 4, 1]);
    assert_eq!(named("other").best_first(&adapters), [0; 0]);
}
