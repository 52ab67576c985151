//! All tests of the library, in three tiers: what needs no device, what `Device::noop` can check, and what
//! needs a real adapter (a software one will do). A browser runs those that say something there.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]
#![cfg_attr(
    target_arch = "wasm32",
    allow(unused_imports, reason = "a browser leaves tests out")
)]

mod adapter;
mod cases;
mod golden;
#[cfg(feature = "safetensors")]
mod golden_control;
#[cfg(feature = "safetensors")]
mod golden_rules;
#[cfg(feature = "safetensors")]
mod golden_tensors;
mod no_device;
#[cfg(not(target_arch = "wasm32"))]
mod noop;
#[cfg(not(target_arch = "wasm32"))]
mod random;
#[cfg(feature = "safetensors")]
mod rule_cases;
#[cfg(all(feature = "safetensors", not(target_arch = "wasm32")))]
mod rule_runs;
mod scales;
mod stored;

/// A test that waits for nothing, natively or in a browser.
#[cfg(not(target_arch = "wasm32"))]
use core::prelude::v1::test;
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

#[cfg(target_arch = "wasm32")]
wasm_bindgen_test::wasm_bindgen_test_configure!(run_in_browser);
