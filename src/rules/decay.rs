//! What all rules make of gradient and parameter before their own work begins: twin of `shaders/rules/decay.wgsl`.

/// Which of maximizing and the two weight decays a configuration has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Decay {
    maximize: bool,
    has_lambda: bool,
    has_rho: bool,
}

impl Decay {
    pub(super) fn new(maximize: bool, weight_decay: f64, decoupled_weight_decay: f64) -> Self {
        Self {
            maximize,
            has_lambda: weight_decay != 0.0,
            has_rho: decoupled_weight_decay != 0.0,
        }
    }

    /// With the terms of the rule's own.
    pub(super) fn terms<const N: usize>(
        self,
        own: [(&'static str, bool); N],
    ) -> std::borrow::Cow<'static, [(&'static str, bool)]> {
        let mut terms = vec![
            ("MAXIMIZE", self.maximize),
            ("HAS_LAMBDA", self.has_lambda),
            ("HAS_RHO", self.has_rho),
        ];
        terms.extend(own);
        terms.into()
    }

    pub(super) fn has_lambda(self) -> bool {
        self.has_lambda
    }

    pub(super) fn twin<const LAMBDA: bool>(self) -> DecayTwin<LAMBDA> {
        DecayTwin {
            flipped_bits: u32::from(self.maximize) << 31,
        }
    }
}

/// The functions of the WGSL. Whether there is a coupled decay is known where loops are compiled: a choice at every element
/// costs a tenth of a step in the caches.
#[derive(Clone, Copy)]
pub(super) struct DecayTwin<const LAMBDA: bool> {
    /// The sign's, to maximize.
    flipped_bits: u32,
}

impl<const LAMBDA: bool> DecayTwin<LAMBDA> {
    #[inline(always)]
    pub(super) fn direction(self, lambda: f32, theta: f32, g: f32) -> f32 {
        let h = f32::from_bits(g.to_bits() ^ self.flipped_bits);
        if LAMBDA { h + lambda * theta } else { h }
    }

    /// Where the kernel leaves out a factor of one, this has it: it rounds nothing.
    #[inline(always)]
    pub(super) fn decayed(self, rho: f32, theta: f32) -> f32 {
        rho * theta
    }
}

/// Compiles what is done with the twin of a configuration's decays for each kind of these.
macro_rules! with_decay {
    ($config:ident, |$decay:ident| $body:expr) => {
        if $config.decay().has_lambda() {
            let $decay = $config.decay().twin::<true>();
            $body
        } else {
            let $decay = $config.decay().twin::<false>();
            $body
        }
    };
}
pub(super) use with_decay;
