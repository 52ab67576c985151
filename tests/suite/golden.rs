//! Trajectories printed by PyTorch, optax and Keras; `tests/golden/` says how.

use serde::Deserialize;
use wgpu_optim::SgdConfig;
use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::rules::sgd::MomentumForm;

/// One trajectory, in this crate's words.
pub struct Golden {
    pub name: String,
    pub config: SgdConfig,
    /// Learning rate of each step.
    pub lrs: Vec<f64>,
    /// Steps at which the tensor had no gradient.
    pub frozen_steps: Vec<usize>,
    pub start: Vec<f32>,
    pub grads: Vec<Vec<f32>>,
    /// Parameters and velocity after each step, as the library computed them.
    pub after: Vec<After>,
}

pub struct After {
    pub params_f32: Vec<f32>,
    pub velocity_f32: Option<Vec<f32>>,
    /// In double precision, where the library was asked for it.
    pub f64: Option<(Vec<f64>, Option<Vec<f64>>)>,
}

impl Golden {
    /// The exact trajectory: the oracle after each step, frozen steps left out.
    pub fn oracles(&self, rounding: Roundoff) -> Vec<Oracle> {
        let mut oracle = Oracle::new(&self.start, rounding);
        (0..self.grads.len())
            .map(|step| {
                if !self.frozen_steps.contains(&step) {
                    oracle.step(
                        &self.config.with_lr(self.lrs[step]).unwrap(),
                        &self.grads[step],
                    );
                }
                oracle.clone()
            })
            .collect()
    }
}

#[derive(Deserialize)]
struct PyTorchCase {
    name: String,
    config: PyTorchConfig,
    lr: Vec<f64>,
    frozen_steps: Vec<usize>,
    theta0: Vec<f32>,
    grads: Vec<Vec<f32>>,
    theta_f32: Vec<Vec<f32>>,
    momentum_buffer_f32: Vec<Option<Vec<f32>>>,
    theta_f64: Vec<Vec<f64>>,
    momentum_buffer_f64: Vec<Option<Vec<f64>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
struct PyTorchConfig {
    momentum: f64,
    dampening: f64,
    weight_decay: f64,
    nesterov: bool,
    maximize: bool,
}

pub fn pytorch() -> Vec<Golden> {
    let cases: Vec<PyTorchCase> =
        serde_json::from_str(include_str!("../golden/pytorch_sgd.json")).unwrap();
    let golden = |case: PyTorchCase| {
        let exact = case.theta_f64.into_iter().zip(case.momentum_buffer_f64);
        let single = case.theta_f32.into_iter().zip(case.momentum_buffer_f32);
        Golden {
            name: case.name,
            config: SgdConfig::builder(case.lr[0])
                .momentum(case.config.momentum)
                .dampening(case.config.dampening)
                .weight_decay(case.config.weight_decay)
                .nesterov(case.config.nesterov)
                .maximize(case.config.maximize)
                .build()
                .unwrap(),
            lrs: case.lr,
            frozen_steps: case.frozen_steps,
            start: case.theta0,
            grads: case.grads,
            after: single
                .zip(exact)
                .map(|((params_f32, velocity_f32), exact)| After {
                    params_f32,
                    velocity_f32,
                    f64: Some(exact),
                })
                .collect(),
        }
    };
    cases.into_iter().map(golden).collect()
}

#[derive(Deserialize)]
struct OptaxKerasCase {
    name: String,
    config: OptaxKerasConfig,
    theta0: Vec<f32>,
    grads: Vec<Vec<f32>>,
    theta_f32: Vec<Vec<f32>>,
    state_f32: Vec<Option<Vec<f32>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OptaxKerasConfig {
    form: Option<String>,
    lr: Option<f64>,
    momentum: Option<f64>,
    nesterov: Option<bool>,
    alpha: Option<f64>,
    beta: Option<f64>,
    weight_decay: Option<f64>,
}

pub fn optax_and_keras() -> Vec<Golden> {
    let cases: Vec<OptaxKerasCase> =
        serde_json::from_str(include_str!("../golden/optax_keras_sgd.json")).unwrap();
    let golden = |case: OptaxKerasCase| {
        let c = &case.config;
        let form = match c.form.as_deref() {
            None => MomentumForm::HeavyBall,
            Some(form) if form.starts_with("v=a*v") => MomentumForm::Ema,
            Some(form) if form.starts_with("m=mu*m-lr*g") => MomentumForm::LrInside,
            Some(form) => panic!("{}: unknown form {form}", case.name),
        };
        let lr = c.lr.or(c.beta).unwrap();
        let config = SgdConfig::builder(lr)
            .form(form)
            .momentum(c.momentum.or(c.alpha).unwrap())
            .nesterov(c.nesterov.unwrap_or(false))
            .decoupled_weight_decay(c.weight_decay.unwrap_or(0.0))
            .build()
            .unwrap();
        Golden {
            name: case.name,
            config,
            lrs: vec![lr; case.grads.len()],
            frozen_steps: Vec::new(),
            start: case.theta0,
            grads: case.grads,
            after: case
                .theta_f32
                .into_iter()
                .zip(case.state_f32)
                .map(|(params_f32, velocity)| After {
                    params_f32,
                    velocity_f32: velocity.filter(|_| config.has_velocity()),
                    f64: None,
                })
                .collect(),
        }
    };
    cases.into_iter().map(golden).collect()
}

pub fn all() -> Vec<Golden> {
    pytorch().into_iter().chain(optax_and_keras()).collect()
}
