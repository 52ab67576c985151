//! What gradients may have been multiplied by, and what of it outlives another control.

use wgpu_optim::{LossScale, StepControl};

/// A loss scale that is twice as large after each step.
pub fn dynamic(initial: f64) -> StepControl {
    let scale = LossScale {
        initial,
        growth_interval: 1,
        ..LossScale::default()
    };
    StepControl::builder().loss_scale(scale).build().unwrap()
}

fn constant(scale: f64) -> StepControl {
    StepControl::builder().grad_scale(scale).build().unwrap()
}

/// Controls that follow each other, and the scale of one step of each, after a step of `dynamic(65536.0)`.
pub fn in_turn() -> [(StepControl, f32); 8] {
    [
        (dynamic(8.0), 131_072.0),
        (StepControl::default(), 1.0),
        (constant(4.0), 4.0),
        (constant(0.5), 0.5),
        (dynamic(8.0), 8.0),
        (dynamic(1024.0), 16.0),
        (StepControl::default(), 1.0),
        (dynamic(1024.0), 1024.0),
    ]
}

/// One of each kind, and no two alike.
pub fn all() -> [StepControl; 4] {
    [
        StepControl::default(),
        constant(4.0),
        dynamic(8.0),
        dynamic(65536.0),
    ]
}

/// The scale of the next step when `now` has taken over what `before` remembered after one.
pub fn resumed(before: &StepControl, now: &StepControl) -> f32 {
    match (before.loss_scale(), now.loss_scale()) {
        (Some(before), Some(_)) => 2.0 * before.initial as f32,
        _ => now.initial_state().scale,
    }
}
