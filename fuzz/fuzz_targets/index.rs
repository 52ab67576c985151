//! Runs `wgpu_optim_fuzz::index` in libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| wgpu_optim_fuzz::index(input));
