// Around a rule (shaders/rules/): where its elements lie, and loads before stores. src/gpu/source.rs puts the two
// together, declares `wo_k` by one of the scalars_*.wgsl files, and writes `Scalars`, `wo_Uniforms` and `wo_scalars` for the
// rule's scalars, and `State`, `wo_load_*` and `wo_store_*` for its slots. Names of the frame begin with `wo_`, and no name of
// a rule does.

// Whether the vec4 entry points start further on than the bindings do. Most tensors start with them, and then
// one address, without a sum, serves all arrays.
override wo_HAS_OFFSET: bool = false;

const wo_WORKGROUP_SIZE: u32 = 256;

// `wo_k`, one member after the other: the rule's scalars, then these.
//
// first: where the dispatch starts in the bindings of params and state. Units of this and what follows: four elements
//     for the vec4 entry points, one element for the scalar ones.
// grads_shift: how much further on the gradients start in theirs, modulo 2^32.
// count: how many units the dispatch covers.
// row: invocations in one row of the grid: a dispatch past the per-dimension limit folds into y.
// head, gap: scalar entry points only: after `head` elements, `gap` elements are skipped.
// tensor_mask: batches only (batch.wgsl): bit i says whether tensor i is updated.
// section: from one slot of the state to the next.

@group(0) @binding(0) var<storage, read_write> wo_params: array<vec4<f32>>;
@group(0) @binding(1) var<storage, GRADS_ACCESS> wo_grads: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> wo_state: array<vec4<f32>>;

// The same bindings by the element, for what does not fill a vec4 or does not line up with one.
@group(0) @binding(0) var<storage, read_write> wo_params_scalar: array<f32>;
@group(0) @binding(1) var<storage, GRADS_ACCESS> wo_grads_scalar: array<f32>;
@group(0) @binding(2) var<storage, read_write> wo_state_scalar: array<f32>;

fn wo_unit_of(invocation: vec3<u32>) -> u32 {
    return invocation.y * wo_k.row + invocation.x;
}

fn wo_vec4_of(unit: u32) -> u32 {
    if wo_HAS_OFFSET {
        return wo_k.first + unit;
    }
    return unit;
}

fn wo_grads_vec4_of(unit: u32) -> u32 {
    if wo_HAS_OFFSET {
        return wo_k.first + unit + wo_k.grads_shift;
    }
    return unit;
}

fn wo_element_of(unit: u32) -> u32 {
    return wo_k.first + unit + select(0u, wo_k.gap, unit >= wo_k.head);
}

// All loads come before the first store: buffers may alias for all that a compiler knows, so it cannot move
// a load up over a store, and a wave would wait for memory twice. All arithmetic does too: a value that is still
// needed when it is stored is copied first (five of 33 instructions on AMD's Vega).

@compute @workgroup_size(wo_WORKGROUP_SIZE)
fn wo_step_RULE(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = wo_unit_of(invocation);
    if unit >= wo_k.count || wo_is_skipped() {
        return;
    }
    let i = wo_vec4_of(unit);
    let theta = wo_params[i];
    let g = wo_grads[wo_grads_vec4_of(unit)];
    var s = wo_load_vec4(i);

    let theta_new = update(wo_scalars(), theta, wo_gradient(g), &s);
    wo_store_vec4(i, s);
    wo_params[i] = theta_new;
}

@compute @workgroup_size(wo_WORKGROUP_SIZE)
fn wo_step_RULE_scalar(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = wo_unit_of(invocation);
    if unit >= wo_k.count || wo_is_skipped() {
        return;
    }
    let i = wo_element_of(unit);
    let theta = vec4(wo_params_scalar[i]);
    let g = vec4(wo_grads_scalar[i + wo_k.grads_shift]);
    var s = wo_load_scalar(i);

    let theta_new = update(wo_scalars(), theta, wo_gradient(g), &s);
    wo_store_scalar(i, s);
    wo_params_scalar[i] = theta_new.x;
}
