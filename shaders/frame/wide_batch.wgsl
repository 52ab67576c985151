// batch.wgsl where something is stored in 16 bits.

@group(0) @binding(TENSOR) var<storage, read_write> params_TENSOR: array<vec4<u32>>;
@group(0) @binding(BATCH + TENSOR) var<storage, read> grads_TENSOR: array<vec4<u32>>;
@group(0) @binding(2 * BATCH + TENSOR) var<storage, read_write> state_TENSOR: array<vec4<u32>>;

fn RULE_TENSOR(i: u32) {
    if (k.tensor_mask & (1u << TENSORu)) == 0u || i >= units_TENSOR() {
        return;
    }
    let theta = load_theta_TENSOR(i);
    let g = load_grads_TENSOR(i);
    var low: State;
    var high: State;
    load_state_TENSOR(i, &low, &high);

    let theta_new = Eight(stepped(theta.low, g.low, &low), stepped(theta.high, g.high, &high));
    store_state_TENSOR(i, low, high);
    store_theta_TENSOR(i, theta_new);
}
