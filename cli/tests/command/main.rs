//! The real command: what it writes, what it prints, and what it refuses.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]

mod adapters;
#[cfg(target_os = "linux")]
mod as_root;
mod benchmark;
mod control;
mod diloco;
mod experiments;
mod gradients;
mod groups;
mod guide;
#[cfg(target_os = "linux")]
mod interruptions;
#[cfg(target_os = "linux")]
mod limits;
mod manual;
mod model;
mod outputs;
mod refusals;
mod reports;
mod rounds;
#[cfg(target_os = "linux")]
mod running;
mod shards;
mod sixteen_bits;

use std::path::PathBuf;

use assert_cmd::Command;

/// Devices that a step is tested on.
const DEVICES: [&str; 2] = ["cpu", "gpu"];

/// The command that was built with these tests, or the one that `WGPU_OPTIM_COMMAND` names.
fn program() -> PathBuf {
    let other = std::env::var_os("WGPU_OPTIM_COMMAND").map(PathBuf::from);
    other.unwrap_or_else(|| assert_cmd::cargo::cargo_bin!("wgpu-optim").to_owned())
}

fn wgpu_optim() -> Command {
    Command::new(program())
}

/// On a machine whose Vulkan loader finds no driver.
fn without_driver() -> Command {
    let mut command = wgpu_optim();
    command
        .env("VK_DRIVER_FILES", "/nonexistent.json")
        .env("VK_ICD_FILENAMES", "/nonexistent.json");
    command
}
