//! Rules that take sums over tensors, on a device.

use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::rules::{Scalars, Twin};
use wgpu_optim::wgsl::KernelError;
use wgpu_optim::{
    AnyRule, Arena, BuildError, ConfigError, CpuOptimizer, GpuControl, GpuOptimizer, LambConfig,
    Optimizer, Rule, StepControl, StepError, wgpu,
};

use super::{Bench, Tensors, gpu_test, whole};
use crate::cases::values;
use crate::golden_tensors::all;

#[gpu_test]
async fn the_points_that_the_libraries_printed_are_visited() {
    for bench in Bench::both().await {
        for golden in all() {
            let buffers: Vec<_> = golden
                .tensors
                .iter()
                .map(|tensor| {
                    let grads = bench.buffer(tensor.theta0.len());
                    (bench.buffer_of(&tensor.theta0), grads)
                })
                .collect();
            let tensors = golden.tensors.iter().zip(&buffers);
            let tensors =
                tensors.map(|(tensor, (params, grads))| whole(&tensor.name, params, grads));
            let tensors: Vec<_> = tensors.collect();
            let mut optimizer =
                GpuOptimizer::new(&bench.kernels, golden.config(), &tensors).unwrap();
            for (step, oracles) in golden.oracles(Roundoff::WGSL).iter().enumerate() {
                for ((_, buffer), grads) in buffers.iter().zip(golden.grads(step)) {
                    bench.upload(buffer, &grads);
                }
                optimizer.set_lr(golden.lr[step]).unwrap();
                bench.step(&mut optimizer);
                let state = bench.wait(optimizer.state()).await.unwrap();
                for (index, oracle) in oracles.iter().enumerate() {
                    let here = format!("{}, tensor {index}, step {step}", golden.name);
                    let params = bench.download(&buffers[index].0).await;
                    oracle
                        .check_params(&params)
                        .unwrap_or_else(|e| panic!("{here}: {e}"));
                    for state in &state.tensors[index].slots {
                        oracle
                            .check_slot(&state.name, &state.values.to_f32())
                            .unwrap_or_else(|e| panic!("{here}: {e}"));
                    }
                }
            }
        }
    }
}

/// However many tensors an arena has: by vectors and by elements, once to take the sums and once to update, and the sums.
#[gpu_test]
async fn an_arena_takes_five_dispatches_and_the_same_bits_twice() {
    let config = LambConfig::builder(0.05).build().unwrap();
    for bench in Bench::both().await {
        let tensors = Tensors::new([("a", vec![7, 11]), ("b", vec![200_001]), ("c", vec![64])]);
        let run = async || {
            let arena = Arena::new(&bench.device, &bench.queue, tensors.shapes.clone()).unwrap();
            tensors.upload(&arena);
            let mut optimizer =
                GpuOptimizer::new(&bench.kernels, config, &arena.bindings()).unwrap();
            for _ in 0..3 {
                bench.step(&mut optimizer);
            }
            let state = bench.wait(optimizer.state()).await.unwrap();
            (optimizer.dispatches(), state)
        };
        let (dispatches, state) = run().await;
        assert_eq!(dispatches, 5);
        assert_eq!(run().await.1, state);
    }
}

/// Descent by gradients of root mean square one: a rule of a user's own, without a slot.
#[derive(Clone, Debug, PartialEq)]
struct RmsDescent {
    lr: f64,
}

impl Rule for RmsDescent {
    fn stem(&self) -> &'static str {
        "rms_descent"
    }

    fn wgsl(&self) -> String {
        "
        fn measure(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: State) -> Summands {
            return Summands(g * g);
        }
        fn decide(k: Scalars, sums: Sums, numel: f32) -> Scalars {
            return Scalars(k.lr / sqrt(sums.grads_sq / numel));
        }
        fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
            return theta - k.lr * g;
        }"
        .into()
    }

    fn scalar_names(&self) -> &'static [&'static str] {
        &["lr"]
    }

    fn sums(&self) -> &'static [&'static str] {
        &["grads_sq"]
    }

    fn scalars(&self, _phase: u64) -> Scalars {
        [self.lr as f32].into()
    }

    fn lr(&self) -> f64 {
        self.lr
    }

    fn with_lr(&self, lr: f64) -> Result<Self, ConfigError> {
        Ok(Self { lr })
    }
}

impl Twin for RmsDescent {
    fn step(&self, scalars: &Scalars, params: &mut [f32], _: &mut [&mut [f32]], grads: &[f32]) {
        let lr = scalars.as_slice()[0];
        for (theta, g) in params.iter_mut().zip(grads) {
            *theta -= lr * g;
        }
    }

    fn measure(&self, _: &Scalars, _: &[f32], _: &[&[f32]], grads: &[f32], sums: &mut [f64]) {
        sums[0] += grads.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>();
    }

    fn decide(&self, scalars: &Scalars, sums: &[f32], numel: f32) -> Scalars {
        [scalars.as_slice()[0] / (sums[0] / numel).sqrt()].into()
    }
}

/// Tensors of any length, one of them frozen for a step, with a control and without, move as they do one by one in `f64`, on
/// the device and on the CPU.
#[gpu_test]
async fn a_rule_of_ones_own_takes_sums() {
    // A term is rounded fewer than 64 times on its way into the sum, and a root halves that; the rest is a handful.
    const BOUND: f64 = 64.0 * f32::EPSILON as f64;
    let numels = [1, 5, 1001, 70_003, 64];
    for (bench, is_controlled) in Bench::both().await.flat_map(|b| [(b, false), (b, true)]) {
        let starts = numels.map(|numel| values(numel as u64, numel));
        let grads = numels.map(|numel| values(9 + numel as u64, numel));
        let params_buffers = starts.each_ref().map(|start| bench.buffer_of(start));
        let grads_buffers = grads.each_ref().map(|grads| bench.buffer_of(grads));
        let names = numels.map(|numel| numel.to_string());
        let buffers = params_buffers.iter().zip(&grads_buffers);
        let tensors = names.iter().zip(buffers);
        let tensors = tensors.map(|(name, (params, grads))| whole(name, params, grads));
        let tensors: Vec<_> = tensors.collect();
        let rule = RmsDescent { lr: 0.5 };
        let mut on_device = GpuOptimizer::new(&bench.kernels, rule.clone(), &tensors).unwrap();
        let specs = names
            .iter()
            .zip(numels)
            .map(|(name, numel)| (name.as_str(), [numel]));
        let mut on_cpu = CpuOptimizer::new(rule, specs).unwrap();
        let control = StepControl::builder().max_norm(1.0).build().unwrap();
        let mut control = GpuControl::new(&bench.kernels, control).unwrap();
        let mut of_cpu = starts.clone();
        let mut exact = starts.each_ref().map(|start| {
            let start = start.iter().map(|theta| f64::from(*theta));
            start.collect::<Vec<_>>()
        });
        for step in 0..3 {
            on_device.set_frozen("1001", step == 1).unwrap();
            on_cpu.set_frozen("1001", step == 1).unwrap();
            // However a control scales gradients, their root mean square is one.
            bench.submit(|encoder| match is_controlled {
                true => on_device.step_with(encoder, &mut control).unwrap(),
                false => on_device.step(encoder).unwrap(),
            });
            let mut slices = of_cpu.each_mut().map(Vec::as_mut_slice);
            let grads_of = grads.each_ref().map(Vec::as_slice);
            on_cpu.step(&mut slices, &grads_of).unwrap();
            for (tensor, exact) in exact.iter_mut().enumerate() {
                if tensor == 2 && step == 1 {
                    continue;
                }
                let grads = || grads[tensor].iter().map(|g| f64::from(*g));
                let mean_sq = grads().map(|g| g * g).sum::<f64>() / numels[tensor] as f64;
                for (theta, g) in exact.iter_mut().zip(grads()) {
                    *theta -= 0.5 * g / mean_sq.sqrt();
                }
            }
        }
        for (tensor, exact) in exact.iter().enumerate() {
            let of_device = bench.download(&params_buffers[tensor]).await;
            for actual in [&of_device, &of_cpu[tensor]] {
                for ((actual, exact), start) in actual.iter().zip(exact).zip(&starts[tensor]) {
                    let off = (f64::from(*actual) - exact).abs();
                    let moved = (exact - f64::from(*start)).abs() + exact.abs();
                    assert!(
                        off <= 3.0 * BOUND * moved,
                        "tensor {tensor}: {actual} {exact}"
                    );
                }
            }
        }
    }
}

/// Encoders that are dropped, tensors that move, leave and come back, and controls between plain steps: every step has the sums
/// of the tensors that it updates, as they are then.
#[gpu_test]
async fn sums_follow_what_happens_between_steps() {
    let config = AnyRule::from(LambConfig::timm(0.05).always_adapt(true).build().unwrap());
    let numels = [1001, 64, 5003];
    for bench in Bench::both().await {
        let grads = numels.map(|numel| values(3 + numel as u64, numel));
        let starts = numels.map(|numel| values(numel as u64, numel));
        let mut oracles = starts
            .each_ref()
            .map(|start| Oracle::new(start, Roundoff::WGSL));
        // Two places for each tensor.
        let grads_buffers = grads.each_ref().map(|grads| bench.buffer_of(grads));
        let places = [0, 1].map(|_| starts.each_ref().map(|start| bench.buffer_of(start)));
        let bindings = |place: usize, tensors: &[usize]| -> Vec<_> {
            let tensors = tensors.iter();
            let of = |tensor: &usize| {
                let name = ["a", "b", "c"][*tensor];
                whole(name, &places[place][*tensor], &grads_buffers[*tensor])
            };
            tensors.map(of).collect()
        };
        let all = bindings(0, &[0, 1, 2]);
        let mut optimizer = GpuOptimizer::new(&bench.kernels, config.clone(), &all).unwrap();
        let control = StepControl::builder().build().unwrap();
        let mut control = GpuControl::new(&bench.kernels, control).unwrap();
        let mut place = 0;
        for step in 0..8 {
            let present: &[usize] = if step == 4 { &[0, 2] } else { &[0, 1, 2] };
            let mut encoder = bench.encoder();
            if [2, 4, 5].contains(&step) {
                let to = 1 - place;
                for (from, to) in places[place].iter().zip(&places[to]) {
                    encoder.copy_buffer_to_buffer(from, 0, to, 0, from.size());
                }
                place = to;
                let bindings = bindings(place, present);
                optimizer.rebind(&mut encoder, &bindings).unwrap();
            }
            match step {
                3 | 6 => optimizer.step_with(&mut encoder, &mut control).unwrap(),
                _ => optimizer.step(&mut encoder).unwrap(),
            }
            if step == 1 {
                drop(encoder);
                continue;
            }
            bench.queue.submit([encoder.finish()]);
            // A plain step behind a controlled one needs its counts.
            bench.wait(optimizer.state()).await.unwrap();
            for tensor in present {
                oracles[*tensor].step(&config, &grads[*tensor]);
            }
            for (tensor, oracle) in oracles.iter().enumerate() {
                let params = bench.download(&places[place][tensor]).await;
                oracle
                    .check_params(&params)
                    .unwrap_or_else(|e| panic!("step {step}, tensor {tensor}: {e}"));
            }
        }
    }
}

/// A step whose chunks have not been sent is refused, not made without them.
#[gpu_test]
async fn a_step_into_a_pass_has_to_be_prepared() {
    let bench = Bench::best().await;
    let (params, grads) = (
        bench.buffer_of(&values(1, 9)),
        bench.buffer_of(&values(2, 9)),
    );
    let config = LambConfig::builder(0.05).build().unwrap();
    let mut optimizer = bench.optimizer(config, &params, &grads);
    let mut encoder = bench.encoder();
    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
    let refused = optimizer.record(&mut pass);
    assert!(
        matches!(refused, Err(StepError::NotPrepared)),
        "{refused:?}"
    );
    drop(pass);
    optimizer.prepare(&mut encoder).unwrap();
    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
    optimizer.record(&mut pass).unwrap();
    drop(pass);
    bench.queue.submit([encoder.finish()]);
    assert_ne!(bench.download(&params).await, values(1, 9));
    assert_eq!(optimizer.steps(), 1);
}

/// No browser binds so few buffers.
#[cfg(not(target_arch = "wasm32"))]
#[gpu_test]
async fn a_device_that_binds_too_few_buffers_is_refused() {
    let limits = wgpu::Limits {
        max_storage_buffers_per_shader_stage: 4,
        ..wgpu::Limits::default()
    };
    let bench = Bench::open(wgpu::Features::empty(), limits).await;
    let (params, grads) = (bench.buffer(9), bench.buffer(9));
    let tensors = [whole("theta", &params, &grads)];
    let rule = |name| AnyRule::preset(name, None, 0.05).unwrap();
    let refused = GpuOptimizer::new(&bench.kernels, rule("lamb"), &tensors).map(drop);
    let expected = BuildError::Kernel(KernelError::LimitTooLow {
        limit: "max_storage_buffers_per_shader_stage",
        required: 5,
        actual: 4,
    });
    assert_eq!(refused.unwrap_err().to_string(), expected.to_string());
    GpuOptimizer::new(&bench.kernels, rule("adam"), &tensors).unwrap();
}
