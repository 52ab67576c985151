//! All rules of this crate as one type, by name.

use super::{ConfigError, Rule, every_rule};

/// A rule that other libraries have, too.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a rule of this crate",
    label = "expected a checked configuration, such as `AdamConfig`",
    note = "if this is a builder, call `.build()?` on it"
)]
pub trait KnownRule: Rule + Into<AnyRule> + TryFrom<AnyRule, Error = AnyRule> {
    /// The rule as libraries have it, each with its own defaults; of one name PyTorch's first, where that has it.
    const PRESETS: &'static [RulePreset];

    /// Whether `torch.optim` has the rule in this form.
    fn is_pytorchs(&self) -> bool {
        false
    }

    /// The values that a `torch.optim` optimizer keeps of a tensor after so many applied steps beside the slots, in its order:
    /// `step`, by default. None where PyTorch has no such rule, or not in this form.
    fn pytorch_scalars(&self, applied_steps: u64) -> Option<Vec<(&'static str, f64)>> {
        self.is_pytorchs()
            .then(|| vec![("step", applied_steps as f64)])
    }
}

/// A rule as a library has it.
#[derive(Clone, Copy, Debug)]
pub struct RulePreset {
    /// The rule's name there, in lower case: `adamw`, say.
    pub rule: &'static str,
    /// The library: `pytorch`, `optax`, `keras`, or a form of it.
    pub library: &'static str,
    start: fn(f64) -> Built,
}

/// A builder of any rule, built.
pub(super) struct Built {
    pub(super) config: Result<AnyRule, ConfigError>,
    pub(super) decouples_weight_decay: bool,
}

impl AnyRule {
    /// A rule as a library has it, with its defaults there. Without a library it is the first that has the rule:
    /// PyTorch, or else optax.
    ///
    /// # Errors
    /// [`ConfigError`] if there is no such rule, the library does not have it, or `lr` is out of range.
    pub fn preset(rule: &str, library: Option<&str>, lr: f64) -> Result<Self, ConfigError> {
        RulePreset::find(rule, library)?.config(lr)
    }
}

impl RulePreset {
    /// A preset by the builder that the library's defaults are, at a learning rate.
    pub(super) const fn new(
        rule: &'static str,
        library: &'static str,
        start: fn(f64) -> Built,
    ) -> Self {
        Self {
            rule,
            library,
            start,
        }
    }

    /// The library's defaults at a learning rate.
    ///
    /// # Errors
    /// [`ConfigError`] if `lr` is out of range.
    pub fn config(&self, lr: f64) -> Result<AnyRule, ConfigError> {
        (self.start)(lr).config
    }

    /// Whether the library's own `weight_decay` is decoupled.
    #[must_use]
    pub fn decouples_weight_decay(&self) -> bool {
        (self.start)(0.0).decouples_weight_decay
    }

    /// The preset of these names; without a library the first of the rule.
    ///
    /// # Errors
    /// [`ConfigError`] saying which there are.
    pub fn find(rule: &str, library: Option<&str>) -> Result<Self, ConfigError> {
        let of_rule = || AnyRule::presets().filter(|preset| preset.rule == rule);
        if of_rule().next().is_none() {
            let mut expected: Vec<_> = AnyRule::presets().map(|preset| preset.rule).collect();
            expected.dedup();
            return Err(ConfigError::UnknownRule {
                name: rule.to_owned(),
                expected: expected.join(", "),
            });
        }
        let found = of_rule().find(|preset| library.is_none_or(|name| preset.library == name));
        found.ok_or_else(|| {
            let expected: Vec<_> = of_rule().map(|preset| preset.library).collect();
            ConfigError::UnknownPreset {
                name: library.unwrap_or_default().to_owned(),
                expected: expected.join(", "),
            }
        })
    }
}

/// Makes an enum of rules that is a [`Rule`](crate::Rule) itself, and a [`Twin`](crate::rules::Twin): an optimizer and
/// its groups then mix them.
///
/// A variant holds a rule that is a `Twin`, a type for each; [`AnyRule`] stands for all of this crate's. Each becomes the
/// enum by `From`, and in [`ParamGroups::with`](crate::ParamGroups::with) as it is. `Clone`, `Debug` and `PartialEq` are
/// derived.
///
/// ```
/// use wgpu_optim::rules::{Scalars, Twin};
/// use wgpu_optim::{AdamConfig, AnyRule, ConfigError, CpuOptimizer, ParamGroups, Rule, rule_enum};
///
/// /// Moves every element by the learning rate, whatever its gradient.
/// #[derive(Clone, Debug, PartialEq)]
/// struct Falling {
///     lr: f64,
/// }
///
/// impl Rule for Falling {
///     fn stem(&self) -> &'static str { "falling" }
///     fn wgsl(&self) -> String {
///         "fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
///             return theta - k.lr;
///         }".to_owned()
///     }
///     fn scalar_names(&self) -> &'static [&'static str] { &["lr"] }
///     fn scalars(&self, _phase: u64) -> Scalars { [self.lr as f32].into() }
///     fn lr(&self) -> f64 { self.lr }
///     fn with_lr(&self, lr: f64) -> Result<Self, ConfigError> { Ok(Self { lr }) }
/// }
///
/// impl Twin for Falling {
///     fn step(&self, scalars: &Scalars, params: &mut [f32], _: &mut [&mut [f32]], _: &[f32]) {
///         params.iter_mut().for_each(|theta| *theta -= scalars.as_slice()[0]);
///     }
/// }
///
/// rule_enum! {
///     enum MyRule {
///         Falling(Falling),
///         Known(AnyRule),
///     }
/// }
///
/// let adamw = AnyRule::from(AdamConfig::adamw(1e-3).build()?);
/// let groups = ParamGroups::<MyRule>::new(adamw.into())
///     .with("falling", Falling { lr: 0.5 }, |name| name == "ball")?;
/// let mut optimizer = CpuOptimizer::with_groups(&groups, [("ball", [1]), ("weight", [1])])?;
/// let (mut ball, mut weight) = ([1.0], [1.0]);
/// optimizer.step(&mut [&mut ball, &mut weight], &[&[3.0], &[3.0]])?;
/// assert_eq!(ball, [0.5]);
/// assert!((weight[0] - 0.99899).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[macro_export]
macro_rules! rule_enum {
    (
        $(#[$enum_meta:meta])*
        $vis:vis enum $Enum:ident {
            $( $(#[$variant_meta:meta])* $Variant:ident($Rule:ty) ),+ $(,)?
        }
    ) => {
        $(#[$enum_meta])*
        #[derive(Clone, Debug, PartialEq)]
        $vis enum $Enum {
            $( $(#[$variant_meta])* $Variant($Rule), )+
        }

        $(
            impl ::std::convert::From<$Rule> for $Enum {
                fn from(rule: $Rule) -> Self {
                    Self::$Variant(rule)
                }
            }

            impl $crate::rules::IntoRule<$Enum> for $Rule {
                fn into_rule(self) -> $Enum {
                    $Enum::$Variant(self)
                }
            }
        )+

        impl $crate::Rule for $Enum {
            fn stem(&self) -> &'static str {
                match self { $( Self::$Variant(rule) => $crate::Rule::stem(rule), )+ }
            }

            fn slots(&self) -> $crate::rules::Slots {
                match self { $( Self::$Variant(rule) => $crate::Rule::slots(rule), )+ }
            }

            fn terms(&self) -> ::std::vec::Vec<(&'static str, bool)> {
                match self { $( Self::$Variant(rule) => $crate::Rule::terms(rule), )+ }
            }

            fn wgsl(&self) -> ::std::string::String {
                match self { $( Self::$Variant(rule) => $crate::Rule::wgsl(rule), )+ }
            }

            fn scalar_names(&self) -> &'static [&'static str] {
                match self { $( Self::$Variant(rule) => $crate::Rule::scalar_names(rule), )+ }
            }

            fn sums(&self) -> &'static [&'static str] {
                match self { $( Self::$Variant(rule) => $crate::Rule::sums(rule), )+ }
            }

            fn phase(&self, applied_steps: u64) -> u64 {
                match self { $( Self::$Variant(rule) => $crate::Rule::phase(rule, applied_steps), )+ }
            }

            fn scalars(&self, phase: u64) -> $crate::rules::Scalars {
                match self { $( Self::$Variant(rule) => $crate::Rule::scalars(rule, phase), )+ }
            }

            fn state_kind(&self) -> ::std::string::String {
                match self { $( Self::$Variant(rule) => $crate::Rule::state_kind(rule), )+ }
            }

            fn lr(&self) -> f64 {
                match self { $( Self::$Variant(rule) => $crate::Rule::lr(rule), )+ }
            }

            fn with_lr(&self, lr: f64) -> ::std::result::Result<Self, $crate::ConfigError> {
                match self { $( Self::$Variant(rule) => $crate::Rule::with_lr(rule, lr).map(Self::$Variant), )+ }
            }

            fn momentum(&self) -> ::std::option::Option<f64> {
                match self { $( Self::$Variant(rule) => $crate::Rule::momentum(rule), )+ }
            }

            fn with_momentum(&self, momentum: f64) -> ::std::result::Result<Self, $crate::ConfigError> {
                match self { $( Self::$Variant(rule) => $crate::Rule::with_momentum(rule, momentum).map(Self::$Variant), )+ }
            }

            fn bytes_per_elem(&self) -> u64 {
                match self { $( Self::$Variant(rule) => $crate::Rule::bytes_per_elem(rule), )+ }
            }
        }

        impl $crate::rules::Twin for $Enum {
            fn step(&self, scalars: &$crate::rules::Scalars, params: &mut [f32], state: &mut [&mut [f32]], grads: &[f32]) {
                match self { $( Self::$Variant(rule) => $crate::rules::Twin::step(rule, scalars, params, state, grads), )+ }
            }

            fn step_in_turn(&self, scalars: &$crate::rules::Scalars, params: &mut [f32], state: &mut [&mut [f32]], grads: &[f32]) {
                match self { $( Self::$Variant(rule) => $crate::rules::Twin::step_in_turn(rule, scalars, params, state, grads), )+ }
            }

            fn measure(&self, scalars: &$crate::rules::Scalars, params: &[f32], state: &[&[f32]], grads: &[f32], sums: &mut [f64]) {
                match self { $( Self::$Variant(rule) => $crate::rules::Twin::measure(rule, scalars, params, state, grads, sums), )+ }
            }

            fn decide(&self, scalars: &$crate::rules::Scalars, sums: &[f32], numel: f32) -> $crate::rules::Scalars {
                match self { $( Self::$Variant(rule) => $crate::rules::Twin::decide(rule, scalars, sums, numel), )+ }
            }
        }
    };
}

macro_rules! any_rule {
    ($( $Variant:ident($Config:ident), )*) => {
        rule_enum! {
            /// Any rule of this crate: for programs that choose one by name, and for [`ParamGroups`](crate::ParamGroups)
            /// that mix them. A rule of the user's own joins by [`rule_enum`](crate::rule_enum).
            ///
            /// ```
            /// use wgpu_optim::{AdamConfig, AnyRule, CpuOptimizer, ParamGroups, SgdConfig};
            ///
            /// let momentum = SgdConfig::builder(0.1).momentum(0.9).build()?;
            /// let groups = ParamGroups::<AnyRule>::new(momentum.into())
            ///     .with("embeddings", AdamConfig::adamw(1e-3).build()?, |name| name.starts_with("embed"))?;
            /// let mut optimizer = CpuOptimizer::with_groups(&groups, [("embed.weight", [2]), ("fc.weight", [2])])?;
            /// optimizer.step(&mut [&mut [1.0, 2.0], &mut [3.0, 4.0]], &[&[0.1, 0.2], &[0.3, 0.4]])?;
            /// # assert!(AdamConfig::try_from(AnyRule::from(momentum)).is_err());
            /// # Ok::<(), Box<dyn std::error::Error>>(())
            /// ```
            #[cfg_attr(
                feature = "safetensors",
                derive(serde::Serialize, serde::Deserialize),
                serde(tag = "rule", rename_all = "kebab-case")
            )]
            #[non_exhaustive]
            pub enum AnyRule {
                $(
                    #[doc = concat!("[`", stringify!($Config), "`](crate::", stringify!($Config), ")")]
                    $Variant(super::$Config),
                )*
            }
        }

        $(
            impl TryFrom<AnyRule> for super::$Config {
                type Error = AnyRule;

                /// Gives back a rule of another kind.
                fn try_from(rule: AnyRule) -> Result<Self, AnyRule> {
                    match rule {
                        AnyRule::$Variant(config) => Ok(config),
                        #[allow(unreachable_patterns, reason = "where there is one rule only")]
                        other => Err(other),
                    }
                }
            }
        )*

        impl AnyRule {
            /// Every rule of this crate as every library has it. The first of a rule is PyTorch's, where that has it.
            pub fn presets() -> impl Iterator<Item = RulePreset> {
                [$( super::$Config::PRESETS, )*].into_iter().flatten().copied()
            }

            /// The values that a `torch.optim` optimizer keeps of a tensor beside its slots; see
            /// [`KnownRule::pytorch_scalars`].
            #[must_use]
            pub fn pytorch_scalars(&self, applied_steps: u64) -> Option<Vec<(&'static str, f64)>> {
                match self { $( Self::$Variant(rule) => rule.pytorch_scalars(applied_steps), )* }
            }
        }
    };
}

every_rule!(any_rule);
