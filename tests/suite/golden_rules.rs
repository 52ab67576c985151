//! Trajectories of Adam that PyTorch, optax and Keras printed; `tests/golden/rules.py` says how.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;
use wgpu_optim::oracle::{Oracle, Rounding};
use wgpu_optim::{AdamConfig, AmsGrad};

/// One trajectory.
#[derive(Deserialize)]
pub struct Golden {
    pub name: String,
    source: String,
    rule: String,
    config: BTreeMap<String, Value>,
    pub lr: Vec<f64>,
    pub frozen_steps: Vec<usize>,
    pub theta0: Vec<f32>,
    pub grads: Vec<Vec<f32>>,
    pub theta_f64: Vec<Vec<f64>>,
    #[serde(default)]
    pub theta_f32: Vec<Vec<f32>>,
    /// By slot; empty before the first step that was not frozen.
    #[serde(default)]
    pub state_f32: Vec<BTreeMap<String, Value>>,
}

impl Golden {
    /// This crate's words for the case, with the library's own defaults where it says nothing; none where the rule is
    /// another.
    pub fn config(&self) -> Option<AdamConfig> {
        let lr = self.lr[0];
        let builder = match (self.source.split(' ').next()?, self.rule.as_str()) {
            ("torch", "adam") | ("optax", "adam" | "amsgrad") => AdamConfig::builder(lr),
            ("torch", "adamw") => AdamConfig::adamw(lr),
            ("optax", "adamw") => AdamConfig::builder(lr).decoupled_weight_decay(1e-4),
            ("keras", "adam") => AdamConfig::keras(lr),
            ("keras", "adamw") => AdamConfig::keras(lr).decoupled_weight_decay(0.004),
            _ => return None,
        };
        let mut builder = match (self.source.starts_with("optax"), self.rule.as_str()) {
            (true, "amsgrad") => builder.amsgrad(AmsGrad::OfCorrected),
            _ => builder,
        };
        for (name, value) in &self.config {
            let number = || value.as_f64().unwrap();
            builder = match name.as_str() {
                "betas" => builder.betas(value[0].as_f64().unwrap(), value[1].as_f64().unwrap()),
                "eps" => builder.eps(number()),
                "eps_root" => builder.eps_root(number()),
                "weight_decay" if self.rule == "adamw" => builder.decoupled_weight_decay(number()),
                "weight_decay" => builder.weight_decay(number()),
                "maximize" => builder.maximize(value.as_bool().unwrap()),
                "amsgrad" => builder.amsgrad(AmsGrad::OfAverage),
                // optax's NAdam.
                "nesterov" => return None,
                other => panic!("{}: {other}", self.name),
            };
        }
        Some(builder.build().unwrap())
    }

    /// The exact trajectory: the oracle after each step, frozen steps left out.
    pub fn oracles(&self, rounding: Rounding) -> Vec<Oracle<AdamConfig>> {
        let config = self.config().unwrap();
        let mut oracle = Oracle::new(&self.theta0, rounding);
        let steps = self.grads.iter().zip(&self.lr).enumerate();
        steps
            .map(|(step, (grads, lr))| {
                if !self.frozen_steps.contains(&step) {
                    oracle.step(&config.with_lr(*lr).unwrap(), grads);
                }
                oracle.clone()
            })
            .collect()
    }
}

/// Every case of Adam, AdamW and AMSGrad.
pub fn adam() -> Vec<Golden> {
    let files = [
        include_str!("../golden/rules_pytorch.json"),
        include_str!("../golden/rules_optax.json"),
        include_str!("../golden/rules_keras.json"),
    ];
    let cases = files.map(|file| serde_json::from_str::<Vec<Golden>>(file).unwrap());
    let adam: Vec<_> = cases
        .into_iter()
        .flatten()
        .filter(|case| case.config().is_some())
        .collect();
    assert_eq!(adam.len(), 18);
    adam
}
