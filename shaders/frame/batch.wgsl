// Tensor TENSOR of a batch: src/gpu/source.rs repeats this file with 0, 1, 2.. for TENSOR, and writes the entry point
// that calls them one after the other. A tensor fills its bindings, so their length is its own.

@group(0) @binding(TENSOR) var<storage, read_write> wo_params_TENSOR: array<wo_Unit>;
@group(0) @binding(wo_BATCH + TENSOR) var<storage, GRADS_ACCESS> wo_grads_TENSOR: array<wo_Unit>;
@group(0) @binding(2 * wo_BATCH + TENSOR) var<storage, read_write> wo_state_TENSOR: array<wo_Unit>;

fn wo_tensor_TENSOR(unit: u32) {
    if (wo_k.tensor_mask & (1u << TENSORu)) == 0u || unit >= arrayLength(&wo_params_TENSOR) {
        return;
    }
    let theta = vec4<f32>(wo_params_TENSOR[unit]);
    let g = vec4<f32>(wo_grads_TENSOR[unit]);
    var s = wo_load_TENSOR(unit);

    let theta_new = update(wo_scalars(), theta, wo_gradient(g), &s);
    wo_store_TENSOR(unit, s);
    wo_params_TENSOR[unit] = wo_stored(theta_new);
}
