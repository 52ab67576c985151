//! The settings that a person chooses: a terrain, a number of balls, and a rule for each side.

use wgpu_optim::rules::RulePreset;
use wgpu_optim::rules::sgd::MomentumForm;
use wgpu_optim::rules::sgd::physics::Particle;
use wgpu_optim::{AnyRule, ConfigError, Rule as _, SgdConfig};

use crate::terrain::Terrain;

/// Everything that a run follows from.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The terrain that the balls roll on.
    pub terrain: Terrain,
    /// The number of balls on each side.
    pub balls: u32,
    /// The seed of the places where balls start, the same on both sides.
    pub seed: u64,
    /// The rules of the left and the right side.
    pub rules: [RuleSettings; 2],
}

impl Settings {
    /// Plain descent beside momentum 0.9, at the terrain's learning rate.
    pub fn new(terrain: Terrain, balls: u32, seed: u64) -> Self {
        let momentum = |momentum| RuleSettings::sgd(terrain.lr(), momentum);
        Self {
            terrain,
            balls,
            seed,
            rules: [momentum(0.0), momentum(0.9)],
        }
    }
}

/// A rule as it is chosen, which need not be valid yet.
#[derive(Clone, Debug, PartialEq)]
pub struct RuleSettings {
    /// `sgd`, or any name of [`AnyRule::presets`].
    pub rule: &'static str,
    /// Learning rate.
    pub lr: f64,
    /// The form of `sgd`; no other rule has one.
    pub form: MomentumForm,
    /// The momentum of `sgd`; no other rule reads it.
    pub momentum: f64,
    /// Whether the momentum of `sgd` is Nesterov's.
    pub nesterov: bool,
    /// The mass in the particle form, which has it in place of `lr` and `momentum`.
    pub mass: f64,
    /// The friction in the particle form.
    pub friction: f64,
    /// The time step in the particle form.
    pub time_step: f64,
}

impl RuleSettings {
    /// The name of the momentum family.
    pub const SGD: &str = "sgd";

    /// The momentum family at these numbers.
    pub const fn sgd(lr: f64, momentum: f64) -> Self {
        Self {
            rule: Self::SGD,
            lr,
            form: MomentumForm::HeavyBall,
            momentum,
            nesterov: false,
            mass: 1.0,
            friction: 1.0,
            time_step: 0.1,
        }
    }

    /// The names of the rules by which each ball moves on its own: all balls are one tensor.
    pub fn names() -> Vec<&'static str> {
        let is_by_element = |preset: &RulePreset| {
            let config = preset.config(0.1);
            config.is_ok_and(|config| config.sums().is_empty())
        };
        let presets = AnyRule::presets().filter(is_by_element);
        let mut names: Vec<_> = presets.map(|preset| preset.rule).collect();
        names.dedup();
        names
    }

    /// Whether the rule is given by mass and friction.
    pub fn is_particle(&self) -> bool {
        self.rule == Self::SGD && self.form == MomentumForm::Particle
    }

    /// The rule, checked.
    pub fn config(&self) -> Result<AnyRule, ConfigError> {
        if self.is_particle() {
            let particle = Particle {
                mass: self.mass,
                friction: self.friction,
                time_step: self.time_step,
                force_scale: 1.0,
            };
            return Ok(particle.config()?.into());
        }
        if self.rule == Self::SGD {
            let builder = SgdConfig::builder(self.lr)
                .momentum(self.momentum)
                .form(self.form)
                .nesterov(self.nesterov);
            return Ok(builder.build()?.into());
        }
        AnyRule::preset(self.rule, None, self.lr)
    }

    /// The rule in a line, as a heading.
    pub fn title(&self) -> String {
        if self.is_particle() {
            let Self {
                mass,
                friction,
                time_step,
                ..
            } = self;
            return format!("particle: mass {mass}, friction {friction}, time step {time_step}");
        }
        let lr = self.lr;
        if self.rule != Self::SGD {
            return format!("{}, lr {lr}", self.rule);
        }
        let form = match (self.momentum == 0.0, self.nesterov, self.form) {
            (true, ..) => return format!("momentum 0 (plain descent), lr {lr}"),
            (_, true, _) => " (Nesterov)",
            (.., MomentumForm::HeavyBall) => "",
            (.., form) => return format!("momentum {} ({form}), lr {lr}", self.momentum),
        };
        format!("momentum {}{form}, lr {lr}", self.momentum)
    }
}
