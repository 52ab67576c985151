// The fused momentum update, and plain gradient descent:
//
//     d     = g + lambda*theta
//     v     <- alpha*v + c*d
//     theta <- rho*theta - (a*v + b*d)
//
// CPU twin: src/cpu/reference.rs, same names, same statement order. One of the scalars_*.wgsl files declares `k`.

// The terms that the config has; an absent term is compiled out.
override HAS_C: bool = false;
override HAS_LAMBDA: bool = false;
override HAS_B: bool = false;
override HAS_RHO: bool = false;
// Whether the vec4 entry points start further on than the bindings do. Most tensors start with them, and then
// one address, without a sum, serves all three arrays.
override HAS_OFFSET: bool = false;

const WORKGROUP_SIZE: u32 = 256;

struct SgdUniforms {
    lambda: f32,
    alpha: f32,
    c: f32,
    a: f32,
    b: f32,
    rho: f32,
    // Where the dispatch starts in the bindings of params and velocity. Units of this and what follows: four
    // elements for the vec4 entry points, one element for the scalar ones.
    first: u32,
    // How much further on the gradients start in theirs, modulo 2^32.
    grads_shift: u32,
    // How many units the dispatch covers.
    count: u32,
    // Invocations in one row of the grid: a dispatch past the per-dimension limit folds into y.
    row: u32,
    // Scalar entry points only: after `head` elements, `gap` elements are skipped.
    head: u32,
    gap: u32,
    // Batches only (sgd_batch.wgsl): bit i says whether tensor i is updated.
    tensor_mask: u32,
}

@group(0) @binding(0) var<storage, read_write> params: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> grads: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> velocity: array<vec4<f32>>;

// The same bindings by the element, for what does not fill a vec4 or does not line up with one.
@group(0) @binding(0) var<storage, read_write> params_scalar: array<f32>;
@group(0) @binding(1) var<storage, read> grads_scalar: array<f32>;
@group(0) @binding(2) var<storage, read_write> velocity_scalar: array<f32>;

fn direction(theta: vec4<f32>, g: vec4<f32>) -> vec4<f32> {
    if HAS_LAMBDA {
        return g + k.lambda * theta;
    }
    return g;
}

fn next_velocity(v: vec4<f32>, d: vec4<f32>) -> vec4<f32> {
    if HAS_C {
        return k.alpha * v + k.c * d;
    }
    return k.alpha * v + d;
}

fn next_params(theta: vec4<f32>, v: vec4<f32>, d: vec4<f32>) -> vec4<f32> {
    var update = k.a * v;
    if HAS_B {
        update = update + k.b * d;
    }
    return decayed(theta) - update;
}

fn next_params_plain(theta: vec4<f32>, d: vec4<f32>) -> vec4<f32> {
    return decayed(theta) - k.b * d;
}

fn decayed(theta: vec4<f32>) -> vec4<f32> {
    if HAS_RHO {
        return k.rho * theta;
    }
    return theta;
}

fn unit_of(invocation: vec3<u32>) -> u32 {
    return invocation.y * k.row + invocation.x;
}

fn vec4_of(unit: u32) -> u32 {
    if HAS_OFFSET {
        return k.first + unit;
    }
    return unit;
}

fn grads_vec4_of(unit: u32) -> u32 {
    if HAS_OFFSET {
        return k.first + unit + k.grads_shift;
    }
    return unit;
}

fn element_of(unit: u32) -> u32 {
    return k.first + unit + select(0u, k.gap, unit >= k.head);
}

// All loads come before the first store: buffers may alias for all that a compiler knows, so it cannot move
// a load up over a store, and a wave would wait for memory twice. All arithmetic does too: a velocity that is still
// needed when it is stored is copied first (five of 33 instructions on AMD's Vega).

@compute @workgroup_size(WORKGROUP_SIZE)
fn sgd(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = unit_of(invocation);
    if unit >= k.count {
        return;
    }
    let i = vec4_of(unit);
    let theta = params[i];
    let g = grads[grads_vec4_of(unit)];
    let v_old = velocity[i];

    let d = direction(theta, g);
    let v = next_velocity(v_old, d);
    let theta_new = next_params(theta, v, d);
    velocity[i] = v;
    params[i] = theta_new;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn sgd_scalar(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = unit_of(invocation);
    if unit >= k.count {
        return;
    }
    let i = element_of(unit);
    let theta = vec4(params_scalar[i]);
    let g = vec4(grads_scalar[i + k.grads_shift]);
    let v_old = vec4(velocity_scalar[i]);

    let d = direction(theta, g);
    let v = next_velocity(v_old, d);
    let theta_new = next_params(theta, v, d);
    velocity_scalar[i] = v.x;
    params_scalar[i] = theta_new.x;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn sgd_plain(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = unit_of(invocation);
    if unit >= k.count {
        return;
    }
    let i = vec4_of(unit);
    let theta = params[i];
    let g = grads[grads_vec4_of(unit)];

    let d = direction(theta, g);
    params[i] = next_params_plain(theta, d);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn sgd_plain_scalar(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = unit_of(invocation);
    if unit >= k.count {
        return;
    }
    let i = element_of(unit);
    let theta = vec4(params_scalar[i]);
    let g = vec4(grads_scalar[i + k.grads_shift]);

    let d = direction(theta, g);
    params_scalar[i] = next_params_plain(theta, d).x;
}
