//! Fields and checks that the configurations of all rules have in common.

use super::ConfigError;
use super::error::unsupported;

/// Declares a configuration: the struct with the fields that every rule has beside its own, an accessor and a setter for
/// each, `with_lr`, and the builder that starts from the values given here and collects fields until `check` has seen them
/// all. A field that is `else default` is that where a state file, which may be older, does not have it. The rule's own
/// weight decay is the coupled one, or else the decoupled one that stands behind `builder`.
macro_rules! config {
    (
        $(#[$config_doc:meta])*
        pub struct $Config:ident, built by $Builder:ident {
            $( $(#[$doc:meta])* $field:ident: $Type:ty = $start:expr $(; else $default:ident)?, )*
        }

        $(#[$builder_doc:meta])*
        pub const fn builder(lr) $(where decoupled_weight_decay = $decoupled:literal)?;
    ) => {
        $(#[$config_doc])*
        #[derive(Clone, Copy, Debug, PartialEq)]
        #[cfg_attr(feature = "safetensors", derive(serde::Serialize))]
        pub struct $Config {
            lr: f64,
            $( $field: $Type, )*
            #[cfg_attr(feature = "safetensors", serde(rename = "weight_decay"))]
            coupled_weight_decay: f64,
            decoupled_weight_decay: f64,
            maximize: bool,
        }

        impl $Config {
            $(#[$builder_doc])*
            pub const fn builder(lr: f64) -> $Builder {
                let config = Self {
                    lr,
                    $( $field: $start, )*
                    coupled_weight_decay: 0.0,
                    decoupled_weight_decay: 0.0,
                    maximize: false,
                };
                let own_decay = crate::rules::decay::OwnDecay::COUPLED;
                $Builder { config, own_decay } $(.decoupling($decoupled))?
            }

            /// Learning rate.
            #[must_use]
            pub const fn lr(&self) -> f64 {
                self.lr
            }

            $(
                $(#[$doc])*
                #[must_use]
                pub const fn $field(&self) -> $Type {
                    self.$field
                }
            )*

            /// Coupled (L2) weight decay: `X*theta` joins the gradient. `weight_decay` in state files.
            #[must_use]
            pub const fn coupled_weight_decay(&self) -> f64 {
                self.coupled_weight_decay
            }

            /// Decoupled weight decay: theta is multiplied by `1 - lr*X` before the step.
            #[must_use]
            pub const fn decoupled_weight_decay(&self) -> f64 {
                self.decoupled_weight_decay
            }

            /// Whether it ascends instead of descends: the gradient changes sign before anything else happens to it.
            #[must_use]
            pub const fn maximize(&self) -> bool {
                self.maximize
            }

            /// Returns the configuration at another learning rate.
            ///
            /// # Errors
            /// [`ConfigError`](crate::ConfigError) if `lr` is out of range, or too large for the decoupled weight decay.
            pub fn with_lr(self, lr: f64) -> Result<Self, crate::rules::ConfigError> {
                crate::rules::Hyperparameters::checked(Self { lr, ..self })
            }
        }

        impl crate::rules::Hyperparameters for $Config {
            fn lr(&self) -> f64 {
                self.lr
            }

            fn decay(&self) -> crate::rules::decay::Decay {
                crate::rules::decay::Decay {
                    lr: self.lr,
                    maximize: self.maximize,
                    coupled: self.coupled_weight_decay,
                    decoupled: self.decoupled_weight_decay,
                }
            }

            fn at_lr(self, lr: f64) -> Self {
                Self { lr, ..self }
            }

            fn checked(self) -> Result<Self, crate::rules::ConfigError> {
                let (coupled, decoupled) = (self.coupled_weight_decay, self.decoupled_weight_decay);
                crate::rules::error::check_decays(self.lr, coupled, decoupled)?;
                self.check()?;
                Ok(self)
            }
        }

        /// Collects hyper-parameters; [`build`](Self::build) checks them together.
        #[derive(Clone, Copy, Debug)]
        #[must_use]
        pub struct $Builder {
            config: $Config,
            own_decay: crate::rules::decay::OwnDecay,
        }

        impl $Builder {
            /// This builder for a rule whose own weight decay is the decoupled one, and this by default.
            #[allow(dead_code, reason = "some rules have only the coupled one")]
            const fn decoupling(mut self, decoupled_weight_decay: f64) -> Self {
                self.config.decoupled_weight_decay = decoupled_weight_decay;
                self.own_decay = crate::rules::decay::OwnDecay::DECOUPLED;
                self
            }

            $(
                $(#[$doc])*
                pub const fn $field(mut self, $field: $Type) -> Self {
                    self.config.$field = $field;
                    self
                }
            )*

            /// Weight decay as the library has it that this builder comes from: decoupled where the documentation of its
            /// constructor says so, else coupled. To have one by its name, or both, call
            /// [`coupled_weight_decay`](Self::coupled_weight_decay) and
            /// [`decoupled_weight_decay`](Self::decoupled_weight_decay).
            pub const fn weight_decay(mut self, weight_decay: f64) -> Self {
                self.own_decay = self.own_decay.set();
                if self.own_decay.is_decoupled() {
                    self.config.decoupled_weight_decay = weight_decay;
                } else {
                    self.config.coupled_weight_decay = weight_decay;
                }
                self
            }

            /// Coupled (L2) weight decay: `X*theta` joins the gradient.
            pub const fn coupled_weight_decay(mut self, coupled_weight_decay: f64) -> Self {
                self.config.coupled_weight_decay = coupled_weight_decay;
                self.own_decay = self.own_decay.named(false);
                self
            }

            /// Decoupled weight decay: theta is multiplied by `1 - lr*X` before the step.
            pub const fn decoupled_weight_decay(mut self, decoupled_weight_decay: f64) -> Self {
                self.config.decoupled_weight_decay = decoupled_weight_decay;
                self.own_decay = self.own_decay.named(true);
                self
            }

            /// Ascends instead of descends: the gradient changes sign before anything else happens to it.
            pub const fn maximize(mut self, maximize: bool) -> Self {
                self.config.maximize = maximize;
                self
            }

            /// Checks all fields together.
            ///
            /// # Errors
            /// [`ConfigError`](crate::ConfigError) naming the fields: a value out of range or not finite, a combination
            /// that no library has, or two weight decays of which one was not set by its name.
            pub fn build(self) -> Result<$Config, crate::rules::ConfigError> {
                let config = self.config;
                let (coupled, decoupled) = (config.coupled_weight_decay, config.decoupled_weight_decay);
                self.own_decay.check(coupled, decoupled)?;
                crate::rules::Hyperparameters::checked(config)
            }
        }

        impl From<$Builder> for crate::rules::any::Built {
            fn from(builder: $Builder) -> Self {
                Self {
                    decouples_weight_decay: builder.own_decay.is_decoupled(),
                    config: builder.build().map(Into::into),
                }
            }
        }

        #[cfg(feature = "safetensors")]
        impl<'de> serde::Deserialize<'de> for $Config {
            /// Checks as `build` does; both weight decays have their names there.
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                #[derive(serde::Deserialize)]
                #[serde(deny_unknown_fields)]
                struct Fields {
                    lr: f64,
                    $( $(#[serde($default)])? $field: $Type, )*
                    weight_decay: f64,
                    decoupled_weight_decay: f64,
                    maximize: bool,
                }
                let fields = Fields::deserialize(deserializer)?;
                let config = Self {
                    lr: fields.lr,
                    $( $field: fields.$field, )*
                    coupled_weight_decay: fields.weight_decay,
                    decoupled_weight_decay: fields.decoupled_weight_decay,
                    maximize: fields.maximize,
                };
                crate::rules::Hyperparameters::checked(config).map_err(serde::de::Error::custom)
            }
        }
    };
}

/// Declares a rule's own scalars of a step by their names in WGSL, where they stand between those of `decay.wgsl`: computed
/// in `f64`, rounded once.
macro_rules! scalars {
    ($(#[$doc:meta])* struct $Name:ident { $( $field:ident, )* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $Name<T = f32> {
            $( $field: T, )*
        }

        impl crate::rules::elementwise::ScalarSet for $Name {
            type Exact = $Name<f64>;

            const NAMES: &'static [&'static str] = &["lambda", $( stringify!($field), )* "rho"];

            fn rounded(lambda: f64, own: Self::Exact, rho: f64) -> crate::rules::Scalars {
                [lambda, $( own.$field, )* rho].map(crate::rules::Real::from_f64).into()
            }

            fn joined(lambda: f32, own: Self, rho: f32) -> crate::rules::Scalars {
                [lambda, $( own.$field, )* rho].into()
            }

            fn split(scalars: &crate::rules::Scalars) -> (f32, Self, f32) {
                let [lambda, $( $field, )* rho, ..] = *scalars.values();
                (lambda, Self { $( $field, )* }, rho)
            }
        }
    };
}

pub(crate) use {config, scalars};

/// A momentum in place of another. The buffer that goes with one stays, also at momentum zero, for which the smallest
/// number that is not zero then stands; where there is none, none can come.
pub(super) fn changed_momentum(before: f64, momentum: f64) -> Result<f64, ConfigError> {
    match (before, momentum) {
        (0.0, 0.0) => Ok(0.0),
        (0.0, _) => unsupported(
            "momentum",
            "momentum cannot rise from zero, because there is no velocity",
        ),
        (_, 0.0) => Ok(f64::MIN_POSITIVE),
        (_, momentum) => Ok(momentum),
    }
}
