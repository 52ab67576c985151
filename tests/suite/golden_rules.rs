//! Trajectories of Adam and its relatives that PyTorch, schedulefree, optax and Keras printed; `tests/golden/rules.py` says how.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};
use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::rules::{RulePreset, Start};
use wgpu_optim::{AnyRule, Rule as _};

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
    /// What a schedule-free rule evaluates with.
    #[serde(default)]
    pub eval_f64: Vec<Vec<f64>>,
}

impl Golden {
    /// This crate's words for the case.
    pub fn config(&self) -> AnyRule {
        let library = match self.source.split(' ').next().unwrap() {
            "torch" => "pytorch",
            "schedulefree" if self.source.ends_with("Paper") => "schedulefree-paper",
            library => library,
        };
        rule_of(library, &self.rule, &self.config, self.lr[0])
    }

    /// The exact trajectory: the oracle after each step, frozen steps left out.
    pub fn oracles(&self, rounding: Roundoff) -> Vec<Oracle<AnyRule>> {
        let config = self.config();
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

    /// How far the library's `f64` trajectory may be from ours. PyTorch keeps the product of NAdam's momenta in `f32`, one
    /// rounding a step; optax computes a warm-up in `f32`; what a slot starts as is rounded to `f32` here. Each update, of the
    /// order of the learning rate, or of that times the gradient, has its share of these.
    pub fn tolerance(&self) -> f64 {
        let starts = self
            .config()
            .slots()
            .iter()
            .any(|slot| ![Start::Value(0.0), Start::Params].contains(&slot.start));
        let warms_up = self.config.contains_key("warmup_steps");
        let roundings = match (self.source.split(' ').next(), self.rule.as_str()) {
            (Some("torch"), "nadam") => self.lr.len(),
            (Some("optax"), _) if warms_up => 1,
            _ if starts => 1,
            _ => return 1e-12,
        };
        let update = match self.rule.as_str() {
            "schedule_free_sgd" => self
                .grads
                .iter()
                .flatten()
                .fold(0.0, |x: f32, g| x.max(g.abs())),
            _ => 1.0,
        };
        let updates = f64::from(update) * self.lr.iter().sum::<f64>();
        8.0 * updates * roundings as f64 * f64::from(f32::EPSILON / 2.0)
    }

    /// Compares what a schedule-free rule evaluates with after a step, in other words `averaged_params`, with what the library
    /// says: it is as far off as the parameters and `z` are, and rounded once. Returns how many elements were compared.
    pub fn check_averaged(
        &self,
        step: usize,
        oracle: &Oracle<AnyRule>,
        params: &[f32],
        z: &[f32],
    ) -> usize {
        let Some(expected) = self.eval_f64.get(step) else {
            return 0;
        };
        let (averaged, beta1) = match &self.config() {
            AnyRule::ScheduleFreeSgd(rule) => (rule.averaged_params(params, z), rule.beta1()),
            AnyRule::ScheduleFreeAdamw(rule) => (rule.averaged_params(params, z), rule.beta1()),
            other => panic!("{other:?}"),
        };
        let off = |(exact, actual): (f64, &f32)| (exact - f64::from(*actual)).abs();
        let params_off = oracle.params().zip(params).map(off);
        let z_off = oracle.slot("z").zip(z).map(off);
        let off = params_off
            .zip(z_off)
            .map(|(y, z)| (y + (1.0 - beta1) * z) / beta1);
        for ((ours, theirs), off) in averaged.iter().zip(expected).zip(off) {
            let rounded = theirs.abs().max(f64::from(f32::MIN_POSITIVE)) * f64::from(f32::EPSILON);
            let bound = 1.001 * off + rounded + self.tolerance() * theirs.abs().max(1.0);
            let close = (f64::from(*ours) - theirs).abs() <= bound;
            assert!(close, "{}, step {step}: {ours} and {theirs}", self.name);
        }
        averaged.len()
    }
}

/// This crate's words for a library's rule: its preset, and what the configuration says beside it.
pub fn rule_of(library: &str, rule: &str, config: &BTreeMap<String, Value>, lr: f64) -> AnyRule {
    let rule = match (library, rule) {
        // optax has NAdam as an Adam that looks ahead.
        ("optax", "adam") if config.contains_key("nesterov") => "nadam".to_owned(),
        (_, rule) => rule.replace('_', "-"),
    };
    let preset = RulePreset::find(&rule, Some(library)).unwrap();
    let mut fields = serde_json::to_value(preset.config(lr).unwrap()).unwrap();
    let decouples = preset.decouples_weight_decay()
        || config.get("decoupled_weight_decay") == Some(&json!(true));
    for (name, value) in config {
        match name.as_str() {
            "betas" => {
                fields["beta1"] = value[0].clone();
                fields["beta2"] = value[1].clone();
            }
            "etas" => {
                fields["eta_minus"] = value[0].clone();
                fields["eta_plus"] = value[1].clone();
            }
            "step_sizes" => {
                fields["step_size_min"] = value[0].clone();
                fields["step_size_max"] = value[1].clone();
            }
            "b1" => fields["beta1"] = value.clone(),
            "b2" => fields["beta2"] = value.clone(),
            "amsgrad" => fields["amsgrad"] = json!("of-average"),
            "decay" => fields["alpha"] = value.clone(),
            "initial_scale" => fields["initial_square_avg"] = value.clone(),
            "weight_decay" if decouples => fields["decoupled_weight_decay"] = value.clone(),
            "decoupled_weight_decay" => {}
            "nesterov" if rule == "nadam" => {}
            name => {
                assert!(fields.get(name).is_some(), "{rule}: {name}");
                fields[name] = value.clone();
            }
        }
    }
    serde_json::from_value(fields).unwrap_or_else(|e| panic!("{rule}: {e}"))
}

/// Every case.
pub fn all() -> Vec<Golden> {
    let files = [
        include_str!("../golden/rules_pytorch.json"),
        include_str!("../golden/rules_schedulefree.json"),
        include_str!("../golden/rules_optax.json"),
        include_str!("../golden/rules_keras.json"),
    ];
    let cases = files.map(|file| serde_json::from_str::<Vec<Golden>>(file).unwrap());
    assert_eq!(cases.each_ref().map(Vec::len), [33, 5, 23, 10]);
    cases.into_iter().flatten().collect()
}
