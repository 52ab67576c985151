//! Tier one: no device.

mod adapters;
mod config;
mod cpu;
#[cfg(feature = "safetensors")]
mod files;
mod golden;
pub mod groups;
mod mathematics;
mod oracle;
mod physics;
mod plan;
mod presets;
pub mod properties;
#[cfg(feature = "safetensors")]
mod pytorch_state;
#[cfg(feature = "safetensors")]
mod rules;
mod schedule;
#[cfg(feature = "safetensors")]
mod state_file;
