//! Optimizer rules: checked configurations with their builders and presets, parameter groups, and the traits by which a
//! program adds a rule of its own.
//!
//! Configurations, [`Rule`], [`AnyRule`] and [`ParamGroups`] are at the root of the crate, too. A rule of one's own
//! implements [`Rule`], and [`Twin`] to run on the CPU; [`rule_enum`](crate::rule_enum) lets it share an optimizer with
//! other rules.

mod adabelief;
mod adadelta;
mod adagrad;
mod adam;
mod adamax;
mod any;
mod config;
mod decay;
mod elementwise;
mod error;
mod groups;
mod lamb;
mod lion;
mod nadam;
mod radam;
mod real;
mod rmsprop;
mod rprop;
mod rule;
mod schedule_free;
mod schedule_free_adamw;
mod schedule_free_sgd;
pub mod sgd;
mod signum;
mod yogi;

/// The registry: calls a macro with every rule of this crate.
macro_rules! every_rule {
    ($callback:ident) => {
        $callback! {
            Sgd(SgdConfig),
            Adam(AdamConfig),
            Nadam(NAdamConfig),
            Radam(RAdamConfig),
            Adamax(AdamaxConfig),
            Rmsprop(RmsPropConfig),
            Adagrad(AdagradConfig),
            Adadelta(AdadeltaConfig),
            Lion(LionConfig),
            Signum(SignumConfig),
            ScheduleFreeSgd(ScheduleFreeSgdConfig),
            ScheduleFreeAdamw(ScheduleFreeAdamWConfig),
            Adabelief(AdaBeliefConfig),
            Yogi(YogiConfig),
            Rprop(RpropConfig),
            Lamb(LambConfig),
        }
    };
}
pub(crate) use every_rule;

pub use adabelief::{AdaBeliefConfig, AdaBeliefConfigBuilder};
pub use adadelta::{AdadeltaConfig, AdadeltaConfigBuilder};
pub use adagrad::{AdagradConfig, AdagradConfigBuilder};
pub use adam::{AdamConfig, AdamConfigBuilder, AdamForm, AmsGrad};
pub use adamax::{AdamaxConfig, AdamaxConfigBuilder};
pub use any::{AnyRule, KnownRule, RulePreset};
pub(crate) use decay::Decay;
pub(crate) use elementwise::Hyperparameters;
pub use error::{ConfigError, GroupError, UnknownSlot};
pub use groups::{Groups, ParamGroups};
pub use lamb::{LambConfig, LambConfigBuilder};
pub use lion::{LionConfig, LionConfigBuilder};
pub use nadam::{NAdamConfig, NAdamConfigBuilder};
pub use radam::{RAdamConfig, RAdamConfigBuilder};
pub use real::Real;
pub use rmsprop::{RmsPropConfig, RmsPropConfigBuilder};
pub use rprop::{RpropConfig, RpropConfigBuilder};
pub use rule::{
    IntoRule, MAX_SCALARS, MAX_SLOTS, MAX_SUMS, Rule, Scalars, Slot, Slots, Start, Twin,
};
pub use schedule_free_adamw::{ScheduleFreeAdamWConfig, ScheduleFreeAdamWConfigBuilder};
pub use schedule_free_sgd::{ScheduleFreeSgdConfig, ScheduleFreeSgdConfigBuilder};
pub use sgd::{SgdConfig, SgdConfigBuilder};
pub use signum::{SignumConfig, SignumConfigBuilder};
pub use yogi::{YogiConfig, YogiConfigBuilder};
