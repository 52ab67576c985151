//! Rules: checked configurations, and the scalars and terms that they compile to.

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
mod lion;
mod nadam;
mod radam;
mod real;
mod rmsprop;
mod rprop;
mod rule;
pub mod schedule;
mod schedule_free;
mod schedule_free_adamw;
mod schedule_free_sgd;
pub(crate) mod sgd;
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
pub use error::{ConfigError, GroupError};
pub(crate) use groups::Groups;
pub use groups::ParamGroups;
pub use lion::{LionConfig, LionConfigBuilder};
pub use nadam::{NAdamConfig, NAdamConfigBuilder};
pub use radam::{RAdamConfig, RAdamConfigBuilder};
pub use real::Real;
pub use rmsprop::{RmsPropConfig, RmsPropConfigBuilder};
pub use rprop::{RpropConfig, RpropConfigBuilder};
pub use rule::{IntoRule, MAX_SCALARS, MAX_SLOTS, Rule, Scalars, Slot, Slots, Start, Twin};
pub use schedule_free_adamw::{ScheduleFreeAdamWConfig, ScheduleFreeAdamWConfigBuilder};
pub use schedule_free_sgd::{ScheduleFreeSgdConfig, ScheduleFreeSgdConfigBuilder};
pub use sgd::{
    Coefficients, Conversion, ConversionError, MomentumForm, SgdConfig, SgdConfigBuilder, Terms,
    physics, reference,
};
pub use signum::{SignumConfig, SignumConfigBuilder};
pub use yogi::{YogiConfig, YogiConfigBuilder};
