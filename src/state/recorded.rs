//! Rules as they stand in state files (feature `safetensors`).

use super::RecordError;
use crate::rules::{AnyRule, Rule, every_rule};

/// A rule that a state file can hold: its configuration as one piece of text. [`AnyRule`] and every configuration of
/// this crate are some; a rule of the user's own becomes one, in JSON or not.
///
/// ```
/// use wgpu_optim::state::Recorded;
/// use wgpu_optim::{AdamConfig, AnyRule, SgdConfig};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = SgdConfig::builder(0.1).momentum(0.9).build()?;
/// let record = config.to_record()?;
/// assert_eq!(SgdConfig::from_record(&record)?, config);
/// assert_eq!(AnyRule::from_record(&record)?, config.into());
/// assert!(AdamConfig::from_record(&record).is_err());
/// # Ok(())
/// # }
/// ```
pub trait Recorded: Rule {
    /// The configuration as text; of a rule of this crate a JSON object with the rule's name under `rule`.
    ///
    /// # Errors
    /// [`RecordError::Unwritable`] if it cannot be written.
    fn to_record(&self) -> Result<String, RecordError>;

    /// The configuration of such a text.
    ///
    /// # Errors
    /// [`RecordError::OtherRule`] if it is another rule's, [`RecordError::Malformed`] if it does not read.
    fn from_record(record: &str) -> Result<Self, RecordError>;
}

impl Recorded for AnyRule {
    fn to_record(&self) -> Result<String, RecordError> {
        serde_json::to_string(self).map_err(|error| RecordError::Unwritable {
            message: error.to_string(),
        })
    }

    fn from_record(record: &str) -> Result<Self, RecordError> {
        serde_json::from_str(record).map_err(|error| RecordError::Malformed {
            message: error.to_string(),
        })
    }
}

macro_rules! recorded {
    ($( $Variant:ident($Config:ident), )*) => {
        $(
            impl Recorded for crate::rules::$Config {
                fn to_record(&self) -> Result<String, RecordError> {
                    AnyRule::from(*self).to_record()
                }

                fn from_record(record: &str) -> Result<Self, RecordError> {
                    Self::try_from(AnyRule::from_record(record)?).map_err(|other| {
                        RecordError::OtherRule {
                            expected: stringify!($Config),
                            actual: config_name(&other).to_owned(),
                        }
                    })
                }
            }
        )*

        fn config_name(rule: &AnyRule) -> &'static str {
            match rule { $( AnyRule::$Variant(_) => stringify!($Config), )* }
        }
    };
}

every_rule!(recorded);
