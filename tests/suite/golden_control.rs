//! Steps that PyTorch unscaled, clipped and skipped; `tests/golden/control.py` says how.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};
use serde_json::Value;
use wgpu_optim::control::{ControlRecord, ControlState, NonFinite};
use wgpu_optim::oracle::{ControlOracle, Decision, Oracle, Roundoff};
use wgpu_optim::{AnyRule, LossScale, OptimizerState, ParamGroups, Rule as _, StepControl};

use crate::golden_rules::rule_of;

/// One trajectory.
#[derive(Deserialize)]
pub struct Golden {
    pub name: String,
    rule: String,
    config: BTreeMap<String, Value>,
    scaler: Option<Scaler>,
    grad_scale: Option<f64>,
    max_norm: Option<f64>,
    clip_value: Option<f64>,
    groups: BTreeMap<String, Group>,
    start: BTreeMap<String, Vec<f32>>,
    pub steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Scaler {
    init_scale: f64,
    growth_factor: f64,
    backoff_factor: f64,
    growth_interval: u32,
}

#[derive(Deserialize)]
struct Group {
    tensors: Vec<String>,
    max_norm: Option<f64>,
    clip_value: Option<f64>,
}

/// What one step was given, and what it left.
#[derive(Deserialize)]
pub struct Step {
    pub lr: f64,
    grads: BTreeMap<String, Option<Numbers>>,
    /// Of the gradients that share one, and of each group that has its own.
    norms: Numbers,
    pub skipped: bool,
    params: BTreeMap<String, Numbers>,
    /// By slot; empty before the first step that was applied.
    state: BTreeMap<String, BTreeMap<String, Value>>,
    scale: f32,
    growth_tracker: u32,
}

/// Numbers, of which JSON has those that are not finite as strings.
struct Numbers(Vec<f64>);

impl<'de> Deserialize<'de> for Numbers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self::of(&Value::deserialize(deserializer)?))
    }
}

impl Numbers {
    fn of(values: &Value) -> Self {
        let number = |value: &Value| match value {
            Value::String(name) => name.parse().unwrap(),
            value => value.as_f64().unwrap(),
        };
        Self(values.as_array().unwrap().iter().map(number).collect())
    }
}

/// What is exact after a step, with the ranges of its `f32` twins.
pub struct Expected {
    decision: Decision,
    /// One a tensor.
    oracles: Vec<Oracle<AnyRule>>,
}

impl Golden {
    pub fn config(&self) -> AnyRule {
        rule_of("pytorch", &self.rule, &self.config, self.steps[0].lr)
    }

    pub fn groups(&self) -> ParamGroups<AnyRule> {
        let mut groups = ParamGroups::new(self.config());
        for (name, group) in &self.groups {
            let tensors = group.tensors.clone();
            let is_in = move |tensor: &str| tensors.iter().any(|name| name == tensor);
            groups = groups.with(name.clone(), self.config(), is_in).unwrap();
        }
        groups
    }

    fn group_of(&self, tensor: &str) -> &str {
        let is_in = |(_, group): &(&String, &Group)| group.tensors.iter().any(|t| t == tensor);
        let found = self.groups.iter().find(is_in);
        found.map_or("default", |(name, _)| name)
    }

    pub fn control(&self) -> StepControl {
        let mut control = StepControl::builder();
        if let Some(max_norm) = self.max_norm {
            control = control.max_norm(max_norm);
        }
        if let Some(clip_value) = self.clip_value {
            control = control.clip_value(clip_value);
        }
        for (name, group) in &self.groups {
            if let Some(max_norm) = group.max_norm {
                control = control.group_max_norm(name, max_norm);
            }
            if let Some(clip_value) = group.clip_value {
                control = control.group_clip_value(name, clip_value);
            }
        }
        if let Some(scale) = self.grad_scale {
            control = control.grad_scale(scale);
        }
        match &self.scaler {
            Some(scaler) => control.loss_scale(LossScale {
                initial: scaler.init_scale,
                growth_factor: scaler.growth_factor,
                backoff_factor: scaler.backoff_factor,
                growth_interval: scaler.growth_interval,
            }),
            // Only GradScaler skips.
            None => control.nonfinite(NonFinite::Apply),
        }
        .build()
        .unwrap()
    }

    /// Names and parameters, in one order.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[f32])> {
        let tensors = self.start.iter();
        tensors.map(|(name, values)| (name.as_str(), values.as_slice()))
    }

    /// The gradients of a step. Nobody looks at those of a frozen tensor: they are NaN.
    pub fn grads(&self, step: usize) -> Vec<Vec<f32>> {
        let grads_of = |(name, start): (&str, &[f32])| match &self.steps[step].grads[name] {
            Some(grads) => grads.0.iter().map(|grad| *grad as f32).collect(),
            None => vec![f32::NAN; start.len()],
        };
        self.tensors().map(grads_of).collect()
    }

    pub fn is_frozen(&self, step: usize, tensor: &str) -> bool {
        self.steps[step].grads[tensor].is_none()
    }

    /// What is exact after each step.
    pub fn expected(&self, rounding: Roundoff) -> Vec<Expected> {
        let mut control = ControlOracle::new(&self.control(), rounding);
        let start = |(_, start)| Oracle::new(start, rounding);
        let mut oracles: Vec<_> = self.tensors().map(start).collect();
        let mut expected = Vec::new();
        for (step, Step { lr, .. }) in self.steps.iter().enumerate() {
            let config = self.config().with_lr(*lr).unwrap();
            let grads = self.grads(step);
            let names = self.tensors().map(|(name, _)| name).enumerate();
            let live: Vec<_> = names
                .filter(|(_, name)| !self.is_frozen(step, name))
                .map(|(tensor, name)| (tensor, self.group_of(name)))
                .collect();
            let seen: Vec<_> = live
                .iter()
                .map(|(tensor, group)| (*group, grads[*tensor].as_slice()))
                .collect();
            let decision = control.decide(&seen);
            for (tensor, group) in live.iter().filter(|_| !decision.is_skipped) {
                oracles[*tensor].step_by(&config, &grads[*tensor], &decision.of_group(group));
            }
            expected.push(Expected {
                decision,
                oracles: oracles.clone(),
            });
        }
        expected
    }

    /// Makes sure that a step's exact values are those that PyTorch printed.
    pub fn check_expected(&self, step: usize, expected: &Expected) {
        let golden = &self.steps[step];
        let here = format!("{}, step {step}", self.name);
        assert_eq!(expected.decision.is_skipped, golden.skipped, "{here}");
        let check = |what: &str, ours: f64, theirs: f64| {
            let is_same = ours == theirs || (ours.is_nan() && theirs.is_nan());
            let is_close = (ours - theirs).abs() <= 1e-9 * theirs.abs();
            assert!(is_same || is_close, "{here}, {what}: {ours} and {theirs}");
        };
        // NaN if one is.
        let norm = golden.norms.0.iter().copied().reduce(f64::hypot).unwrap();
        let has_nan = golden.norms.0.iter().any(|norm| norm.is_nan());
        let norm = if has_nan { f64::NAN } else { norm };
        check("norm", expected.decision.norm.exact, norm);
        for ((name, _), oracle) in self.tensors().zip(&expected.oracles) {
            for (ours, theirs) in oracle.params().zip(&golden.params[name].0) {
                check(name, ours, *theirs);
            }
            let slots = self.config().slots();
            for slot in slots.kept() {
                let Some(theirs) = golden.state[name].get(slot.name) else {
                    assert_eq!(self.applied(step, name), 0, "{here}: {name} has no state");
                    continue;
                };
                for (ours, theirs) in oracle.slot(slot.name).zip(Numbers::of(theirs).0) {
                    check(slot.name, ours, theirs);
                }
            }
        }
    }

    /// How many steps a tensor has been applied after this one.
    fn applied(&self, step: usize, tensor: &str) -> u64 {
        let is_applied =
            |step: &usize| !self.steps[*step].skipped && !self.is_frozen(*step, tensor);
        (0..=step).filter(is_applied).count() as u64
    }

    /// Makes sure that what an optimizer and its control came to lies within the bounds, and that the rest is as PyTorch
    /// has it.
    pub fn check(
        &self,
        step: usize,
        expected: &Expected,
        params: &[Vec<f32>],
        state: &OptimizerState<AnyRule>,
        record: &ControlRecord,
        after: ControlState,
    ) {
        let golden = &self.steps[step];
        let here = format!("{}, step {step}", self.name);
        let tensors = self.tensors().zip(&expected.oracles).zip(params);
        for ((((name, _), oracle), params), state) in tensors.zip(&state.tensors) {
            let fail = |e| panic!("{here}, {name}: {e}");
            oracle.check_params(params).unwrap_or_else(fail);
            assert_eq!(state.name, name);
            assert_eq!(
                state.applied_steps,
                self.applied(step, name),
                "{here}: {name}"
            );
            if state.applied_steps > 0 {
                for slot in &state.slots {
                    oracle
                        .check_slot(&slot.name, &slot.values.to_f32())
                        .unwrap_or_else(fail);
                }
            }
        }
        let steps = &self.steps[..=step];
        let before = step.checked_sub(1).map(|before| self.steps[before].scale);
        let found_nonfinite = golden.norms.0.iter().any(|norm| !norm.is_finite());
        let rest = ControlRecord {
            step: step as u64 + 1,
            norm: record.norm,
            clip_factor: record.clip_factor,
            found_nonfinite,
            is_skipped: golden.skipped,
            scale: before.unwrap_or(self.control().initial_state().scale),
            skipped: steps.iter().filter(|step| step.skipped).count() as u64,
        };
        // Both of the others may be NaN.
        assert_eq!(format!("{record:?}"), format!("{rest:?}"), "{here}");
        let norm = expected.decision.norm;
        let (actual, is_nan) = (f64::from(record.norm), norm.exact.is_nan());
        assert!(
            (is_nan && actual.is_nan()) || (norm.low <= actual && actual <= norm.high),
            "{here}: {actual} is not within {norm:?}"
        );
        let scale = ControlState {
            scale: golden.scale,
            growth_tracker: golden.growth_tracker,
            is_dynamic: self.control().loss_scale().is_some(),
            steps: rest.step,
            skipped: rest.skipped,
        };
        assert_eq!(after, scale, "{here}");
    }
}

/// Every case.
pub fn all() -> Vec<Golden> {
    let file = include_str!("../golden/control_pytorch.json");
    let cases: Vec<Golden> = serde_json::from_str(file).unwrap();
    assert_eq!(cases.len(), 14);
    cases
}
