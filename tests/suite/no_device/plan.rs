use proptest::prelude::*;
use std::collections::HashSet;
use std::iter::repeat_n;
use std::ops::Range;
use wgpu_optim::plan::{
    Access, BATCH_WORKGROUP_SIZE, Chunk, Chunked, DeviceLimits, Dispatch, ELEM_BYTES, Piece, Place,
    Plan, PlanError, Target, TensorLayout, WORKGROUP_SIZE, Window,
};
use wgpu_optim::storage::{Codec, Storage};
use wgpu_optim::{Masters, Precision, StorageType, wgpu};

/// What lavapipe has, and WebGPU guarantees.
const COMMON: DeviceLimits = DeviceLimits {
    max_binding_bytes: 128 << 20,
    max_buffer_bytes: 256 << 20,
    offset_alignment_bytes: 256,
    max_storage_buffers: 8,
    max_workgroups_per_dimension: 65_535,
    max_dispatch_elems: u64::MAX,
    is_software: false,
};

/// A group without state among groups with more and more of it.
fn slots_of(group: usize) -> usize {
    match group {
        1 => 0,
        group => 1 + group % 3,
    }
}

/// A tensor in buffers of its own.
fn tensor(numel: u64, params_offset_bytes: u64, grads_offset_bytes: u64) -> TensorLayout {
    TensorLayout {
        numel,
        params: Place {
            buffer: 0,
            offset_bytes: params_offset_bytes,
        },
        grads: Place {
            buffer: 1,
            offset_bytes: grads_offset_bytes,
        },
        storage: with_slots(1),
        ..TensorLayout::default()
    }
}

/// The storage of `f32` with so many slots.
fn with_slots(slots: usize) -> Storage {
    Storage {
        state: repeat_n(Codec::F32, slots).collect(),
        ..Storage::default()
    }
}

/// Tensors apart from each other, each in buffers of its own.
fn scattered(tensors: &[TensorLayout]) -> Vec<TensorLayout> {
    let mut tensors = tensors.to_vec();
    for (index, tensor) in tensors.iter_mut().enumerate() {
        tensor.params.buffer = 2 * index;
        tensor.grads.buffer = 2 * index + 1;
    }
    tensors
}

/// Every way to store a tensor whose rule keeps slots.
fn storages() -> Vec<Storage> {
    let types = StorageType::ALL;
    let mut storages = Vec::new();
    for (params, grads) in types.iter().flat_map(|p| types.map(|g| (*p, g))) {
        for state in types {
            for masters in [Masters::None, Masters::F32, Masters::LowBits] {
                let precision = Precision {
                    state,
                    masters,
                    ..Precision::default()
                };
                let slots = [[].as_slice(), &["a"], &["a", "b"], &["a", "b", "c"]];
                let of =
                    |slots: &[&str]| Storage::new(params, grads, slots.iter().copied(), &precision);
                storages.extend(slots[1..].iter().map(|slots| of(slots)));
            }
        }
    }
    storages.sort_unstable();
    storages.dedup();
    storages
}

/// Tensors one after the other in two buffers, from byte `start` on.
fn contiguous(sizes: &[(u64, u64)], start: u64) -> Vec<TensorLayout> {
    let mut next = start;
    let layout = |(numel, padding_elems): &(u64, u64)| {
        let layout = TensorLayout {
            padding_elems: *padding_elems,
            ..tensor(*numel, next, next)
        };
        next += (numel + padding_elems) * ELEM_BYTES;
        layout
    };
    sizes.iter().map(layout).collect()
}

/// The pieces that a dispatch updates, each with its elements, by walking the grid as the shader does.
fn updated(plan: &Plan, d: &Dispatch) -> Vec<(usize, Vec<u64>)> {
    match d.target {
        Target::Piece(piece) => vec![(piece, updated_alone(plan, piece, d))],
        Target::Batch { batch, mask } => {
            assert_eq!((d.access, d.workgroups[1]), (plan.batches[batch].access, 1));
            let pieces = plan.batches[batch].pieces.iter().enumerate();
            let taking_part = pieces.filter(|(position, _)| mask >> position & 1 == 1);
            taking_part
                .map(|(position, piece)| {
                    let is_odd = plan.batches[batch].odd >> position & 1 == 1;
                    (*piece, updated_in_batch(&plan.pieces[*piece], is_odd, d))
                })
                .collect()
        }
    }
}

/// Where some tensors are left out and others are of two classes, chunks and the dispatches beside them reach every element
/// that takes part once, in its class, few dispatches do, and no two workgroups write one word.
fn check_chunks(plan: &Plan, limits: &DeviceLimits, left_out: &dyn Fn(usize) -> bool) {
    let class_of = |tensor: usize| (!left_out(tensor)).then_some(tensor % 3 / 2);
    for chunked in [Chunked::ByClass, Chunked::Together] {
        let mut classes: Vec<Vec<Option<usize>>> = plan
            .pieces
            .iter()
            .map(|piece| vec![None; piece.numel as usize])
            .collect();
        let (dispatches, chunks) = plan.dispatches_by(chunked, class_of);
        assert!(chunks.len() as u64 <= plan.max_chunks());
        // Whole chunks come short of a ceiling by a chunk at most: by half of it, where it is that low.
        let is_low = limits.max_dispatch_elems < 1 << 16;
        let most = plan.dispatches(class_of).len() * if is_low { 2 } else { 1 };
        assert!(dispatches.len() <= most);
        for (dispatch, class) in &dispatches {
            let mut update = |piece: usize, element: u64, class: usize| {
                let before = classes[piece][element as usize].replace(class);
                assert_eq!(before, None, "{dispatch:?} in {plan:?}");
            };
            if !dispatch.access.is_chunked() {
                for (piece, elements) in updated(plan, dispatch) {
                    let elements = elements.into_iter();
                    elements.for_each(|element| update(piece, element, *class));
                }
                continue;
            }
            let Target::Piece(index) = dispatch.target else {
                panic!("batches are not in chunks")
            };
            let piece = &plan.pieces[index];
            let unit = piece.unit_elems(dispatch.access);
            assert!(
                dispatch
                    .workgroups
                    .iter()
                    .all(|n| *n <= limits.max_workgroups_per_dimension)
            );
            assert!(dispatch.count <= dispatch.workgroups[0] * dispatch.workgroups[1]);
            assert_eq!(dispatch.row(), dispatch.workgroups[0]);
            let own = dispatch.first as usize..(dispatch.first + dispatch.count) as usize;
            let mut numel = 0;
            let mut words = HashSet::new();
            for Chunk {
                elems, class: of, ..
            } in &chunks[own]
            {
                assert!(chunked == Chunked::Together || of == class);
                let units = elems.start / unit..elems.end.div_ceil(unit);
                assert!(units.len() as u32 <= WORKGROUP_SIZE && !elems.is_empty());
                let is_whole = elems.start.is_multiple_of(unit) && elems.end.is_multiple_of(unit);
                assert!(is_whole || dispatch.access.is_scalar());
                assert!(units.into_iter().all(|unit| words.insert(unit)), "{plan:?}");
                for elem in elems.clone() {
                    update(index, u64::from(elem - piece.params.first_elem), *of);
                }
                numel += elems.len() as u64;
            }
            assert!(numel <= limits.max_dispatch_elems.max(1));
            let per_shift = if dispatch.access.is_scalar() { 1 } else { unit };
            let shift = dispatch.grads_shift.wrapping_mul(per_shift);
            let apart = piece.grads.first_elem.wrapping_sub(piece.params.first_elem);
            assert_eq!(shift, apart);
            let section = piece.state.map_or(0, |state| state.section_elems);
            assert_eq!(dispatch.section * per_shift, section);
        }
        for part in &plan.parts {
            let range = part.start as usize..(part.start + part.numel()) as usize;
            let expected = class_of(part.tensor);
            let actual = &classes[part.piece][range];
            assert!(actual.iter().all(|class| *class == expected), "{plan:?}");
        }
    }
}

/// The elements that a dispatch over a batch updates of one of its pieces, by what the shader knows of that: the words that
/// are bound, and whether the number of elements is odd.
fn updated_in_batch(piece: &Piece, is_odd: bool, d: &Dispatch) -> Vec<u64> {
    let storage = piece.storage;
    let unit_elems = piece.unit_elems(d.access);
    let in_words = d.access == Access::Scalar;
    let item_bytes = if in_words { 4 } else { 16 };
    let items_per_unit = match storage.params {
        StorageType::F32 if !storage.is_f32() => 2,
        _ => 1,
    };
    let items = (piece.params.size_bytes / item_bytes) as u32;
    let units = items.div_ceil(items_per_unit);
    let reached = units.min(d.workgroups[0] * BATCH_WORKGROUP_SIZE);
    let mut elements: Vec<_> = (0..u64::from(reached * unit_elems)).collect();
    if unit_elems == 2 && reached == units && is_odd {
        elements.pop();
    }
    if let Some(state) = piece.state {
        // Sections start on 16 bytes.
        let section = if in_words {
            units.next_multiple_of(4)
        } else {
            units
        };
        assert_eq!(section * unit_elems, state.section_elems);
    }
    elements
}

fn updated_alone(plan: &Plan, piece: usize, d: &Dispatch) -> Vec<u64> {
    let piece = &plan.pieces[piece];
    let per_unit = u64::from(piece.unit_elems(d.access));
    // Scalar dispatches count sections and the shift in elements.
    let unit_of_shift = match d.access {
        Access::Scalar => 1,
        _ => per_unit,
    };
    let in_pairs = piece.in_vec4_pairs && d.access != Access::Scalar;
    let units = 1 + u32::from(in_pairs);
    let mut elements = Vec::new();
    for y in 0..d.workgroups[1] {
        for x in 0..d.workgroups[0] * WORKGROUP_SIZE * units {
            let unit = y * d.row() * units + x;
            if unit >= d.count {
                continue;
            }
            let skips = unit >= d.head && d.access == Access::Scalar;
            let unit = u64::from(unit + if skips { d.gap } else { 0 });
            // Without an offset the shader adds none.
            let (first, shift) = match d.access {
                Access::Vec4 => (0, 0),
                _ => (d.first, d.grads_shift),
            };
            for lane in 0..per_unit {
                let at = (u64::from(first) + unit) * per_unit + lane;
                // Of two that share a word one may be another's.
                if !(d.elems[0]..d.elems[1]).contains(&(at as u32)) {
                    assert!(d.access == Access::Scalar && per_unit == 2);
                    continue;
                }
                let element = at - u64::from(piece.params.first_elem);
                if let Some(state) = &piece.state {
                    assert_eq!(element, at - u64::from(state.first_elem));
                    assert_eq!(
                        u64::from(d.section) * unit_of_shift,
                        u64::from(state.section_elems)
                    );
                }
                let shift = i64::from(shift as i32) * unit_of_shift as i64;
                let in_grads = at as i64 + shift - i64::from(piece.grads.first_elem);
                assert_eq!(element as i64, in_grads);
                elements.push(element);
            }
        }
    }
    elements
}

/// Checks everything that must hold of a plan and of a step in which some tensors are left out.
fn check_plan(
    tensors: &[TensorLayout],
    limits: &DeviceLimits,
    left_out: &dyn Fn(usize) -> bool,
) -> Plan {
    let plan = Plan::new(tensors, limits).unwrap();
    for (index, layout) in tensors.iter().enumerate() {
        let mut next = 0;
        for part in plan.parts_of(index) {
            let piece = &plan.pieces[part.piece];
            assert_eq!(
                (part.tensor, part.elems.start),
                (index, next),
                "parts follow each other"
            );
            assert!(part.numel() > 0 && part.start + part.numel() + part.padding <= piece.numel);
            let at = |place: &Place, window: &Window, of: StorageType| {
                let elems = u64::from(window.first_elem + part.start);
                let bytes = window.offset_bytes + elems * of.bytes();
                assert_eq!(bytes, place.offset_bytes + part.elems.start * of.bytes());
            };
            assert_eq!(piece.storage, layout.storage);
            let in_vec4_pairs = limits.is_software && layout.storage.is_f32();
            assert_eq!(piece.in_vec4_pairs, in_vec4_pairs);
            at(&layout.params, &piece.params, layout.storage.params);
            at(&layout.grads, &piece.grads, layout.storage.grads);
            assert_eq!(piece.params_buffer, layout.params.buffer);
            assert_eq!(piece.grads_buffer, layout.grads.buffer);
            let codecs = layout.storage.state;
            assert_eq!(
                piece.state.map(|state| state.codecs).unwrap_or_default(),
                codecs
            );
            for (section, codec) in codecs.iter().enumerate() {
                let bytes = plan.state_bytes_of(part, section).unwrap();
                assert_eq!(bytes.start % codec.elem_bytes(), 0);
                let size = u64::from(part.numel()) * codec.elem_bytes();
                assert_eq!(bytes.end - bytes.start, size);
                assert!(bytes.end <= piece.state.unwrap().size_bytes());
            }
            assert_eq!(plan.state_bytes_of(part, codecs.len()), None);
            next = part.elems.end;
        }
        assert_eq!(next, layout.numel, "every element lies in a part");
    }

    for piece in &plan.pieces {
        assert_eq!(
            piece.in_one_buffer(),
            piece.params_buffer == piece.grads_buffer
        );
        check_bindings(&plan, &[piece]);
        let storage = piece.storage;
        for (window, of) in [
            (&piece.params, storage.params),
            (&piece.grads, storage.grads),
        ] {
            assert_eq!(window.offset_bytes % limits.offset_alignment_bytes, 0);
            assert!(window.size_bytes <= limits.max_binding_bytes.min(limits.max_buffer_bytes));
            let bytes = u64::from(window.first_elem + piece.numel) * of.bytes();
            assert_eq!(window.size_bytes, bytes.next_multiple_of(4));
        }
        if let Some(state) = &piece.state {
            assert_eq!(state.first_elem, piece.params.first_elem);
            assert!(state.size_bytes() <= limits.max_binding_bytes.min(limits.max_buffer_bytes));
            assert!(
                state
                    .section_elems
                    .is_multiple_of(piece.unit_elems(Access::Vec4))
            );
            assert!(state.section_elems >= state.first_elem + piece.numel);
            let elem_bytes = |section: usize| state.codecs[section].elem_bytes();
            let start_of = |section: usize| {
                state.start_bytes(section) - u64::from(state.first_elem) * elem_bytes(section)
            };
            for section in 1..state.codecs.len() {
                let apart = start_of(section) - start_of(section - 1);
                assert_eq!(
                    apart,
                    u64::from(state.section_elems) * elem_bytes(section - 1)
                );
                assert_eq!(start_of(section) % 16, 0);
            }
        }
    }

    check_batches(&plan, limits);

    check_chunks(&plan, limits, left_out);
    let mut times: Vec<Vec<u8>> = plan
        .pieces
        .iter()
        .map(|p| vec![0; p.numel as usize])
        .collect();
    let dispatches = plan.dispatches(|tensor| (!left_out(tensor)).then_some(()));
    assert!(dispatches.len() <= plan.max_dispatches());
    for (dispatch, ()) in &dispatches {
        assert!(
            dispatch
                .workgroups
                .iter()
                .all(|n| *n <= limits.max_workgroups_per_dimension)
        );
        let updated = updated(&plan, dispatch);
        let elems: usize = updated.iter().map(|(_, elements)| elements.len()).sum();
        assert!(0 < elems && elems as u64 <= limits.max_dispatch_elems);
        for (piece, elements) in updated {
            for element in elements {
                times[piece][element as usize] += 1;
            }
        }
    }
    for part in &plan.parts {
        let range = part.start as usize..(part.start + part.numel()) as usize;
        let expected = u8::from(!left_out(part.tensor));
        let times = &times[part.piece][range];
        assert!(
            times.iter().all(|n| *n == expected),
            "tensor {} in {plan:?}",
            part.tensor
        );
    }
    assert!(
        times.iter().flatten().all(|n| *n <= 1),
        "padding at most once"
    );
    assert!(
        dispatches.is_sorted_by_key(|(dispatch, ())| match dispatch.target {
            Target::Piece(_) => (false, dispatch.access),
            Target::Batch { .. } => (true, Access::Vec4),
        })
    );
    plan
}

/// What one dispatch binds: a buffer is bound for writing throughout or not at all, and nothing that is bound for writing
/// is bound twice.
fn check_bindings(plan: &Plan, pieces: &[&Piece]) {
    let mut bound = Vec::new();
    for piece in pieces {
        let writes_grads = piece.in_one_buffer();
        bound.push((piece.params_buffer, piece.params, true));
        bound.push((piece.grads_buffer, piece.grads, writes_grads));
    }
    for (index, (buffer, window, writes)) in bound.iter().enumerate() {
        for (other_buffer, other, other_writes) in &bound[..index] {
            if buffer != other_buffer {
                continue;
            }
            assert_eq!(writes, other_writes, "{plan:?}");
            let end = |window: &Window| window.offset_bytes + window.size_bytes;
            let are_apart = end(window) <= other.offset_bytes || end(other) <= window.offset_bytes;
            assert!(!writes || are_apart, "{plan:?}");
        }
    }
}

fn check_batches(plan: &Plan, limits: &DeviceLimits) {
    let mut times = vec![0; plan.pieces.len()];
    for batch in &plan.batches {
        assert!(batch.pieces.len() > 1);
        let pieces: Vec<_> = batch
            .pieces
            .iter()
            .map(|piece| &plan.pieces[*piece])
            .collect();
        let bindings = |piece: &&Piece| if piece.state.is_some() { 3 } else { 2 };
        let bindings: usize = pieces.iter().map(bindings).sum();
        assert!(bindings <= limits.max_storage_buffers as usize);
        for (piece, index) in pieces.iter().zip(&batch.pieces) {
            times[*index] += 1;
            assert_eq!(piece.params.first_elem + piece.grads.first_elem, 0);
            assert_eq!(piece.storage, pieces[0].storage);
            assert!(!piece.storage.is_stochastic);
            assert_eq!(piece.group, pieces[0].group);
            assert_eq!(piece.state.is_some(), pieces[0].state.is_some());
            let fills_units = piece.numel.is_multiple_of(piece.unit_elems(Access::Vec4));
            assert_eq!(batch.access == Access::Vec4, fills_units);
            assert_eq!(piece.in_one_buffer(), pieces[0].in_one_buffer());
        }
        let odd = (0..).zip(&pieces);
        let odd = odd.map(|(position, piece)| (piece.numel & 1) << position);
        assert_eq!(batch.odd, odd.sum::<u32>());
        check_bindings(plan, &pieces);
    }
    for (piece, times) in plan.pieces.iter().zip(times) {
        assert_eq!(u8::from(piece.batched), times);
    }
}

/// Bindings start on an alignment, so that what follows closely in one buffer would be bound twice.
#[test]
fn gradients_right_behind_their_parameters_are_too_close() {
    let pool = |numel, params, grads| {
        let mut layout = tensor(numel, params, grads);
        layout.grads.buffer = layout.params.buffer;
        layout
    };
    for layout in [pool(100, 0, 400), pool(100, 400, 0)] {
        let error = Plan::new(&[tensor(1, 4096, 4096), layout], &COMMON).unwrap_err();
        let expected = PlanError::TooClose {
            tensor: 1,
            params_offset_bytes: layout.params.offset_bytes,
            grads_offset_bytes: layout.grads.offset_bytes,
            least_offset_bytes: 512,
        };
        assert_eq!(error, expected);
    }
    check_plan(&[pool(100, 0, 512)], &COMMON, &all);
    check_plan(&[pool(100, 512, 0)], &COMMON, &all);
    // All parameters, then all gradients: one piece.
    let behind = [pool(64, 0, 1024), pool(100, 256, 1280)];
    assert_eq!(check_plan(&behind, &COMMON, &all).pieces.len(), 1);
}

fn all(_: usize) -> bool {
    false
}

fn dispatch_count(plan: &Plan) -> usize {
    plan.dispatches(|_| Some(())).len()
}

prop_compose! {
    /// Made-up limits; bindings and buffers of so many times what every offset is a multiple of.
    fn limits_of(binding_steps: Range<u64>, buffer_steps: Range<u64>)(
        alignment in prop::sample::select(vec![4u64, 16, 32, 64, 256]),
        max_storage_buffers in 3u32..40,
        binding_steps in binding_steps,
        buffer_steps in buffer_steps,
        max_workgroups_per_dimension in 1u32..5,
        max_dispatch_elems in prop_oneof![8u64..100, 100u64..5000, Just(u64::MAX)],
        is_software in any::<bool>(),
    ) -> DeviceLimits {
        let step = alignment.max(16);
        DeviceLimits {
            max_binding_bytes: binding_steps * step,
            max_buffer_bytes: buffer_steps * step,
            offset_alignment_bytes: alignment,
            max_storage_buffers,
            max_workgroups_per_dimension,
            max_dispatch_elems,
            is_software,
        }
    }
}

proptest! {
    #[test]
    fn every_element_is_updated_exactly_once_within_the_limits(
        sizes in prop::collection::vec((0u64..3000, 0u64..200, 0u64..200, any::<bool>()), 1..8),
        follow in prop::collection::vec((0u64..600, 0u64..70, any::<bool>(), 0usize..3), 0..12),
        start in 0u64..200,
        batched in prop::collection::vec((0u64..9000, 0usize..5, 1usize..5, 0usize..3, any::<bool>()), 0..40),
        limits in limits_of(6..60, 6..120),
    ) {
        let max_storage_buffers = limits.max_storage_buffers;
        let apart: Vec<_> = sizes
            .into_iter()
            .map(|(n, p, g, same)| tensor(n, 4 * p, 4 * if same { p } else { g }))
            .collect();
        check_plan(&scattered(&apart), &limits, &all);

        // In few buffers that hold parameters of one and gradients of another, with room between them.
        let mut small = Vec::new();
        for (index, (numel, buffer, other, group, _)) in batched.iter().enumerate() {
            let at = (1 << 17) * index as u64;
            let other = (buffer + other) % 5;
            // In one buffer with their gradients, too, then behind each other.
            let mut layout = tensor(*numel, at, at + if other == *buffer { 1 << 16 } else { 0 });
            (layout.params.buffer, layout.grads.buffer) = (*buffer, other);
            (layout.group, layout.storage) = (*group, with_slots(slots_of(*group)));
            small.push(layout);
        }
        check_plan(&small, &limits, &|tensor| batched[tensor].4);
        check_plan(&small, &DeviceLimits { max_storage_buffers, ..COMMON }, &|tensor| batched[tensor].4);

        let sizes: Vec<_> = follow.iter().map(|(n, padding, ..)| (*n, *padding)).collect();
        let mut together = contiguous(&sizes, 4 * start);
        for (tensor, (.., group)) in together.iter_mut().zip(&follow) {
            (tensor.group, tensor.storage) = (*group, with_slots(slots_of(*group)));
        }
        check_plan(&together, &limits, &|tensor| follow[tensor].2);
        together.reverse();
        check_plan(&together, &limits, &all);
    }

    #[test]
    fn elements_of_sixteen_bits_are_updated_exactly_once_within_the_limits(
        sizes in prop::collection::vec((0u64..3000, 0u64..200, 0u64..200, any::<bool>()), 1..6),
        follow in prop::collection::vec((0u64..600, 0u64..70, any::<bool>(), 0usize..3), 0..12),
        starts in (0u64..200, 0u64..200),
        batched in prop::collection::vec((0u64..9000, 0usize..5, 0usize..2, any::<bool>()), 0..40),
        storage in prop::sample::select(storages()),
        is_stochastic in any::<bool>(),
        limits in limits_of(16..80, 32..160),
    ) {
        let max_storage_buffers = limits.max_storage_buffers;
        let storage = Storage { is_stochastic: is_stochastic && !storage.is_f32(), ..storage };
        let limits = DeviceLimits {
            max_buffer_bytes: 2 * limits.max_binding_bytes,
            ..limits
        };
        let stored = |numel, params: u64, grads: u64| TensorLayout {
            storage,
            ..tensor(numel, params * storage.params.bytes(), grads * storage.grads.bytes())
        };
        let of_group = |group: usize| Storage {
            state: storage.state.iter().copied().take(1 + group).collect(),
            ..storage
        };
        let apart: Vec<_> = sizes
            .into_iter()
            .map(|(n, p, g, same)| stored(n, p, if same { p } else { g }))
            .collect();
        check_plan(&scattered(&apart), &limits, &all);
        check_plan(&scattered(&apart), &COMMON, &all);

        // Where bindings may start, in few buffers.
        let mut small = Vec::new();
        for (index, (numel, buffer, group, _)) in batched.iter().enumerate() {
            let at = (1 << 16) * index as u64;
            let mut layout = stored(*numel, at, at);
            (layout.params.buffer, layout.grads.buffer) = (*buffer, 5 + buffer);
            (layout.group, layout.storage) = (*group, of_group(*group));
            small.push(layout);
        }
        check_plan(&small, &limits, &|tensor| batched[tensor].3);
        check_plan(&small, &DeviceLimits { max_storage_buffers, ..COMMON }, &|tensor| batched[tensor].3);

        let (mut params, mut grads) = starts;
        let together: Vec<_> = follow
            .iter()
            .map(|(numel, padding_elems, _, group)| {
                let layout = TensorLayout {
                    padding_elems: *padding_elems,
                    group: *group,
                    storage: of_group(*group),
                    ..stored(*numel, params, grads)
                };
                params += numel + padding_elems;
                grads += numel + padding_elems;
                layout
            })
            .collect();
        check_plan(&together, &limits, &|tensor| follow[tensor].2);
    }

    #[test]
    fn the_order_in_which_tensors_are_given_does_not_matter(
        sizes in prop::collection::vec((0u64..600, 0u64..70, any::<bool>()), 1..20),
        seed in any::<u64>(),
        max_dispatch_elems in prop_oneof![8u64..100, Just(u64::MAX)],
    ) {
        let limits = DeviceLimits {
            max_binding_bytes: 4096,
            max_dispatch_elems,
            ..COMMON
        };
        // Some next to each other, the others in buffers of their own.
        let mut tensors = contiguous(&sizes.iter().map(|s| (s.0, s.1)).collect::<Vec<_>>(), 0);
        for (index, tensor) in tensors.iter_mut().enumerate().filter(|(i, _)| sizes[*i].2) {
            (tensor.params.buffer, tensor.grads.buffer) = (2 + 2 * index, 3 + 2 * index);
        }
        let mut order: Vec<_> = (0..tensors.len()).collect();
        fastrand::Rng::with_seed(seed).shuffle(&mut order);
        let shuffled: Vec<_> = order.iter().map(|index| tensors[*index]).collect();

        let expected = Plan::new(&tensors, &limits).unwrap();
        let mut found = Plan::new(&shuffled, &limits).unwrap();
        prop_assert_eq!(&found.pieces, &expected.pieces);
        let class = |tensor: usize| [None, Some('a'), Some('b')][tensor % 3];
        prop_assert_eq!(found.dispatches(|tensor| class(order[tensor])), expected.dispatches(class));
        for part in &mut found.parts {
            part.tensor = order[part.tensor];
        }
        prop_assert_eq!(found.parts, expected.parts);
    }

    #[test]
    fn contiguous_tensors_take_the_fewest_pieces_and_dispatches_that_the_limits_allow(
        sizes in prop::collection::vec(1u64..3000, 1..50),
        padded in any::<bool>(),
        start in 0u64..4,
        limits in limits_of(2..200, 2..200),
    ) {
        let step = limits.offset_alignment_bytes.max(16);
        let limits = DeviceLimits {
            // No batches, which would take fewer.
            max_storage_buffers: 3,
            ..limits
        };
        // Nothing between them, or what an arena puts there.
        let multiple = if padded { step / ELEM_BYTES } else { 1 };
        let padded = |numel: &u64| (*numel, numel.next_multiple_of(multiple) - numel);
        let mut sizes: Vec<_> = sizes.iter().map(padded).collect();
        // A whole number of vec4s from an aligned start, so that no odd ends take dispatches of their own.
        let total: u64 = sizes.iter().map(|(n, padding)| n + padding).sum();
        let last = total.next_multiple_of(4) - total + 4;
        sizes.push((last, 0));
        let plan = check_plan(&contiguous(&sizes, start * step), &limits, &all);

        let grid_elems = 4 * u64::from(WORKGROUP_SIZE) * u64::from(limits.max_workgroups_per_dimension).pow(2);
        let bytes = limits.max_binding_bytes.min(limits.max_buffer_bytes);
        let piece_elems = (bytes / ELEM_BYTES).min(grid_elems);
        prop_assert_eq!(plan.pieces.len() as u64, (total + last).div_ceil(piece_elems));
        let ceiling = limits.max_dispatch_elems - limits.max_dispatch_elems % 4;
        // Padding that an earlier piece has left over is left out.
        let updated = |piece: &Piece| u64::from(piece.numel - plan.parts[piece.parts.start].start);
        let fewest: u64 = plan.pieces.iter().map(|p| updated(p).div_ceil(ceiling)).sum();
        prop_assert_eq!(dispatch_count(&plan) as u64, fewest);
    }

    #[test]
    fn common_limits_take_one_dispatch_for_contiguous_tensors(
        sizes in prop::collection::vec((1u64..3000, 0u64..64), 1..100),
        start in 0u64..100,
    ) {
        // A whole number of vec4s from an aligned start.
        let mut sizes = sizes;
        let total: u64 = sizes.iter().map(|(n, padding)| n + padding).sum();
        sizes.push((total.next_multiple_of(4) - total + 4, 0));
        let plan = check_plan(&contiguous(&sizes, 16 * start), &COMMON, &all);
        prop_assert_eq!((plan.pieces.len(), dispatch_count(&plan)), (1, 1));
    }
}

#[test]
fn awkward_sizes_and_offsets() {
    for numel in (0..=12).chain(63..=65).chain(255..=257).chain(1023..=1025) {
        for params in 0..5 {
            for grads in 0..5 {
                let plan = check_plan(&[tensor(numel, 4 * params, 4 * grads)], &COMMON, &all);
                let dispatches = plan.dispatches(|_| Some(()));
                let vec4 = dispatches
                    .iter()
                    .filter(|(d, ())| d.access != Access::Scalar)
                    .count();
                let reaches_a_vec4 = numel >= 4 + (4 - params % 4) % 4;
                assert_eq!(vec4 == 1, params % 4 == grads % 4 && reaches_a_vec4);
            }
        }
    }
}

#[test]
fn a_tensor_that_fills_a_binding_is_one_dispatch_and_one_element_more_is_two() {
    let full = COMMON.max_binding_bytes / ELEM_BYTES;
    let counts = |numel, offset| {
        let plan = Plan::new(&[tensor(numel, offset, offset)], &COMMON).unwrap();
        (plan.pieces.len(), dispatch_count(&plan))
    };
    assert_eq!(counts(full, 0), (1, 1));
    assert_eq!(counts(full + 4, 0), (2, 2));
    assert_eq!(counts(full, 4), (2, 4));
}

/// Past 2^32 elements, where indices are 32 bits wide, and past what drivers bind, whatever they say.
#[test]
fn limits_without_bounds_leave_those_of_indices_and_drivers() {
    let unlimited = DeviceLimits {
        max_binding_bytes: u64::MAX,
        max_buffer_bytes: u64::MAX,
        ..COMMON
    };
    for (params, grads) in [(0, 0), (4, 4), (0, 4)] {
        let numel = 10_000_000_001;
        let plan = Plan::new(&[tensor(numel, params, grads)], &unlimited).unwrap();
        for piece in &plan.pieces {
            let state = piece.state.map_or(0, |state| state.size_bytes());
            for size_bytes in [piece.params.size_bytes, piece.grads.size_bytes, state] {
                assert!(size_bytes <= i32::MAX as u64);
            }
        }
        let mut next = 0;
        for part in plan.parts_of(0) {
            assert_eq!(part.elems.start, next);
            next = part.elems.end;
        }
        assert_eq!(next, numel);
        let mut updated = 0;
        for (dispatch, ()) in plan.dispatches(|_| Some(())) {
            let [x, y] = dispatch.workgroups.map(u64::from);
            assert!(
                x.max(y) <= 65_535 && x * y * u64::from(WORKGROUP_SIZE) >= dispatch.count.into()
            );
            let unit_elems = dispatch.access.unit_elems(&Storage::default());
            updated += u64::from(dispatch.count) * u64::from(unit_elems);
        }
        assert_eq!(updated, numel);
    }
}

#[test]
fn software_adapters_take_half_the_invocations_for_the_same_elements() {
    let software = DeviceLimits {
        is_software: true,
        ..COMMON
    };
    let per_workgroup = 4 * u64::from(WORKGROUP_SIZE);
    let of = StorageType::Bf16;
    let bf16 = Storage::new(of, of, ["slot"], &Precision::default());
    // Whole pairs, a vec4 alone in its workgroup, an odd end, and an odd start.
    for (numel, start) in [
        (8 * per_workgroup, 0),
        (8 * per_workgroup + 4, 0),
        (8 * per_workgroup + 7, 0),
        (9 * per_workgroup, 3),
    ] {
        let tensor = tensor(numel, 4 * start, 4 * start);
        let vec4 = |limits| {
            let plan = check_plan(&[tensor], limits, &all);
            let dispatches = plan.dispatches(|_| Some(()));
            let of_scalars = |d: &Dispatch| d.access == Access::Scalar;
            assert!(
                dispatches
                    .iter()
                    .all(|(d, ())| !of_scalars(d) || d.workgroups == [1, 1])
            );
            dispatches[0].0
        };
        let (one, two) = (vec4(&COMMON), vec4(&software));
        let halved = one.count.div_ceil(2).div_ceil(WORKGROUP_SIZE);
        assert_eq!(two.workgroups, [halved, 1], "{numel} from {start}");
        let workgroups = one.workgroups;
        assert_eq!(Dispatch { workgroups, ..two }, one);

        let stored = TensorLayout {
            storage: bf16,
            ..tensor
        };
        let plans = [&COMMON, &software].map(|limits| check_plan(&[stored], limits, &all));
        assert_eq!(plans[0].pieces, plans[1].pieces);
    }
}

#[test]
fn what_does_not_follow_is_not_joined() {
    let pieces = |tensors: &[TensorLayout]| check_plan(tensors, &COMMON, &all).pieces.len();
    let pair = contiguous(&[(100, 0), (100, 0)], 0);
    assert_eq!(pieces(&pair), 1);
    let mut gap = pair.clone();
    gap[1].params.offset_bytes += 16;
    gap[1].grads.offset_bytes += 16;
    assert_eq!(pieces(&gap), 2);
    let mut only_params = pair.clone();
    only_params[1].grads.offset_bytes += 16;
    assert_eq!(pieces(&only_params), 2);
    let mut other_buffer = pair.clone();
    other_buffer[1].grads.buffer = 7;
    assert_eq!(pieces(&other_buffer), 2);
    let mut other_group = pair.clone();
    other_group[1].group = 1;
    assert_eq!(pieces(&other_group), 2);
}

#[test]
fn classes_part_neighbours_that_share_a_piece() {
    let plan = Plan::new(&contiguous(&[(64, 0); 6], 0), &COMMON).unwrap();
    let classes = [Some('a'), Some('a'), None, Some('a'), Some('b'), Some('b')];
    let dispatches = plan.dispatches(|tensor| classes[tensor]);
    let found: Vec<_> = dispatches
        .iter()
        .map(|(d, class)| (d.first, d.count, *class))
        .collect();
    assert_eq!(found, [(0, 32, 'a'), (48, 16, 'a'), (64, 32, 'b')]);
}

#[test]
fn small_scattered_tensors_share_dispatches_as_far_as_bindings_reach() {
    let dispatches = |tensors: &[TensorLayout], max_storage_buffers| {
        let limits = DeviceLimits {
            max_storage_buffers,
            ..COMMON
        };
        dispatch_count(&check_plan(tensors, &limits, &all))
    };
    let mut tensors = scattered(&[tensor(1000, 0, 0); 100]);
    let of_many = |tensors: &[TensorLayout]| [32, 10, 8, 6, 5, 3].map(|n| dispatches(tensors, n));
    assert_eq!(of_many(&tensors), [10, 34, 50, 50, 100, 100]);
    for tensor in &mut tensors {
        tensor.storage = Storage::default();
    }
    assert_eq!(of_many(&tensors), [10, 20, 25, 34, 50, 100]);
    // An odd end takes the batch by the element, not a dispatch of its own.
    let odd = scattered(&[tensor(1001, 0, 0); 100]);
    assert_eq!(of_many(&odd)[0], 10);
    // In 16 bits, too, but for those with random bits of their own.
    for storage in storages() {
        for numel in [997, 998, 1000, 1001] {
            let stored = |is_stochastic| {
                let storage = Storage {
                    is_stochastic,
                    ..storage
                };
                let layout = TensorLayout {
                    storage,
                    ..tensor(numel, 0, 0)
                };
                scattered(&[layout; 30])
            };
            assert_eq!(of_many(&stored(false))[0], 3, "{numel} of {storage:?}");
            let alone = of_many(&stored(!storage.is_f32()))[0];
            assert!(alone >= 30 || storage.is_f32());
        }
    }
    // Nothing that begins elsewhere than its binding, or is large.
    assert_eq!(of_many(&scattered(&[tensor(1000, 16, 16); 100]))[0], 100);
    assert_eq!(of_many(&scattered(&[tensor(10_000, 0, 0); 100]))[0], 100);
}

#[test]
fn a_batch_is_dispatched_once_per_class() {
    let plan = Plan::new(&scattered(&[tensor(64, 0, 0); 3]), &COMMON).unwrap();
    assert_eq!(plan.batches.len(), 1, "of two, and one is left");
    let plain = TensorLayout {
        storage: Storage::default(),
        ..tensor(64, 0, 0)
    };
    let plan = Plan::new(&scattered(&[plain; 4]), &COMMON).unwrap();
    let classes = [Some('a'), None, Some('b'), Some('a')];
    let dispatches = plan.dispatches(|tensor| classes[tensor]);
    let found: Vec<_> = dispatches
        .iter()
        .map(|(d, class)| (d.target, *class))
        .collect();
    let of = |mask| Target::Batch { batch: 0, mask };
    assert_eq!(found, [(of(0b1001), 'a'), (of(0b0100), 'b')]);
}

#[test]
fn a_ceiling_cuts_at_the_ends_of_vec4s() {
    let limits = DeviceLimits {
        max_dispatch_elems: 1000,
        ..COMMON
    };
    // Two elements into a vec4, so the head is two, and one is left at the end.
    let plan = check_plan(&[tensor(4003, 8, 8)], &limits, &all);
    let dispatches = plan.dispatches(|_| Some(()));
    let vec4 = dispatches
        .iter()
        .filter(|(d, ())| d.access != Access::Scalar)
        .count();
    assert_eq!((vec4, dispatches.len()), (5, 7));
}

#[test]
fn a_grid_past_the_limit_folds_into_rows() {
    let limits = DeviceLimits {
        max_workgroups_per_dimension: 100,
        ..COMMON
    };
    let plan = check_plan(&[tensor(4 * 256 * 101, 0, 0)], &limits, &all);
    assert_eq!(plan.dispatches(|_| Some(()))[0].0.workgroups, [51, 2]);
}

/// Planning is a pass over sorted tensors: two million take well under a second in an optimized build, and no
/// time that grows with their square in this one.
#[test]
fn two_million_tensors_are_planned() {
    let tensors = contiguous(&vec![(10, 6); 2_000_000], 0);
    let plan = Plan::new(&tensors, &COMMON).unwrap();
    assert_eq!(plan.parts.len(), 2_000_000);
    assert_eq!(dispatch_count(&plan), plan.pieces.len());
    assert_eq!(plan.pieces.len(), 1);
}

#[test]
fn what_cannot_be_planned_is_said() {
    let refused = Plan::new(&[tensor(1, 0, 0), tensor(1, 0, 6)], &COMMON);
    assert_eq!(
        refused,
        Err(PlanError::Misaligned {
            tensor: 1,
            offset_bytes: 6,
            elem_bytes: 4,
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
    let none = DeviceLimits {
        max_workgroups_per_dimension: 0,
        ..COMMON
    };
    for (limits, expected) in [(tiny, 256), (none, 0)] {
        let refused = Plan::new(&[tensor(1, 0, 0)], &limits).unwrap_err();
        let PlanError::LimitTooLow {
            required, actual, ..
        } = refused
        else {
            panic!("{refused:?}");
        };
        assert_eq!((required > actual, actual), (true, expected));
        assert!(actual == 0 || required == 512);
    }
}

#[test]
fn slow_adapters_have_a_ceiling_on_dispatches() {
    let limits = wgpu::Limits::default();
    for (device_type, ceiling) in [
        (wgpu::DeviceType::Cpu, 1 << 26),
        (wgpu::DeviceType::IntegratedGpu, 1 << 26),
        (wgpu::DeviceType::DiscreteGpu, u64::MAX),
        (wgpu::DeviceType::VirtualGpu, u64::MAX),
        (wgpu::DeviceType::Other, 1 << 26),
    ] {
        let of = DeviceLimits::of(&limits, device_type);
        let expected = DeviceLimits {
            max_dispatch_elems: ceiling,
            is_software: device_type == wgpu::DeviceType::Cpu,
            ..DeviceLimits::from(&limits)
        };
        assert_eq!(of, expected, "{device_type:?}");
    }
}

#[test]
fn frozen_tensors_of_an_arena_split_no_dispatch_into_many() {
    let tensors = contiguous(&[(1000, 24); 400], 0);
    let limits = DeviceLimits {
        max_binding_bytes: 1 << 30,
        max_buffer_bytes: 1 << 30,
        ..COMMON
    };
    let plan = check_plan(&tensors, &limits, &|tensor| tensor % 2 == 1);
    let every_other = |tensor: usize| tensor.is_multiple_of(2).then_some(());
    assert_eq!(plan.dispatches(every_other).len(), 200);
    let (dispatches, chunks) = plan.dispatches_by(Chunked::ByClass, every_other);
    assert_eq!((dispatches.len(), chunks.len()), (1, 200));
    // Few runs, and all tensors of one class, take what they took.
    let few = |tensor: usize| (tensor % 200 != 7).then_some(());
    let (dispatches, chunks) = plan.dispatches_by(Chunked::Together, few);
    assert_eq!((dispatches.len(), chunks.len()), (3, 0));
    // Classes of their own are one dispatch together.
    let (dispatches, chunks) = plan.dispatches_by(Chunked::Together, Some);
    assert_eq!((dispatches.len(), chunks.len()), (1, 400));
}
