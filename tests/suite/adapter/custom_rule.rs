//! Rules that are not the library's.

use std::borrow::Cow;

use wgpu_optim::{
    Arena, BuildError, ConfigError, GpuOptimizer, KernelError, ParamGroups, Rule, Scalars, Slot,
    Slots, Start,
};

use super::{Bench, gpu_test, whole};
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

    fn terms(&self) -> Cow<'static, [(&'static str, bool)]> {
        Cow::Borrowed(&[])
    }

    fn wgsl(&self) -> Cow<'static, str> {
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

    fn meaning(&self) -> String {
        "counting".to_owned()
    }

    fn lr(&self) -> f64 {
        self.lr
    }

    fn with_lr(&self, lr: f64) -> Result<Self, ConfigError> {
        Ok(Self { lr, ..self.clone() })
    }

    fn momentum(&self) -> Option<f64> {
        None
    }

    fn with_momentum(&self, _momentum: f64) -> Result<Self, ConfigError> {
        Err(ConfigError::Unsupported {
            fields: "momentum",
            why: "there is none",
        })
    }
}

/// Slots that start at something else than zero, in an arena, alone at an odd size, in batches, and after a state
/// without slots.
#[gpu_test]
async fn slots_start_as_they_say_and_groups_have_rules_of_their_own() {
    for bench in Bench::both().await {
        let tensors = [("a", vec![7, 11]), ("b", vec![4]), ("c", vec![1001])];
        let numels = tensors
            .clone()
            .map(|(_, shape)| shape.iter().product::<usize>());
        let starts = numels.map(|numel| values(numel as u64, numel));
        let grads = numels.map(|numel| values(1 + numel as u64, numel));
        let arena = Arena::new(&bench.device, &bench.queue, tensors).unwrap();
        arena.upload_all_params(&starts).unwrap();
        arena.upload_all_grads(&grads).unwrap();
        let groups = ParamGroups::new(Counting::good(0.5))
            .with("b", Counting::good(0.25), |name| name == "b")
            .unwrap();
        let mut optimizer =
            GpuOptimizer::with_groups(&bench.kernels, &groups, &arena.bindings()).unwrap();
        for applied in 1..=3 {
            let mut encoder = bench.encoder();
            optimizer.step(&mut encoder).unwrap();
            bench.queue.submit([encoder.finish()]);
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
                        .zip(&grads[tensor])
                        .all(|(x, g)| *x == g.abs())
                );
                let lr = if state.name == "b" { 0.25 } else { 0.5 };
                let mut expected = starts[tensor].clone();
                for _ in 0..applied {
                    expected
                        .iter_mut()
                        .zip(&grads[tensor])
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
        let mut encoder = bench.encoder();
        optimizer.step(&mut encoder).unwrap();
        bench.queue.submit([encoder.finish()]);
        let state = bench.wait(optimizer.state()).await.unwrap();
        assert!(
            state.tensors[0]
                .slot("count")
                .unwrap()
                .iter()
                .all(|x| *x == 1.5)
        );
        assert!(
            state.tensors[2]
                .slot("count")
                .unwrap()
                .iter()
                .all(|x| *x == 4.5)
        );
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
        let mut encoder = bench.encoder();
        good.step(&mut encoder).unwrap();
        bench.queue.submit([encoder.finish()]);
        assert!(good.set_momentum(0.9).is_err());
    }
}
