//! Rules whose scalars depend on the count of steps in ways of their own.

use wgpu_optim::oracle::{Arithmetic, Bounded, Element, Textbook};
use wgpu_optim::rules::{Scalars, Slot, Slots, Start};
use wgpu_optim::{ConfigError, Rule};

/// A step of a rule with the scalars of a count that may not be the oracle's own: what is started is started at the first
/// step that is done, whichever it was when it was recorded.
#[derive(Clone, Debug, PartialEq)]
pub struct Counted<R> {
    pub rule: R,
    pub count: u64,
}

impl<R: Rule> Rule for Counted<R> {
    fn stem(&self) -> &'static str {
        self.rule.stem()
    }
    fn slots(&self) -> Slots {
        self.rule.slots()
    }
    fn terms(&self) -> Vec<(&'static str, bool)> {
        self.rule.terms()
    }
    fn wgsl(&self) -> String {
        self.rule.wgsl()
    }
    fn scalar_names(&self) -> &'static [&'static str] {
        self.rule.scalar_names()
    }
    fn scalars(&self, phase: u64) -> Scalars {
        self.rule.scalars(phase)
    }
    fn lr(&self) -> f64 {
        self.rule.lr()
    }
    fn with_lr(&self, lr: f64) -> Result<Self, ConfigError> {
        let rule = self.rule.with_lr(lr)?;
        Ok(Self { rule, ..*self })
    }
}

impl<R: Textbook> Textbook for Counted<R> {
    fn follow(&self, step: u64, element: &mut Element<f64>, grad: f64) {
        if step == 1 {
            self.start(element, self.lr());
        }
        self.rule.follow(self.count, element, grad);
    }

    fn bound(&self, step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
        if step == 1 {
            self.start(element, at.scalar(self.lr()));
        }
        self.rule.bound(self.count, at, element, grad);
    }
}

impl<R: Rule> Counted<R> {
    fn start<T: Copy>(&self, element: &mut Element<T>, lr: T) {
        let (theta, values) = element.split();
        for (value, slot) in values.iter_mut().zip(&*self.slots()) {
            match slot.start {
                Start::Params => *value = *theta,
                Start::FirstStep => *value = lr,
                Start::Value(_) => {}
            }
        }
    }
}

/// Momentum whose learning rate goes down a stair at every third step: a phase that stays for some steps and moves on.
#[derive(Clone, Debug, PartialEq)]
pub struct Stairs {
    pub lr: f64,
}

impl Stairs {
    pub fn lr_of(&self, phase: u64) -> f64 {
        self.lr / (1 + phase) as f64
    }
}

impl Rule for Stairs {
    fn stem(&self) -> &'static str {
        "stairs"
    }
    fn slots(&self) -> Slots {
        [Slot::new("sum")].into()
    }
    fn wgsl(&self) -> String {
        "
fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    (*state).sum = 0.5 * (*state).sum + g;
    return theta - k.lr * (*state).sum;
}"
        .into()
    }
    fn scalar_names(&self) -> &'static [&'static str] {
        &["lr"]
    }
    fn phase(&self, applied_steps: u64) -> u64 {
        applied_steps / 3 * 3
    }
    fn scalars(&self, phase: u64) -> Scalars {
        [self.lr_of(phase) as f32].into()
    }
    fn lr(&self) -> f64 {
        self.lr
    }
    fn with_lr(&self, lr: f64) -> Result<Self, ConfigError> {
        Ok(Self { lr })
    }
}

impl Textbook for Stairs {
    fn follow(&self, step: u64, element: &mut Element<f64>, grad: f64) {
        let (theta, [sum, ..]) = element.split();
        *sum = 0.5 * *sum + grad;
        *theta -= self.lr_of((step - 1) / 3 * 3) * *sum;
    }

    fn bound(&self, step: u64, at: Arithmetic, element: &mut Element<Bounded>, grad: Bounded) {
        let (theta, [sum, ..]) = element.split();
        *sum = at.sum([at.scaled(0.5, *sum), grad]);
        let lr = self.lr_of((step - 1) / 3 * 3);
        *theta = at.difference(*theta, at.scaled(lr, *sum));
    }
}
