//! The steps that the device has applied, and what the host knows of them.

use super::*;
use wgpu_optim::Optimizer;

/// A device that has had its turn: what it has counted arrives without anybody reading it.
#[gpu_test]
async fn nobody_has_to_read_for_training_to_go_on() {
    let bench = Bench::best().await;
    let mut theta = bench.follow(adamw(), 100);
    let poisoned = theta.poisoned(99, f32::NAN);
    let mut control = bench.control(only_finite());
    for step in 0..400 {
        let is_poisoned = step % 4 == 3;
        let gradient = if is_poisoned {
            &poisoned
        } else {
            &theta.gradient
        };
        bench.upload(&theta.grads, gradient);
        bench.submit(|encoder| theta.step_with(encoder, &mut control));
        if !is_poisoned {
            theta.expect_step();
        }
        if step % 16 == 0 {
            // Not a word to the control or the optimizer.
            bench.download(&theta.params).await;
        }
    }
    theta.check().await;
    assert_eq!(control.steps(), 400);
    let records = bench.outcomes(&mut control).await;
    assert_eq!(
        (records[0].step, records.len()),
        (337, 64),
        "the last 64 are kept"
    );
    assert_eq!(records[63].skipped, 100);
    assert_eq!(theta.optimizer.applied_steps("theta"), Some(300));
}

#[gpu_test]
async fn a_state_counts_as_having_been_read() {
    let bench = Bench::best().await;
    let mut control = bench.control(only_finite());
    let mut theta = bench.follow(adamw(), 100);
    let poisoned = theta.poisoned(0, f32::INFINITY);
    for grad in [&theta.gradient, &poisoned, &theta.gradient] {
        bench.upload(&theta.grads, grad);
        bench.submit(|encoder| theta.optimizer.step_with(encoder, &mut control).unwrap());
    }
    let state = bench.wait(theta.optimizer.state()).await.unwrap();
    assert_eq!((state.steps, state.tensors[0].applied_steps), (3, 2));
    assert_eq!(theta.optimizer.applied_steps("theta"), Some(2));
    // A step without a control needs to know, and now does.
    bench.submit(|encoder| theta.optimizer.step(encoder).unwrap());
    assert_eq!(theta.optimizer.applied_steps("theta"), Some(3));
}

/// More than 64 steps in one encoder, all skipped: there are no scalars for what comes then, and that is said.
#[gpu_test]
async fn a_step_without_scalars_is_skipped_and_said_once() {
    let bench = Bench::best().await;
    let mut theta = bench.follow(adamw(), 100);
    let good = bench.buffer_of(&theta.gradient);
    let bad = bench.buffer_of(&theta.poisoned(99, f32::NAN));
    let mut control = bench.control(only_finite());
    let mut encoder = bench.encoder();
    // After 64 skipped steps there are scalars, and after 65 there are none.
    for step in 0..67 {
        let from = if [0, 65].contains(&step) { &good } else { &bad };
        let from = if step == 66 { &good } else { from };
        encoder.copy_buffer_to_buffer(from, 0, &theta.grads, 0, 400);
        theta.step_with(&mut encoder, &mut control);
        if [0, 65].contains(&step) {
            theta.expect_step();
        }
        if step == 65 {
            // One more skipped step, so that the next is too far ahead.
            encoder.copy_buffer_to_buffer(&bad, 0, &theta.grads, 0, 400);
            theta.step_with(&mut encoder, &mut control);
        }
    }
    bench.queue.submit([encoder.finish()]);
    let records = bench.outcomes(&mut control).await;
    let last = records.last().unwrap();
    assert_eq!(
        (last.step, last.is_skipped, last.found_nonfinite),
        (68, true, false)
    );
    theta.check().await;
    let mut encoder = bench.encoder();
    let said = theta.optimizer.step_with(&mut encoder, &mut control);
    assert_eq!(said, Err(StepError::TooFarAhead { step: 68 }));
    // It has been said, and all is known again.
    for _ in 0..3 {
        theta.step_with(&mut encoder, &mut control);
        theta.expect_step();
    }
    bench.queue.submit([encoder.finish()]);
    theta.check().await;
    bench.outcomes(&mut control).await;
    assert_eq!(theta.optimizer.applied_steps("theta"), Some(5));
    assert_eq!(theta.optimizer.steps(), 71);
}

/// More than 64 steps in one encoder, some of them skipped: there are scalars for the next, be it that they depend on the
/// number of steps and few were skipped, or that they do not.
#[gpu_test]
async fn scalars_that_never_change_are_there_however_many_steps_were_skipped() {
    for bench in Bench::both().await {
        let lion: AnyRule = LionConfig::builder(0.05).build().unwrap().into();
        for (rules, skipped) in [
            ([adamw(), lion.clone()], 1..4),
            ([lion.clone(), lion], 1..70),
        ] {
            let (start, gradient) = (values(1, 100), values(2, 100));
            let mut poisoned = gradient.clone();
            poisoned[99] = f32::NAN;
            let (good, bad) = (bench.buffer_of(&gradient), bench.buffer_of(&poisoned));
            let params = [(); 2].map(|()| bench.buffer_of(&start));
            let grads = bench.buffer_of(&gradient);
            let groups =
                ParamGroups::new(rules[0].clone()).with("b", rules[1].clone(), |name| name == "b");
            let tensors = [
                whole("a", &params[0], &grads),
                whole("b", &params[1], &grads),
            ];
            let mut optimizer =
                GpuOptimizer::with_groups(&bench.kernels, &groups.unwrap(), &tensors).unwrap();
            let mut control = bench.control(only_finite());
            let mut oracles = [(); 2].map(|()| Oracle::new(&start, Roundoff::WGSL));
            bench.submit(|encoder| {
                for step in 0..75 {
                    let is_skipped = skipped.contains(&step);
                    let from = if is_skipped { &bad } else { &good };
                    encoder.copy_buffer_to_buffer(from, 0, &grads, 0, 400);
                    optimizer.step_with(encoder, &mut control).unwrap();
                    for (oracle, rule) in oracles.iter_mut().zip(&rules) {
                        if !is_skipped {
                            oracle.step(rule, &gradient);
                        }
                    }
                }
            });
            let records = bench.outcomes(&mut control).await;
            assert_eq!(records.last().unwrap().skipped, skipped.len() as u64);
            for (oracle, params) in oracles.iter_mut().zip(&params) {
                oracle.check_params(&bench.download(params).await).unwrap();
            }
            bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
            bench.outcomes(&mut control).await;
            let applied = Some(76 - skipped.len() as u64);
            assert_eq!(
                ["a", "b"].map(|name| optimizer.applied_steps(name)),
                [applied; 2]
            );
        }
    }
}

/// wgpu calls back for a submission's buffers before it calls back for the submission: who looks in between, on another
/// thread, takes no report for one whose steps may still be on their way.
#[cfg(not(target_arch = "wasm32"))]
#[gpu_test]
async fn reports_are_taken_when_their_submission_is_done() {
    use std::sync::mpsc::channel;

    let bench = Bench::best().await;
    let mut theta = bench.follow(adamw(), 100);
    let mut control = bench.control(only_finite());
    let mapped = bench.device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 4,
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let (is_between, between) = channel();
    let (goes_on, go_on) = channel();
    bench.submit(|encoder| {
        for _ in 0..75 {
            theta.step_with(encoder, &mut control);
            theta.expect_step();
        }
        encoder.clear_buffer(&mapped, 0, None);
        encoder.map_buffer_on_submit(&mapped, wgpu::MapMode::Read, .., move |_| {
            is_between.send(()).unwrap();
            go_on.recv().unwrap();
        });
    });
    let mut encoder = bench.encoder();
    std::thread::scope(|scope| {
        scope.spawn(|| bench.device.poll(wgpu::PollType::wait_indefinitely()));
        between.recv().unwrap();
        theta.step_with(&mut encoder, &mut control);
        goes_on.send(()).unwrap();
    });
    bench.queue.submit([encoder.finish()]);
    theta.expect_step();
    bench.outcomes(&mut control).await;
    bench.submit(|encoder| theta.step_with(encoder, &mut control));
    theta.expect_step();
    bench.outcomes(&mut control).await;
    theta.check().await;
    assert_eq!(theta.optimizer.applied_steps("theta"), Some(77));
}

/// A submission that wgpu refuses has not been made: what lies in its report's buffer is another step's.
#[cfg(not(target_arch = "wasm32"))]
#[gpu_test]
async fn a_submission_that_fails_is_no_step() {
    for bench in Bench::both().await {
        let mut theta = bench.follow(adamw(), 100);
        let mut control = bench.control(only_finite());
        let mut steps = 0;
        for step in 0..12 {
            let fails = [0, 4, 5, 9].contains(&step);
            let mut encoder = bench.encoder();
            theta.step_with(&mut encoder, &mut control);
            let scope = bench.device.push_error_scope(wgpu::ErrorFilter::Validation);
            if fails {
                encoder.copy_buffer_to_buffer(&theta.grads, 0, &theta.params, 400, 400);
            } else {
                theta.expect_step();
                steps += 1;
            }
            bench.queue.submit([encoder.finish()]);
            assert_eq!(scope.pop().await.is_some(), fails);
            theta.check().await;
            if step % 3 == 2 {
                control.read();
                assert_eq!(theta.optimizer.applied_steps("theta"), Some(steps));
            }
        }
        let state = bench.wait(theta.optimizer.state()).await.unwrap();
        assert_eq!(state.tensors[0].applied_steps, steps);
    }
}

/// Counts that are set stay set, whatever is on its way of other tensors.
#[gpu_test]
async fn counts_that_are_set_stay_while_others_are_on_their_way() {
    for bench in Bench::both().await {
        let gradient = values(2, 64);
        let buffers = [1, 2].map(|seed| {
            (
                bench.buffer_of(&values(seed, 64)),
                bench.buffer_of(&gradient),
            )
        });
        let tensors: Vec<_> = ["a", "b"]
            .iter()
            .zip(&buffers)
            .map(|(name, (params, grads))| whole(name, params, grads))
            .collect();
        let mut optimizer = GpuOptimizer::new(&bench.kernels, adamw(), &tensors).unwrap();
        let mut control = bench.control(only_finite());
        for _ in 0..3 {
            bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
        }
        optimizer.set_applied_steps("a", 1000).unwrap();
        let state = bench.wait(optimizer.state()).await.unwrap();
        let applied = |state: &wgpu_optim::OptimizerState<AnyRule>| {
            let tensors = state.tensors.iter();
            tensors
                .map(|tensor| tensor.applied_steps)
                .collect::<Vec<_>>()
        };
        assert_eq!(applied(&state), [1000, 3]);
        bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
        optimizer.set_applied_steps("b", 7).unwrap();
        // One that was recorded before comes after it.
        let mut encoder = bench.encoder();
        optimizer.step_with(&mut encoder, &mut control).unwrap();
        optimizer.set_applied_steps("a", 20).unwrap();
        bench.queue.submit([encoder.finish()]);
        let state = bench.wait(optimizer.state()).await.unwrap();
        assert_eq!(applied(&state), [21, 8]);
        bench.outcomes(&mut control).await;
        assert_eq!(optimizer.applied_steps("a"), Some(21));
        assert_eq!(optimizer.applied_steps("b"), Some(8));
    }
}

/// What a control has skipped before an optimizer was there is nothing to it.
#[gpu_test]
async fn an_optimizer_that_comes_later_starts_afresh() {
    let bench = Bench::best().await;
    let mut theta = bench.follow(adamw(), 100);
    bench.upload(&theta.grads, &theta.poisoned(0, f32::NAN));
    let mut first = bench.optimizer(adamw(), &theta.params, &theta.grads);
    let mut control = bench.control(only_finite());
    bench.submit(|encoder| {
        for _ in 0..63 {
            first.step_with(encoder, &mut control).unwrap();
        }
    });
    bench.upload(&theta.grads, &theta.gradient);
    bench.submit(|encoder| {
        for _ in 0..10 {
            theta.step_with(encoder, &mut control);
            theta.expect_step();
        }
    });
    theta.check().await;
    bench.outcomes(&mut control).await;
    assert_eq!(theta.optimizer.applied_steps("theta"), Some(10));
}

#[gpu_test]
async fn counts_are_saved_loaded_and_needed_by_steps_without_a_control() {
    for bench in Bench::both().await {
        let mut theta = bench.follow(adamw(), 1003);
        let poisoned = theta.poisoned(1002, f32::INFINITY);
        let mut control = bench.control(only_finite());
        for grad in [&theta.gradient, &poisoned, &theta.gradient, &poisoned] {
            bench.upload(&theta.grads, grad);
            bench.submit(|encoder| theta.optimizer.step_with(encoder, &mut control).unwrap());
        }
        theta.expect_step();
        theta.expect_step();
        let state = bench.wait(theta.optimizer.state()).await.unwrap();
        assert_eq!((state.steps, state.tensors[0].applied_steps), (4, 2));
        // One that is recorded may still be submitted.
        let mut open = bench.encoder();
        theta.step_with(&mut open, &mut control);
        let mut encoder = bench.encoder();
        assert_eq!(theta.optimizer.step(&mut encoder), Err(StepError::Unread));
        let mut other = bench.control(only_finite());
        let refused = theta.optimizer.step_with(&mut encoder, &mut other);
        assert_eq!(refused, Err(StepError::Unread));
        drop((encoder, open));
        bench.outcomes(&mut control).await;
        assert_eq!(theta.optimizer.applied_steps("theta"), Some(2));
        // By turns without a control, with another one, and with the first again.
        bench.upload(&theta.grads, &theta.gradient);
        bench.submit(|encoder| theta.optimizer.step(encoder).unwrap());
        bench.submit(|encoder| theta.step_with(encoder, &mut other));
        bench.outcomes(&mut other).await;
        bench.submit(|encoder| theta.step_with(encoder, &mut control));
        for _ in 0..3 {
            theta.expect_step();
        }
        theta.check().await;

        // What is on its way when a state is loaded is not mistaken for it.
        theta.oracle = Oracle::resume(&adamw(), &theta.start, &state.tensors[0], Roundoff::WGSL);
        bench.upload(&theta.params, &theta.start);
        theta.optimizer.load_state(&state).unwrap();
        bench.outcomes(&mut control).await;
        assert_eq!(theta.optimizer.applied_steps("theta"), Some(2));
        for grad in [&poisoned, &theta.gradient] {
            bench.upload(&theta.grads, grad);
            bench.submit(|encoder| theta.optimizer.step_with(encoder, &mut control).unwrap());
        }
        theta.expect_step();
        theta.check().await;
        bench.outcomes(&mut control).await;
        assert_eq!(theta.optimizer.applied_steps("theta"), Some(3));

        // The scale goes on, too.
        let scale = StepControl::builder()
            .loss_scale(LossScale::default())
            .build()
            .unwrap();
        let mut scaled = bench.control(scale);
        let mut state = bench.wait(scaled.state()).await.unwrap();
        assert_eq!((state.scale, state.growth_tracker), (65536.0, 0));
        (state.scale, state.growth_tracker) = (
            2.0,
            if bench.kernels.scalar_path() == ScalarPath::Uniforms {
                u32::MAX
            } else {
                1999
            },
        );
        scaled.load_state(&state).unwrap();
        let mut scaled = scaled;
        bench.submit(|encoder| theta.step_with(encoder, &mut scaled));
        let state = bench.wait(scaled.state()).await.unwrap();
        assert_eq!((state.scale, state.growth_tracker), (4.0, 0));
    }
}
