//! What the user says, checked, and what it compiles to: scalars of a step, and terms that are there at all.

mod adam;
mod elementwise;
mod error;
mod groups;
mod real;
mod rule;
pub mod schedule;
pub mod sgd;

pub use adam::{AdamConfig, AdamConfigBuilder, AdamForm, AmsGrad};
pub use error::{ConfigError, ConversionError, GroupError};
pub(crate) use groups::Groups;
pub use groups::ParamGroups;
pub use real::Real;
pub use rule::{MAX_SCALARS, MAX_SLOTS, Rule, Scalars, Slot, Slots, Twin};
