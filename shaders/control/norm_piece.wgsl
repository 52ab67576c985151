// The gradients of a piece: chunks of its elements, counted from the start of the binding, of tensors that take part.
@group(0) @binding(0) var<storage, read> grads: array<vec4<u32>>;
// The same by the word, for what does not fill a vec4: one entry point may not bind one place twice.
@group(0) @binding(1) var<storage, read> grads_word: array<u32>;
@group(0) @binding(2) var<storage, read> chunks: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read_write> partials: array<vec4<u32>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn norm(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = workgroup.y * k.row + workgroup.x;
    var sums = Sums();
    var elements = vec2(0u);
    if index < k.count {
        elements = chunks[k.first + index];
    }
    // Whole vec4, and what is left at either end.
    let whole = vec2((elements.x + UNIT - 1u) / UNIT, elements.y / UNIT);
    for (var i = whole.x + lane; i < whole.y; i += WORKGROUP_SIZE) {
        add_words(&sums, grads[i]);
    }
    let head = min(whole.x * UNIT, elements.y);
    let tail = max(whole.y * UNIT, head);
    if elements.x + lane < head {
        add_squares(&sums, vec4(bits_of(elements.x + lane), 0u, 0u, 0u));
    }
    if tail + lane < elements.y {
        add_squares(&sums, vec4(bits_of(tail + lane), 0u, 0u, 0u));
    }
    let total = sum_of_workgroup(sums, lane);
    if lane == 0u && index < k.count {
        store_partial(k.partial + index, total);
    }
}
