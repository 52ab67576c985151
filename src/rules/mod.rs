//! What the user says, checked, and what it compiles to: scalars of a step, and terms that are there at all.

mod adam;
mod any;
mod config;
mod elementwise;
mod error;
mod groups;
mod real;
mod rule;
pub mod schedule;
pub(crate) mod sgd;

/// The registry: calls a macro with every rule of this crate.
macro_rules! every_rule {
    ($callback:ident) => {
        $callback! {
            Sgd(SgdConfig),
            Adam(AdamConfig),
        }
    };
}
pub(crate) use every_rule;

pub use adam::*;
pub use any::{AnyRule, KnownRule, RulePreset};
pub use error::{ConfigError, ConversionError, GroupError};
pub(crate) use groups::Groups;
pub use groups::ParamGroups;
pub use real::Real;
pub use rule::{MAX_SCALARS, MAX_SLOTS, Rule, Scalars, Slot, Slots, Twin};
pub use sgd::{
    Coefficients, Conversion, MomentumForm, Preset, SgdConfig, SgdConfigBuilder, Terms, physics,
    reference,
};
