// batch.wgsl where something is stored in 16 bits.

@group(0) @binding(TENSOR) var<storage, read_write> wo_params_TENSOR: array<vec4<u32>>;
@group(0) @binding(wo_BATCH + TENSOR) var<storage, GRADS_ACCESS> wo_grads_TENSOR: array<vec4<u32>>;
@group(0) @binding(2 * wo_BATCH + TENSOR) var<storage, read_write> wo_state_TENSOR: array<vec4<u32>>;

fn wo_tensor_TENSOR(i: u32) {
    if (wo_k.tensor_mask & (1u << TENSORu)) == 0u || i >= wo_units_TENSOR() {
        return;
    }
    let theta = wo_load_theta_TENSOR(i);
    let g = wo_load_grads_TENSOR(i);
    var low: State;
    var high: State;
    wo_load_state_TENSOR(i, &low, &high);

    let theta_new = wo_Eight(wo_stepped(theta.low, g.low, &low), wo_stepped(theta.high, g.high, &high));
    wo_store_state_TENSOR(i, low, high);
    wo_store_theta_TENSOR(i, theta_new);
}
