//! Hyper-parameters that cannot be used.

use super::sgd::MomentumForm;

/// A hyper-parameter that cannot be used, or fields that do not go together.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A value that is not finite or out of range.
    #[error("{field} = {value:?} is out of range: expected {expected}")]
    OutOfRange {
        /// The field.
        field: &'static str,
        /// What was given.
        value: f64,
        /// What would be accepted.
        expected: &'static str,
    },
    /// Fields that no library defines together.
    #[error("unsupported combination of {fields}: {why}")]
    Unsupported {
        /// The fields.
        fields: &'static str,
        /// The rule they break.
        why: &'static str,
    },
    /// `1 - lr*decoupled_weight_decay` would be negative.
    #[error(
        "lr = {lr:?} with decoupled_weight_decay = {decoupled_weight_decay:?} is out of range: \
         expected lr*decoupled_weight_decay <= 1"
    )]
    DecayTooLarge {
        /// The learning rate.
        lr: f64,
        /// The decay.
        decoupled_weight_decay: f64,
    },
    /// A form that does not exist.
    #[error("unknown form {name:?}: expected heavy-ball, ema, lr-inside or particle")]
    UnknownForm {
        /// What was given.
        name: String,
    },
    /// A preset that does not exist.
    #[error(
        "unknown preset {name:?}: expected pytorch, optax-sgd, optax-trace, optax-ema, keras, tensorflow-js or \
         sutskever-2013"
    )]
    UnknownPreset {
        /// What was given.
        name: String,
    },
}

/// No exact conversion between two forms.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("no exact conversion from the {from} form to the {to} form: {why}")]
pub struct ConversionError {
    /// The form of the configuration.
    pub from: MomentumForm,
    /// The form that was asked for.
    pub to: MomentumForm,
    /// What stands in the way.
    pub why: &'static str,
}

/// A parameter group that cannot be, or is not there.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GroupError {
    /// A group that does not go with the others.
    #[error("group {group:?}: {why}")]
    Incompatible {
        /// The group.
        group: String,
        /// Why.
        why: &'static str,
    },
    /// No group of this name.
    #[error("no group {group:?}")]
    Unknown {
        /// The name.
        group: String,
    },
    /// A hyper-parameter that cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// Accepts what lies between zero and `limit` and is not too large for `f32`. Which terms a kernel has depends on
/// what is zero here, and not on what is too small for `f32`: one that has become so is still there, times zero.
pub(super) fn check_range(field: &'static str, value: f64, limit: f64) -> Result<(), ConfigError> {
    if (value as f32).is_finite() && (0.0..=limit).contains(&value) {
        Ok(())
    } else {
        Err(ConfigError::OutOfRange {
            field,
            value,
            expected: match (limit.is_finite(), limit < 1.0) {
                (false, _) => "zero or a positive number that f32 can hold",
                (true, true) => "0 <= x < 1",
                (true, false) => "0 <= x <= 1",
            },
        })
    }
}
