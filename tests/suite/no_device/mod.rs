//! Tier one: no device.

pub mod adam;
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
mod schedule;
#[cfg(feature = "safetensors")]
mod state_file;
