//! Weight decay and maximizing, which change gradient and parameter before a rule's own work: twin of `shaders/rules/decay.wgsl`.

use super::ConfigError;

/// The weight decay of the two that is a rule's own, which a builder's `weight_decay` sets, and how it has been set.
#[derive(Clone, Copy, Debug)]
pub(super) struct OwnDecay {
    is_decoupled: bool,
    set: Set,
}

#[derive(Clone, Copy, Debug)]
enum Set {
    /// Not at all: it is what it is by default.
    ByDefault,
    /// By `weight_decay`, which does not say which of the two it is.
    WithoutName,
    /// By its own name, so that it may stand beside the other.
    ByName,
}

impl OwnDecay {
    pub(super) const COUPLED: Self = Self {
        is_decoupled: false,
        set: Set::ByDefault,
    };
    pub(super) const DECOUPLED: Self = Self {
        is_decoupled: true,
        set: Set::ByDefault,
    };

    pub(super) const fn is_decoupled(self) -> bool {
        self.is_decoupled
    }

    /// After `weight_decay`.
    pub(super) const fn set(self) -> Self {
        let set = Set::WithoutName;
        Self { set, ..self }
    }

    /// After the setter of one of the two by its name.
    pub(super) const fn named(self, is_decoupled: bool) -> Self {
        let set = if is_decoupled == self.is_decoupled {
            Set::ByName
        } else {
            self.set
        };
        Self { set, ..self }
    }

    /// Refuses both at once, unless both were named: who writes `weight_decay` means all the decay that there is, and who
    /// names the other does not think of a default.
    pub(super) fn check(self, coupled: f64, decoupled: f64) -> Result<(), ConfigError> {
        let (own, other) = match self.is_decoupled {
            true => (decoupled, coupled),
            false => (coupled, decoupled),
        };
        let is_meant = match self.set {
            Set::ByDefault => own == 0.0,
            Set::WithoutName => false,
            Set::ByName => true,
        };
        if other == 0.0 || is_meant {
            return Ok(());
        }
        Err(ConfigError::BothDecays {
            coupled_weight_decay: coupled,
            decoupled_weight_decay: decoupled,
            own: match self.is_decoupled {
                true => "decoupled_weight_decay",
                false => "coupled_weight_decay",
            },
        })
    }
}

/// Maximizing and the two weight decays of a configuration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decay {
    pub(crate) lr: f64,
    pub(crate) maximize: bool,
    pub(crate) coupled: f64,
    pub(crate) decoupled: f64,
}

impl Decay {
    /// The terms of `decay.wgsl`.
    pub(super) fn terms(self) -> [(&'static str, bool); 3] {
        [
            ("MAXIMIZE", self.maximize),
            ("HAS_LAMBDA", self.has_lambda()),
            ("HAS_RHO", self.decoupled != 0.0),
        ]
    }

    pub(super) fn has_lambda(self) -> bool {
        self.coupled != 0.0
    }

    /// The share of itself that a parameter keeps.
    pub(crate) fn rho(self) -> f64 {
        1.0 - self.lr * self.decoupled
    }

    pub(super) fn twin<const LAMBDA: bool>(self, lambda: f32, rho: f32) -> DecayTwin<LAMBDA> {
        DecayTwin {
            flipped_bits: u32::from(self.maximize) << 31,
            lambda,
            rho,
        }
    }
}

/// The functions of the WGSL. Whether there is a coupled decay is known where loops are compiled: a choice at every element
/// costs a tenth of a step in the caches.
#[derive(Clone, Copy)]
pub(super) struct DecayTwin<const LAMBDA: bool> {
    /// The sign's, to maximize.
    flipped_bits: u32,
    lambda: f32,
    rho: f32,
}

impl<const LAMBDA: bool> DecayTwin<LAMBDA> {
    #[inline(always)]
    pub(super) fn direction(self, theta: f32, g: f32) -> f32 {
        let h = f32::from_bits(g.to_bits() ^ self.flipped_bits);
        if LAMBDA { h + self.lambda * theta } else { h }
    }

    /// The parameter after decoupled decay. It has the factor of one that the kernel leaves out, which rounds nothing.
    #[inline(always)]
    pub(super) fn decayed(self, theta: f32) -> f32 {
        self.rho * theta
    }
}
