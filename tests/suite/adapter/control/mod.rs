//! Steps under a control on a real adapter: norms, what is skipped and what follows from it, against exact arithmetic.

mod counts;
mod norm;

use wgpu_optim::control::{ControlRecord, NonFinite};
use wgpu_optim::oracle::{ControlOracle, Oracle, Roundoff};
use wgpu_optim::wgsl::ScalarPath;
use wgpu_optim::{
    AdamConfig, AnyRule, Arena, GpuControl, GpuOptimizer, LionConfig, LossScale, Optimizer,
    ParamGroups, Rule, SgdConfig, StepControl, StepError, StorageType, TensorBinding, wgpu,
};

use super::{Bench, Followed, gpu_test, whole};
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

impl Followed<'_, AnyRule> {
    /// The gradient with an element that is not finite.
    fn poisoned(&self, index: usize, by: f32) -> Vec<f32> {
        let mut gradient = self.gradient.clone();
        gradient[index] = by;
        gradient
    }
}

fn adamw() -> AnyRule {
    AdamConfig::adamw(0.05).build().unwrap().into()
}

/// Momentum whose first step is another.
pub fn momentum() -> AnyRule {
    let config = SgdConfig::builder(0.05).momentum(0.9).dampening(0.3);
    config.build().unwrap().into()
}

/// Every rule's first preset.
pub fn rules() -> Vec<AnyRule> {
    let mut rules: Vec<AnyRule> = Vec::new();
    for preset in AnyRule::presets() {
        let rule = preset.config(0.05).unwrap();
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
        let mut theta = bench.follow(adamw(), 1003);
        let scale = LossScale {
            initial: 8.0,
            growth_interval: 2,
            ..LossScale::default()
        };
        let control = StepControl::builder().loss_scale(scale).build().unwrap();
        let mut control = bench.control(control);
        let mut scale = 8.0;
        for (step, poison) in [false, true, false, false, true, false]
            .into_iter()
            .enumerate()
        {
            let mut scaled: Vec<_> = theta.gradient.iter().map(|g| g * scale).collect();
            if poison {
                scaled[500] = f32::INFINITY;
            } else {
                theta.expect_step();
            }
            bench.upload(&theta.grads, &scaled);
            bench.submit(|encoder| theta.step_with(encoder, &mut control));
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
            theta.check().await;
        }
        assert_eq!(theta.optimizer.applied_steps("theta"), Some(4));
        assert_eq!(theta.optimizer.steps(), 6);
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
    let mut decisions = ControlOracle::new(&control, Roundoff::WGSL);
    let mut on_device = bench.control(control);
    let oracle = |start: &Vec<f32>| Oracle::new(start, Roundoff::WGSL);
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
            for (place, i) in taking_part.into_iter().enumerate() {
                let config = optimizer.group_config(group_of(i)).unwrap();
                let factors = decision.of_tensor(place, group_of(i));
                oracles[i].step_by(config, &grads[i], &factors);
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
                .check_slot(&slot.name, &slot.values.to_f32())
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
        StepControl::builder().tensor_max_norm(1.0),
        StepControl::builder()
            .loss_scale(scale)
            .tensor_max_norm(0.25)
            .group_max_norm("head", 0.5)
            .clip_value(0.125),
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

/// A tensor of many partial sums, one of several pieces, small ones; with an infinite gradient that is applied, too.
/// Beside the twin on all cores, which a browser has not.
#[cfg(not(target_arch = "wasm32"))]
#[gpu_test]
async fn tensors_are_clipped_one_by_one_as_their_twins_are() {
    use wgpu_optim::{CpuControl, CpuOptimizer};

    for bench in Bench::both().await {
        for nonfinite in [None, Some(f32::INFINITY), Some(f32::NAN)] {
            let numels = [400_001, 64, 7, 65_536];
            let start: Vec<_> = (0..).zip(numels).map(|(i, n)| values(i, n)).collect();
            let mut gradients: Vec<_> = (9..).zip(numels).map(|(i, n)| values(i, n)).collect();
            if let Some(value) = nonfinite {
                gradients[1][63] = value;
            }
            let specs = ["a", "b", "c", "d"].iter().zip(numels);
            let specs: Vec<_> = specs.map(|(name, numel)| (*name, [numel])).collect();
            let arena = Arena::new(&bench.device, &bench.queue, specs.clone()).unwrap();
            arena.upload_all_params(&start).unwrap();
            arena.upload_all_grads(&gradients).unwrap();
            let config = SgdConfig::builder(0.5).build().unwrap();
            // The largest norm is that of a group, which does not clip; the tensor of the next largest is frozen.
            let groups = ParamGroups::new(config).with("head", config, |name| name == "a");
            let groups = groups.unwrap();
            let mut optimizer =
                GpuOptimizer::with_groups(&bench.kernels, &groups, &arena.bindings()).unwrap();
            optimizer.set_frozen("d", true).unwrap();
            let control = StepControl::builder().tensor_max_norm(3.0);
            let control = control.group_max_norm("head", 1e6);
            let control = control.nonfinite(NonFinite::Apply).build().unwrap();
            let mut on_device = bench.control(control.clone());
            bench.submit(|encoder| optimizer.step_with(encoder, &mut on_device).unwrap());
            let record = bench.outcomes(&mut on_device).await[0];

            let mut by_hand = CpuOptimizer::with_groups(&groups, specs.clone()).unwrap();
            let mut twin = CpuOptimizer::with_groups(&groups, specs).unwrap();
            twin.set_frozen("d", true).unwrap();
            let mut params = start.clone();
            let mut slices: Vec<_> = params.iter_mut().map(Vec::as_mut_slice).collect();
            let grads: Vec<_> = gradients.iter().map(Vec::as_slice).collect();
            let mut in_memory = CpuControl::new(control.clone());
            let expected = twin.step_with(&mut slices, &grads, &mut in_memory).unwrap();
            // What a verdict does to gradients, and a plain step by them, is the controlled one.
            let norms = twin.grad_norms(
                &grads
                    .iter()
                    .map(|grads| (*grads).into())
                    .collect::<Vec<_>>(),
                &control,
            );
            let norms = norms.unwrap();
            let verdict = CpuControl::new(control.clone()).decide(std::slice::from_ref(&norms));
            let mut applied = gradients.clone();
            for (tensor, grads) in applied.iter_mut().enumerate() {
                let group = if tensor == 0 { "head" } else { "default" };
                verdict.apply_to(group, norms.tensors[tensor].as_ref(), grads);
            }
            by_hand.set_frozen("d", true).unwrap();
            let mut again = start.clone();
            let mut slices: Vec<_> = again.iter_mut().map(Vec::as_mut_slice).collect();
            let applied: Vec<_> = applied.iter().map(Vec::as_slice).collect();
            by_hand.step(&mut slices, &applied).unwrap();
            let bits = |params: &[Vec<f32>]| -> Vec<u32> {
                params
                    .iter()
                    .flatten()
                    .map(|param| param.to_bits())
                    .collect()
            };
            if nonfinite.is_none() {
                assert!(bits(&again) == bits(&params));
            }
            let is_same = |x: f32, y: f32| x == y || x.is_nan() && y.is_nan();
            let is_near = |x: f32, y: f32| is_same(x, y) || (x / y - 1.0).abs() < 1e-4;
            assert!(
                is_near(record.norm, expected.norm),
                "{record:?} {expected:?}"
            );
            let factors = [record.clip_factor, expected.clip_factor];
            assert!(is_near(factors[0], factors[1]), "{factors:?}");
            assert_eq!(record.found_nonfinite, nonfinite.is_some());

            let group_of = |tensor: usize| if tensor == 0 { "head" } else { "default" };
            let seen = grads[..3].iter().enumerate();
            let seen: Vec<_> = seen.map(|(i, grads)| (group_of(i), *grads)).collect();
            if nonfinite.is_none() {
                let norms = grads[1..3].iter().map(|grads| {
                    let squares = grads.iter().map(|g| f64::from(*g).powi(2));
                    squares.sum::<f64>().sqrt()
                });
                let factor = norms.map(|norm| 3.0 / (norm + 1e-6)).fold(1.0, f64::min);
                assert!(
                    is_near(expected.clip_factor, factor as f32),
                    "{expected:?} {factor}"
                );
            }
            let decision = ControlOracle::new(&control, Roundoff::WGSL).decide(&seen);
            let stepped = bench.wait(arena.download_all_params()).await.unwrap();
            for (tensor, start) in start.iter().enumerate() {
                if tensor == 3 {
                    assert_eq!((&stepped[3], &params[3]), (start, start));
                    continue;
                }
                if nonfinite.is_some() && tensor == 1 {
                    let pairs = stepped[1].iter().zip(&params[1]);
                    assert!({ pairs }.all(|(x, y)| is_same(*x, *y)));
                    continue;
                }
                for (params, rounding) in [
                    (&stepped[tensor], Roundoff::WGSL),
                    (&params[tensor], Roundoff::NEAREST),
                ] {
                    let mut oracle = Oracle::new(start, rounding);
                    let factors = decision.of_tensor(tensor, group_of(tensor));
                    oracle.step_by(&config, grads[tensor], &factors);
                    oracle.check_params(params).unwrap();
                }
            }
        }
    }
}

/// Under one control, of tensors whose norms are 5, 13 and 0.5; frozen, skipped and let go on.
#[gpu_test]
async fn tensors_of_several_optimizers_are_clipped_one_by_one() {
    for bench in Bench::both().await {
        let config = SgdConfig::builder(1.0).build().unwrap();
        let grads = [[3.0, -4.0], [5.0, 12.0], [0.3, 0.4]];
        let buffers = grads.map(|grads| (bench.buffer_of(&[0.0; 2]), bench.buffer_of(&grads)));
        let [a, b, c] = buffers.each_ref().map(|(params, grads)| (params, grads));
        let tensors = [whole("a", a.0, a.1), whole("b", b.0, b.1)];
        let mut first = GpuOptimizer::new(&bench.kernels, config, &tensors).unwrap();
        let mut second = bench.optimizer(config, c.0, c.1);
        let scale = LossScale {
            initial: 2.0,
            ..LossScale::default()
        };
        let control = StepControl::builder().tensor_max_norm(1.25);
        let mut control = bench.control(control.loss_scale(scale).build().unwrap());
        let mut step = |first: &mut GpuOptimizer, second: &mut GpuOptimizer| {
            bench.submit(|encoder| control.step(encoder, &mut [first, second]).unwrap());
        };
        // Half of each, of norm 1.25 at most; then without the one that is frozen.
        step(&mut first, &mut second);
        first.set_frozen("a", true).unwrap();
        step(&mut first, &mut second);
        bench.upload(c.1, &[f32::INFINITY, 0.0]);
        step(&mut first, &mut second);
        first.set_frozen("a", false).unwrap();
        bench.upload(c.1, &grads[2]);
        step(&mut first, &mut second);
        let records = bench.outcomes(&mut control).await;
        let skipped: Vec<_> = records.iter().map(|record| record.is_skipped).collect();
        assert_eq!(skipped, [false, false, true, false]);
        let unscaled = [0.5, 0.5, 1.0];
        for (index, (params, _)) in buffers.iter().enumerate() {
            let norm = grads[index].iter().map(|g| g * g).sum::<f32>().sqrt();
            let mut expected = 0.0;
            for (step, factor) in unscaled.into_iter().enumerate() {
                if index > 0 || step != 1 {
                    expected -= factor * (1.25 / (factor * norm)).min(1.0);
                }
            }
            let params = bench.download(params).await;
            for (param, grad) in params.iter().zip(grads[index]) {
                approx::assert_relative_eq!(*param, expected * grad, max_relative = 1e-5);
            }
        }
        for (record, factor) in records.iter().zip([6.5, 6.5, f32::INFINITY, 13.0]) {
            approx::assert_relative_eq!(record.clip_factor, 1.25 / factor, max_relative = 1e-5);
        }
    }
}

#[gpu_test]
async fn steps_of_one_encoder_each_see_their_own_control() {
    for bench in Bench::both().await {
        let mut theta = bench.follow(adamw(), 300);
        let mut on_device = bench.control(only_finite());
        let mut encoder = bench.encoder();
        for (max_norm, scale, lr) in [(1.0, 2.0, 0.1), (0.25, 3.0, 0.01), (8.0, 1.0, 0.2)] {
            let mut control = StepControl::builder().max_norm(max_norm).grad_scale(scale);
            if lr < 0.1 {
                control = control.clip_value(0.001);
            }
            let control = control.build().unwrap();
            let decision = ControlOracle::new(&control, Roundoff::WGSL)
                .decide(&[("default", &theta.gradient)]);
            on_device.set_control(control);
            theta.optimizer.set_lr(lr).unwrap();
            theta.step_with(&mut encoder, &mut on_device);
            theta.oracle.step_by(
                theta.optimizer.config(),
                &theta.gradient,
                &decision.of_group("default"),
            );
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
        theta.check().await;
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
            ControlOracle::new(&control, Roundoff::WGSL).decide(&[("default", &gradient)]);
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
        let mut oracle = Oracle::new(&start, Roundoff::WGSL);
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
        let mut decisions = ControlOracle::new(&control, Roundoff::WGSL);
        let mut control = bench.control(control);
        let mut oracles = start
            .each_ref()
            .map(|start| Oracle::new(start, Roundoff::WGSL));
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
                    TensorBinding::new(names[i], &buffer, &buffer, [numels[i]])
                        .params_at(params)
                        .grads_at(grads)
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
