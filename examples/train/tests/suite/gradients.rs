//! The twin's gradients: against differences of the loss, and within their bound.

use train::cpu::Network;
use wgpu_optim::oracle::{Arithmetic, Bounded, Roundoff};

use crate::bounds::{exactly, gradients, outside, widest};
use crate::task;

const AT: Arithmetic = Arithmetic::new(Roundoff::NEAREST);

/// Differences over `2h` of a loss in `f64`: that has fewer than 1000 roundings of a number below 4, each worth 1.1e-16
/// of it, which is 2.2e-7 of the quotient; the third derivatives, below 1e4, leave `h^2/6` of that, 2e-9. No row changes
/// the side of softsign's kink within `h` (its second derivative jumps there), or that row would show.
#[test]
fn gradients_are_differences_of_the_loss() {
    let h = 1e-6;
    let task = task(50, 1);
    let start = task.start(3);
    let batch = task.batch(2);
    let params = exactly(&start.params);
    let of = |params: &[Vec<Bounded>]| gradients(&task, &start.order, params, batch, AT);
    let grads = of(&params).grads;
    for (tensor, grads) in grads.iter().enumerate() {
        for (index, grad) in grads.iter().enumerate() {
            let loss = |dx: f64| {
                let mut moved = params.clone();
                moved[tensor][index].exact += dx;
                of(&moved).loss.exact
            };
            let slope = (loss(h) - loss(-h)) / (2.0 * h);
            let off = (slope - grad.exact).abs();
            assert!(off < 2.3e-7, "{tensor}[{index}]: {slope} {}", grad.exact);
        }
    }
}

#[test]
fn twin_stays_within_the_bound_of_every_batch() {
    for batch_rows in [1, 7, 100, 1280, 5000] {
        let task = task(batch_rows, 1);
        let start = task.start(batch_rows as u64);
        let params = exactly(&start.params);
        let mut network = Network::new(&task, &start);
        // The first, and the last, which has what is left.
        for step in [0, task.steps_per_epoch() - 1] {
            let batch = task.batch(step);
            let loss = network.loss(batch);
            network.gradients(batch);
            let bound = gradients(&task, &start.order, &params, batch, AT);
            assert_eq!(outside([&loss], [&bound.loss]), 0);
            let grads = network.grads.iter().flatten();
            assert_eq!(outside(grads, bound.grads.iter().flatten()), 0);
        }
    }
}

/// A bound that holds of anything proves nothing: it is narrow, and what leaves out a row is outside.
#[test]
fn bound_is_narrow() {
    let task = task(100, 1);
    let start = task.start(1);
    let params = exactly(&start.params);
    let mut network = Network::new(&task, &start);
    let batch = task.batch(0);
    let bound = gradients(&task, &start.order, &params, batch, AT);
    let largest = bound.grads.iter().flatten().map(|g| g.exact.abs());
    let largest = largest.fold(0.0, f64::max);
    let widest = widest(bound.grads.iter().flatten());
    assert!(widest < 1e-3 * largest, "{widest} of {largest}");

    let mut without_a_row = batch;
    without_a_row.rows -= 1;
    network.loss(without_a_row);
    network.gradients(without_a_row);
    let grads = network.grads.iter().flatten();
    let wrong = outside(grads, bound.grads.iter().flatten());
    assert!(wrong > task.model.numel() * 9 / 10, "{wrong}");
}
