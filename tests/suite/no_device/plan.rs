use proptest::prelude::*;
use wgpu_optim::PlanError;
use wgpu_optim::plan::{
    Access, DeviceLimits, ELEM_BYTES, Piece, Plan, TensorLayout, WORKGROUP_SIZE, Window,
};

/// What lavapipe has, and WebGPU guarantees.
const COMMON: DeviceLimits = DeviceLimits {
    max_binding_bytes: 128 << 20,
    max_buffer_bytes: 256 << 20,
    offset_alignment_bytes: 256,
    max_workgroups_per_dimension: 65_535,
};

fn tensor(numel: u64, params_offset_bytes: u64, grads_offset_bytes: u64) -> TensorLayout {
    TensorLayout {
        numel,
        params_offset_bytes,
        grads_offset_bytes,
    }
}

fn numel(piece: &Piece) -> u64 {
    piece.elems.end - piece.elems.start
}

/// The elements of its piece that a dispatch updates, by walking its grid as the shader does.
fn updated(plan: &Plan, dispatch: usize) -> Vec<u64> {
    let d = &plan.dispatches[dispatch];
    let piece = &plan.pieces[d.piece];
    let per_unit = u64::from(d.access.unit_elems());
    let mut elements = Vec::new();
    for y in 0..d.workgroups[1] {
        for x in 0..d.workgroups[0] * WORKGROUP_SIZE {
            let unit = y * d.row() + x;
            if unit >= d.count {
                continue;
            }
            let skips = unit >= d.head && d.access == Access::Scalar;
            let skipped = if skips { d.gap } else { 0 };
            let unit = u64::from(unit + skipped);
            for lane in 0..per_unit {
                let in_window = |first: u32, window: &Window| {
                    (u64::from(first) + unit) * per_unit + lane - u64::from(window.first_elem)
                };
                let grads_first = d.first.wrapping_add(d.grads_shift);
                let element = in_window(d.first, &piece.params);
                assert_eq!(element, in_window(d.first, &piece.velocity));
                assert_eq!(element, in_window(grads_first, &piece.grads));
                elements.push(element);
            }
        }
    }
    elements
}

fn check_plan(tensors: &[TensorLayout], limits: &DeviceLimits) -> Plan {
    let plan = Plan::new(tensors, limits).unwrap();
    for (index, layout) in tensors.iter().enumerate() {
        let mut next = 0;
        for piece in plan.pieces_of(index) {
            assert_eq!(piece.elems.start, next, "pieces follow each other");
            assert!(numel(piece) > 0);
            next = piece.elems.end;
            let start = piece.elems.start * ELEM_BYTES;
            assert_eq!(
                piece.params.start_bytes(),
                layout.params_offset_bytes + start
            );
            assert_eq!(piece.grads.start_bytes(), layout.grads_offset_bytes + start);
        }
        assert_eq!(next, layout.numel, "every element lies in a piece");
    }
    let mut velocity_ranges = Vec::new();
    for piece in &plan.pieces {
        for window in [&piece.params, &piece.grads, &piece.velocity] {
            assert_eq!(window.offset_bytes % limits.offset_alignment_bytes, 0);
            assert!(window.size_bytes <= limits.max_binding_bytes);
            let first = u64::from(window.first_elem);
            assert_eq!(window.size_bytes, (first + numel(piece)) * ELEM_BYTES);
        }
        let start = piece.velocity.start_bytes();
        velocity_ranges.push((
            piece.velocity_buffer,
            start,
            start + numel(piece) * ELEM_BYTES,
        ));
    }
    velocity_ranges.sort_unstable();
    for pair in velocity_ranges.windows(2) {
        assert!(
            pair[0].0 < pair[1].0 || pair[0].2 <= pair[1].1,
            "velocities overlap"
        );
    }
    for (buffer, _, end) in &velocity_ranges {
        assert!(*end <= plan.velocity_buffer_bytes[*buffer]);
    }
    for bytes in &plan.velocity_buffer_bytes {
        assert!(*bytes <= limits.max_buffer_bytes);
    }

    let mut covered: Vec<Vec<u8>> = plan
        .pieces
        .iter()
        .map(|piece| vec![0; numel(piece) as usize])
        .collect();
    for (index, dispatch) in plan.dispatches.iter().enumerate() {
        assert!(
            dispatch
                .workgroups
                .iter()
                .all(|n| *n <= limits.max_workgroups_per_dimension)
        );
        for element in updated(&plan, index) {
            covered[dispatch.piece][element as usize] += 1;
        }
    }
    assert!(
        covered.iter().flatten().all(|times| *times == 1),
        "not exactly once: {plan:?}"
    );
    assert!(plan.dispatches.is_sorted_by_key(|dispatch| dispatch.access));
    plan
}

proptest! {
    #[test]
    fn every_element_is_updated_exactly_once_within_the_limits(
        sizes in prop::collection::vec((0u64..3000, 0u64..200, 0u64..200, any::<bool>()), 1..8),
        alignment in prop::sample::select(vec![4u64, 16, 32, 64, 256]),
        binding_steps in 2u64..20,
        buffer_steps in 2u64..40,
        max_workgroups_per_dimension in 1u32..5,
    ) {
        let step = alignment.max(16);
        let limits = DeviceLimits {
            max_binding_bytes: binding_steps * step,
            max_buffer_bytes: buffer_steps * step,
            offset_alignment_bytes: alignment,
            max_workgroups_per_dimension,
        };
        let tensors: Vec<_> = sizes
            .into_iter()
            .map(|(n, p, g, same)| tensor(n, 4 * p, 4 * if same { p } else { g }))
            .collect();
        check_plan(&tensors, &limits);
    }

    #[test]
    fn common_limits_take_one_dispatch_for_an_aligned_tensor(
        quads in 1u64..300_000,
        params_offset in 0u64..100,
        grads_offset in 0u64..100,
    ) {
        let layout = tensor(4 * quads, 16 * params_offset, 16 * grads_offset);
        let plan = check_plan(&[layout], &COMMON);
        prop_assert_eq!(plan.dispatches.len(), 1);
    }
}

#[test]
fn awkward_sizes_and_offsets() {
    for numel in (0..=12).chain(63..=65).chain(255..=257).chain(1023..=1025) {
        for params in 0..5 {
            for grads in 0..5 {
                let plan = check_plan(&[tensor(numel, 4 * params, 4 * grads)], &COMMON);
                let vec4 = plan
                    .dispatches
                    .iter()
                    .filter(|d| d.access != Access::Scalar)
                    .count();
                let reaches_a_vec4 = numel >= 4 + (4 - params % 4) % 4;
                assert_eq!(vec4 == 1, params % 4 == grads % 4 && reaches_a_vec4);
            }
        }
    }
}

#[test]
fn a_tensor_that_fills_a_binding_is_one_dispatch_and_one_element_more_is_three() {
    let full = COMMON.max_binding_bytes / ELEM_BYTES;
    let plan = Plan::new(&[tensor(full, 0, 0)], &COMMON).unwrap();
    assert_eq!((plan.pieces.len(), plan.dispatches.len()), (1, 1));
    let plan = Plan::new(&[tensor(full + 4, 0, 0)], &COMMON).unwrap();
    assert_eq!((plan.pieces.len(), plan.dispatches.len()), (2, 2));
    let plan = Plan::new(&[tensor(full, 4, 4)], &COMMON).unwrap();
    assert_eq!((plan.pieces.len(), plan.dispatches.len()), (2, 4));
}

#[test]
fn a_grid_past_the_limit_folds_into_rows() {
    let limits = DeviceLimits {
        max_workgroups_per_dimension: 100,
        ..COMMON
    };
    let plan = check_plan(&[tensor(4 * 256 * 101, 0, 0)], &limits);
    assert_eq!(plan.dispatches[0].workgroups, [51, 2]);
}

#[test]
fn small_tensors_share_a_velocity_buffer() {
    let plan = check_plan(&vec![tensor(100, 0, 0); 50], &COMMON);
    assert_eq!(plan.velocity_buffer_bytes.len(), 1);
}

#[test]
fn what_cannot_be_planned_is_said() {
    let refused = Plan::new(&[tensor(1, 0, 0), tensor(1, 0, 6)], &COMMON);
    assert_eq!(
        refused,
        Err(PlanError::Misaligned {
            tensor: 1,
            offset_bytes: 6
        })
    );
    let refused = Plan::new(&[tensor(u64::MAX / 4, 8, 0)], &COMMON);
    assert!(matches!(
        refused,
        Err(PlanError::TooLarge { tensor: 0, .. })
    ));
    let tiny = DeviceLimits {
        max_binding_bytes: 256,
        ..COMMON
    };
    let refused = Plan::new(&[tensor(1, 0, 0)], &tiny);
    assert!(matches!(
        refused,
        Err(PlanError::LimitTooLow {
            required: 512,
            actual: 256,
            ..
        })
    ));
    let none = DeviceLimits {
        max_workgroups_per_dimension: 0,
        ..COMMON
    };
    let refused = Plan::new(&[tensor(1, 0, 0)], &none);
    assert!(matches!(
        refused,
        Err(PlanError::LimitTooLow { actual: 0, .. })
    ));
}
