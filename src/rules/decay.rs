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

    #[inline(always)]
    pub(super) fn direction(self, lambda: f32, theta: f32, g: f32) -> f32 {
        let h = if self.maximize { -g } else { g };
        if self.has_lambda {
            h + lambda * theta
        } else {
            h
        }
    }

    #[inline(always)]
    pub(super) fn decayed(self, rho: f32, theta: f32) -> f32 {
        if self.has_rho { rho * theta } else { theta }
    }
}
