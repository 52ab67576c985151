//! The simulation in a browser: `cargo xtask web-test`.
#![cfg(target_arch = "wasm32")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod twin;

use landscape::landscape::{FEATURES, Landscape};
use landscape::scene::Camera;
use landscape::settings::Settings;
use landscape::terrain::Terrain;
use wasm_bindgen_test::{wasm_bindgen_test, wasm_bindgen_test_configure};
use wgpu_optim::{AdapterRequest, Gpu, readback, wgpu};

wasm_bindgen_test_configure!(run_in_browser);

#[wasm_bindgen_test]
async fn sixty_frames_in_a_browser_are_as_the_twin_says() {
    const BALLS: u32 = 2001;
    const FRAMES: u32 = 60;
    let request = AdapterRequest {
        features: FEATURES,
        ..AdapterRequest::default()
    };
    let Gpu { device, queue, .. } = Gpu::open(&request).await.unwrap();
    for terrain in [Terrain::Hills, Terrain::Fractal] {
        let settings = Settings::new(terrain, BALLS, 3);
        let format = wgpu::TextureFormat::Rgba8Unorm;
        let mut landscape = Landscape::new(&device, &queue, format, &settings).unwrap();
        let numel = 2 * u64::from(BALLS);
        let download = |params: &wgpu::Buffer| {
            let (device, queue, params) = (device.clone(), queue.clone(), params.clone());
            async move {
                readback::download(&device, &queue, &params, 0, numel)
                    .await
                    .unwrap()
            }
        };
        let starts = download(landscape.params(0)).await;
        for _ in 0..FRAMES {
            let mut encoder = device.create_command_encoder(&Default::default());
            landscape.record_steps(&mut encoder, 1).unwrap();
            let camera = Camera::default();
            landscape.record_picture(&device, &queue, &mut encoder, &camera, [256, 128]);
            queue.submit([encoder.finish()]);
        }
        // There when a later download is.
        download(landscape.params(1)).await;
        let frame = landscape.newest().unwrap();
        assert_eq!(frame.steps, u64::from(FRAMES));
        twin::agrees(&settings, &starts, FRAMES, frame.sides);
    }
}
