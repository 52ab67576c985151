// Tensor TENSOR of a batch: src/gpu/source.rs repeats this file with 0, 1, 2.. for TENSOR, and writes the entry point
// that calls them one after the other. A tensor fills its bindings, so their length is its own.

@group(0) @binding(TENSOR) var<storage, read_write> params_TENSOR: array<Unit>;
@group(0) @binding(BATCH + TENSOR) var<storage, read> grads_TENSOR: array<Unit>;
@group(0) @binding(2 * BATCH + TENSOR) var<storage, read_write> state_TENSOR: array<Unit>;

fn RULE_TENSOR(unit: u32) {
    if (k.tensor_mask & (1u << TENSORu)) == 0u || unit >= arrayLength(&params_TENSOR) {
        return;
    }
    let theta = vec4<f32>(params_TENSOR[unit]);
    let g = vec4<f32>(grads_TENSOR[unit]);
    var s = load_TENSOR(unit);

    let theta_new = update(rule_scalars(), theta, gradient(g), &s);
    store_TENSOR(unit, s);
    params_TENSOR[unit] = stored(theta_new);
}
