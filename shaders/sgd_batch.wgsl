// Tensor TENSOR of a batch: src/gpu/kernels.rs repeats this file with 0, 1, 2.. for TENSOR, and writes the entry points
// that call them one after the other. A tensor fills its bindings, so their length is its own.

@group(0) @binding(TENSOR) var<storage, read_write> params_TENSOR: array<Unit>;
@group(0) @binding(BATCH + TENSOR) var<storage, read> grads_TENSOR: array<Unit>;
@group(0) @binding(2 * BATCH + TENSOR) var<storage, read_write> velocity_TENSOR: array<Unit>;

fn sgd_TENSOR(unit: u32) {
    if (k.tensor_mask & (1u << TENSORu)) == 0u || unit >= arrayLength(&params_TENSOR) {
        return;
    }
    let theta = vec4<f32>(params_TENSOR[unit]);
    let g = vec4<f32>(grads_TENSOR[unit]);
    let v_old = vec4<f32>(velocity_TENSOR[unit]);

    let d = direction(theta, g);
    let v = next_velocity(v_old, d);
    let theta_new = next_params(theta, v, d);
    velocity_TENSOR[unit] = stored(v);
    params_TENSOR[unit] = stored(theta_new);
}

fn sgd_plain_TENSOR(unit: u32) {
    if (k.tensor_mask & (1u << TENSORu)) == 0u || unit >= arrayLength(&params_TENSOR) {
        return;
    }
    let theta = vec4<f32>(params_TENSOR[unit]);
    let g = vec4<f32>(grads_TENSOR[unit]);

    let d = direction(theta, g);
    params_TENSOR[unit] = stored(next_params_plain(theta, d));
}
