//! Trajectories of rules that take sums over tensors, each over several tensors of which one starts at zero and one has
//! gradients that vanish: as timm and optax printed them.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;
use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::{AnyRule, Rule as _};

use crate::golden_rules::rule_of;

/// One trajectory.
#[derive(Deserialize)]
pub struct Golden {
    pub name: String,
    source: String,
    rule: String,
    config: BTreeMap<String, Value>,
    pub lr: Vec<f64>,
    pub tensors: Vec<Tensor>,
}

/// One tensor of a trajectory; what comes step by step is in the order of the steps.
#[derive(Deserialize)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub theta0: Vec<f32>,
    pub grads: Vec<Vec<f32>>,
    pub theta_f64: Vec<Vec<f64>>,
    /// By slot.
    #[serde(default)]
    pub state_f64: Vec<BTreeMap<String, Vec<f64>>>,
}

impl Golden {
    /// This crate's words for the case.
    pub fn config(&self) -> AnyRule {
        let library = self.source.split(' ').next().unwrap();
        let mut config = self.config.clone();
        // The one is the learning rate of every step, the other what is done to gradients before.
        config.remove("learning_rate");
        config.remove("max_grad_norm");
        rule_of(library, &self.rule, &config, self.lr[0])
    }

    /// The norm at which the library clips all gradients of a step together, which is no part of the rule here.
    fn max_grad_norm(&self) -> Option<f64> {
        let default = (self.source.starts_with("timm") && self.rule == "lamb").then_some(1.0);
        match self.config.get("max_grad_norm") {
            Some(value) => value.as_f64(),
            None => default,
        }
    }

    /// The gradients of a step, by tensor, clipped and rounded.
    pub fn grads(&self, step: usize) -> Vec<Vec<f32>> {
        let grads = || self.tensors.iter().map(|tensor| &tensor.grads[step]);
        let squares = grads().flatten().map(|g| f64::from(*g).powi(2));
        let norm = squares.sum::<f64>().sqrt();
        let divisor = self
            .max_grad_norm()
            .map_or(1.0, |max| (norm / max).max(1.0));
        let clipped = |g: &f32| (f64::from(*g) / divisor) as f32;
        grads()
            .map(|grads| grads.iter().map(clipped).collect())
            .collect()
    }

    /// The exact trajectory of every tensor: its oracle after each step.
    pub fn oracles(&self, rounding: Roundoff) -> Vec<Vec<Oracle<AnyRule>>> {
        let config = self.config();
        let start = |tensor: &Tensor| Oracle::new(&tensor.theta0, rounding);
        let mut oracles: Vec<_> = self.tensors.iter().map(start).collect();
        let steps = self.lr.iter().enumerate();
        let after = steps.map(|(step, lr)| {
            let config = config.with_lr(*lr).unwrap();
            for (oracle, grads) in oracles.iter_mut().zip(self.grads(step)) {
                oracle.step(&config, &grads);
            }
            oracles.clone()
        });
        after.collect()
    }

    /// How far the library's `f64` trajectory may be from ours: gradients that it clips are rounded to `f32` here, by which
    /// updates move of the order of the learning rate, and averages of gradients, of the order of one.
    pub fn tolerance(&self) -> f64 {
        match self.max_grad_norm() {
            Some(_) => 8.0 * self.lr.len() as f64 * f64::from(f32::EPSILON / 2.0),
            None => 1e-12,
        }
    }
}

/// Every case.
pub fn all() -> Vec<Golden> {
    let files = [
        include_str!("../golden/tensors_timm.json"),
        include_str!("../golden/tensors_optax.json"),
    ];
    let cases = files.map(|file| serde_json::from_str::<Vec<Golden>>(file).unwrap());
    assert_eq!(cases.each_ref().map(Vec::len), [3, 2]);
    cases.into_iter().flatten().collect()
}
