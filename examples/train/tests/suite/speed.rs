//! Tests of the speed that the example is there to show.

use indicatif::ProgressBar;
use train::comparison::{compare, median, steps_to};
use train::contender::{Contender, learning_rates};
use train::cpu::Twin;
use train::training::Device;

use crate::task;

/// Plain descent at the best of eleven learning rates, and momentum at the same one, from every start.
#[test]
fn momentum_takes_half_the_steps_at_most() {
    let task = task(256, 80);
    let starts = [task.start(0), task.start(1)];
    let typed = ["plain", "momentum@same", "nesterov@same"];
    let contenders: Vec<Contender> = typed.iter().map(|text| text.parse().unwrap()).collect();
    let progress = ProgressBar::hidden();
    let lrs = learning_rates(&task, &contenders, &starts, &progress).unwrap();
    assert!(lrs.iter().all(|lr| *lr == lrs[0]), "{lrs:?}");
    let contenders: Vec<_> = contenders.into_iter().zip(lrs).collect();
    let twin: &dyn Device = &Twin::new(&task);
    let comparison = compare(&task, &contenders, &starts, &[twin], &progress).unwrap();
    let [plain, faster @ ..] = comparison.contenders.as_slice() else {
        panic!("no contender");
    };
    for faster in faster {
        for (plain, faster) in plain.runs[0].iter().zip(&faster.runs[0]) {
            let (plain, faster) = (plain.steps.unwrap(), faster.steps.unwrap());
            assert!(2 * faster <= plain, "{faster} against {plain} steps");
        }
    }
}

#[test]
fn the_first_evaluation_at_the_target_counts() {
    let losses = [1.0, 0.5, f32::NAN, 0.25, 0.3, 0.2];
    assert_eq!(steps_to(&losses, 0.25, 10), Some(30));
    assert_eq!(steps_to(&losses, 0.1, 10), None);
    assert_eq!(median([Some(3.0), None, Some(1.0)]), 3.0);
    assert_eq!(median([None, None, Some(1.0)]), f64::INFINITY);
}
