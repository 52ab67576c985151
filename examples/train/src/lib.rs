//! Trains a small network on real data inside an engine of its own: forward and backward in WGSL, gradients straight into
//! an arena, one submit per batch.
//!
//! `gpu.rs` is what an engine has of it; `cpu.rs` is its twin.

pub mod cpu;
pub mod data;
pub mod gpu;
pub mod model;
pub mod task;
pub mod training;
