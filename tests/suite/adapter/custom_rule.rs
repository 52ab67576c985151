//! Rules that are not the library's.

use wgpu_optim::rules::{Scalars, Slot, Slots, Start, Twin};
use wgpu_optim::wgsl::KernelError;
use wgpu_optim::{
    AnyRule, Arena, BuildError, ConfigError, CpuOptimizer, GpuControl, GpuOptimizer, Optimizer,
    ParamGroups, Rule, SgdConfig, StepControl, rule_enum,
};

use super::{Bench, Tensors, gpu_test, whole};
use crate::cases::values;

/// `theta - lr*g` with an accumulator that starts at a half and counts steps, and what goes wrong with it.
#[derive(Clone, Debug, PartialEq)]
struct Counting {
    lr: f64,
    wgsl: &'static str,
    names: &'static [&'static str],
}

const GOOD: &str = "
fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    (*state).count = (*state).count + 1.0;
    (*state).largest = max((*state).largest, abs(g));
    return theta - k.lr * g;
}";

impl Counting {
    fn good(lr: f64) -> Self {
        Self {
            lr,
            wgsl: GOOD,
            names: &["lr"],
        }
    }
}

impl Rule for Counting {
    fn stem(&self) -> &'static str {
        "counting"
    }

    fn slots(&self) -> Slots {
        let slot = |name, start, is_kept| Slot {
            name,
            start: Start::Value(start),
            is_kept,
        };
        [
            slot("not_kept", 3.0, false),
            slot("count", 0.5, true),
            slot("largest", 0.0, true),
        ]
        .into()
    }

    fn wgsl(&self) -> String {
        self.wgsl.into()
    }

    fn scalar_names(&self) -> &'static [&'static str] {
        self.names
    }

    fn phase(&self, _applied_steps: u64) -> u64 {
        0
    }

    fn scalars(&self, _phase: u64) -> Scalars {
        [self.lr as f32].into()
    }

    fn lr(&self) -> f64 {
        self.lr
    }

    fn with_lr(&self, lr: f64) -> Result<Self, ConfigError> {
        Ok(Self { lr, ..self.clone() })
    }
}

impl Twin for Counting {
    fn step(&self, scalars: &Scalars, params: &mut [f32], state: &mut [&mut [f32]], grads: &[f32]) {
        for (i, (theta, g)) in params.iter_mut().zip(grads).enumerate() {
            state[0][i] += 1.0;
            state[1][i] = state[1][i].max(g.abs());
            *theta -= scalars.as_slice()[0] * g;
        }
    }
}

rule_enum! {
    enum Mixed {
        Own(Counting),
        Known(AnyRule),
    }
}

/// An enum of rules steps each tensor as its rule alone does, on the GPU and on the CPU.
#[gpu_test]
async fn rules_of_ones_own_and_the_librarys_share_an_optimizer() {
    for bench in Bench::both().await {
        let (start, grads) = (values(1, 1001), values(2, 1001));
        let momentum = SgdConfig::builder(0.25).momentum(0.5).build().unwrap();
        let known = AnyRule::from(momentum);
        let groups = ParamGroups::<Mixed>::new(Counting::good(0.5).into())
            .with("known", known.clone(), |name| name == "b")
            .unwrap();
        let grads_buffer = bench.buffer_of(&grads);
        let buffers = [(); 4].map(|()| bench.buffer_of(&start));
        let [a, b, a_alone, b_alone] = &buffers;
        let tensors = [whole("a", a, &grads_buffer), whole("b", b, &grads_buffer)];
        let mut mixed = GpuOptimizer::with_groups(&bench.kernels, &groups, &tensors).unwrap();
        let alone = [whole("a", a_alone, &grads_buffer)];
        let mut own = GpuOptimizer::new(&bench.kernels, Counting::good(0.5), &alone).unwrap();
        let alone = [whole("b", b_alone, &grads_buffer)];
        let mut library = GpuOptimizer::new(&bench.kernels, known, &alone).unwrap();
        let names = [("a", [1001]), ("b", [1001])];
        let mut on_cpu = CpuOptimizer::with_groups(&groups, names).unwrap();
        let (mut cpu_a, mut cpu_b) = (start.clone(), start.clone());
        for lr in [0.5, 0.25, 0.125] {
            mixed.set_lr(lr).unwrap();
            own.set_lr(lr).unwrap();
            library.set_lr(0.5 * lr).unwrap();
            on_cpu.set_lr(lr).unwrap();
            bench.submit(|encoder| {
                mixed.step(encoder).unwrap();
                own.step(encoder).unwrap();
                library.step(encoder).unwrap();
            });
            on_cpu
                .step(&mut [&mut cpu_a, &mut cpu_b], &[&grads, &grads])
                .unwrap();
        }
        for (mixed, alone, cpu) in [(a, a_alone, &cpu_a), (b, b_alone, &cpu_b)] {
            let mixed = bench.download(mixed).await;
            assert_eq!(mixed, bench.download(alone).await);
            let close = |(x, y): (&f32, &f32)| (x - y).abs() <= 16.0 * f32::EPSILON * 8.0;
            assert!(mixed.iter().zip(cpu).all(close));
            assert_ne!(mixed, start);
        }
        let state = bench.wait(mixed.state()).await.unwrap();
        assert_eq!(state.tensors[0].slot("count").unwrap()[7], 3.5);
        assert!(state.tensors[1].slot("momentum_buffer").is_some());
        assert_eq!(Mixed::from(Counting::good(0.5)).momentum(), None);
    }
}

/// Slots that start at something else than zero, in an arena, alone at an odd size, in batches, and after a state
/// without slots.
#[gpu_test]
async fn slots_start_as_they_say_and_groups_have_rules_of_their_own() {
    for bench in Bench::both().await {
        let shapes = [("a", vec![7, 11]), ("b", vec![4]), ("c", vec![1001])];
        let tensors = Tensors::new(shapes);
        let arena = Arena::new(&bench.device, &bench.queue, tensors.shapes.clone()).unwrap();
        tensors.upload(&arena);
        let groups = ParamGroups::new(Counting::good(0.5))
            .with("b", Counting::good(0.25), |name| name == "b")
            .unwrap();
        let mut optimizer =
            GpuOptimizer::with_groups(&bench.kernels, &groups, &arena.bindings()).unwrap();
        for applied in 1..=3 {
            bench.step(&mut optimizer);
            let state = bench.wait(optimizer.state()).await.unwrap();
            let params = bench.wait(arena.download_all_params()).await.unwrap();
            for (tensor, state) in state.tensors.iter().enumerate() {
                let names: Vec<_> = state.slots.iter().map(|slot| slot.name.as_str()).collect();
                assert_eq!(names, ["count", "largest"]);
                let count = 0.5 + applied as f32;
                assert!(state.slot("count").unwrap().iter().all(|x| *x == count));
                let largest = state.slot("largest").unwrap();
                assert!(
                    largest
                        .iter()
                        .zip(&tensors.grads[tensor])
                        .all(|(x, g)| *x == g.abs())
                );
                let lr = if state.name == "b" { 0.25 } else { 0.5 };
                let mut expected = tensors.starts[tensor].clone();
                for _ in 0..applied {
                    expected
                        .iter_mut()
                        .zip(&tensors.grads[tensor])
                        .for_each(|(x, g)| *x -= lr * g);
                }
                let close = |(x, y): (&f32, &f32)| (x - y).abs() <= 4.0 * f32::EPSILON * 12.0;
                assert!(params[tensor].iter().zip(&expected).all(close));
            }
        }
        let mut fresh = bench.wait(optimizer.state()).await.unwrap();
        fresh.tensors[0].slots.clear();
        optimizer.load_state(&fresh).unwrap();
        bench.queue.submit([]);
        let state = bench.wait(optimizer.state()).await.unwrap();
        assert_eq!(state.tensors[0].applied_steps, 0);
        bench.step(&mut optimizer);
        let state = bench.wait(optimizer.state()).await.unwrap();
        for (tensor, count) in [(0, 1.5), (2, 4.5)] {
            let counts = state.tensors[tensor].slot("count").unwrap();
            assert!(counts.iter().all(|x| *x == count), "{tensor}");
        }
    }
}

/// A browser tells its console, later.
#[cfg(not(target_arch = "wasm32"))]
#[gpu_test]
async fn errors_in_its_wgsl_point_at_its_lines_and_the_next_rule_builds() {
    for bench in Bench::both().await {
        let values = values(1, 64);
        let (params, grads) = (bench.buffer_of(&values), bench.buffer_of(&values));
        let build = |rule: Counting| {
            let theta = whole("theta", &params, &grads);
            GpuOptimizer::new(&bench.kernels, rule, &[theta])
        };
        let refused = |wgsl: &'static str| {
            let rule = Counting {
                wgsl,
                ..Counting::good(0.1)
            };
            match build(rule).unwrap_err() {
                BuildError::Kernel(KernelError::Device { kernel, message }) => {
                    assert!(kernel.starts_with("wgpu_optim.counting"), "{kernel}");
                    message
                }
                other => panic!("{other}"),
            }
        };
        let unknown = "
fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    return theta - k.learning_rate * g;
}";
        let message = refused(unknown);
        assert!(
            message.contains(":3:") && message.contains("learning_rate"),
            "{message}"
        );
        let mistyped = "
fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let x = 1u;

    return theta - x * g;
}";
        let message = refused(mistyped);
        assert!(
            message.contains(":2:"),
            "where its function begins: {message}"
        );
        let nonsense = "nonsense
fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    return theta;
}";
        assert!(refused(nonsense).contains(":1:"));

        let miscounted = Counting {
            names: &["lr", "beta"],
            ..Counting::good(0.1)
        };
        assert!(matches!(
            build(miscounted),
            Err(BuildError::Kernel(KernelError::Scalars {
                rule: "counting",
                expected: 2,
                actual: 1
            }))
        ));
        let mut good = build(Counting::good(0.1)).unwrap();
        bench.step(&mut good);
        assert!(good.set_momentum(0.9).is_err());
    }
}

/// A rule whose scalars are called what a control's are, and which steps in phases of ten.
#[derive(Clone, Debug, PartialEq)]
struct InPhases;

impl InPhases {
    fn numbers(steps: u64) -> [f32; 8] {
        let phase = 1.0 + (steps / 10) as f32;
        [0.5 / phase, 3.0, 0.25, 2.0, 1.0, 0.0, 5.0, 7.0]
    }

    fn factor(steps: u64) -> f32 {
        let [lr, clip, unscale, clip_value, skip, fresh, key_x, key_y] = Self::numbers(steps);
        lr * clip * unscale * clip_value * (skip + fresh) * (key_y - key_x)
    }
}

impl Rule for InPhases {
    fn stem(&self) -> &'static str {
        "in_phases"
    }

    fn wgsl(&self) -> String {
        "fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
            let all = k.lr * k.clip * k.unscale * k.clip_value * (k.skip + k.fresh) * (k.key_y - k.key_x);
            return theta - mix(vec4(0.0), vec4(all), vec4(1.0)) * g;
        }"
        .into()
    }

    fn scalar_names(&self) -> &'static [&'static str] {
        &[
            "lr",
            "clip",
            "unscale",
            "clip_value",
            "skip",
            "fresh",
            "key_x",
            "key_y",
        ]
    }

    fn phase(&self, applied_steps: u64) -> u64 {
        applied_steps / 10 * 10
    }

    fn scalars(&self, phase: u64) -> Scalars {
        Self::numbers(phase).into()
    }

    fn lr(&self) -> f64 {
        0.5
    }

    fn with_lr(&self, _lr: f64) -> Result<Self, ConfigError> {
        Ok(Self)
    }
}

/// Tensors that are as far as others, and tensors that are not, go from phase to phase, with a control and without.
#[gpu_test]
async fn a_phase_that_lasts_moves_on_and_scalars_are_the_rules_own() {
    for bench in Bench::both().await {
        let numels = [12, 8, 5];
        let grads = numels.map(|numel| bench.buffer_of(&vec![1.0; numel]));
        let params = numels.map(|numel| bench.buffer_of(&vec![0.0; numel]));
        let names = ["a", "b", "c"];
        let tensors: Vec<_> = (0..3)
            .map(|i| whole(names[i], &params[i], &grads[i]))
            .collect();
        let mut optimizer = GpuOptimizer::new(&bench.kernels, InPhases, &tensors).unwrap();
        let control = StepControl::builder()
            .clip_value(0.5)
            .grad_scale(4.0)
            .build()
            .unwrap();
        let mut control = GpuControl::new(&bench.kernels, control).unwrap();
        let (mut applied, mut expected) = ([0; 3], [0.0; 3]);
        for step in 0..40 {
            // b is four steps behind a, and c seven.
            let takes_part = [true, step >= 4, step >= 7];
            for (name, takes_part) in names.iter().zip(takes_part) {
                optimizer.set_frozen(name, !takes_part).unwrap();
            }
            let is_controlled = step % 4 == 1;
            bench.submit(|encoder| match is_controlled {
                true => optimizer.step_with(encoder, &mut control).unwrap(),
                false => optimizer.step(encoder).unwrap(),
            });
            if is_controlled {
                bench.outcomes(&mut control).await;
            }
            for tensor in (0..3).filter(|tensor| takes_part[*tensor]) {
                // Unscaled by four it is less than what it is cut off at.
                let gradient = if is_controlled { 0.25 } else { 1.0 };
                expected[tensor] -= InPhases::factor(applied[tensor]) * gradient;
                applied[tensor] += 1;
            }
        }
        for tensor in 0..3 {
            assert_eq!(
                optimizer.applied_steps(names[tensor]),
                Some(applied[tensor])
            );
            let values = bench.download(&params[tensor]).await;
            // Forty sums of numbers that are below 64, each rounded once or twice.
            let bound = 80.0 * 64.0 * f32::EPSILON;
            let is_close = |value: &f32| (value - expected[tensor]).abs() <= bound;
            assert!(
                values.iter().all(is_close),
                "{}: {values:?}, {}",
                names[tensor],
                expected[tensor]
            );
        }
    }
}
