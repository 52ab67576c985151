//! A discrete GPU that is not there, as RADV shows one.

use std::env;
use std::path::Path;
use std::process::Command;

use wgpu_optim::gpu::GpuError;
use wgpu_optim::{AdapterRequest, Gpu, wgpu};

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
    let child = Command::new(env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(CHILD, "1")
        .env("RADV_FORCE_FAMILY", "navi21")
        .env("VK_DRIVER_FILES", drivers.join(":"))
        .env("VK_ICD_FILENAMES", drivers.join(":"))
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout) + String::from_utf8_lossy(&child.stderr);
    assert!(
        child.status.success() && output.contains("1 passed"),
        "{output}"
    );
}
