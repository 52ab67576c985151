//! What only a browser does.

use wasm_bindgen_test::wasm_bindgen_test;
use wgpu_optim::gpu::GpuError;
use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::{AdapterRequest, Gpu, Optimizer, SgdConfig, wgpu};

use super::transfers::every_transfer;
use super::{Bench, gpu};
use crate::cases::values;

#[wasm_bindgen_test]
async fn every_transfer_finishes_by_itself() {
    every_transfer().await;
}

#[wasm_bindgen_test]
async fn a_browser_without_webgpu_has_no_adapter() {
    let navigator = js_sys::Reflect::get(&js_sys::global(), &"navigator".into()).unwrap();
    let nothing = js_sys::Object::new();
    js_sys::Reflect::set(&nothing, &"configurable".into(), &true.into()).unwrap();
    let gpu = "gpu".into();
    let navigator = navigator.into();
    js_sys::Reflect::define_property(&navigator, &gpu, &nothing).unwrap();
    let without = Gpu::open(&AdapterRequest::default()).await;
    js_sys::Reflect::delete_property(&navigator, &gpu).unwrap();
    assert!(
        matches!(&without, Err(GpuError::NoAdapter { available, .. }) if available == "none"),
        "{without:?}"
    );
    Gpu::open(&AdapterRequest::default()).await.unwrap();
}

#[wasm_bindgen_test]
async fn a_request_for_hardware_is_not_given_software() {
    let request = AdapterRequest {
        allow_software: false,
        power_preference: wgpu::PowerPreference::LowPower,
        ..AdapterRequest::default()
    };
    let opened = Gpu::open(&request).await;
    match gpu().await.adapter.get_info().device_type {
        wgpu::DeviceType::Cpu => assert!(
            matches!(opened, Err(GpuError::NoAdapter { .. })),
            "{opened:?}"
        ),
        _ => drop(opened.unwrap()),
    }
}

/// A page that steps for long without giving the browser its turn, in which staging buffers would come back.
#[wasm_bindgen_test]
async fn many_steps_of_one_turn_each_see_their_own_lr() {
    let bench = Bench::best().await;
    let (start, gradient) = (values(1, 1003), values(2, 1003));
    let (params, grads) = (bench.buffer_of(&start), bench.buffer_of(&gradient));
    let config = SgdConfig::builder(0.1).momentum(0.5).build().unwrap();
    let mut optimizer = bench.optimizer(config, &params, &grads);
    let mut oracle = Oracle::new(&start, Roundoff::WGSL);
    for step in 0..50 {
        optimizer.set_lr(0.1 / f64::from(step + 1)).unwrap();
        bench.step(&mut optimizer);
        oracle.step(optimizer.config(), &gradient);
    }
    oracle.check_params(&bench.download(&params).await).unwrap();
}
