//! Steps under a control on a real adapter: norms, what is skipped and what follows from it, against exact arithmetic.

use wgpu_optim::oracle::{ControlOracle, Oracle, Rounding};
use wgpu_optim::{
    AdamConfig, AnyRule, Arena, ControlRecord, GpuControl, GpuOptimizer, LionConfig, LossScale,
    NonFinite, ParamGroups, Rule, ScalarPath, SgdConfig, StepControl, StepError, StorageType,
    TensorBinding, wgpu,
};

use super::{Bench, gpu_test, whole};
use crate::cases::{sizes, values};
use crate::scales;
use crate::stored::{encode, rounded};

impl Bench {
    pub fn submit(&self, record: impl FnOnce(&mut wgpu::CommandEncoder)) {
        let mut encoder = self.encoder();
        record(&mut encoder);
        self.queue.submit([encoder.finish()]);
    }

    /// What has come of all that was submitted.
    pub async fn outcomes(&self, control: &mut GpuControl) -> Vec<ControlRecord> {
        // A browser's device has had its turn when this is done.
        self.wait(control.state()).await.unwrap();
        #[cfg_attr(
            target_arch = "wasm32",
            allow(unused_mut, reason = "a browser has nothing to wait for")
        )]
        let mut records = control.read();
        // Another test's thread may have been called back for this one's copy, and is not there yet.
        #[cfg(not(target_arch = "wasm32"))]
        for _ in 0..1000 {
            if control.unread() == 0 {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
            records.extend(control.read());
        }
        records
    }

    fn control(&self, control: StepControl) -> GpuControl {
        GpuControl::new(&self.kernels, control).unwrap()
    }
}

fn adamw() -> AnyRule {
    AdamConfig::adamw(0.05).build().unwrap().into()
}

fn momentum() -> AnyRule {
    let config = SgdConfig::builder(0.05).momentum(0.9).dampening(0.3);
    config.build().unwrap().into()
}

/// Every rule's first preset.
pub fn rules() -> Vec<AnyRule> {
    let mut rules: Vec<AnyRule> = Vec::new();
    for preset in AnyRule::presets() {
        let rule = (preset.config)(0.05).unwrap();
        if rules.iter().all(|other| other.stem() != rule.stem()) {
            rules.push(rule);
        }
    }
    rules
}

fn only_finite() -> StepControl {
    StepControl::builder().build().unwrap()
}

#[gpu_test]
async fn a_loss_scale_follows_and_a_skipped_step_writes_and_counts_nothing() {
    for bench in Bench::both().await {
        let (start, gradient) = (values(1, 1003), values(2, 1003));
        let params = bench.buffer_of(&start);
        let grads = bench.buffer_of(&gradient);
        let tensor = [whole("theta", &params, &grads)];
        let mut optimizer = GpuOptimizer::new(&bench.kernels, adamw(), &tensor).unwrap();
        let scale = LossScale {
            initial: 8.0,
            growth_interval: 2,
            ..LossScale::default()
        };
        let control = StepControl::builder().loss_scale(scale).build().unwrap();
        let mut control = bench.control(control);
        let mut oracle = Oracle::new(&start, Rounding::WGSL);
        let mut scale = 8.0;
        for (step, poison) in [false, true, false, false, true, false]
            .into_iter()
            .enumerate()
        {
            let mut scaled: Vec<_> = gradient.iter().map(|g| g * scale).collect();
            if poison {
                scaled[500] = f32::INFINITY;
            } else {
                oracle.step(&adamw(), &gradient);
            }
            bench.upload(&grads, &scaled);
            bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
            let records = bench.outcomes(&mut control).await;
            assert_eq!(records.len(), 1);
            assert_eq!(records[0].step, step as u64 + 1);
            assert_eq!((records[0].is_skipped, records[0].scale), (poison, scale));
            if poison {
                scale /= 2.0;
            } else if step == 3 {
                scale *= 2.0;
            }
            assert_eq!(bench.wait(control.state()).await.unwrap().scale, scale);
            oracle.check_params(&bench.download(&params).await).unwrap();
        }
        assert_eq!(optimizer.applied_steps("theta"), Some(4));
        assert_eq!(optimizer.steps(), 6);
    }
}

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
        bytes.resize(bytes.len().next_multiple_of(4).max(4), 0);
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
                .at(at_params, at_grads)
                .stored_as(StorageType::F32, of),
        );
        let tensor = TensorBinding::new(name, &apart[index].0, &apart[index].1, [grads.len()]);
        scattered.push(tensor.stored_as(StorageType::F32, of));
    }
    let seen: Vec<_> = host.iter().map(|grads| ("default", &grads[..])).collect();
    let decision = ControlOracle::new(&only_finite(), Rounding::WGSL).decide(&seen);
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
            let others = [
                (bench.buffer(24), bench.buffer(24)),
                (bench.buffer(40), bench.buffer(40)),
            ];
            let mut at = start as u64;
            let mut tensors = Vec::new();
            for (name, numel) in ["a", "b", "c"].into_iter().zip(numels) {
                let tensor = TensorBinding::new(name, &params, &grads, [numel]);
                tensors.push(tensor.at(4 * at, of.bytes() * at));
                at += numel as u64;
            }
            for (name, (params, grads)) in ["d", "e"].into_iter().zip(&others) {
                tensors.push(whole(name, params, grads));
            }
            let tensors: Vec<_> = tensors
                .into_iter()
                .map(|tensor| tensor.stored_as(StorageType::F32, of))
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

/// Two groups, tensors of awkward sizes in an arena and scattered, clipped by norm and value, with steps that are skipped
/// and tensors that are frozen, held against the oracle. Read of after every so many steps.
async fn follow(bench: &Bench, rule: &AnyRule, control: StepControl, read_every: usize) {
    let numels = [5, 1000, 64, 1, 333, 0, 2048];
    let names: Vec<_> = (0..numels.len() + 3)
        .map(|index| format!("{index}.{}", if index % 3 == 2 { "head" } else { "body" }))
        .collect();
    let (in_arena, apart) = names.split_at(numels.len());
    let layout = in_arena
        .iter()
        .zip(numels)
        .map(|(name, numel)| (name.clone(), vec![numel]));
    let arena = Arena::new(&bench.device, &bench.queue, layout).unwrap();
    let apart_numels = [8, 12, 4097];
    let buffers = apart_numels.map(|numel| (bench.buffer(numel), bench.buffer(numel)));
    let mut bindings = arena.bindings();
    for (name, (params, grads)) in apart.iter().zip(&buffers) {
        bindings.push(whole(name, params, grads));
    }
    let numels: Vec<_> = numels.into_iter().chain(apart_numels).collect();
    let group_of = |index: usize| if index % 3 == 2 { "head" } else { "default" };
    let upload = |grads: bool, values: &[Vec<f32>]| {
        let (in_arena, apart) = values.split_at(values.len() - 3);
        match grads {
            true => arena.upload_all_grads(in_arena).unwrap(),
            false => arena.upload_all_params(in_arena).unwrap(),
        }
        for (values, buffers) in apart.iter().zip(&buffers) {
            bench.upload(if grads { &buffers.1 } else { &buffers.0 }, values);
        }
    };
    let start: Vec<_> = (0..)
        .zip(&numels)
        .map(|(i, numel)| values(i, *numel))
        .collect();
    upload(false, &start);
    let groups = ParamGroups::new(rule.clone());
    let groups = groups.with("head", rule.with_lr(0.01).unwrap(), |name| {
        name.ends_with("head")
    });
    let mut optimizer =
        GpuOptimizer::with_groups(&bench.kernels, &groups.unwrap(), &bindings).unwrap();
    let mut decisions = ControlOracle::new(&control, Rounding::WGSL);
    let mut on_device = bench.control(control);
    let oracle = |start: &Vec<f32>| Oracle::new(start, Rounding::WGSL);
    let mut oracles: Vec<_> = start.iter().map(oracle).collect();
    let mut applied = vec![0; numels.len()];
    let mut records = Vec::new();
    let mut expected = Vec::new();
    for step in 0..9 {
        let frozen: Vec<_> = (0..numels.len())
            .map(|i| (i + step) % 4 == 3 && step != 6)
            .collect();
        for (name, frozen) in names.iter().zip(&frozen) {
            optimizer.set_frozen(name, *frozen).unwrap();
        }
        optimizer.set_lr(0.05 / (step + 1) as f64).unwrap();
        let scale = decisions.scale() as f32;
        let size = [0.01, 3.0, 1.0][step % 3] * scale;
        let mut grads: Vec<Vec<f32>> = numels
            .iter()
            .enumerate()
            .map(|(i, numel)| {
                let values = values(1000 * (step + 1) as u64 + i as u64, *numel);
                values.into_iter().map(|g| g * size).collect()
            })
            .collect();
        if step % 4 == 0 {
            // Where nobody looks if it is frozen.
            grads[3][0] = f32::NAN;
        }
        match step {
            2 => grads[6][0] = f32::INFINITY,
            3 => grads[9][4096] = f32::NAN,
            7 => grads[1][999] = f32::NEG_INFINITY,
            _ => {}
        }
        upload(true, &grads);
        let taking_part: Vec<_> = (0..numels.len()).filter(|i| !frozen[*i]).collect();
        let seen: Vec<_> = taking_part
            .iter()
            .map(|i| (group_of(*i), &grads[*i][..]))
            .collect();
        let decision = decisions.decide(&seen);
        bench.submit(|encoder| optimizer.step_with(encoder, &mut on_device).unwrap());
        if !decision.is_skipped {
            for i in taking_part {
                let config = optimizer.group_config(group_of(i)).unwrap();
                oracles[i].step_by(config, &grads[i], &decision.of_group(group_of(i)));
                applied[i] += 1;
            }
        }
        expected.push(decision);
        if step % read_every == read_every - 1 {
            records.extend(bench.outcomes(&mut on_device).await);
        }
    }
    records.extend(bench.outcomes(&mut on_device).await);
    assert_eq!(records.len(), expected.len());
    let mut skipped = 0;
    for (record, decision) in records.iter().zip(&expected) {
        skipped += u64::from(decision.is_skipped);
        assert_eq!(
            (record.is_skipped, record.skipped),
            (decision.is_skipped, skipped)
        );
        let norm = f64::from(record.norm);
        let fits = decision.norm.low <= norm && norm <= decision.norm.high;
        assert!(
            fits || decision.found_nonfinite,
            "{norm:e}, expected {:?}",
            decision.norm
        );
    }
    assert_eq!(skipped, 3);
    let state = bench.wait(optimizer.state()).await.unwrap();
    let in_arena = bench.wait(arena.download_all_params()).await.unwrap();
    for (i, oracle) in oracles.iter().enumerate() {
        let params = match i.checked_sub(in_arena.len()) {
            None => in_arena[i].clone(),
            Some(apart) => bench.download(&buffers[apart].0).await,
        };
        let here = format!(
            "{rule:?} {:?} tensor {i}, read every {read_every}",
            on_device.control()
        );
        oracle
            .check_params(&params)
            .unwrap_or_else(|e| panic!("{here}: {e}"));
        assert_eq!(
            optimizer.applied_steps(&names[i]),
            Some(applied[i]),
            "{here}"
        );
        assert_eq!(state.tensors[i].applied_steps, applied[i], "{here}");
        for slot in &state.tensors[i].slots {
            oracle
                .check_slot(&slot.name, &slot.values)
                .unwrap_or_else(|e| panic!("{here}: {e}"));
        }
    }
}

/// What PyTorch's users combine.
fn controls() -> Vec<StepControl> {
    let scale = LossScale {
        initial: 1024.0,
        growth_interval: 2,
        ..LossScale::default()
    };
    let odd = LossScale {
        initial: 3.0,
        growth_factor: 1.5,
        backoff_factor: 0.25,
        growth_interval: 1,
    };
    [
        StepControl::builder(),
        StepControl::builder().max_norm(1.0),
        StepControl::builder().max_norm(30.0).clip_value(0.125),
        StepControl::builder().grad_scale(1.0 / 3.0).clip_value(0.5),
        StepControl::builder()
            .loss_scale(scale)
            .max_norm(2.0)
            .group_max_norm("head", 0.5),
        StepControl::builder()
            .loss_scale(odd)
            .group_clip_value("head", 0.25),
    ]
    .map(|control| control.build().unwrap())
    .into()
}

#[gpu_test]
async fn momentum_and_adamw_follow_their_oracle_under_every_control() {
    for bench in Bench::both().await {
        for rule in [momentum(), adamw()] {
            for (index, control) in controls().into_iter().enumerate() {
                follow(bench, &rule, control, [1, 2, 100][index % 3]).await;
            }
        }
    }
}

#[gpu_test]
async fn every_rule_follows_its_oracle_under_a_control() {
    let bench = Bench::best().await;
    for (index, rule) in rules().into_iter().enumerate() {
        let controls = controls();
        let control = controls[index % controls.len()].clone();
        follow(bench, &rule, control, [100, 1, 3][index % 3]).await;
    }
}

#[gpu_test]
async fn steps_of_one_encoder_each_see_their_own_control() {
    for bench in Bench::both().await {
        let (start, gradient) = (values(1, 300), values(2, 300));
        let params = bench.buffer_of(&start);
        let grads = bench.buffer_of(&gradient);
        let tensor = [whole("theta", &params, &grads)];
        let mut optimizer = GpuOptimizer::new(&bench.kernels, adamw(), &tensor).unwrap();
        let mut on_device = bench.control(only_finite());
        let mut oracle = Oracle::new(&start, Rounding::WGSL);
        let mut encoder = bench.encoder();
        for (max_norm, scale, lr) in [(1.0, 2.0, 0.1), (0.25, 3.0, 0.01), (8.0, 1.0, 0.2)] {
            let mut control = StepControl::builder().max_norm(max_norm).grad_scale(scale);
            if lr < 0.1 {
                control = control.clip_value(0.001);
            }
            let control = control.build().unwrap();
            let decision =
                ControlOracle::new(&control, Rounding::WGSL).decide(&[("default", &gradient)]);
            on_device.set_control(control);
            optimizer.set_lr(lr).unwrap();
            optimizer.step_with(&mut encoder, &mut on_device).unwrap();
            oracle.step_by(optimizer.config(), &gradient, &decision.of_group("default"));
        }
        bench.queue.submit([encoder.finish()]);
        let records = bench.outcomes(&mut on_device).await;
        assert_eq!(
            records
                .iter()
                .map(|record| record.scale)
                .collect::<Vec<_>>(),
            [2.0, 3.0, 1.0]
        );
        oracle.check_params(&bench.download(&params).await).unwrap();
    }
}

/// Steps parameters that lie at zero once, by a gradient of 1 that was multiplied by this scale. The loss sees the same
/// scale, in the same submission.
async fn step_by_one(bench: &Bench, control: &mut GpuControl, scale: f32) {
    let (params, grads) = (bench.buffer_of(&[0.0; 5]), bench.buffer_of(&[scale; 5]));
    let config = SgdConfig::builder(1.0).build().unwrap();
    let tensor = [whole("theta", &params, &grads)];
    let mut optimizer = GpuOptimizer::new(&bench.kernels, config, &tensor).unwrap();
    let seen = bench.buffer(4);
    bench.submit(|encoder| {
        encoder.copy_buffer_to_buffer(control.loss_scale_buffer(), 0, &seen, 0, 16);
        optimizer.step_with(encoder, control).unwrap();
    });
    assert_eq!(bench.download(&seen).await[0], scale);
    assert_eq!(
        bench.download(&params).await,
        [-1.0; 5],
        "a scale of {scale}"
    );
    assert_eq!(bench.outcomes(control).await[0].scale, scale);
}

#[gpu_test]
async fn a_scale_that_is_not_dynamic_is_the_configuration_s() {
    for bench in Bench::both().await {
        let mut control = bench.control(scales::dynamic(65536.0));
        step_by_one(bench, &mut control, 65536.0).await;
        for (next, expected) in scales::in_turn() {
            control.set_control(next);
            step_by_one(bench, &mut control, expected).await;
        }
    }
}

#[gpu_test]
async fn a_loaded_scale_goes_on_where_it_was_dynamic_and_is() {
    let bench = Bench::best().await;
    for before in scales::all() {
        for now in scales::all() {
            let [mut saved, mut loaded] = [&before, &now].map(|of| bench.control(of.clone()));
            step_by_one(bench, &mut saved, before.initial_state().scale).await;
            // What the control itself remembers does not matter.
            step_by_one(bench, &mut loaded, now.initial_state().scale).await;
            let state = bench.wait(saved.state()).await.unwrap();
            loaded.load_state(&state).unwrap();
            let expected = scales::resumed(&before, &now);
            assert_eq!(bench.wait(loaded.state()).await.unwrap().scale, expected);
            step_by_one(bench, &mut loaded, expected).await;
        }
    }
}

/// A group that was mistyped would be clipped by nobody. Of several optimizers one has to have it.
#[gpu_test]
async fn a_control_of_a_group_that_is_not_there_is_refused_and_a_right_one_steps() {
    for bench in Bench::both().await {
        let config = SgdConfig::builder(1.0).build().unwrap();
        let groups = ParamGroups::new(config).with("head", config, |name| name == "head");
        let buffers = [(); 2].map(|()| (bench.buffer_of(&[0.0; 3]), bench.buffer_of(&[3.0; 3])));
        let [body, head] = buffers.each_ref();
        let body_tensor = [whole("body", &body.0, &body.1)];
        let head_tensor = [whole("head", &head.0, &head.1)];
        let mut body_alone = GpuOptimizer::new(&bench.kernels, config, &body_tensor).unwrap();
        let mut with_head =
            GpuOptimizer::with_groups(&bench.kernels, &groups.unwrap(), &head_tensor).unwrap();
        let builder = StepControl::builder;
        for wrong in [
            builder().group_max_norm("heads", 1.0),
            builder().group_clip_value("heads", 1.0),
        ] {
            let wrong = wrong.loss_scale(LossScale::default()).build().unwrap();
            let mut wrong = bench.control(wrong);
            let expected = StepError::UnknownGroup {
                group: "heads".into(),
            };
            let refused = |step: &mut dyn FnMut(&mut wgpu::CommandEncoder) -> Result<_, _>| {
                bench.submit(|encoder| assert_eq!(step(encoder), Err(expected.clone())));
            };
            refused(&mut |encoder| with_head.step_with(encoder, &mut wrong));
            refused(&mut |encoder| wrong.step(encoder, &mut [&mut body_alone, &mut with_head]));
            refused(&mut |encoder| wrong.step(encoder, &mut []));
            assert_eq!((wrong.steps(), wrong.unread()), (0, 0));
            assert_eq!(bench.outcomes(&mut wrong).await, []);
            let state = bench.wait(wrong.state()).await.unwrap();
            assert_eq!((state.scale, state.growth_tracker), (65536.0, 0));
        }
        let right = builder().group_clip_value("head", 1.0).clip_value(2.0);
        let mut right = bench.control(right.build().unwrap());
        bench.submit(|encoder| {
            // Alone it does not have the group; together one of them does.
            assert!(body_alone.step_with(encoder, &mut right).is_err());
            right
                .step(encoder, &mut [&mut body_alone, &mut with_head])
                .unwrap();
        });
        assert_eq!(bench.download(&body.0).await, [-2.0; 3]);
        assert_eq!(bench.download(&head.0).await, [-1.0; 3]);
        assert_eq!((body_alone.steps(), with_head.steps()), (1, 1));
        let records = bench.outcomes(&mut right).await;
        assert_eq!(records.len(), 1);
        assert_eq!(records[0].norm, 54_f32.sqrt());
    }
}

/// Every tensor of an engine may be left out for a while.
#[gpu_test]
async fn a_step_of_no_optimizers_is_one_over_no_gradients() {
    for bench in Bench::both().await {
        let builder = StepControl::builder().max_norm(1.0);
        let mut control = bench.control(builder.build().unwrap());
        let (params, grads) = (bench.buffer_of(&[0.0; 4]), bench.buffer_of(&[3.0; 4]));
        let config = SgdConfig::builder(1.0).build().unwrap();
        let mut optimizer = bench.optimizer(config, &params, &grads);
        bench.submit(|encoder| control.step(encoder, &mut []).unwrap());
        bench.submit(|encoder| {
            control.prepare(encoder, &mut []).unwrap();
            let mut pass = encoder.begin_compute_pass(&Default::default());
            control.record(&mut pass, &mut []).unwrap();
            drop(pass);
            control.report(encoder);
        });
        bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
        bench.submit(|encoder| control.step(encoder, &mut []).unwrap());
        assert_eq!(control.steps(), 4);
        let records = bench.outcomes(&mut control).await;
        let of = |record: &ControlRecord| {
            let found = record.found_nonfinite || record.is_skipped;
            (record.step, record.norm, found)
        };
        let seen: Vec<_> = records.iter().map(of).collect();
        let expected = [(1, 0.0), (2, 0.0), (3, 6.0), (4, 0.0)];
        assert_eq!(seen, expected.map(|(step, norm)| (step, norm, false)));
        assert_eq!(records[0].clip_factor, 1.0);
        for param in bench.download(&params).await {
            approx::assert_relative_eq!(param, -0.5, max_relative = 1e-6);
        }
    }
}

/// A device that has had its turn: what it has counted arrives without anybody reading it.
#[gpu_test]
async fn nobody_has_to_read_for_training_to_go_on() {
    let bench = Bench::best().await;
    let (start, gradient) = (values(1, 100), values(2, 100));
    let mut poisoned = gradient.clone();
    poisoned[99] = f32::NAN;
    let params = bench.buffer_of(&start);
    let grads = bench.buffer_of(&gradient);
    let tensor = [whole("theta", &params, &grads)];
    let mut optimizer = GpuOptimizer::new(&bench.kernels, adamw(), &tensor).unwrap();
    let mut control = bench.control(only_finite());
    let mut oracle = Oracle::new(&start, Rounding::WGSL);
    for step in 0..400 {
        let is_poisoned = step % 4 == 3;
        bench.upload(&grads, if is_poisoned { &poisoned } else { &gradient });
        bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
        if !is_poisoned {
            oracle.step(&adamw(), &gradient);
        }
        if step % 16 == 0 {
            // Not a word to the control or the optimizer.
            bench.download(&params).await;
        }
    }
    oracle.check_params(&bench.download(&params).await).unwrap();
    assert_eq!(control.steps(), 400);
    let records = bench.outcomes(&mut control).await;
    assert_eq!(
        (records[0].step, records.len()),
        (337, 64),
        "the last 64 are kept"
    );
    assert_eq!(records[63].skipped, 100);
    assert_eq!(optimizer.applied_steps("theta"), Some(300));
}

#[gpu_test]
async fn a_state_counts_as_having_been_read() {
    let bench = Bench::best().await;
    let gradient = values(2, 100);
    let mut poisoned = gradient.clone();
    poisoned[0] = f32::INFINITY;
    let (params, grads) = (bench.buffer_of(&values(1, 100)), bench.buffer(100));
    let tensor = [whole("theta", &params, &grads)];
    let mut optimizer = GpuOptimizer::new(&bench.kernels, adamw(), &tensor).unwrap();
    let mut control = bench.control(only_finite());
    for grad in [&gradient, &poisoned, &gradient] {
        bench.upload(&grads, grad);
        bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
    }
    let state = bench.wait(optimizer.state()).await.unwrap();
    assert_eq!((state.steps, state.tensors[0].applied_steps), (3, 2));
    assert_eq!(optimizer.applied_steps("theta"), Some(2));
    // A step without a control needs to know, and now does.
    bench.submit(|encoder| optimizer.step(encoder).unwrap());
    assert_eq!(optimizer.applied_steps("theta"), Some(3));
}

/// More than 64 steps in one encoder, all skipped: there are no scalars for what comes then, and that is said.
#[gpu_test]
async fn a_step_without_scalars_is_skipped_and_said_once() {
    let bench = Bench::best().await;
    let (start, gradient) = (values(1, 100), values(2, 100));
    let mut poisoned = gradient.clone();
    poisoned[99] = f32::NAN;
    let params = bench.buffer_of(&start);
    let (good, bad) = (bench.buffer_of(&gradient), bench.buffer_of(&poisoned));
    let grads = bench.buffer_of(&gradient);
    let tensor = [whole("theta", &params, &grads)];
    let mut optimizer = GpuOptimizer::new(&bench.kernels, adamw(), &tensor).unwrap();
    let mut control = bench.control(only_finite());
    let mut oracle = Oracle::new(&start, Rounding::WGSL);
    let mut encoder = bench.encoder();
    // After 64 skipped steps there are scalars, and after 65 there are none.
    for step in 0..67 {
        let from = if [0, 65].contains(&step) { &good } else { &bad };
        let from = if step == 66 { &good } else { from };
        encoder.copy_buffer_to_buffer(from, 0, &grads, 0, 400);
        optimizer.step_with(&mut encoder, &mut control).unwrap();
        if [0, 65].contains(&step) {
            oracle.step(&adamw(), &gradient);
        }
        if step == 65 {
            // One more skipped step, so that the next is too far ahead.
            encoder.copy_buffer_to_buffer(&bad, 0, &grads, 0, 400);
            optimizer.step_with(&mut encoder, &mut control).unwrap();
        }
    }
    bench.queue.submit([encoder.finish()]);
    let records = bench.outcomes(&mut control).await;
    let last = records.last().unwrap();
    assert_eq!(
        (last.step, last.is_skipped, last.found_nonfinite),
        (68, true, false)
    );
    oracle.check_params(&bench.download(&params).await).unwrap();
    let mut encoder = bench.encoder();
    let said = optimizer.step_with(&mut encoder, &mut control);
    assert_eq!(said, Err(StepError::TooFarAhead { step: 68 }));
    // It has been said, and all is known again.
    for _ in 0..3 {
        optimizer.step_with(&mut encoder, &mut control).unwrap();
        oracle.step(&adamw(), &gradient);
    }
    bench.queue.submit([encoder.finish()]);
    oracle.check_params(&bench.download(&params).await).unwrap();
    bench.outcomes(&mut control).await;
    assert_eq!(optimizer.applied_steps("theta"), Some(5));
    assert_eq!(optimizer.steps(), 71);
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
            let mut oracles = [(); 2].map(|()| Oracle::new(&start, Rounding::WGSL));
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

/// A submission that wgpu refuses has not been made: what lies in its report's buffer is another step's.
#[cfg(not(target_arch = "wasm32"))]
#[gpu_test]
async fn a_submission_that_fails_is_no_step() {
    for bench in Bench::both().await {
        let (start, gradient) = (values(1, 100), values(2, 100));
        let (params, grads) = (bench.buffer_of(&start), bench.buffer_of(&gradient));
        let tensor = [whole("theta", &params, &grads)];
        let mut optimizer = GpuOptimizer::new(&bench.kernels, adamw(), &tensor).unwrap();
        let mut control = bench.control(only_finite());
        let mut oracle = Oracle::new(&start, Rounding::WGSL);
        let mut steps = 0;
        for step in 0..12 {
            let fails = [0, 4, 5, 9].contains(&step);
            let mut encoder = bench.encoder();
            optimizer.step_with(&mut encoder, &mut control).unwrap();
            let scope = bench.device.push_error_scope(wgpu::ErrorFilter::Validation);
            if fails {
                encoder.copy_buffer_to_buffer(&grads, 0, &params, 400, 400);
            } else {
                oracle.step(&adamw(), &gradient);
                steps += 1;
            }
            bench.queue.submit([encoder.finish()]);
            assert_eq!(scope.pop().await.is_some(), fails);
            oracle.check_params(&bench.download(&params).await).unwrap();
            if step % 3 == 2 {
                control.read();
                assert_eq!(optimizer.applied_steps("theta"), Some(steps));
            }
        }
        let state = bench.wait(optimizer.state()).await.unwrap();
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
    let gradient = values(2, 100);
    let mut poisoned = gradient.clone();
    poisoned[0] = f32::NAN;
    let start = values(1, 100);
    let (params, grads) = (bench.buffer_of(&start), bench.buffer_of(&poisoned));
    let tensor = [whole("theta", &params, &grads)];
    let mut first = GpuOptimizer::new(&bench.kernels, adamw(), &tensor).unwrap();
    let mut second = GpuOptimizer::new(&bench.kernels, adamw(), &tensor).unwrap();
    let mut control = bench.control(only_finite());
    let mut encoder = bench.encoder();
    for _ in 0..63 {
        first.step_with(&mut encoder, &mut control).unwrap();
    }
    bench.queue.submit([encoder.finish()]);
    bench.upload(&grads, &gradient);
    let mut oracle = Oracle::new(&start, Rounding::WGSL);
    let mut encoder = bench.encoder();
    for _ in 0..10 {
        second.step_with(&mut encoder, &mut control).unwrap();
        oracle.step(&adamw(), &gradient);
    }
    bench.queue.submit([encoder.finish()]);
    oracle.check_params(&bench.download(&params).await).unwrap();
    bench.outcomes(&mut control).await;
    assert_eq!(second.applied_steps("theta"), Some(10));
}

#[gpu_test]
async fn counts_are_saved_loaded_and_needed_by_steps_without_a_control() {
    for bench in Bench::both().await {
        let (start, gradient) = (values(1, 1003), values(2, 1003));
        let mut poisoned = gradient.clone();
        poisoned[1002] = f32::INFINITY;
        let params = bench.buffer_of(&start);
        let grads = bench.buffer_of(&gradient);
        let tensor = [whole("theta", &params, &grads)];
        let mut optimizer = GpuOptimizer::new(&bench.kernels, adamw(), &tensor).unwrap();
        let mut control = bench.control(only_finite());
        let mut oracle = Oracle::new(&start, Rounding::WGSL);
        for grad in [&gradient, &poisoned, &gradient, &poisoned] {
            bench.upload(&grads, grad);
            bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
        }
        oracle.step(&adamw(), &gradient);
        oracle.step(&adamw(), &gradient);
        let state = bench.wait(optimizer.state()).await.unwrap();
        assert_eq!((state.steps, state.tensors[0].applied_steps), (4, 2));
        // One that is recorded may still be submitted.
        let mut open = bench.encoder();
        optimizer.step_with(&mut open, &mut control).unwrap();
        let mut encoder = bench.encoder();
        assert_eq!(optimizer.step(&mut encoder), Err(StepError::Unread));
        let mut other = bench.control(only_finite());
        let refused = optimizer.step_with(&mut encoder, &mut other);
        assert_eq!(refused, Err(StepError::Unread));
        drop((encoder, open));
        bench.outcomes(&mut control).await;
        assert_eq!(optimizer.applied_steps("theta"), Some(2));
        // By turns without a control, with another one, and with the first again.
        bench.upload(&grads, &gradient);
        bench.submit(|encoder| optimizer.step(encoder).unwrap());
        bench.submit(|encoder| optimizer.step_with(encoder, &mut other).unwrap());
        bench.outcomes(&mut other).await;
        bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
        for _ in 0..3 {
            oracle.step(&adamw(), &gradient);
        }
        oracle.check_params(&bench.download(&params).await).unwrap();

        // What is on its way when a state is loaded is not mistaken for it.
        let mut oracle = Oracle::resume(&adamw(), &start, &state.tensors[0], Rounding::WGSL);
        bench.upload(&params, &start);
        optimizer.load_state(&state).unwrap();
        bench.outcomes(&mut control).await;
        assert_eq!(optimizer.applied_steps("theta"), Some(2));
        for grad in [&poisoned, &gradient] {
            bench.upload(&grads, grad);
            bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
        }
        oracle.step(&adamw(), &gradient);
        oracle.check_params(&bench.download(&params).await).unwrap();
        bench.outcomes(&mut control).await;
        assert_eq!(optimizer.applied_steps("theta"), Some(3));

        // The scale goes on, too.
        let scale = StepControl::builder()
            .loss_scale(LossScale::default())
            .build()
            .unwrap();
        let scaled = bench.control(scale);
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
        bench.submit(|encoder| optimizer.step_with(encoder, &mut scaled).unwrap());
        let state = bench.wait(scaled.state()).await.unwrap();
        assert_eq!((state.scale, state.growth_tracker), (4.0, 0));
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
        let mut decisions = ControlOracle::new(&control, Rounding::WGSL);
        let mut control = bench.control(control);
        let mut oracles = (
            Oracle::new(&start, Rounding::WGSL),
            Oracle::new(&start, Rounding::WGSL),
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

/// What an encoder held that was dropped for an error is recorded again.
#[gpu_test]
async fn a_step_that_was_refused_leaves_nothing_behind() {
    for bench in Bench::both().await {
        let (start, gradient) = (values(1, 1003), values(2, 1003));
        let buffers = [(); 2].map(|()| (bench.buffer_of(&start), bench.buffer_of(&gradient)));
        let tensors = buffers
            .each_ref()
            .map(|(params, grads)| [whole("theta", params, grads)]);
        let optimizer = |i: usize| GpuOptimizer::new(&bench.kernels, adamw(), &tensors[i]).unwrap();
        let (mut fresh, mut unread) = (optimizer(0), optimizer(1));
        let mut other = bench.control(only_finite());
        bench.submit(|encoder| unread.step_with(encoder, &mut other).unwrap());
        let control = StepControl::builder().max_norm(1.0).build().unwrap();
        let decision =
            ControlOracle::new(&control, Rounding::WGSL).decide(&[("default", &gradient)]);
        let mut control = bench.control(control);
        let mut encoder = bench.encoder();
        let refused = control.step(&mut encoder, &mut [&mut fresh, &mut unread]);
        assert_eq!(refused, Err(StepError::Unread));
        drop(encoder);
        assert_eq!((fresh.steps(), control.steps()), (0, 0));
        bench.submit(|encoder| fresh.step_with(encoder, &mut control).unwrap());
        let norm = f64::from(bench.outcomes(&mut control).await[0].norm);
        assert!(
            decision.norm.low <= norm && norm <= decision.norm.high,
            "{norm}"
        );
        let mut oracle = Oracle::new(&start, Rounding::WGSL);
        oracle.step_by(&adamw(), &gradient, &decision.of_group("default"));
        let params = bench.download(&buffers[0].0).await;
        oracle.check_params(&params).unwrap();
    }
}

#[gpu_test]
async fn gradients_that_are_not_finite_are_applied_where_that_is_asked_for() {
    let bench = Bench::best().await;
    for (poison, max_norm) in [
        (f32::INFINITY, None),
        (f32::NAN, None),
        (f32::INFINITY, Some(1.0)),
        (f32::NAN, Some(1.0)),
    ] {
        let mut gradient = values(2, 37);
        gradient[5] = poison;
        let (params, grads) = (bench.buffer_of(&values(1, 37)), bench.buffer_of(&gradient));
        let config = SgdConfig::builder(0.5).build().unwrap();
        let tensor = [whole("theta", &params, &grads)];
        let mut optimizer = GpuOptimizer::new(&bench.kernels, config, &tensor).unwrap();
        let mut control = StepControl::builder().nonfinite(NonFinite::Apply);
        if let Some(max_norm) = max_norm {
            control = control.max_norm(max_norm);
        }
        let mut control = bench.control(control.build().unwrap());
        bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
        let record = bench.outcomes(&mut control).await[0];
        assert!(record.found_nonfinite && !record.is_skipped);
        assert_eq!(record.norm.is_nan(), poison.is_nan());
        let stepped = bench.download(&params).await;
        assert!(
            !stepped[5].is_finite(),
            "{poison} {max_norm:?}: {}",
            stepped[5]
        );
        let start = values(1, 37);
        match max_norm {
            // torch.nn.utils.clip_grad_norm_ multiplies by 1/inf, or by NaN.
            Some(_) if poison.is_nan() => assert!(stepped.iter().all(|x| x.is_nan())),
            Some(_) => assert!((0..37).all(|i| i == 5 || stepped[i] == start[i])),
            None => assert!((0..37).all(|i| i == 5 || stepped[i] == start[i] - 0.5 * gradient[i])),
        }
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
            TensorBinding::new(name, &params, &grads, [numel_of(index)]).at(offset, offset)
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
    let mut decisions = ControlOracle::new(&control, Rounding::WGSL);
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
                let mut oracle = Oracle::new(&start[range.clone()], Rounding::WGSL);
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

/// In a pool parameters and gradients lie in one buffer, and tensors move from step to step.
#[gpu_test]
async fn tensors_of_a_pool_move_under_a_control() {
    for bench in Bench::both().await {
        let (numels, start) = (
            [100, 4099, 8],
            [values(1, 100), values(2, 4099), values(3, 8)],
        );
        let grads = [values(4, 100), values(5, 4099), values(6, 8)];
        let names = ["a", "b", "c"];
        let groups = ParamGroups::new(adamw());
        let shapes = names
            .iter()
            .zip(numels)
            .map(|(name, numel)| (*name, vec![numel]));
        let mut optimizer = GpuOptimizer::unbound(&bench.kernels, &groups, shapes).unwrap();
        let control = StepControl::builder().max_norm(1.0).build().unwrap();
        let mut decisions = ControlOracle::new(&control, Rounding::WGSL);
        let mut control = bench.control(control);
        let mut oracles = start
            .each_ref()
            .map(|start| Oracle::new(start, Rounding::WGSL));
        let mut params = start.clone();
        for (step, order) in [[0, 1, 2], [2, 0, 1], [1, 2, 0], [1, 0, 2]]
            .into_iter()
            .enumerate()
        {
            // The gradient of each follows its parameters, on 256 bytes, in another order at every step.
            let (mut pool, mut places) = (vec![f32::NAN; 64], [[0; 2]; 3]);
            for index in order {
                let mut grads = grads[index].clone();
                if step == 1 && index == 2 {
                    grads[7] = f32::INFINITY;
                }
                for (role, values) in [&params[index], &grads].into_iter().enumerate() {
                    places[index][role] = 4 * pool.len() as u64;
                    pool.extend_from_slice(values);
                    pool.resize(pool.len().next_multiple_of(64), f32::NAN);
                }
            }
            let buffer = bench.buffer_of(&pool);
            let tensors: Vec<_> = (0..3)
                .map(|i| {
                    let [params, grads] = places[i];
                    TensorBinding::new(names[i], &buffer, &buffer, [numels[i]]).at(params, grads)
                })
                .collect();
            bench.submit(|encoder| {
                optimizer.rebind(encoder, &tensors).unwrap();
                optimizer.step_with(encoder, &mut control).unwrap();
            });
            let seen = grads.each_ref().map(|grads| ("default", &grads[..]));
            if step != 1 {
                let factors = decisions.decide(&seen).of_group("default");
                for (oracle, grads) in oracles.iter_mut().zip(&grads) {
                    oracle.step_by(&adamw(), grads, &factors);
                }
            }
            let pool = bench.download(&buffer).await;
            for (index, oracle) in oracles.iter().enumerate() {
                let start = places[index][0] as usize / 4;
                params[index] = pool[start..start + numels[index]].to_vec();
                oracle.check_params(&params[index]).unwrap();
            }
        }
        let records = bench.outcomes(&mut control).await;
        assert_eq!(records.last().unwrap().skipped, 1);
        assert_eq!(optimizer.applied_steps("b"), Some(3));
    }
}

/// Buffers, bind groups, pipelines and modules; `noop::control` counts what is on the heap, and that nothing is submitted or
/// polled. A browser does not count.
#[cfg(not(target_arch = "wasm32"))]
#[gpu_test]
async fn nothing_is_created_after_the_first_step() {
    // Others create on the shared device meanwhile.
    for optional in [wgpu_optim::OPTIONAL_FEATURES, wgpu::Features::empty()] {
        let bench = Bench::with(optional).await;
        let arena = Arena::new(&bench.device, &bench.queue, [("a", [5000]), ("b", [77])]).unwrap();
        let apart = [(); 3].map(|()| (bench.buffer(64), bench.buffer(64)));
        let mut bindings = arena.bindings();
        for (name, (params, grads)) in ["c", "d", "e"].iter().zip(&apart) {
            bindings.push(whole(name, params, grads));
        }
        let mut optimizer = GpuOptimizer::new(&bench.kernels, adamw(), &bindings).unwrap();
        let control = StepControl::builder()
            .max_norm(1.0)
            .loss_scale(LossScale::default());
        let mut control = bench.control(control.build().unwrap());
        let objects = || {
            let counters = bench.device.get_internal_counters().hal;
            let counters = [
                &counters.buffers,
                &counters.bind_groups,
                &counters.compute_pipelines,
                &counters.shader_modules,
            ];
            counters.map(|counter| counter.read())
        };
        let mut counts = Vec::new();
        for _ in 0..5 {
            let before = objects();
            let mut encoder = bench.encoder();
            optimizer.step_with(&mut encoder, &mut control).unwrap();
            let after = objects();
            counts.push([0, 1, 2, 3].map(|i| after[i] - before[i]));
            bench.queue.submit([encoder.finish()]);
            bench.outcomes(&mut control).await;
        }
        assert!(counts[0].iter().all(|created| *created > 0), "{counts:?}");
        assert_eq!(counts[1..], [[0; 4]; 4]);
    }
}
