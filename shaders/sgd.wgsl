// The fused momentum update, and plain gradient descent:
//
//     d     = s*g + lambda*theta
//     v     <- alpha*v + c*d
//     theta <- rho*theta - (a*v + b*d)
//
// CPU twin: src/reference.rs, same names, same statement order. One of the scalars_*.wgsl files declares `k`.

// The terms that the config has; an absent term is compiled out.
override HAS_LAMBDA: bool = false;
override HAS_B: bool = false;
override HAS_RHO: bool = false;

const WORKGROUP_SIZE: u32 = 256;

struct SgdUniforms {
    s: f32,
    lambda: f32,
    alpha: f32,
    c: f32,
    a: f32,
    b: f32,
    rho: f32,
    // Where the dispatch starts in each binding. Units of this and what follows: four elements for the
    // vec4 entry points, one element for the scalar ones.
    params_first: u32,
    grads_first: u32,
    velocity_first: u32,
    // How many units the dispatch covers.
    count: u32,
    // Invocations in one row of the grid: a dispatch past the per-dimension limit folds into y.
    row: u32,
    // Scalar entry points only: after `head` elements, `gap` elements are skipped.
    head: u32,
    gap: u32,
}

@group(0) @binding(0) var<storage, read_write> params: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> grads: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> velocity: array<vec4<f32>>;

// The same bindings by the element, for what does not fill a vec4 or does not line up with one.
@group(0) @binding(0) var<storage, read_write> params_scalar: array<f32>;
@group(0) @binding(1) var<storage, read> grads_scalar: array<f32>;
@group(0) @binding(2) var<storage, read_write> velocity_scalar: array<f32>;

fn direction(theta: vec4<f32>, g: vec4<f32>) -> vec4<f32> {
    var d = k.s * g;
    if HAS_LAMBDA {
        d = d + k.lambda * theta;
    }
    return d;
}

fn next_velocity(v: vec4<f32>, d: vec4<f32>) -> vec4<f32> {
    return k.alpha * v + k.c * d;
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

fn element_of(unit: u32) -> u32 {
    return unit + select(0u, k.gap, unit >= k.head);
}

// All loads come before the first store: buffers may alias for all that a compiler knows, so it cannot move
// a load up over a store, and a wave would wait for memory twice.

@compute @workgroup_size(WORKGROUP_SIZE)
fn sgd(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = unit_of(invocation);
    if unit >= k.count {
        return;
    }
    let theta = params[k.params_first + unit];
    let g = grads[k.grads_first + unit];
    let v_old = velocity[k.velocity_first + unit];

    let d = direction(theta, g);
    let v = next_velocity(v_old, d);
    velocity[k.velocity_first + unit] = v;
    params[k.params_first + unit] = next_params(theta, v, d);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn sgd_scalar(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = unit_of(invocation);
    if unit >= k.count {
        return;
    }
    let i = element_of(unit);
    let theta = vec4(params_scalar[k.params_first + i]);
    let g = vec4(grads_scalar[k.grads_first + i]);
    let v_old = vec4(velocity_scalar[k.velocity_first + i]);

    let d = direction(theta, g);
    let v = next_velocity(v_old, d);
    velocity_scalar[k.velocity_first + i] = v.x;
    params_scalar[k.params_first + i] = next_params(theta, v, d).x;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn sgd_plain(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = unit_of(invocation);
    if unit >= k.count {
        return;
    }
    let theta = params[k.params_first + unit];
    let g = grads[k.grads_first + unit];

    let d = direction(theta, g);
    params[k.params_first + unit] = next_params_plain(theta, d);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn sgd_plain_scalar(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = unit_of(invocation);
    if unit >= k.count {
        return;
    }
    let i = element_of(unit);
    let theta = vec4(params_scalar[k.params_first + i]);
    let g = vec4(grads_scalar[k.grads_first + i]);

    let d = direction(theta, g);
    params_scalar[k.params_first + i] = next_params_plain(theta, d).x;
}
