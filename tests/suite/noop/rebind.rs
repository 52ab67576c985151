//! What may be bound anew, and what it costs.

use allocation_counter::measure;
use wgpu_optim::gpu::RebindError;
use wgpu_optim::plan::PlanError;
use wgpu_optim::state::{DuplicateName, UnknownTensor};
use wgpu_optim::{
    BuildError, GpuOptimizer, Optimizer, ParamGroups, Precision, SgdConfig, StorageType,
    TensorBinding,
};

use super::{STORAGE, buffer, build, kernels, tensor};

#[test]
fn other_tensors_are_named_and_the_optimizer_goes_on() {
    let kernels = kernels();
    let params = &buffer(&kernels, 4096, STORAGE);
    let grads = &buffer(&kernels, 4096, STORAGE);
    let a = || tensor("a", (params, 0), (grads, 0), 10);
    let b = || tensor("b", (params, 256), (grads, 0), 20);
    let mut optimizer = build(&kernels, &[a(), b()]).unwrap();
    let mut encoder = kernels.device().create_command_encoder(&Default::default());
    let mut refused = |tensors: &[TensorBinding<'_>]| {
        let before = optimizer.plan().clone();
        let error = optimizer.rebind(&mut encoder, tensors).unwrap_err();
        assert_eq!(*optimizer.plan(), before);
        optimizer.step(&mut encoder).unwrap();
        error
    };
    let unknown = UnknownTensor { tensor: "c".into() };
    let c = tensor("c", (params, 256), (grads, 0), 20);
    assert_eq!(refused(&[a(), c]), unknown.into());
    let twice = BuildError::from(DuplicateName { tensor: "a".into() });
    assert_eq!(refused(&[a(), a()]), twice.into());
    let other = tensor("b", (params, 256), (grads, 0), 21);
    let expected = RebindError::Shape {
        tensor: "b".into(),
        expected: vec![20],
        actual: vec![21],
    };
    assert_eq!(refused(&[a(), other]), expected);
    let overlapping = tensor("b", (params, 36), (grads, 0), 20);
    let expected = BuildError::Overlap {
        tensor: "b".into(),
        role: "params",
        other: "a".into(),
    };
    assert_eq!(refused(&[a(), overlapping]), expected.into());
    let too_close = tensor("b", (params, 1024), (params, 1104), 20);
    let expected = BuildError::Plan(PlanError::TooClose {
        tensor: "b".to_owned(),
        params_offset_bytes: 1024,
        grads_offset_bytes: 1104,
        least_offset_bytes: 1280,
    });
    assert_eq!(refused(&[a(), too_close]), expected.into());

    // In any order.
    let moved = tensor("b", (params, 1024), (grads, 512), 20);
    optimizer.rebind(&mut encoder, &[moved, a()]).unwrap();
    optimizer.step(&mut encoder).unwrap();
    kernels.queue().submit([encoder.finish()]);
    assert_eq!(optimizer.applied_steps("b"), Some(6));
}

#[test]
fn what_has_not_moved_is_not_bound_again() {
    let kernels = kernels();
    let params = &buffer(&kernels, 1 << 20, STORAGE);
    let grads = &buffer(&kernels, 2 << 20, STORAGE);
    let names: Vec<_> = (0..16).map(|index| index.to_string()).collect();
    let at = |grads_offset: u64| -> Vec<_> {
        let binding = |(index, name)| {
            tensor(
                name,
                (params, 40_960 * index),
                (grads, 40_960 * index + grads_offset),
                9000,
            )
        };
        (0_u64..)
            .zip(&names)
            .map(|(index, name)| binding((index, name.as_str())))
            .collect()
    };
    let mut optimizer = build(&kernels, &at(0)).unwrap();
    let mut encoder = kernels.device().create_command_encoder(&Default::default());
    let state = |optimizer: &GpuOptimizer| -> Vec<_> {
        let slices = names
            .iter()
            .flat_map(|name| optimizer.state_slices(name, "momentum_buffer"));
        slices.map(|slice| slice.buffer.clone()).collect()
    };
    let before = state(&optimizer);
    let mut allocations = |grads_offset| {
        measure(|| optimizer.rebind(&mut encoder, &at(grads_offset)).unwrap()).count_total
    };
    let (first, same, moved) = (allocations(0), allocations(0), allocations(256));
    assert!(
        same <= first && same + 16 <= moved,
        "{first} {same} {moved}"
    );
    assert_eq!(state(&optimizer), before, "no state had to move");
}

#[test]
fn a_tensor_without_a_place_waits_for_one() {
    let kernels = kernels();
    let params = &buffer(&kernels, 4096, STORAGE);
    let grads = &buffer(&kernels, 4096, STORAGE);
    let groups = ParamGroups::new(SgdConfig::builder(0.1).momentum(0.9).build().unwrap());
    let shapes = [("a", [10]), ("b", [20])];
    let mut optimizer = GpuOptimizer::unbound(&kernels, &groups, shapes).unwrap();
    let mut encoder = kernels.device().create_command_encoder(&Default::default());
    let mut step = |optimizer: &mut GpuOptimizer, tensors: &[_]| {
        optimizer.rebind(&mut encoder, tensors).unwrap();
        optimizer.step(&mut encoder).unwrap();
        ["a", "b"].map(|name| optimizer.applied_steps(name).unwrap())
    };
    let a = || tensor("a", (params, 0), (grads, 0), 10);
    let b = || tensor("b", (params, 256), (grads, 256), 20);
    assert_eq!(step(&mut optimizer, &[]), [0, 0]);
    assert_eq!(optimizer.dispatches(), 0);
    assert_eq!(step(&mut optimizer, &[b()]), [0, 1]);
    assert_eq!(step(&mut optimizer, &[a()]), [1, 1]);
    optimizer.set_frozen("b", true).unwrap();
    assert_eq!(step(&mut optimizer, &[b(), a()]), [2, 1]);
    optimizer.set_frozen("b", false).unwrap();
    assert_eq!(step(&mut optimizer, &[b(), a()]), [3, 2]);
    assert_eq!(optimizer.steps(), 5);
    kernels.queue().submit([encoder.finish()]);
}

#[test]
fn a_tensor_that_is_stored_otherwise_or_moves_by_half_a_word_is_named() {
    let kernels = kernels();
    let params = &buffer(&kernels, 4096, STORAGE);
    let grads = &buffer(&kernels, 4096, STORAGE);
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let groups = ParamGroups::new(config).with_precision(Precision {
        state: StorageType::Bf16,
        ..Precision::default()
    });
    let at = |params_bytes, params_type| {
        let a = tensor("a", (params, params_bytes), (grads, 0), 10);
        a.params_type(params_type)
    };
    let halves = |params_bytes| at(params_bytes, StorageType::Bf16);
    let mut optimizer = GpuOptimizer::with_groups(&kernels, &groups, &[halves(256)]).unwrap();
    let mut encoder = kernels.device().create_command_encoder(&Default::default());
    let mut refused = |tensor| {
        let before = optimizer.plan().clone();
        let error = optimizer.rebind(&mut encoder, &[tensor]).unwrap_err();
        assert_eq!(*optimizer.plan(), before);
        optimizer.step(&mut encoder).unwrap();
        error
    };
    let expected = RebindError::Stored {
        tensor: "a".into(),
        role: "params",
        expected: "bf16",
        actual: "f16",
    };
    assert_eq!(refused(at(256, StorageType::F16)), expected);
    let expected = RebindError::HalfWord { tensor: "a".into() };
    assert_eq!(refused(halves(258)), expected);
    let expected = BuildError::Misaligned {
        tensor: "a".into(),
        role: "params",
        offset_bytes: 257,
        elem_bytes: 2,
    };
    assert_eq!(refused(halves(257)), expected.into());
    // By whole words it does, as far as a window lets it.
    optimizer.rebind(&mut encoder, &[halves(512)]).unwrap();
    optimizer.rebind(&mut encoder, &[halves(516)]).unwrap();
    optimizer.step(&mut encoder).unwrap();
    assert_eq!(optimizer.applied_steps("a"), Some(4));
    kernels.queue().submit([encoder.finish()]);
}

#[test]
fn a_tensor_past_the_address_range_is_named_before_it_has_a_place() {
    let kernels = kernels();
    let groups = ParamGroups::new(SgdConfig::builder(0.1).momentum(0.9).build().unwrap());
    let unbound = |shape| GpuOptimizer::unbound(&kernels, &groups, [("a", vec![2]), ("b", shape)]);
    let refused = unbound(vec![usize::MAX, usize::MAX]).unwrap_err();
    let expected = BuildError::Plan(PlanError::TooLarge {
        tensor: "b".to_owned(),
        numel: u64::MAX,
    });
    assert_eq!(refused, expected);
    assert!(unbound(vec![3]).is_ok());
}
