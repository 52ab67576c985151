//! Hyper-parameters that cannot be used.

use super::Real;

/// A hyper-parameter that cannot be used, or fields that do not go together.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A value that is not finite or out of range.
    #[error("{field} = {value:?} is out of range: expected {expected}")]
    OutOfRange {
        /// The field.
        field: &'static str,
        /// The value that was given.
        value: f64,
        /// The values that would be accepted.
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
    /// A coupled and a decoupled weight decay at once, of which one was not set by its name: it is a default, or
    /// `weight_decay`.
    #[error(
        "coupled_weight_decay = {coupled_weight_decay:?} and decoupled_weight_decay = {decoupled_weight_decay:?} at once: \
         expected one of them alone, or both set by these names; weight_decay is {own} here"
    )]
    BothDecays {
        /// The coupled one.
        coupled_weight_decay: f64,
        /// The decoupled one.
        decoupled_weight_decay: f64,
        /// The one of them that the builder's `weight_decay` sets.
        own: &'static str,
    },
    /// A value that `f32` does not hold, and that must not be zero: what keeps a divisor from zero, say.
    #[error("{field} = {value:?} is zero in f32: expected at least {least:?}")]
    Vanishes {
        /// The field.
        field: &'static str,
        /// The value that was given.
        value: f64,
        /// The smallest value that is held.
        least: f64,
    },
    /// A form that does not exist.
    #[error("unknown form {name:?}: expected heavy-ball, ema, lr-inside or particle")]
    UnknownForm {
        /// The value that was given.
        name: String,
    },
    /// A rule that does not exist.
    #[error("unknown rule {name:?}: expected one of {expected}")]
    UnknownRule {
        /// The value that was given.
        name: String,
        /// The names that there are.
        expected: String,
    },
    /// A preset that does not exist, or not of this rule.
    #[error("unknown preset {name:?}: expected one of {expected}")]
    UnknownPreset {
        /// The value that was given.
        name: String,
        /// The names that there are.
        expected: String,
    },
}

/// A parameter group that cannot be, or is not there.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GroupError {
    /// Two groups of one name.
    #[error("there is a group {group:?} already")]
    NameTaken {
        /// The name.
        group: String,
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
            expected: match limit.is_finite() {
                false => "zero or a positive number that f32 can hold",
                true => "0 <= x <= 1",
            },
        })
    }
}

/// Accepts the decay of an average: below one, and not one in `f32` either, where the average would never forget.
pub(super) fn check_below_one(field: &'static str, value: f64) -> Result<(), ConfigError> {
    if value >= 0.0 && (value as f32) < 1.0 {
        return Ok(());
    }
    Err(ConfigError::OutOfRange {
        field,
        value,
        expected: "0 <= x < 1, in f32, too",
    })
}

/// Accepts the decays of two averages.
pub(super) fn check_betas(beta1: f64, beta2: f64) -> Result<(), ConfigError> {
    check_below_one("beta1", beta1)?;
    check_below_one("beta2", beta2)
}

/// Accepts zero, or what `f32` holds: for what keeps a divisor from zero, or what something starts as. A kernel gets it
/// times `factor`, at the least.
pub(super) fn check_held(field: &'static str, value: f64, factor: f64) -> Result<(), ConfigError> {
    check_range(field, value, f64::INFINITY)?;
    if value == 0.0 || f32::from_f64(value * factor) != 0.0 {
        return Ok(());
    }
    Err(ConfigError::Vanishes {
        field,
        value,
        least: f64::from(f32::MIN_POSITIVE) / factor,
    })
}

/// Checks a learning rate and the two weight decays against each other.
pub(super) fn check_decays(lr: f64, coupled: f64, decoupled: f64) -> Result<(), ConfigError> {
    check_range("lr", lr, f64::INFINITY)?;
    check_range("weight_decay", coupled, f64::INFINITY)?;
    check_range("decoupled_weight_decay", decoupled, f64::INFINITY)?;
    if lr * decoupled > 1.0 {
        return Err(ConfigError::DecayTooLarge {
            lr,
            decoupled_weight_decay: decoupled,
        });
    }
    Ok(())
}

pub(super) fn unsupported<T>(fields: &'static str, why: &'static str) -> Result<T, ConfigError> {
    Err(ConfigError::Unsupported { fields, why })
}

/// A storage type for a slot that no rule of the optimizer has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("group {group:?}: no slot {slot:?} to store as another type, expected one of {expected:?}")]
pub struct UnknownSlot {
    /// The group whose [`Precision`](crate::Precision) names it.
    pub group: String,
    /// The slot.
    pub slot: String,
    /// The slots of the group's rule.
    pub expected: String,
}
