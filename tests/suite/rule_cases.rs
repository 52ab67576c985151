//! Configurations of every rule: the presets, and what becomes of them field by field.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use wgpu_optim::AnyRule;

/// Other values of a field than the one it has.
fn others(name: &str, value: &Value) -> Vec<Value> {
    match (name, value) {
        ("rule" | "lr", _) => vec![],
        ("amsgrad", _) => vec![json!("of-average"), json!("of-corrected")],
        ("form", Value::String(form)) if form.ends_with("ed") || form.ends_with("hat") => {
            vec![json!("corrected"), json!("epsilon-hat")]
        }
        // The momentum family has a sweep of its own.
        ("form" | "time_step", _) => vec![],
        ("warmup_steps", _) => vec![json!(3)],
        (_, Value::Bool(flag)) => vec![json!(!flag)],
        ("eps" | "eps_root", _) => vec![json!(1e-3)],
        ("beta1" | "beta2" | "alpha" | "rho" | "momentum", _) => vec![json!(0.8)],
        (_, Value::Number(_)) => vec![json!(0.125)],
        (name, value) => panic!("what else could {name} be than {value}?"),
    }
}

/// The rule of these fields, if there is one.
pub fn built(fields: &Value) -> Option<AnyRule> {
    serde_json::from_value(fields.clone()).ok()
}

/// One configuration for each rule's first preset, and what becomes of it when a field changes, and when every pair does.
fn variations(depth: usize) -> Vec<AnyRule> {
    let mut seen = BTreeSet::new();
    let mut rules = Vec::new();
    let mut kinds = BTreeSet::new();
    for preset in AnyRule::presets() {
        let fields = serde_json::to_value(preset.config(0.05).unwrap()).unwrap();
        if !kinds.insert(fields["rule"].to_string()) {
            continue;
        }
        let mut level = vec![fields];
        for at in 0..=depth {
            let mut next = Vec::new();
            for fields in &level {
                // A combination that no library has may become one with the next change.
                if let Some(rule) = built(fields).filter(|_| seen.insert(fields.to_string())) {
                    rules.push(rule);
                }
                if at == depth {
                    continue;
                }
                for (name, value) in fields.as_object().unwrap() {
                    next.extend(others(name, value).into_iter().map(|other| {
                        let mut changed = fields.clone();
                        changed[name] = other;
                        changed
                    }));
                }
            }
            level = next;
        }
    }
    rules
}

/// Every rule with every change of one field.
pub fn rules() -> Vec<AnyRule> {
    variations(1)
}

/// Every rule with every change of two fields.
pub fn pairs() -> Vec<AnyRule> {
    variations(2)
}
