//! Steps under a control on a real adapter: norms, what is skipped and what follows from it, against exact arithmetic.

use wgpu_optim::control::ControlState;
use wgpu_optim::oracle::{ControlOracle, Oracle, Rounding};
use wgpu_optim::{
    AdamConfig, AnyRule, Arena, ControlRecord, GpuControl, GpuOptimizer, LossScale, Masters,
    NonFinite, ParamGroups, Precision, Rule, SgdConfig, StepControl, StepError, StorageType,
    TensorBinding, wgpu,
};

use super::{Bench, gpu_test, whole};
use crate::cases::{LRS, sizes, values};

impl Bench {
    pub fn submit(&self, record: impl FnOnce(&mut wgpu::CommandEncoder)) {
        let mut encoder = self.encoder();
        record(&mut encoder);
        self.queue.submit([encoder.finish()]);
    }

    /// What has come of all that was submitted.
    pub async fn outcomes(&self, control: &mut GpuControl) -> Vec<ControlRecord> {
        // The device has had its turn when this is done, a browser too.
        self.wait(control.state()).await.unwrap();
        #[cfg(not(target_arch = "wasm32"))]
        self.device
            .poll(wgpu::PollType::wait_indefinitely())
            .unwrap();
        control.read()
    }
}

fn adamw() -> AnyRule {
    AdamConfig::adamw(0.05).build().unwrap().into()
}

/// Every rule's first preset.
fn rules() -> Vec<AnyRule> {
    let mut rules: Vec<AnyRule> = Vec::new();
    for preset in AnyRule::presets() {
        let rule = (preset.config)(0.05).unwrap();
        if rules.iter().all(|other| other.stem() != rule.stem()) {
            rules.push(rule);
        }
    }
    rules
}

#[gpu_test]
async fn a_skipped_step_writes_nothing_and_counts_nothing() {
    for bench in Bench::both().await {
        let (start, gradient) = (values(1, 1003), values(2, 1003));
        let params = bench.buffer_of(&start);
        let grads = bench.buffer_of(&gradient);
        let tensor = [whole("theta", &params, &grads)];
        let mut optimizer = GpuOptimizer::new(&bench.kernels, adamw(), &tensor).unwrap();
        let scale = LossScale {
            initial: 8.0,
            growth_interval: 2,
            ..LossScale::default()
        };
        let control = StepControl::builder().loss_scale(scale).build().unwrap();
        let mut control = GpuControl::new(&bench.kernels, control).unwrap();
        let mut oracle = Oracle::new(&start, Rounding::WGSL);
        let mut scale = 8.0;
        for (step, poison) in [false, true, false, false, true, false]
            .into_iter()
            .enumerate()
        {
            let mut scaled: Vec<_> = gradient.iter().map(|g| g * scale).collect();
            if poison {
                scaled[500] = f32::INFINITY;
            } else {
                oracle.step(&adamw(), &gradient);
            }
            bench.upload(&grads, &scaled);
            bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
            let records = bench.outcomes(&mut control).await;
            assert_eq!(records.len(), 1);
            assert_eq!(records[0].step, step as u64 + 1);
            assert_eq!((records[0].is_skipped, records[0].scale), (poison, scale));
            if poison {
                scale /= 2.0;
            } else if step == 3 {
                scale *= 2.0;
            }
            assert_eq!(bench.wait(control.state()).await.unwrap().scale, scale);
            oracle.check_params(&bench.download(&params).await).unwrap();
        }
        assert_eq!(optimizer.applied_steps("theta"), Some(4));
        assert_eq!(optimizer.steps(), 6);
        assert_eq!(optimizer.dispatches(), 4);
    }
}
