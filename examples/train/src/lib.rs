//! Trains a small network on real data inside an engine of its own: forward and backward in WGSL, gradients straight into
//! an arena, one submit per batch.
//!
//! [`gpu`] is what an engine has of it, [`cpu`] its twin, `model.wgsl` the network.

pub mod comparison;
pub mod contender;
pub mod cpu;
pub mod data;
pub mod gpu;
pub mod mixed;
pub mod model;
pub mod picture;
pub mod report;
pub mod task;
pub mod training;
