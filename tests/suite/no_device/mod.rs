//! Tier one: no device.

mod adapters;
#[cfg(all(feature = "safetensors", not(target_arch = "wasm32")))]
mod checkpoint;
mod config;
#[cfg(feature = "safetensors")]
mod control;
mod cpu;
#[cfg(all(feature = "safetensors", not(target_arch = "wasm32")))]
mod files;
mod golden;
pub mod groups;
mod mathematics;
#[cfg(not(target_arch = "wasm32"))]
mod mixed;
mod oracle;
mod physics;
#[cfg(not(target_arch = "wasm32"))]
mod plan;
mod presets;
#[cfg(not(target_arch = "wasm32"))]
pub mod properties;
#[cfg(feature = "safetensors")]
mod pytorch_state;
#[cfg(feature = "safetensors")]
mod rules;
mod schedule;
#[cfg(feature = "safetensors")]
mod state_file;
pub mod storage;
#[cfg(feature = "safetensors")]
mod sums;
