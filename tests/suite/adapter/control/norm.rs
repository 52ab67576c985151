//! Norms of gradients and what is not finite among them, wherever they lie.

use super::*;
use wgpu_optim::Optimizer;

/// Magnitudes over all that f32 has.
fn of_any_magnitude(seed: u64, numel: usize) -> Vec<f32> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut value = || match rng.u32(..) & 0x7fff_ffff {
        bits if bits < 0x7f80_0000 => f32::from_bits(bits),
        bits => f32::from_bits(bits & 0x007f_ffff),
    };
    (0..numel).map(|_| value()).collect()
}

fn norm_of(grads: &[Vec<f32>]) -> f64 {
    let squares = grads.iter().flatten().map(|g| f64::from(*g).powi(2));
    squares.sum::<f64>().sqrt()
}

/// Takes the norm of tensors that lie one after the other in one buffer, and of each in a buffer of its own; twice.
async fn check_norm(bench: &Bench, of: StorageType, gap: usize, host: &[Vec<f32>]) {
    let finite = |grads: &Vec<f32>| {
        let rounded = rounded(of, grads).into_iter();
        rounded
            .map(|grad| if grad.is_finite() { grad } else { 6e4 })
            .collect()
    };
    let host: Vec<Vec<f32>> = host.iter().map(finite).collect();
    let host: Vec<_> = host.iter().map(|grads| rounded(of, grads)).collect();
    let config: AnyRule = SgdConfig::builder(0.0).build().unwrap().into();
    let mut starts = Vec::new();
    // What lies between belongs to nobody.
    let mut joined = vec![f32::NAN; gap];
    for grads in &host {
        starts.push(joined.len());
        joined.extend_from_slice(grads);
        joined.resize(joined.len() + gap, f32::NAN);
    }
    let words = |values: &[f32]| {
        let mut bytes = encode(of, values);
        bytes.resize(bytes.len().next_multiple_of(4).max(4), 0xff);
        bytemuck::pod_collect_to_vec::<u8, f32>(&bytes)
    };
    let joined_grads = bench.buffer_of(&words(&joined));
    let joined_params = bench.buffer(joined.len().max(1));
    let apart: Vec<_> = host
        .iter()
        .map(|grads| {
            (
                bench.buffer(grads.len().max(1)),
                bench.buffer_of(&words(grads)),
            )
        })
        .collect();
    let names: Vec<_> = (0..host.len()).map(|index| index.to_string()).collect();
    let (mut in_one_buffer, mut scattered) = (Vec::new(), Vec::new());
    for (index, (name, grads)) in names.iter().zip(&host).enumerate() {
        let [at_params, at_grads] = [4, of.bytes()].map(|size| size * starts[index] as u64);
        let tensor = TensorBinding::new(name, &joined_params, &joined_grads, [grads.len()]);
        in_one_buffer.push(
            tensor
                .params_at(at_params)
                .grads_at(at_grads)
                .grads_type(of),
        );
        let tensor = TensorBinding::new(name, &apart[index].0, &apart[index].1, [grads.len()]);
        scattered.push(tensor.grads_type(of));
    }
    let seen: Vec<_> = host.iter().map(|grads| ("default", &grads[..])).collect();
    let decision = ControlOracle::new(&only_finite(), Roundoff::WGSL).decide(&seen);
    for bindings in [in_one_buffer, scattered] {
        let mut optimizer = GpuOptimizer::new(&bench.kernels, config.clone(), &bindings).unwrap();
        let mut control = bench.control(only_finite());
        for _ in 0..2 {
            bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
        }
        let records = bench.outcomes(&mut control).await;
        let [first, second] = records[..] else {
            panic!("{records:?}");
        };
        assert_eq!(first.norm.to_bits(), second.norm.to_bits());
        assert!(!first.found_nonfinite);
        let norm = f64::from(first.norm);
        let bound = &decision.norm;
        let fits = bound.low <= norm && norm <= bound.high;
        let overflows = bound.high > f32::MAX.into() && first.norm == f32::INFINITY;
        assert!(
            fits || overflows,
            "{of:?}: {norm:e} ({:#x}), expected {bound:?}",
            first.norm.to_bits()
        );
    }
}

#[gpu_test]
async fn norms_of_any_size_place_and_magnitude_are_within_their_bound() {
    for bench in Bench::both().await {
        for of in StorageType::ALL {
            let awkward = |seed: u64| -> Vec<Vec<f32>> {
                let sizes = sizes().enumerate();
                sizes
                    .map(|(i, numel)| of_any_magnitude(seed + i as u64, numel))
                    .collect()
            };
            check_norm(bench, of, 0, &awkward(1)).await;
            check_norm(bench, of, 3, &awkward(50)).await;
            let ordinary: Vec<_> = sizes().map(|numel| values(numel as u64, numel)).collect();
            check_norm(bench, of, 0, &ordinary).await;
            check_norm(bench, of, 0, &[values(3, 300_007), values(4, 5)]).await;
        }
        // Each class of magnitudes alone, and beside the next: what is subnormal, too.
        for magnitudes in [
            &[1e-45][..],
            &[1e-45, 3e-39, 1e-30],
            &[1e-19, 1e-18],
            &[1e10, 1e13, 1e14],
            &[1e-45, 1.0, 3e38],
            &[3e38],
            &[0.0],
        ] {
            let grads: Vec<_> = magnitudes.iter().map(|m| vec![*m; 37]).collect();
            check_norm(bench, StorageType::F32, 0, &grads).await;
        }
    }
}

#[gpu_test]
async fn what_is_not_finite_is_found_wherever_it_is() {
    let bench = Bench::best().await;
    for of in StorageType::ALL {
        // Ends on either side, in a piece and in a batch.
        let numels = [61, 24, 1];
        let config: AnyRule = SgdConfig::builder(0.0).build().unwrap().into();
        for start in [0, 3] {
            let total = start + numels.iter().sum::<usize>();
            let params = bench.buffer(total);
            let grads = bench.buffer(total);
            let others = [24, 40, 27, 13, 2].map(|n| (bench.buffer(n), bench.buffer(n)));
            let mut at = start as u64;
            let mut tensors = Vec::new();
            for (name, numel) in ["a", "b", "c"].into_iter().zip(numels) {
                let tensor = TensorBinding::new(name, &params, &grads, [numel]);
                tensors.push(tensor.params_at(4 * at).grads_at(of.bytes() * at));
                at += numel as u64;
            }
            for (name, (params, grads)) in ["d", "e", "f", "g", "h"].into_iter().zip(&others) {
                tensors.push(whole(name, params, grads));
            }
            let tensors: Vec<_> = tensors
                .into_iter()
                .map(|tensor| tensor.grads_type(of))
                .collect();
            let mut optimizer =
                GpuOptimizer::new(&bench.kernels, config.clone(), &tensors).unwrap();
            let mut control = bench.control(only_finite());
            let kinds = [
                f32::NAN,
                f32::INFINITY,
                f32::NEG_INFINITY,
                f32::MAX.min(1e30),
            ];
            let places = (start..total).map(|place| (&grads, total, place));
            let others = others.iter().flat_map(|(_, grads)| {
                let numel = grads.size() as usize / 4;
                (0..numel).map(move |place| (grads, numel, place))
            });
            for (index, (buffer, numel, place)) in places.chain(others).enumerate() {
                let kind = kinds[index % 4];
                let mut host = vec![0.0; numel];
                host[place] = if of == StorageType::F16 {
                    kind.clamp(-6e4, 6e4)
                } else {
                    kind
                };
                if kind.is_infinite() {
                    host[place] = kind;
                }
                let mut bytes = encode(of, &host);
                bytes.resize(bytes.len().next_multiple_of(4), 0);
                bench.queue.write_buffer(buffer, 0, &bytes);
                bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
                bench.queue.write_buffer(buffer, 0, &vec![0; bytes.len()]);
                let records = bench.outcomes(&mut control).await;
                let record = records.last().unwrap();
                assert_eq!(
                    record.found_nonfinite,
                    !kind.is_finite(),
                    "{of:?} {place} {kind}"
                );
                assert_eq!(record.norm.is_nan(), kind.is_nan(), "{of:?} {place} {kind}");
                assert_eq!(
                    record.norm == f32::INFINITY,
                    kind.is_infinite(),
                    "{of:?} {place} {kind}"
                );
            }
        }
    }
}

#[gpu_test]
async fn optimizers_that_share_a_control_share_a_norm() {
    for bench in Bench::both().await {
        let (start, gradients) = (values(1, 1003), [values(2, 1003), values(3, 1003)]);
        let buffers = [0, 1].map(|i| (bench.buffer_of(&start), bench.buffer_of(&gradients[i])));
        let tensors = [0, 1].map(|i| [whole("theta", &buffers[i].0, &buffers[i].1)]);
        let sgd = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
        let adam = AdamConfig::adamw(0.01).build().unwrap();
        let mut first = GpuOptimizer::new(&bench.kernels, sgd, &tensors[0]).unwrap();
        let mut second = GpuOptimizer::new(&bench.kernels, adam, &tensors[1]).unwrap();
        let control = StepControl::builder().max_norm(1.0).build().unwrap();
        let mut decisions = ControlOracle::new(&control, Roundoff::WGSL);
        let mut control = bench.control(control);
        let mut oracles = (
            Oracle::new(&start, Roundoff::WGSL),
            Oracle::new(&start, Roundoff::WGSL),
        );
        for poison in [false, true, false] {
            let mut grads = gradients.clone();
            if poison {
                grads[1][7] = f32::NAN;
            }
            bench.upload(&buffers[1].1, &grads[1]);
            bench.submit(|encoder| {
                control
                    .step(encoder, &mut [&mut first, &mut second])
                    .unwrap()
            });
            let seen: Vec<_> = grads.iter().map(|grads| ("default", &grads[..])).collect();
            let decision = decisions.decide(&seen);
            if !decision.is_skipped {
                let factors = decision.of_group("default");
                oracles.0.step_by(&sgd, &grads[0], &factors);
                oracles.1.step_by(&adam, &grads[1], &factors);
            }
        }
        // Alone it is skipped by what is its own.
        bench.upload(&buffers[1].1, &[f32::NAN; 1003]);
        bench.submit(|encoder| first.step_with(encoder, &mut control).unwrap());
        let decision = decisions.decide(&[("default", &gradients[0])]);
        oracles
            .0
            .step_by(&sgd, &gradients[0], &decision.of_group("default"));
        let records = bench.outcomes(&mut control).await;
        assert_eq!(
            records.iter().map(|r| r.is_skipped).collect::<Vec<_>>(),
            [false, true, false, false]
        );
        oracles
            .0
            .check_params(&bench.download(&buffers[0].0).await)
            .unwrap();
        oracles
            .1
            .check_params(&bench.download(&buffers[1].0).await)
            .unwrap();
        assert_eq!(
            (first.applied_steps("theta"), second.applied_steps("theta")),
            (Some(3), Some(2))
        );
    }
}

/// Each is alone in its dispatch, and their partial sums together would not fit into a binding. A browser takes its time
/// over so many bind groups.
#[cfg(not(target_arch = "wasm32"))]
#[gpu_test]
async fn a_norm_goes_over_any_number_of_scattered_tensors() {
    const TENSORS: usize = 140_000;
    const STRIDE: usize = 16;
    let bench = Bench::best().await;
    // Two elements further on than a binding may start.
    let numel = STRIDE * TENSORS + 2;
    let (start, mut gradient) = (values(1, numel), values(2, numel));
    let (params, grads) = (bench.buffer_of(&start), bench.buffer_of(&gradient));
    let names: Vec<_> = (0..TENSORS).map(|index| index.to_string()).collect();
    let numel_of = |index: usize| 1 + index % 13;
    let at = |index: usize| STRIDE * index + 2;
    let bindings: Vec<_> = names
        .iter()
        .enumerate()
        .map(|(index, name)| {
            let offset = 4 * at(index) as u64;
            TensorBinding::new(name, &params, &grads, [numel_of(index)])
                .params_at(offset)
                .grads_at(offset)
        })
        .collect();
    let config = SgdConfig::builder(1.0).build().unwrap();
    let groups = ParamGroups::new(config)
        .with("odd", config, |name| {
            name.ends_with(['1', '3', '5', '7', '9'])
        })
        .unwrap();
    let mut optimizer = GpuOptimizer::with_groups(&bench.kernels, &groups, &bindings).unwrap();
    let control = StepControl::builder()
        .max_norm(0.5)
        .group_max_norm("odd", 0.25);
    let control = control.build().unwrap();
    let mut decisions = ControlOracle::new(&control, Roundoff::WGSL);
    let mut on_device = bench.control(control);
    for poisoned in [None, Some(139_999)] {
        if let Some(tensor) = poisoned {
            gradient[at(tensor)] = f32::INFINITY;
            bench.upload(&grads, &gradient);
        }
        let seen: Vec<_> = (0..TENSORS)
            .map(|index| {
                let group = if index % 2 == 1 { "odd" } else { "default" };
                (group, &gradient[at(index)..at(index) + numel_of(index)])
            })
            .collect();
        let decision = decisions.decide(&seen);
        bench.submit(|encoder| optimizer.step_with(encoder, &mut on_device).unwrap());
        let records = bench.outcomes(&mut on_device).await;
        assert_eq!(records[0].is_skipped, poisoned.is_some());
        let norm = f64::from(records[0].norm);
        let bound = &decision.norm;
        assert!(
            poisoned.is_some() || (bound.low <= norm && norm <= bound.high),
            "{norm} {bound:?}"
        );
        if poisoned.is_none() {
            let moved = bench.download(&params).await;
            for index in 0..TENSORS {
                let group = if index % 2 == 1 { "odd" } else { "default" };
                let range = at(index)..at(index) + numel_of(index);
                let mut oracle = Oracle::new(&start[range.clone()], Roundoff::WGSL);
                oracle.step_by(&config, &gradient[range.clone()], &decision.of_group(group));
                oracle.check_params(&moved[range]).unwrap();
            }
        }
    }
}

#[gpu_test]
async fn a_thousand_tensors_of_an_arena_are_four_dispatches() {
    let bench = Bench::best().await;
    let layout = (0..1000).map(|index| (index.to_string(), vec![1000]));
    let arena = Arena::new(&bench.device, &bench.queue, layout).unwrap();
    let host: Vec<_> = (0..1000).map(|seed| values(seed, 1000)).collect();
    arena.upload_all_grads(&host).unwrap();
    let mut optimizer = GpuOptimizer::new(&bench.kernels, adamw(), &arena.bindings()).unwrap();
    let mut control = bench.control(StepControl::builder().max_norm(1.0).build().unwrap());
    bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
    // And the one that decides.
    assert_eq!(optimizer.dispatches() + 1, 4);
    let norm = f64::from(bench.outcomes(&mut control).await[0].norm);
    approx::assert_relative_eq!(norm, norm_of(&host), max_relative = 1e-5);
}
