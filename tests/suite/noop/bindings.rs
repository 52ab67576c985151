//! Every mistake in a list of tensors is named, and the next optimizer builds.

use std::slice;

use wgpu_optim::plan::PlanError;
use wgpu_optim::rules::UnknownSlot;
use wgpu_optim::state::DuplicateName;
use wgpu_optim::{
    AdamConfig, BuildError, GpuOptimizer, Optimizer, ParamGroups, Precision, StorageType, wgpu,
};

use super::{STORAGE, buffer, build, kernels, tensor};

#[test]
fn a_good_list_builds_and_steps() {
    let kernels = kernels();
    let [params, grads] = [(); 2].map(|()| buffer(&kernels, 400, STORAGE));
    let tensors = [
        tensor("a", (&params, 0), (&grads, 0), 50),
        tensor("empty", (&params, 200), (&grads, 0), 0),
        // Gradients may be shared.
        tensor("b", (&params, 200), (&grads, 0), 50),
    ];
    let mut optimizer = build(&kernels, &tensors).unwrap();
    let mut encoder = kernels.device().create_command_encoder(&Default::default());
    optimizer.step(&mut encoder).unwrap();
    kernels.queue().submit([encoder.finish()]);
    assert_eq!(optimizer.applied_steps("b"), Some(1));
    assert_eq!(optimizer.applied_steps("c"), None);
}

#[test]
fn a_slot_to_store_otherwise_that_no_rule_has_is_named() {
    let kernels = kernels();
    let [params, grads] = [(); 2].map(|()| buffer(&kernels, 400, STORAGE));
    let weight = tensor("weight", (&params, 0), (&grads, 0), 50);
    let build = |slot| {
        let config = AdamConfig::adamw(0.1).build().unwrap();
        let groups = ParamGroups::new(config).with_precision(Precision {
            slots: match slot {
                "exp_avg" => &[("exp_avg", StorageType::Bf16)],
                _ => &[("exp_avg_squared", StorageType::Bf16)],
            },
            ..Precision::default()
        });
        GpuOptimizer::with_groups(&kernels, &groups, slice::from_ref(&weight))
    };
    let expected = BuildError::UnknownSlot(UnknownSlot {
        group: "default".into(),
        slot: "exp_avg_squared".into(),
        expected: "exp_avg, exp_avg_sq, max_exp_avg_sq".into(),
    });
    assert_eq!(build("exp_avg_squared").unwrap_err(), expected);
    build("exp_avg").unwrap();
}

#[test]
fn no_tensors_at_all_is_a_step_of_nothing() {
    let kernels = kernels();
    let mut optimizer = build(&kernels, &[]).unwrap();
    let mut encoder = kernels.device().create_command_encoder(&Default::default());
    optimizer.step(&mut encoder).unwrap();
    kernels.queue().submit([encoder.finish()]);
    assert_eq!(optimizer.dispatches(), 0);
}

#[test]
fn mistakes_are_named_and_the_next_list_builds() {
    let kernels = kernels();
    let params = &buffer(&kernels, 400, STORAGE);
    let grads = &buffer(&kernels, 400, STORAGE);
    let copy = &buffer(&kernels, 400, wgpu::BufferUsages::COPY_DST);
    let good = || tensor("a", (params, 0), (grads, 0), 10);

    let refused = |tensors: &[_]| build(&kernels, tensors).unwrap_err();
    let name = || "b".to_owned();
    assert_eq!(
        refused(&[good(), good()]),
        BuildError::DuplicateName(DuplicateName { tensor: "a".into() })
    );
    let misaligned = |role| BuildError::Misaligned {
        tensor: name(),
        role,
        offset_bytes: 42,
        elem_bytes: 4,
    };
    let unusable = |role| BuildError::MissingUsage {
        tensor: name(),
        role,
        required: STORAGE,
        actual: wgpu::BufferUsages::COPY_DST,
    };
    for ((params, grads), expected) in [
        (((params, 42), (grads, 40)), misaligned("params")),
        (((params, 40), (grads, 42)), misaligned("grads")),
        (((copy, 0), (grads, 0)), unusable("params")),
        (((params, 40), (copy, 0)), unusable("grads")),
    ] {
        let bad = tensor("b", params, grads, 10);
        assert_eq!(refused(&[good(), bad]), expected);
    }
    for (role, offset_bytes, numel) in [
        ("params", 364, 10),
        ("params", 40, u64::MAX / 2),
        ("params", u64::MAX - 3, 1),
    ] {
        let bad = tensor("b", (params, offset_bytes), (grads, 0), numel);
        let expected = BuildError::OutOfBounds {
            tensor: name(),
            role,
            offset_bytes,
            numel,
            storage: "f32",
            buffer_bytes: 400,
        };
        assert_eq!(refused(&[good(), bad]), expected);
    }
    let bad = tensor("b", (params, 40), (grads, 364), 10);
    assert!(matches!(
        refused(&[good(), bad]),
        BuildError::OutOfBounds { role: "grads", .. }
    ));
    // In one buffer: over each other, and too close for two bindings.
    let within = tensor("b", (params, 40), (params, 60), 10);
    let overlap = BuildError::Overlap {
        tensor: name(),
        role: "grads",
        other: name(),
    };
    assert_eq!(refused(&[good(), within]), overlap);
    let close = tensor("b", (params, 40), (params, 200), 10);
    let too_close = BuildError::Plan(PlanError::TooClose {
        tensor: name(),
        params_offset_bytes: 40,
        grads_offset_bytes: 200,
        least_offset_bytes: 256,
    });
    let refused = refused(&[good(), close]);
    assert_eq!(refused, too_close);
    assert!(
        refused
            .to_string()
            .starts_with("tensor \"b\": parameters at byte 40")
    );

    let pool = tensor("b", (params, 40), (params, 256), 10);
    assert!(build(&kernels, &[good(), pool]).is_ok());
}

#[test]
fn overlaps_are_found_in_any_order() {
    let kernels = kernels();
    let params = &buffer(&kernels, 4000, STORAGE);
    let grads = &buffer(&kernels, 4000, STORAGE);
    let other = &buffer(&kernels, 4000, STORAGE);
    let wide = || tensor("wide", (params, 0), (grads, 0), 100);
    let inside = || tensor("inside", (params, 100), (grads, 800), 1);
    let beside = || tensor("beside", (params, 400), (grads, 0), 100);
    let last_element = tensor("last", (params, 396), (grads, 1200), 2);
    let reads_wide = || tensor("reads", (other, 0), (params, 200), 10);

    for (list, names) in [
        (vec![wide(), inside()], ["wide", "inside"]),
        (vec![inside(), beside(), wide()], ["wide", "inside"]),
        (vec![last_element, wide()], ["wide", "last"]),
        (vec![reads_wide(), wide()], ["wide", "reads"]),
    ] {
        let Err(BuildError::Overlap { tensor, other, .. }) = build(&kernels, &list) else {
            panic!("an overlap went unseen: {names:?}");
        };
        assert!(names.contains(&tensor.as_str()) && names.contains(&other.as_str()));
    }
    let Err(error) = build(&kernels, &[reads_wide(), wide()]) else {
        panic!("an overlap went unseen");
    };
    let expected = "tensor \"wide\": its parameters overlap the grads of tensor \"reads\"";
    assert_eq!(error.to_string(), expected);
    assert!(build(&kernels, &[wide(), beside()]).is_ok());
}

#[test]
fn a_destroyed_buffer_is_an_error_and_the_next_list_builds() {
    let kernels = kernels();
    let [params, grads] = [(); 2].map(|()| buffer(&kernels, 400, STORAGE));
    params.destroy();
    let refused = build(&kernels, &[tensor("a", (&params, 0), (&grads, 0), 100)]);
    assert!(
        matches!(refused, Err(BuildError::Device { .. })),
        "{refused:?}"
    );
    let params = buffer(&kernels, 400, STORAGE);
    assert!(build(&kernels, &[tensor("a", (&params, 0), (&grads, 0), 100)]).is_ok());
}
