use wgpu_optim::gpu::ArenaError;
use wgpu_optim::oracle::{ControlOracle, Oracle, Roundoff};
use wgpu_optim::state::DuplicateName;
use wgpu_optim::storage::Storage;
use wgpu_optim::{
    AdamConfig, AnyRule, Arena, GpuControl, GpuOptimizer, Masters, OPTIONAL_FEATURES, Optimizer,
    ParamGroups, Precision, Rule as _, SgdConfig, StepControl, StorageType, TensorSpec,
};

use super::{Bench, gpu_test};
use crate::cases::{LRS, sizes, values};
use crate::stored::rounded;

fn config() -> SgdConfig {
    SgdConfig::builder(0.05)
        .momentum(0.9)
        .nesterov(true)
        .weight_decay(0.01)
        .build()
        .unwrap()
}

/// Steps an arena of these sizes and compares every element.
async fn check(bench: &Bench, sizes: &[usize]) -> (Arena, GpuOptimizer) {
    let layout = sizes
        .iter()
        .enumerate()
        .map(|(i, numel)| (i.to_string(), vec![*numel]));
    let arena = Arena::new(&bench.device, &bench.queue, layout).unwrap();
    let values_of = |(i, numel): (usize, &usize)| values(i as u64, *numel);
    let start: Vec<_> = sizes.iter().enumerate().map(values_of).collect();
    arena.upload_all_params(&start).unwrap();
    let oracle = |start: &Vec<f32>| Oracle::new(start, Roundoff::WGSL);
    let mut oracles: Vec<_> = start.iter().map(oracle).collect();
    let mut optimizer = GpuOptimizer::new(&bench.kernels, config(), &arena.bindings()).unwrap();
    for (step, lr) in LRS.into_iter().enumerate() {
        optimizer.set_lr(lr).unwrap();
        let seed = |i: usize| (1000 * (step + 1) + i) as u64;
        let values_of = |(i, numel): (usize, &usize)| values(seed(i), *numel);
        let grads: Vec<_> = sizes.iter().enumerate().map(values_of).collect();
        // Each tensor on its own, or all at once.
        if step == 0 {
            for (i, grads) in grads.iter().enumerate() {
                arena.upload_grads(&i.to_string(), grads).unwrap();
            }
        } else {
            arena.upload_all_grads(&grads).unwrap();
        }
        for (oracle, grads) in oracles.iter_mut().zip(&grads) {
            oracle.step(optimizer.config(), grads);
        }
        bench.step(&mut optimizer);
    }
    let all = bench.wait(arena.download_all_params()).await.unwrap();
    let state = bench.wait(optimizer.state()).await.unwrap();
    for (i, oracle) in oracles.iter().enumerate() {
        oracle
            .check_params(&all[i])
            .unwrap_or_else(|e| panic!("tensor {i}: {e}"));
        oracle
            .check_velocity(&state.tensors[i].slot("momentum_buffer").unwrap())
            .unwrap();
    }
    (arena, optimizer)
}

#[gpu_test]
async fn every_size_in_one_dispatch() {
    let sizes: Vec<_> = sizes().collect();
    for bench in Bench::both().await {
        let (arena, optimizer) = check(bench, &sizes).await;
        assert_eq!(optimizer.dispatches(), 1);
        let alignment = bench.device.limits().min_storage_buffer_offset_alignment;
        for tensor in arena.tensors() {
            assert_eq!(
                tensor.offset_bytes % u64::from(alignment),
                0,
                "{}",
                tensor.name
            );
        }
        let one = bench.wait(arena.download_params("20")).await.unwrap();
        let all = bench.wait(arena.download_all_params()).await.unwrap();
        assert_eq!(one, all[20]);
    }
}

/// Every other tensor of an arena stays as it is, then others do: in few dispatches, each of its tensors as if it were alone,
/// with a control that clips them one by one and without.
async fn freeze_every_other(bench: &Bench, stored: (StorageType, Precision), is_controlled: bool) {
    let ((of, precision), numels) = (stored, [5, 1000, 64, 1, 2049, 8]);
    let numels: Vec<_> = numels.into_iter().cycle().take(60).collect();
    let specs = numels.iter().enumerate();
    let specs = specs.map(|(i, numel)| {
        TensorSpec::new(i.to_string(), [*numel])
            .params_type(of)
            .grads_type(of)
    });
    let arena = Arena::new(&bench.device, &bench.queue, specs).unwrap();
    let of_seed =
        |seed: usize| move |(i, n): (usize, &usize)| rounded(of, &values((seed + i) as u64, *n));
    let start: Vec<_> = numels.iter().enumerate().map(of_seed(0)).collect();
    arena.upload_all_params(&start).unwrap();
    let config: AnyRule = AdamConfig::adamw(0.05).build().unwrap().into();
    let groups = ParamGroups::new(config.clone()).with_precision(precision);
    let mut optimizer =
        GpuOptimizer::with_groups(&bench.kernels, &groups, &arena.bindings()).unwrap();
    let storage = Storage::new(of, of, config.slots().kept_names(), &precision);
    let oracle = |start: &Vec<f32>| Oracle::new(start, Roundoff::WGSL).stored(storage);
    let mut oracles: Vec<_> = start.iter().map(oracle).collect();
    let control = StepControl::builder().tensor_max_norm(2.0).build().unwrap();
    let mut decisions = ControlOracle::new(&control, Roundoff::WGSL);
    let mut control = GpuControl::new(&bench.kernels, control).unwrap();
    for step in 0..6 {
        let is_frozen = |tensor: usize| match step {
            0..2 => tensor % 2 == 1,
            2..4 => (tensor / 3).is_multiple_of(2),
            _ => false,
        };
        for tensor in 0..numels.len() {
            optimizer
                .set_frozen(&tensor.to_string(), is_frozen(tensor))
                .unwrap();
        }
        let gradients: Vec<_> = numels
            .iter()
            .enumerate()
            .map(of_seed(1000 * (step + 1)))
            .collect();
        arena.upload_all_grads(&gradients).unwrap();
        let taking_part: Vec<_> = (0..numels.len())
            .filter(|tensor| !is_frozen(*tensor))
            .collect();
        let mut encoder = bench.encoder();
        if is_controlled {
            optimizer.step_with(&mut encoder, &mut control).unwrap();
            let seen = taking_part
                .iter()
                .map(|tensor| ("default", &*gradients[*tensor]));
            let decision = decisions.decide(&seen.collect::<Vec<_>>());
            for (place, tensor) in taking_part.iter().enumerate() {
                let factors = decision.of_tensor(place, "default");
                oracles[*tensor].step_by(&config, &gradients[*tensor], &factors);
            }
            // Norms, their decision and that of tensors, and the step.
            assert!(optimizer.dispatches() <= 6, "{}", optimizer.dispatches());
        } else {
            optimizer.step(&mut encoder).unwrap();
            for tensor in &taking_part {
                oracles[*tensor].step(&config, &gradients[*tensor]);
            }
            // Tensors of three counts, at the end.
            assert!(optimizer.dispatches() <= 4, "{}", optimizer.dispatches());
        }
        bench.queue.submit([encoder.finish()]);
    }
    let all = bench.wait(arena.download_all_params()).await.unwrap();
    let state = bench.wait(optimizer.state()).await.unwrap();
    for (i, oracle) in oracles.iter().enumerate() {
        let here = format!("tensor {i}, {of:?} {precision:?}, controlled: {is_controlled}");
        oracle
            .check_params(&all[i])
            .unwrap_or_else(|e| panic!("{here}: {e}"));
        for slot in state.tensors[i]
            .slots
            .iter()
            .filter(|slot| slot.name.starts_with("exp"))
        {
            let checked = oracle.check_slot(&slot.name, &slot.values.to_f32());
            checked.unwrap_or_else(|e| panic!("{here}: {e}"));
        }
    }
}

#[gpu_test]
async fn frozen_tensors_leave_few_dispatches() {
    for bench in Bench::both().await {
        for masters in [Masters::F32, Masters::LowBits, Masters::None] {
            let precision = Precision {
                masters,
                ..Precision::default()
            };
            for is_controlled in [false, true] {
                freeze_every_other(bench, (StorageType::Bf16, precision), is_controlled).await;
            }
        }
        for is_controlled in [false, true] {
            let f32s = (StorageType::F32, Precision::default());
            freeze_every_other(bench, f32s, is_controlled).await;
        }
    }
}

/// Buffers of 64 KiB and bindings of 16: the arena takes several buffers, and each several pieces.
#[cfg(not(target_arch = "wasm32"))]
#[gpu_test]
async fn an_arena_past_a_buffer_and_past_a_binding() {
    use wgpu_optim::wgpu;

    let limits = wgpu::Limits {
        max_storage_buffer_binding_size: 16 * 1024,
        max_buffer_size: 64 * 1024,
        ..wgpu::Limits::default()
    };
    let bench = Bench::open(wgpu::Features::empty(), limits).await;
    let (arena, optimizer) = check(&bench, &[10_000, 3, 5_000, 9_999, 1, 12_000, 700]).await;
    assert!(arena.params().len() >= 3);
    assert!(optimizer.dispatches() > arena.params().len());
}

#[gpu_test]
async fn mistakes_are_named_and_the_arena_goes_on() {
    let bench = Bench::with(OPTIONAL_FEATURES).await;
    let new = |tensors: &[(&str, Vec<usize>)]| {
        Arena::new(&bench.device, &bench.queue, tensors.iter().cloned())
    };
    let twice = new(&[("a", vec![1]), ("a", vec![2])]);
    assert_eq!(
        twice.unwrap_err(),
        ArenaError::DuplicateName(DuplicateName { tensor: "a".into() })
    );
    for shape in [vec![1 << 30, 1 << 10], vec![usize::MAX, usize::MAX]] {
        let large = new(&[("a", vec![1]), ("b", shape)]);
        assert!(matches!(large, Err(ArenaError::TooLarge { tensor, .. }) if tensor == "b"));
    }
    let arena = new(&[("a", vec![2, 3]), ("none", vec![0, 9]), ("scalar", vec![])]).unwrap();
    assert_eq!(arena.tensors()[0].numel, 6);
    let unknown = arena.upload_params("b", &[1.0]);
    assert_eq!(
        unknown,
        Err(ArenaError::UnknownTensor { tensor: "b".into() })
    );
    let short = arena.upload_grads("a", &[1.0]);
    let expected = ArenaError::Length {
        tensor: "a".into(),
        expected: 6,
        actual: 1,
    };
    assert_eq!(short, Err(expected));
    arena.upload_params("scalar", &[7.0]).unwrap();
    let too_few = arena.upload_all_params(&[vec![1.0; 6], vec![]]);
    let expected = ArenaError::TensorCount {
        expected: 3,
        actual: 2,
    };
    assert_eq!(too_few, Err(expected));
    let too_long = arena.upload_all_params(&[vec![1.0; 6], vec![], vec![1.0; 2]]);
    let expected = ArenaError::Length {
        tensor: "scalar".into(),
        expected: 1,
        actual: 2,
    };
    assert_eq!(too_long, Err(expected));
    let all = bench.wait(arena.download_all_params()).await.unwrap();
    assert_eq!(
        all,
        [vec![0.0; 6], vec![], vec![7.0]],
        "nothing was written"
    );
    let other: [&[f32]; 3] = [&[1.0; 6], &[], &[2.0]];
    arena.upload_all_params(&other).unwrap();
    let all = bench.wait(arena.download_all_params()).await.unwrap();
    assert_eq!(all, other);

    let empty = new(&[]).unwrap();
    assert!(empty.bindings().is_empty());
    empty.upload_all_params(&[[0.0; 0]; 0]).unwrap();
    assert!(
        bench
            .wait(empty.download_all_params())
            .await
            .unwrap()
            .is_empty()
    );
}

/// In a browser nobody knows before the next transfer down.
#[cfg(not(target_arch = "wasm32"))]
#[gpu_test]
async fn an_upload_to_a_lost_device_is_an_error() {
    let bench = Bench::with(OPTIONAL_FEATURES).await;
    let arena = Arena::new(&bench.device, &bench.queue, [("a", vec![2])]).unwrap();
    bench.device.destroy();
    let lost = arena.upload_all_params(&[[1.0; 2]]);
    assert!(matches!(lost, Err(ArenaError::Transfer(_))), "{lost:?}");
}
