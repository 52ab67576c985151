//! Tier one: no device. In a browser it is there for the arithmetic.

#[cfg(not(target_arch = "wasm32"))]
mod adapters;
#[cfg(not(target_arch = "wasm32"))]
mod config;
mod cpu;
#[cfg(all(feature = "safetensors", not(target_arch = "wasm32")))]
mod files;
mod golden;
pub mod groups;
#[cfg(not(target_arch = "wasm32"))]
mod mathematics;
#[cfg(not(target_arch = "wasm32"))]
mod oracle;
#[cfg(not(target_arch = "wasm32"))]
mod physics;
#[cfg(not(target_arch = "wasm32"))]
mod plan;
#[cfg(not(target_arch = "wasm32"))]
mod presets;
#[cfg(not(target_arch = "wasm32"))]
pub mod properties;
#[cfg(all(feature = "safetensors", not(target_arch = "wasm32")))]
mod pytorch_state;
#[cfg(feature = "safetensors")]
mod rules;
#[cfg(not(target_arch = "wasm32"))]
mod schedule;
#[cfg(all(feature = "safetensors", not(target_arch = "wasm32")))]
mod state_file;
