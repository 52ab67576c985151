//! Orders of recorded, dropped and submitted steps that once came out wrong, each alone.

use super::*;
use wgpu_optim::Optimizer;

/// egui's callbacks record into an encoder that egui drops where the window has no texture.
#[gpu_test]
async fn an_encoder_of_an_engine_is_dropped_every_third_frame() {
    let (start, gradient) = (values(1, 1003), values(2, 1003));
    for bench in benches().await {
        let has_ring = bench.kernels.scalar_path() == ScalarPath::Uniforms;
        for control in [
            None,
            Some(StepControl::builder().max_norm(1.0).build().unwrap()),
        ] {
            let (params, grads) = (bench.buffer_of(&start), bench.buffer_of(&gradient));
            let tensor = [whole("theta", &params, &grads)];
            let rule = preset("adamw", None);
            let mut optimizer = GpuOptimizer::new(&bench.kernels, rule.clone(), &tensor).unwrap();
            let mut oracle = Oracle::new(&start, Roundoff::WGSL);
            let mut decisions = control
                .as_ref()
                .map(|c| ControlOracle::new(c, Roundoff::WGSL));
            let control = control.map(|control| GpuControl::new(&bench.kernels, control));
            let mut control = control.transpose().unwrap();
            let mut done = 0;
            for frame in 0..18 {
                let mut encoder = bench.encoder();
                match &mut control {
                    Some(control) => control.prepare(&mut encoder, &mut [&mut optimizer]),
                    None => optimizer.prepare(&mut encoder),
                }
                .unwrap();
                if frame % 9 == 8 {
                    // What has been prepared there is not prepared any more.
                    drop(encoder);
                    let mut encoder = bench.encoder();
                    let mut pass =
                        encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                    let recorded = match &mut control {
                        Some(control) => control.record(&mut pass, &mut [&mut optimizer]),
                        None => optimizer.record(&mut pass),
                    };
                    let needs_it = has_ring || control.is_some();
                    let refused = Err(StepError::NotPrepared);
                    assert_eq!(recorded, if needs_it { refused } else { Ok(()) });
                    continue;
                }
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                match &mut control {
                    Some(control) => control.record(&mut pass, &mut [&mut optimizer]),
                    None => optimizer.record(&mut pass),
                }
                .unwrap();
                drop(pass);
                if let Some(control) = &mut control {
                    control.report(&mut encoder);
                }
                match frame % 9 {
                    2 => drop(encoder),
                    5 => drop(encoder.finish()),
                    _ => {
                        bench.queue.submit([encoder.finish()]);
                        match &mut decisions {
                            Some(decisions) => {
                                let decision = decisions.decide(&[("default", &gradient)]);
                                oracle.step_by(&rule, &gradient, &decision.of_group("default"));
                            }
                            None => oracle.step(&rule, &gradient),
                        }
                        done += 1;
                    }
                }
                assert_eq!(optimizer.steps(), done);
                oracle.check_params(&bench.download(&params).await).unwrap();
            }
            if let Some(control) = &mut control {
                let norms: Vec<_> = control.read().iter().map(|record| record.norm).collect();
                assert_eq!(norms.len(), done as usize);
                assert!(norms.iter().all(|norm| *norm == norms[0] && *norm > 1.0));
                assert_eq!(control.steps(), done);
            }
            assert_eq!(optimizer.applied_steps("theta"), Some(done));
        }
    }
}

/// State is on its way into other buffers, and what was recorded before goes on in the old ones.
#[gpu_test]
async fn a_state_does_not_overtake_the_steps_before_a_rebind() {
    for bench in benches().await {
        let (start, gradient) = (values(1, 100), values(2, 100));
        let (params, grads) = (bench.buffer_of(&start), bench.buffer_of(&gradient));
        let halves = |name, at| {
            TensorBinding::new(name, &params, &grads, [50])
                .params_at(at)
                .grads_at(at)
        };
        let tensors = [halves("a", 0), halves("b", 200)];
        let mut optimizer = GpuOptimizer::new(&bench.kernels, momentum(), &tensors).unwrap();
        let mut first = bench.encoder();
        optimizer.step(&mut first).unwrap();
        let mut second = bench.encoder();
        optimizer.rebind(&mut second, &tensors).unwrap();
        optimizer.step(&mut second).unwrap();
        let state = bench.wait(optimizer.state()).await.unwrap();
        assert_eq!((state.steps, state.tensors[0].applied_steps), (0, 0));
        bench.queue.submit([first.finish(), second.finish()]);
        let mut oracle = Oracle::new(&start, Roundoff::WGSL);
        oracle.step(&momentum(), &gradient);
        oracle.step(&momentum(), &gradient);
        oracle.check_params(&bench.download(&params).await).unwrap();
    }
}

/// The numbers of a loaded state are those of what was submitted before.
#[gpu_test]
async fn a_state_that_is_loaded_stands_for_what_was_submitted_before() {
    for bench in benches().await {
        let (params, grads) = (bench.buffer(8), bench.buffer(8));
        let tensor = [whole("theta", &params, &grads)];
        let mut optimizer = GpuOptimizer::new(&bench.kernels, momentum(), &tensor).unwrap();
        let control = StepControl::builder().build().unwrap();
        let mut control = GpuControl::new(&bench.kernels, control).unwrap();
        bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
        let state = bench.wait(optimizer.state()).await.unwrap();
        bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
        bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
        optimizer.load_state(&state).unwrap();
        bench.outcomes(&mut control).await;
        assert_eq!(bench.wait(optimizer.state()).await.unwrap(), state);
        assert_eq!(
            (optimizer.steps(), optimizer.applied_steps("theta")),
            (1, Some(1))
        );
    }
}

/// What was in flight when somebody looked has not been seen.
#[gpu_test]
async fn a_state_says_nothing_of_what_is_submitted_later() {
    for bench in benches().await {
        let (start, gradient) = (values(1, 100), values(2, 100));
        let (params, grads) = (bench.buffer_of(&start), bench.buffer_of(&gradient));
        let tensor = [whole("theta", &params, &grads)];
        let rule = preset("adamw", None);
        let mut optimizer = GpuOptimizer::new(&bench.kernels, rule.clone(), &tensor).unwrap();
        let control = StepControl::builder().build().unwrap();
        let mut control = GpuControl::new(&bench.kernels, control).unwrap();
        let mut encoder = bench.encoder();
        for _ in 0..3 {
            optimizer.step_with(&mut encoder, &mut control).unwrap();
        }
        bench.wait(optimizer.state()).await.unwrap();
        bench.queue.submit([encoder.finish()]);
        bench
            .device
            .poll(wgpu::PollType::wait_indefinitely())
            .unwrap();
        // Nobody has read of them.
        let mut encoder = bench.encoder();
        assert_eq!(optimizer.step(&mut encoder), Err(StepError::Unread));
        bench.outcomes(&mut control).await;
        bench.submit(|encoder| optimizer.step(encoder).unwrap());
        let mut oracle = Oracle::new(&start, Roundoff::WGSL);
        (0..4).for_each(|_| oracle.step(&rule, &gradient));
        oracle.check_params(&bench.download(&params).await).unwrap();
        assert_eq!(optimizer.applied_steps("theta"), Some(4));
    }
}

/// What is submitted and not done yet is part of one tensor's count, and not of another's that was set behind it.
#[gpu_test]
async fn tensors_share_no_scalars_where_a_count_was_set_behind_steps_on_their_way() {
    for bench in benches().await {
        let gradient = values(2, 64);
        let starts = [values(1, 64), values(3, 64)];
        let buffers = starts
            .each_ref()
            .map(|start| (bench.buffer_of(start), bench.buffer_of(&gradient)));
        // Something that takes its time.
        let large = (bench.buffer(1 << 21), bench.buffer(1 << 21));
        let tensors = [
            whole("a", &buffers[0].0, &buffers[0].1),
            whole("b", &buffers[1].0, &buffers[1].1),
            whole("large", &large.0, &large.1),
        ];
        let rule = preset("adamw", None);
        let mut optimizer = GpuOptimizer::new(&bench.kernels, rule.clone(), &tensors).unwrap();
        let control = StepControl::builder().build().unwrap();
        let mut control = GpuControl::new(&bench.kernels, control).unwrap();
        let mut oracles = starts
            .each_ref()
            .map(|start| Oracle::new(start, Roundoff::WGSL));
        for counts in [[1, 1], [2, 1]] {
            bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
            for (oracle, count) in oracles.iter_mut().zip(counts) {
                let rule = Counted {
                    rule: rule.clone(),
                    count,
                };
                oracle.step(&rule, &gradient);
            }
            optimizer.set_applied_steps("b", 0).unwrap();
        }
        for (oracle, (params, _)) in oracles.iter().zip(&buffers) {
            oracle.check_params(&bench.download(params).await).unwrap();
        }
    }
}
