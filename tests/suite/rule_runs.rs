//! Random runs of optimizers whose groups have rules of their own.

use std::ops::Range;

use proptest::prelude::*;
use serde_json::{Value, json};
use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::{AnyRule, CpuOptimizer, Optimizer, ParamGroups};

use crate::cases::values;
use crate::rule_cases::built;

/// What happens at one step.
#[derive(Clone, Debug)]
pub struct Planned {
    lr: f64,
    momentum: f64,
    /// By tensor.
    pub frozen: Vec<bool>,
}

/// A whole run.
#[derive(Clone, Debug)]
pub struct Run {
    /// One a group; the first is the default group's.
    rules: Vec<AnyRule>,
    /// Elements and group of each.
    pub tensors: Vec<(usize, usize)>,
    seed: u64,
    pub steps: Vec<Planned>,
}

impl Run {
    /// The group of a tensor.
    pub fn group(&self, tensor: usize) -> String {
        match self.tensors[tensor].1 {
            0 => "default".to_owned(),
            group => group.to_string(),
        }
    }

    /// The rule of a tensor as it was built.
    pub fn rule(&self, tensor: usize) -> &AnyRule {
        &self.rules[self.tensors[tensor].1]
    }

    /// Every tensor is named after its number and its group.
    pub fn names(&self) -> Vec<String> {
        let tensors = self.tensors.iter().enumerate();
        tensors
            .map(|(index, (_, group))| format!("{index}.{group}"))
            .collect()
    }

    pub fn named(&self) -> Vec<(String, [usize; 1])> {
        let numels = self.tensors.iter().map(|(numel, _)| [*numel]);
        self.names().into_iter().zip(numels).collect()
    }

    pub fn groups(&self) -> ParamGroups<AnyRule> {
        let mut groups = ParamGroups::new(self.rules[0].clone());
        for (group, rule) in self.rules.iter().enumerate().skip(1) {
            let ending = format!(".{group}");
            groups = groups
                .with(group.to_string(), rule.clone(), move |name| {
                    name.ends_with(&ending)
                })
                .unwrap();
        }
        groups
    }

    pub fn starts(&self) -> Vec<Vec<f32>> {
        let tensors = self.tensors.iter().enumerate();
        tensors
            .map(|(index, (numel, _))| values(self.seed.wrapping_add(index as u64), *numel))
            .collect()
    }

    pub fn grads(&self, step: usize) -> Vec<Vec<f32>> {
        let seed = self.seed.wrapping_add(1000 * (1 + step as u64));
        let tensors = self.tensors.iter().enumerate();
        tensors
            .map(|(index, (numel, _))| values(seed.wrapping_add(index as u64), *numel))
            .collect()
    }

    /// Sets what a step has of its own. Learning rates and momenta that one of the rules refuses change nothing.
    pub fn prepare(&self, step: usize, optimizer: &mut impl Optimizer) {
        let planned = &self.steps[step];
        // Refused as a whole or not at all, on every device alike.
        let _ = optimizer.set_lr(planned.lr);
        let _ = optimizer.set_momentum(planned.momentum);
        for (name, frozen) in self.names().iter().zip(&planned.frozen) {
            optimizer.set_frozen(name, *frozen).unwrap();
        }
    }

    /// The oracle of each tensor after the run.
    pub fn oracles(&self, rounding: Roundoff) -> Vec<Oracle<AnyRule>> {
        let starts = self.starts();
        let mut oracles: Vec<_> = starts.iter().map(|p| Oracle::new(p, rounding)).collect();
        // What each group's rule is at each step, an optimizer of no elements says.
        let named: Vec<_> = self.names().into_iter().map(|name| (name, [0])).collect();
        let mut empty = CpuOptimizer::with_groups(&self.groups(), named).unwrap();
        for (step, planned) in self.steps.iter().enumerate() {
            self.prepare(step, &mut empty);
            let grads = self.grads(step);
            for (tensor, oracle) in oracles.iter_mut().enumerate() {
                if !planned.frozen[tensor] {
                    let rule = empty.group_config(&self.group(tensor)).unwrap();
                    oracle.step(rule, &grads[tensor]);
                }
            }
        }
        oracles
    }
}

/// Any rule with any hyper-parameters.
fn any_rule() -> impl Strategy<Value = AnyRule> {
    let presets: Vec<_> = AnyRule::presets().collect();
    let drawn = (
        prop::sample::select(presets),
        prop::collection::vec(0.0..1.0f64, 20),
    );
    drawn.prop_filter_map("a combination that no library has", |(preset, drawn)| {
        let mut fields = serde_json::to_value(preset.config(0.5 * drawn[0]).unwrap()).ok()?;
        let object = fields.as_object_mut()?;
        for ((name, value), x) in object.iter_mut().zip(&drawn[1..]) {
            // Half of what may be absent is.
            let some = |most: f64| {
                if *x < 0.5 {
                    0.0
                } else {
                    most * (2.0 * x - 1.0)
                }
            };
            let one_of = |names: &[&str]| json!(names[(x * names.len() as f64) as usize]);
            *value = match (name.as_str(), &*value) {
                ("rule" | "lr" | "time_step", value) => value.clone(),
                ("amsgrad", _) => one_of(&["off", "of-average", "of-corrected"]),
                ("form", Value::String(form)) if form.ends_with("ed") || form.ends_with("hat") => {
                    one_of(&["corrected", "epsilon-hat"])
                }
                ("form", _) => one_of(&["heavy-ball", "ema", "lr-inside"]),
                ("warmup_steps", _) => json!((10.0 * some(1.0)) as u64),
                (_, Value::Bool(_)) => json!(*x < 0.5),
                ("eps", _) => json!(10_f64.powf(-8.0 + 5.0 * x)),
                ("eps_root", _) => json!(some(1e-3)),
                ("beta1" | "beta2" | "alpha" | "rho", _) => json!(0.01 + 0.98 * x),
                ("momentum", _) => json!(some(0.99)),
                (_, Value::Number(_)) if *x < 0.5 => value.clone(),
                (_, Value::Number(_)) => json!(some(0.5)),
                (name, value) => panic!("what else could {name} be than {value}?"),
            };
        }
        built(&fields)
    })
}

/// Runs of up to six steps over up to five tensors of up to `max_numel` elements, by up to three rules.
pub fn runs(max_numel: usize) -> impl Strategy<Value = Run> {
    const TENSORS: Range<usize> = 1..6;
    let step = (
        0.0..0.5f64,
        0.01..0.98f64,
        prop::collection::vec(prop::bool::weighted(0.2), TENSORS.end),
    )
        .prop_map(|(lr, momentum, frozen)| Planned {
            lr,
            momentum,
            frozen,
        });
    (
        prop::collection::vec(any_rule(), 1..4),
        prop::collection::vec((0..=max_numel, 0..3_usize), TENSORS),
        any::<u64>(),
        prop::collection::vec(step, 1..7),
    )
        .prop_map(|(rules, mut tensors, seed, steps)| {
            for (_, group) in &mut tensors {
                *group %= rules.len();
            }
            Run {
                rules,
                tensors,
                seed,
                steps,
            }
        })
}
