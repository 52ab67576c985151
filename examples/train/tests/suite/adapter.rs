//! Tests on an adapter: gradients and steps within their bounds, one submit for each batch, and runs that repeat.

use std::sync::{Mutex, MutexGuard, PoisonError};

use train::cpu::Twin;
use train::gpu::Engine;
use train::task::Task;
use train::training::{Device, Gradients, Run as _, train};
use wgpu_optim::oracle::{Arithmetic, Bounded, Element, Oracle, Roundoff, Textbook as _};
use wgpu_optim::readback::block_on;
use wgpu_optim::rules::MAX_SLOTS;
use wgpu_optim::{AdapterRequest, AnyRule, CpuOptimizer, Gpu, StorageType, wgpu};

use crate::bounds::{exactly, gradients, outside, widest};
use crate::{rules, task};

/// Two cores are enough for one software adapter at a time.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn engine(task: &Task) -> Engine<'_> {
    engine_with(task, Gradients::default())
}

fn engine_with(task: &Task, gradients: Gradients) -> Engine<'_> {
    let request = AdapterRequest {
        backends: wgpu::Backends::from_env().unwrap_or(wgpu::Backends::PRIMARY),
        ..AdapterRequest::default()
    };
    let gpu = Gpu::open_blocking(&request).unwrap_or_else(|error| {
        panic!("{error}. This test needs a wgpu adapter; `cargo xtask test` installs one")
    });
    Engine::with_gradients(gpu, task, gradients).unwrap()
}

/// Gradients of batches that do not divide the data, the last one included, are within their bounds at parameters that
/// training has reached.
#[test]
fn gradients_stay_within_their_bound() {
    let _one = one_at_a_time();
    for (batch_rows, before) in [(1, 9), (100, 12), (100, 24), (256, 7), (5000, 3)] {
        let task = task(batch_rows, 10);
        let start = task.start(5);
        let engine = engine(&task);
        let [_, momentum, ..] = rules(0.05);
        let mut run = engine.run(&momentum, &start, false).unwrap();
        for _ in 0..before {
            run.step().unwrap();
        }
        let params = exactly(&run.params().unwrap());
        run.step().unwrap();
        let at = Arithmetic::new(Roundoff::WGSL);
        let bound = gradients(&task, &start.order, &params, task.batch(before), at);
        let loss = run.losses().unwrap().batches[before];
        assert_eq!(outside([&loss], [&bound.loss]), 0);
        let grads = run.grads().unwrap();
        let wrong = outside(grads.iter().flatten(), bound.grads.iter().flatten());
        assert_eq!(wrong, 0, "{batch_rows} rows");
        // The bound itself is narrow, and of other rows the gradients are others.
        let other = gradients(&task, &start.order, &params, task.batch(before + 1), at);
        let wrong = outside(grads.iter().flatten(), other.grads.iter().flatten());
        assert!(
            wrong > task.model.numel() / 2 || batch_rows == 5000,
            "{wrong}"
        );
    }
}

/// The next step of device and twin is within the oracle's bound of each, whatever a run has come to: every few steps
/// the twin takes over the device's parameters, state and gradients.
#[test]
fn steps_along_a_run_stay_within_the_oracles_bound() {
    let _one = one_at_a_time();
    let task = task(100, 4);
    let start = task.start(11);
    let engine = engine(&task);
    for rule in rules(0.05) {
        let mut run = engine.run(&rule, &start, false).unwrap();
        let mut twin = CpuOptimizer::new(rule.clone(), task.model.tensors()).unwrap();
        for step in 0..task.steps() {
            if step % 7 != 0 {
                run.step().unwrap();
                continue;
            }
            let before = run.params().unwrap();
            let state = block_on(&engine.gpu().device, run.optimizer().state()).unwrap();
            run.step().unwrap();
            let (after, grads) = (run.params().unwrap(), run.grads().unwrap());

            let mut by_twin = before.clone();
            let mut params: Vec<_> = by_twin.iter_mut().map(Vec::as_mut_slice).collect();
            let of_step: Vec<_> = grads.iter().map(Vec::as_slice).collect();
            twin.load_state(&state).unwrap();
            twin.step(&mut params, &of_step).unwrap();
            for (index, grads) in grads.iter().enumerate() {
                let expect = |rounding, params: &[f32]| {
                    let state = &state.tensors[index];
                    let mut oracle = Oracle::resume(&rule, &before[index], state, rounding);
                    oracle.step(&rule, grads);
                    let agreement = oracle.check_params(params);
                    agreement.unwrap_or_else(|error| panic!("step {step} of {rule:?}: {error}"));
                };
                expect(Roundoff::WGSL, &after[index]);
                expect(Roundoff::NEAREST, &by_twin[index]);
            }
        }
    }
}

/// The whole recurrence, gradients at parameters that are ranges already: from the start on, device and twin are both
/// within the ranges of the exact run, for as long as these say something. They grow by a factor a step, because the
/// analysis has to take every error at its worst, so this can be proved of the first steps only. Later ones are held step
/// by step, above.
#[test]
fn first_steps_stay_within_the_bound_of_the_whole_run() {
    /// The widest range that still says something of parameters between -1 and 1.
    const WIDEST: f64 = 1e-2;

    let _one = one_at_a_time();
    let task = task(100, 10);
    let start = task.start(4);
    let engine = engine(&task);
    let twin = Twin::new(&task);
    let [plain, momentum, nesterov, _] = rules(0.01);
    for (rule, at_least) in [(plain, 40), (momentum, 20), (nesterov, 15)] {
        let at = Arithmetic::new(Roundoff::WGSL);
        let mut params = exactly(&start.params);
        let zeros = |values: &Vec<_>| vec![[Bounded::default(); MAX_SLOTS]; values.len()];
        let mut state: Vec<_> = params.iter().map(zeros).collect();
        let mut on_device = engine.run(&rule, &start, false).unwrap();
        let mut on_twin = twin.run(&rule, &start, false).unwrap();
        let mut steps = 0;
        while widest(params.iter().flatten()) < WIDEST {
            let bound = gradients(&task, &start.order, &params, task.batch(steps), at);
            steps += 1;
            for ((params, state), grads) in params.iter_mut().zip(&mut state).zip(&bound.grads) {
                for ((theta, slots), grad) in params.iter_mut().zip(state).zip(grads) {
                    let mut element = Element::new(*theta, *slots);
                    rule.bound(steps as u64, at, &mut element, *grad);
                    (*theta, *slots) = (element.theta, element.slots);
                }
            }
            on_device.step().unwrap();
            on_twin.step().unwrap();
            let ranges = || params.iter().flatten();
            let of_device = on_device.params().unwrap();
            assert_eq!(outside(of_device.iter().flatten(), ranges()), 0, "{rule:?}");
            let of_twin = &on_twin.network().params;
            assert_eq!(outside(of_twin.iter().flatten(), ranges()), 0, "{rule:?}");
        }
        assert!(steps >= at_least, "{steps} steps of {rule:?}");
    }
}

/// Losses of device and twin agree to a thousandth: not a bound but what a run can be relied on for; the bounds are
/// above. Roundoff moves a parameter by 3e-6 a step at most (the first range of the analysis at this learning rate),
/// which 130 steps add up to 4e-4. Where the loss curves upwards a step shrinks what differs, and along the few
/// steepest directions, where it does not, the learning rate is far from where it would swing. So losses, whose slopes
/// are of the order of one, agree to a thousandth.
#[test]
fn losses_of_device_and_twin_agree() {
    let _one = one_at_a_time();
    let task = task(100, 10);
    let start = task.start(8);
    let (engine, twin) = (engine(&task), Twin::new(&task));
    for rule in rules(0.03) {
        let losses = |device: &dyn Device| {
            let run = (&rule, &start);
            let trained = train(device, run, (task.steps(), true));
            trained.unwrap().losses
        };
        let (of_device, of_twin) = (losses(&engine), losses(&twin));
        let pairs = [
            (of_device.batches, of_twin.batches),
            (of_device.train, of_twin.train),
            (of_device.held_out, of_twin.held_out),
        ];
        for (of_device, of_twin) in pairs {
            assert_eq!(of_device.len(), of_twin.len());
            for (a, b) in of_device.iter().zip(&of_twin) {
                assert!((a - b).abs() < 1e-3 * b, "{a} and {b} of {rule:?}");
            }
        }
    }
}

/// A batch is one submit by the engine's count, and without a control by the number that wgpu gives each submission of
/// a device: nobody else submits. That a controlled step does not is the library's own test.
#[test]
fn a_batch_is_one_submit() {
    let _one = one_at_a_time();
    let task = task(100, 2);
    let start = task.start(1);
    let engines = [engine(&task), engine_with(&task, Gradients::f16().unwrap())];
    for (is_controlled, evaluates) in [(false, false), (false, true), (true, false), (true, true)] {
        let engine = &engines[usize::from(is_controlled)];
        for rule in rules(0.05) {
            let mut run = engine.run(&rule, &start, evaluates).unwrap();
            let number = || {
                let submission = engine.gpu().queue.submit([]);
                let digits = format!("{submission:?}");
                let digits: String = digits.chars().filter(char::is_ascii_digit).collect();
                digits.parse::<usize>().unwrap()
            };
            let (counted, numbered) = (engine.submissions(), number());
            for step in 1..=task.steps() {
                run.step().unwrap();
                assert_eq!(engine.submissions() - counted, step);
            }
            run.wait().unwrap();
            // wgpu takes numbers for callbacks, too, without a submission: of a step one tells that it is done. Under a
            // control there are those of the buffers that it maps besides.
            if !is_controlled {
                assert_eq!(number() - numbered - 1, 2 * task.steps());
            }
        }
    }
}

#[test]
fn runs_repeat_bit_for_bit() {
    let _one = one_at_a_time();
    let task = task(300, 4);
    let (start, other) = (task.start(1), task.start(2));
    let engine = engine(&task);
    let run = |rule: &AnyRule, start| {
        let mut run = engine.run(rule, start, true).unwrap();
        for _ in 0..task.steps() {
            run.step().unwrap();
        }
        run.wait().unwrap();
        (run.losses().unwrap(), run.params().unwrap())
    };
    for rule in rules(0.05) {
        let first = run(&rule, &start);
        assert_ne!(run(&rule, &other), first);
        assert_eq!(run(&rule, &start), first);
    }
}

/// Momentum takes at most half the steps of plain descent, with the configuration of the twin's test.
#[test]
fn momentum_takes_half_the_steps_at_most() {
    let _one = one_at_a_time();
    let task = task(256, 40);
    let start = task.start(0);
    let engine = engine(&task);
    let [plain, momentum, ..] = rules(0.25);
    let losses = |rule: &AnyRule| {
        let run = (rule, &start);
        let trained = train(&engine, run, (task.steps(), true));
        trained.unwrap().losses.train
    };
    let plain = losses(&plain);
    let least = plain.iter().copied().fold(f32::INFINITY, f32::min);
    let epochs = |losses: &[f32]| losses.iter().position(|loss| *loss <= least).unwrap();
    let (plain, momentum) = (epochs(&plain), epochs(&losses(&momentum)));
    assert!(2 * momentum <= plain, "{momentum} against {plain} epochs");
}

/// Gradients of 16 bits end at the loss of `f32`, far below the learning rates at which the loss jumps from step to
/// step and runs part by a rounding.
#[test]
fn gradients_of_16_bits_end_at_the_loss_of_f32() {
    let _one = one_at_a_time();
    let task = task(256, 30);
    let start = task.start(0);
    let of_f16 = Gradients::f16().unwrap();
    let f32_engine = engine_with(&task, Gradients::f32_clipped().unwrap());
    let f16_engine = engine_with(&task, of_f16.clone());
    let twin = Twin::with_gradients(&task, of_f16);
    for rule in rules(0.01) {
        let of_f32 = train(&f32_engine, (&rule, &start), (task.steps(), true)).unwrap();
        assert_eq!(of_f32.outcome.unwrap().skipped, 0);
        let at_end = of_f32.losses.train.last().unwrap();
        assert!(*at_end < of_f32.losses.train[0]);
        for device in [&f16_engine as &dyn Device, &twin] {
            let of_f16 = train(device, (&rule, &start), (task.steps(), true)).unwrap();
            let (loss, outcome) = (of_f16.losses.train.last().unwrap(), of_f16.outcome.unwrap());
            let apart = (loss - at_end).abs() / at_end;
            assert!(apart < 0.02, "{loss} and {at_end} of {rule:?}");
            assert!(
                outcome.skipped >= 2 && outcome.scale < 16_777_216.0,
                "{outcome:?}"
            );
        }
    }
}

/// The scale begins too high, falls, grows back and overflows again; and the first steps that are applied are clipped.
#[test]
fn a_loss_scale_falls_grows_and_overflows_again() {
    let _one = one_at_a_time();
    let task = task(256, 40);
    let start = task.start(0);
    let engine = engine_with(&task, Gradients::f16().unwrap());
    let [_, momentum, ..] = rules(0.01);
    let mut run = engine.run(&momentum, &start, false).unwrap();
    for _ in 0..task.steps() {
        run.step().unwrap();
    }
    run.wait().unwrap();
    let (records, outcome) = (run.records(), run.outcome().unwrap().unwrap());
    assert!(records[0].is_skipped && records[0].scale == 16_777_216.0);
    let applied = records.iter().position(|record| !record.is_skipped);
    let later = &records[applied.unwrap()..];
    assert!(later.iter().any(|record| record.is_skipped));
    let grows = |pair: &[wgpu_optim::control::ControlRecord]| pair[1].scale > pair[0].scale;
    assert!(later.windows(2).any(grows));
    assert!(later.iter().any(|record| record.clip_factor < 1.0));
    let last = records.last().unwrap();
    assert!(last.skipped <= outcome.skipped && outcome.skipped < task.steps() as u64 / 4);
}

/// The nearest f16 to what the other engine stores as f32, by a scale that is a power of two and thus exact; where that is
/// beyond, infinity. Some tensors are of odd lengths, so their last words are half full.
#[test]
fn gradients_of_16_bits_are_those_of_32_rounded() {
    let _one = one_at_a_time();
    let task = task(100, 1);
    let start = task.start(2);
    let [plain, ..] = rules(0.05);
    let grads = |gradients| {
        let engine = engine_with(&task, gradients);
        let mut run = engine.run(&plain, &start, false).unwrap();
        run.step().unwrap();
        run.grads().unwrap().concat()
    };
    let exact = grads(Gradients::default());
    for scale in [1.0 / 1024.0, 1.0, 1024.0, 16_777_216.0_f32] {
        let control = wgpu_optim::StepControl::builder().loss_scale(wgpu_optim::LossScale {
            initial: scale.into(),
            ..wgpu_optim::LossScale::default()
        });
        let stored = grads(Gradients {
            stored_as: StorageType::F16,
            control: Some(control.build().unwrap()),
        });
        assert_eq!(stored.len(), task.model.numel());
        for (stored, exact) in stored.iter().zip(&exact) {
            // Compilers may contract the sums of one pipeline and not of the other.
            let near = |by: f32| StorageType::F16.rounded(exact * scale * by);
            let (a, b) = (near(1.0 - 1e-4), near(1.0 + 1e-4));
            assert!(
                a.min(b) <= *stored && *stored <= a.max(b),
                "{stored} of {exact} by {scale}"
            );
        }
        let overflows = stored.iter().any(|grad| grad.is_infinite());
        assert_eq!(overflows, scale > 65536.0);
    }
}
