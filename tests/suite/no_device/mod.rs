//! Tier one: no device.

mod config;
mod cpu;
mod golden;
mod oracle;
mod plan;
