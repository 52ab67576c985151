//! Notes of the report, one line each, on what is allowed and may not be meant.

use anyhow::Result;
use serde_json::Value;
use wgpu_optim::AnyRule;
use wgpu_optim::storage::Rounding;

use super::inputs::{Inputs, Pairing, Updated};
use crate::groups::Groups;
use crate::rule;

/// The notes on a step, before it is made.
pub fn of_inputs(
    inputs: &Inputs,
    pairing: &Pairing,
    groups: &Groups,
    rounding: Rounding,
) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    if let Some(state) = &inputs.state {
        notes.extend(other_params(inputs)?);
        notes.extend(other_fields(&state.saved.record.config, groups.config())?);
        notes.extend(groups.notes(&state.saved.files)?);
    }
    let is_rounded = pairing.updated.values().any(Updated::is_rounded);
    if let (Rounding::Stochastic { seed }, None, true) = (rounding, &inputs.state, is_rounded) {
        notes.push(format!(
            "without --state every run is a first step, whose random bits of --seed {seed} are the same"
        ));
    }
    Ok(notes)
}

/// A state of another model or run.
fn other_params(inputs: &Inputs) -> Result<Option<String>> {
    let (others, known) = inputs.of_other_params()?;
    Ok(others.first().map(|first| {
        format!(
            "the state was written beside other parameters: {} of {known} tensors have been changed since, the first \
             of them {first:?}",
            others.len()
        )
    }))
}

/// Hyper-parameters that are not what the state was made with; a learning rate is expected to follow a schedule.
fn other_fields(before: &AnyRule, now: &AnyRule) -> Result<Vec<String>> {
    let (before, now) = (rule::fields_of(before)?, rule::fields_of(now)?);
    let differs = |(name, now): (&String, &Value)| {
        let before = before.get(name).unwrap_or(&Value::Null);
        (name != "lr" && before != now)
            .then(|| format!("{name} is {now}, and was {before} where the state was made"))
    };
    Ok(now.iter().filter_map(differs).collect())
}
