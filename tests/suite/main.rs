//! All tests of the library, in three tiers: what needs no device, what `Device::noop` can check, and what
//! needs a real adapter (a software one will do).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]

mod adapter;
mod cases;
mod golden;
#[cfg(feature = "safetensors")]
mod golden_rules;
mod no_device;
mod noop;
mod random;
#[cfg(feature = "safetensors")]
mod rule_cases;
#[cfg(feature = "safetensors")]
mod rule_runs;
