// piece.wgsl where something is stored in 16 bits: an invocation updates twice four elements, so that a load of 16 bytes
// is all its own and no word is shared. src/gpu/wide.rs writes the functions that load and store, by type: bits go in and
// out, those of f32, so that nothing is rounded or flushed on the way.

override wo_HAS_OFFSET: bool = false;

const wo_WORKGROUP_SIZE: u32 = 256;

// `wo_k` goes on behind what piece.wgsl says, where a unit is now eight elements for the vec4 entry point, and two for the
// scalar one, which share a word:
//
// begin, end: the elements that the dispatch may update, counted from the start of the parameters' binding.
// index, key_x, key_y: of random bits: the first element of the binding as the tensor counts, modulo 2^32, and the
//     tensor's stream at this step.

@group(0) @binding(0) var<storage, read_write> wo_params: array<vec4<u32>>;
@group(0) @binding(1) var<storage, GRADS_ACCESS> wo_grads: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> wo_state: array<vec4<u32>>;

// The same bindings by the word.
@group(0) @binding(0) var<storage, read_write> wo_params_scalar: array<u32>;
@group(0) @binding(1) var<storage, GRADS_ACCESS> wo_grads_scalar: array<u32>;
@group(0) @binding(2) var<storage, read_write> wo_state_scalar: array<u32>;

// Eight f32, as their bits.
struct wo_Eight {
    low: vec4<u32>,
    high: vec4<u32>,
}

// Twice four 16-bit values, as they lie in memory.
fn wo_packed(low: vec4<u32>, high: vec4<u32>) -> vec4<u32> {
    return vec4(
        low.x | (low.y << 16u),
        low.z | (low.w << 16u),
        high.x | (high.y << 16u),
        high.z | (high.w << 16u),
    );
}

// A word of which only some halves are the dispatch's to write.
fn wo_merged(kept: u32, halves: vec4<u32>, mine: vec2<bool>) -> u32 {
    let low = select(kept & 0xffffu, halves.x, mine.x);
    let high = select(kept >> 16u, halves.y, mine.y);
    return low | (high << 16u);
}

fn wo_half_of(word: u32, element: u32) -> u32 {
    return (word >> ((element & 1u) * 16u)) & 0xffffu;
}

fn wo_stepped(theta: vec4<u32>, g: vec4<u32>, state: ptr<function, State>) -> vec4<u32> {
    let next = update(wo_scalars(), bitcast<vec4<f32>>(theta), wo_gradient(bitcast<vec4<f32>>(g)), state);
    return bitcast<vec4<u32>>(next);
}

fn wo_unit_of(invocation: vec3<u32>) -> u32 {
    return invocation.y * wo_k.row + invocation.x;
}

fn wo_eight_of(unit: u32) -> u32 {
    if wo_HAS_OFFSET {
        return wo_k.first + unit;
    }
    return unit;
}

fn wo_grads_eight_of(unit: u32) -> u32 {
    if wo_HAS_OFFSET {
        return wo_k.first + unit + wo_k.grads_shift;
    }
    return unit;
}

fn wo_pair_of(unit: u32) -> u32 {
    return wo_k.first + unit + select(0u, wo_k.gap, unit >= wo_k.head);
}

@compute @workgroup_size(wo_WORKGROUP_SIZE)
fn wo_step_RULE(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = wo_unit_of(invocation);
    if unit >= wo_k.count || wo_is_skipped() {
        return;
    }
    let i = wo_eight_of(unit);
    let theta = wo_load_theta(i);
    let g = wo_load_grads(wo_grads_eight_of(unit));
    var low: State;
    var high: State;
    wo_load_state(i, &low, &high);

    let theta_new = wo_Eight(wo_stepped(theta.low, g.low, &low), wo_stepped(theta.high, g.high, &high));
    wo_store_state(i, low, high);
    wo_store_theta(i, theta_new);
}

@compute @workgroup_size(wo_WORKGROUP_SIZE)
fn wo_step_RULE_scalar(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = wo_unit_of(invocation);
    if unit >= wo_k.count || wo_is_skipped() {
        return;
    }
    let i = wo_pair_of(unit);
    let elements = vec2(2u * i, 2u * i + 1u);
    let mine = (elements >= vec2(wo_k.begin)) & (elements < vec2(wo_k.end));
    let theta = wo_load_theta_pair(i);
    let g = wo_load_grads_pair(2u * i + wo_k.grads_shift);
    var s: State;
    wo_load_state_pair(i, &s);

    let theta_new = wo_stepped(theta, g, &s);
    wo_store_state_pair(i, s, mine);
    wo_store_theta_pair(i, theta_new, mine);
}
