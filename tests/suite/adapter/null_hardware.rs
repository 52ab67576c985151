//! A discrete GPU that is not there, as RADV shows one.

use std::env;
use std::path::Path;

use wgpu_optim::gpu::GpuError;
use wgpu_optim::{AdapterRequest, Gpu, wgpu};

use super::in_own_process;

/// Names this module's process among the test's.
const CHILD: &str = "WGPU_OPTIM_TEST_NULL_HARDWARE";

#[test]
fn an_adapter_that_gives_no_device_is_passed_over() {
    let request = |name: Option<&str>| AdapterRequest {
        name: name.map(str::to_owned),
        backends: wgpu::Backends::VULKAN,
        ..AdapterRequest::default()
    };
    if env::var_os(CHILD).is_some() {
        let alone = Gpu::open_blocking(&request(Some("null hardware")));
        assert!(
            matches!(&alone, Err(GpuError::NoDevice { adapter, .. }) if adapter.contains("NAVI21")),
            "{alone:?}"
        );
        let next_best = Gpu::open_blocking(&request(None)).unwrap();
        assert_eq!(
            next_best.adapter.get_info().device_type,
            wgpu::DeviceType::Cpu
        );
        return;
    }
    // RADV shows a discrete GPU that is not there.
    let drivers =
        ["radeon", "lvp"].map(|driver| format!("/usr/share/vulkan/icd.d/{driver}_icd.x86_64.json"));
    if !drivers.iter().all(|driver| Path::new(driver).exists()) {
        println!("not run: this machine has not both RADV and lavapipe");
        return;
    }
    // A driver reads its variables when it is loaded.
    let name = "adapter::null_hardware::an_adapter_that_gives_no_device_is_passed_over";
    let drivers = drivers.join(":");
    let variables = [
        (CHILD, "1"),
        ("RADV_FORCE_FAMILY", "navi21"),
        ("VK_DRIVER_FILES", &drivers),
        ("VK_ICD_FILENAMES", &drivers),
    ];
    in_own_process(name, &variables);
}
