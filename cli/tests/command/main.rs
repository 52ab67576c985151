//! The real command: what it writes, what it prints, and what it refuses.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]

mod adapters;
mod benchmark;
mod experiments;
mod model;
mod refusals;
mod reports;
mod rounds;

use assert_cmd::Command;

/// Devices that a step is tested on.
const DEVICES: [&str; 2] = ["cpu", "gpu"];

fn wgpu_optim() -> Command {
    Command::new(assert_cmd::cargo::cargo_bin!("wgpu-optim"))
}

/// On a machine whose Vulkan loader finds no driver.
fn without_driver() -> Command {
    let mut command = wgpu_optim();
    command
        .env("VK_DRIVER_FILES", "/nonexistent.json")
        .env("VK_ICD_FILENAMES", "/nonexistent.json");
    command
}
