// The gradient of the loss: the slope under each ball, two balls an invocation. Stands behind terrain.wgsl.

@group(0) @binding(0) var<storage, read> params: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> grads: array<vec4<f32>>;
// How many times there have been slopes: a step each.
@group(0) @binding(2) var<storage, read_write> steps_taken: u32;

@compute @workgroup_size(256)
fn slope(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= arrayLength(&params) {
        return;
    }
    if id.x == 0u {
        steps_taken += 1u;
    }
    let two = params[id.x];
    grads[id.x] = vec4(ground(two.xy).slope, ground(two.zw).slope);
}
