//! A wrapper around any rule, as a user writes one: cautious masking, which leaves an element alone where the step would go up
//! the gradient (Liang et al. 2024, without their scaling).

use wgpu_optim::rules::{Scalars, Slots, Twin};
use wgpu_optim::{AdamConfig, ConfigError, CpuOptimizer, LionConfig, Rule};

use super::{Bench, gpu_test};
use crate::cases::values;

#[derive(Clone, Debug, PartialEq)]
struct Cautious<R>(R);

const WGSL: &str = "
fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let next = inner(k, theta, g, state);
    return select(theta, next, (theta - next) * g > vec4(0.0));
}";

impl<R: Rule> Rule for Cautious<R> {
    fn stem(&self) -> &'static str {
        "cautious"
    }

    fn slots(&self) -> Slots {
        self.0.slots()
    }

    fn terms(&self) -> Vec<(&'static str, bool)> {
        self.0.terms()
    }

    /// The inner rule's function gives up its name to the wrapper's.
    fn wgsl(&self) -> String {
        self.0.wgsl().replace("fn update(", "fn inner(") + WGSL
    }

    fn scalar_names(&self) -> &'static [&'static str] {
        self.0.scalar_names()
    }

    fn phase(&self, applied_steps: u64) -> u64 {
        self.0.phase(applied_steps)
    }

    fn scalars(&self, phase: u64) -> Scalars {
        self.0.scalars(phase)
    }

    fn state_kind(&self) -> String {
        format!("cautious {}", self.0.state_kind())
    }

    fn lr(&self) -> f64 {
        self.0.lr()
    }

    fn with_lr(&self, lr: f64) -> Result<Self, ConfigError> {
        Ok(Self(self.0.with_lr(lr)?))
    }
}

impl<R: Twin> Twin for Cautious<R> {
    fn step(&self, scalars: &Scalars, params: &mut [f32], state: &mut [&mut [f32]], grads: &[f32]) {
        let before = params.to_vec();
        self.0.step(scalars, params, state, grads);
        for ((theta, before), g) in params.iter_mut().zip(before).zip(grads) {
            if (before - *theta) * g <= 0.0 {
                *theta = before;
            }
        }
    }
}

/// The state of the inner rule does not depend on the parameters, so that a cautious run makes those of the bare run's moves
/// that go down the gradient.
async fn check<R: Twin>(bench: &Bench, rule: R) {
    const STEPS: u32 = 6;
    let numel = 1003;
    let start = values(1, numel);
    let gradients: Vec<_> = (0..STEPS)
        .map(|step| values(u64::from(step) + 2, numel))
        .collect();
    let [bare_params, params, grads] = [(); 3].map(|()| bench.buffer_of(&start));
    let mut bare = bench.optimizer(rule.clone(), &bare_params, &grads);
    let mut cautious = bench.optimizer(Cautious(rule.clone()), &params, &grads);
    let mut twin = CpuOptimizer::new(Cautious(rule), [("theta", [numel])]).unwrap();
    let mut in_memory = start.clone();
    let (mut expected, mut before) = (start.clone(), start);
    let mut kept = 0;
    for gradient in &gradients {
        bench.upload(&grads, gradient);
        bench.submit(|encoder| bare.step(encoder).unwrap());
        bench.submit(|encoder| cautious.step(encoder).unwrap());
        twin.step(&mut [&mut in_memory], &[gradient]).unwrap();
        let after = bench.download(&bare_params).await;
        for (index, (before, after)) in before.iter().zip(&after).enumerate() {
            match (before - after) * gradient[index] > 0.0 {
                true => expected[index] += after - before,
                false => kept += 1,
            }
        }
        before = after;
    }
    // Many go the other way.
    assert!(kept > numel / 10, "{kept}");
    let params = bench.download(&params).await;
    for index in 0..numel {
        // Each step rounds a parameter once in each run and its move once; they stay within eight.
        let bound = 3.0 * STEPS as f32 * 8.0 * f32::EPSILON;
        for actual in [params[index], in_memory[index]] {
            let off = (actual - expected[index]).abs();
            assert!(
                off <= bound,
                "{index}: {actual}, expected {}",
                expected[index]
            );
        }
    }
}

#[gpu_test]
async fn a_wrapper_of_a_user_goes_around_any_rule() {
    let bench = Bench::best().await;
    check(bench, AdamConfig::builder(0.01).build().unwrap()).await;
    let lion = LionConfig::builder(0.01).weight_decay(0.0);
    check(bench, lion.build().unwrap()).await;
}
