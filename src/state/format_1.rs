//! The rule in files of format 1: they held the momentum family alone, each velocity under its tensor's own
//! name (feature `safetensors`).

use serde::Deserialize;

use super::StateFileError;
use crate::rules::sgd::SgdConfig;

/// The slot that they hold.
pub(super) const SLOT: &str = "momentum_buffer";

/// The configuration as it stands in a file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigRecord {
    lr: f64,
    momentum: f64,
    dampening: f64,
    nesterov: bool,
    weight_decay: f64,
    decoupled_weight_decay: f64,
    maximize: bool,
    time_step: f64,
}

/// The configuration by the metadata `form` and `config`.
pub(super) fn config(form: &str, config: &str) -> Result<SgdConfig, StateFileError> {
    let record: ConfigRecord =
        serde_json::from_str(config).map_err(|error| StateFileError::MalformedMetadata {
            key: "config",
            message: error.to_string(),
        })?;
    Ok(SgdConfig::builder(record.lr)
        .momentum(record.momentum)
        .dampening(record.dampening)
        .nesterov(record.nesterov)
        .coupled_weight_decay(record.weight_decay)
        .decoupled_weight_decay(record.decoupled_weight_decay)
        .maximize(record.maximize)
        .time_step(record.time_step)
        .form(form.parse()?)
        .build()?)
}
