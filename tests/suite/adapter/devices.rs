//! Devices as engines open them: several at a time, and with limits of their own.

use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::wgsl::ScalarPath;
use wgpu_optim::{Gpu, GpuOptimizer, OPTIONAL_FEATURES, Optimizer, SgdConfig, TensorBinding, wgpu};

use super::{Bench, gpu_test, open_gpu};
use crate::cases::{LRS, values};

fn config(momentum: f64) -> SgdConfig {
    SgdConfig::builder(0.1)
        .momentum(momentum)
        .dampening(0.2)
        .build()
        .unwrap()
}

/// Steps on all of these devices in turn, with recordings of all of them under way at a time.
async fn step_side_by_side(benches: &[Bench]) {
    let numel = 1003;
    let buffers_of = |(seed, bench): (usize, &Bench)| {
        let (start, gradient) = (values(seed as u64, numel), values(50 + seed as u64, numel));
        let buffers = (bench.buffer_of(&start), bench.buffer_of(&gradient));
        (Oracle::new(&start, Roundoff::WGSL), gradient, buffers)
    };
    let mut runs: Vec<_> = benches.iter().enumerate().map(buffers_of).collect();
    let optimizer_of = |(index, bench): (usize, &Bench)| {
        let (params, grads) = &runs[index].2;
        bench.optimizer(config(0.5 + 0.1 * index as f64), params, grads)
    };
    let mut optimizers: Vec<_> = benches.iter().enumerate().map(optimizer_of).collect();
    for lr in LRS {
        let mut encoders: Vec<_> = benches.iter().map(Bench::encoder).collect();
        for (index, optimizer) in optimizers.iter_mut().enumerate() {
            optimizer.set_lr(lr / (index + 1) as f64).unwrap();
            optimizer.step(&mut encoders[index]).unwrap();
            let (oracle, gradient, _) = &mut runs[index];
            oracle.step(optimizer.config(), gradient);
        }
        for (bench, encoder) in benches.iter().zip(encoders).rev() {
            bench.queue.submit([encoder.finish()]);
        }
    }
    for ((bench, optimizer), (oracle, _, (params, _))) in benches.iter().zip(&optimizers).zip(&runs)
    {
        oracle.check_params(&bench.download(params).await).unwrap();
        let velocity = bench.velocity(optimizer, 0).await.unwrap();
        oracle.check_velocity(&velocity).unwrap();
    }
}

#[gpu_test]
async fn two_devices_of_one_instance_step_side_by_side() {
    for features in [OPTIONAL_FEATURES, wgpu::Features::empty()] {
        let benches = [
            Bench::with(features).await,
            Bench::with(wgpu::Features::empty()).await,
        ];
        step_side_by_side(&benches).await;
    }
}

#[gpu_test]
async fn devices_of_two_instances_step_side_by_side() {
    let opened = [open_gpu().await, open_gpu().await];
    step_side_by_side(&opened.map(|Gpu { device, queue, .. }| Bench::new(device, queue))).await;
}

/// What an engine may have asked for on an adapter that has more. In a browser that is no less than WebGPU's own.
fn engines_limits() -> Vec<wgpu::Limits> {
    if cfg!(target_arch = "wasm32") {
        return vec![wgpu::Limits::default()];
    }
    let cramped = wgpu::Limits {
        max_storage_buffer_binding_size: 16 << 10,
        max_buffer_size: 64 << 10,
        max_compute_workgroups_per_dimension: 3,
        ..wgpu::Limits::downlevel_defaults()
    };
    vec![
        wgpu::Limits::default(),
        wgpu::Limits::downlevel_defaults(),
        cramped,
    ]
}

#[gpu_test]
async fn an_engines_own_limits_are_kept() {
    // Element offsets of parameters and gradients, and sizes: aligned or not, with each other or not.
    const TENSORS: [(usize, usize, usize); 4] = [
        (0, 0, 4099),
        (4099, 4099, 777),
        (5000, 5001, 1025),
        (7001, 7021, 8000),
    ];
    const NUMEL: usize = 15_100;
    for limits in engines_limits() {
        let bench = Bench::open(wgpu::Features::empty(), limits.clone()).await;
        assert_eq!(bench.device.limits(), limits);
        assert_eq!(bench.kernels.scalar_path(), ScalarPath::Uniforms);
        let (start, gradient) = (values(1, NUMEL), values(2, NUMEL));
        let (params, grads) = (bench.buffer_of(&start), bench.buffer_of(&gradient));
        let names = ["a", "b", "c", "d"];
        let binding = |(name, (p, g, numel)): (&'static str, (usize, usize, usize))| {
            TensorBinding::new(name, &params, &grads, [numel])
                .params_at(4 * p as u64)
                .grads_at(4 * g as u64)
        };
        let tensors: Vec<_> = names.into_iter().zip(TENSORS).map(binding).collect();
        let mut optimizer = GpuOptimizer::new(&bench.kernels, config(0.9), &tensors).unwrap();
        for piece in &optimizer.plan().pieces {
            let state_bytes = piece.state.map_or(0, |state| state.size_bytes());
            assert!(state_bytes <= limits.max_storage_buffer_binding_size);
            for window in [piece.params, piece.grads] {
                assert!(window.size_bytes <= limits.max_storage_buffer_binding_size);
                let alignment = u64::from(limits.min_storage_buffer_offset_alignment);
                assert_eq!(window.offset_bytes % alignment, 0);
            }
        }
        for lr in LRS {
            optimizer.set_lr(lr).unwrap();
            bench.step(&mut optimizer);
        }
        let after = bench.download(&params).await;
        let mut expected_untouched = start.clone();
        for (index, (p, g, numel)) in TENSORS.into_iter().enumerate() {
            let mut oracle = Oracle::new(&start[p..p + numel], Roundoff::WGSL);
            for lr in LRS {
                let config = config(0.9).with_lr(lr).unwrap();
                oracle.step(&config, &gradient[g..g + numel]);
            }
            oracle.check_params(&after[p..p + numel]).unwrap();
            let velocity = bench.velocity(&optimizer, index).await.unwrap();
            oracle.check_velocity(&velocity).unwrap();
            expected_untouched[p..p + numel].copy_from_slice(&after[p..p + numel]);
        }
        assert_eq!(after, expected_untouched, "what lies between the tensors");
        assert_eq!(bench.download(&grads).await, gradient);
    }
}
