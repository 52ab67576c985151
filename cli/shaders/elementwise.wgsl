// What the fused step is measured against: a plain copy with its access pattern, and the operations of which a
// tensor library would put it together. One array element is four values.

struct ElementwiseUniforms {
    count: u32,
    row: u32,
    // Never set, but only the host knows, so no compiler can leave out a read.
    swap: u32,
    factor: f32,
}

@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> y: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> z: array<vec4<f32>>;
@group(1) @binding(0) var<uniform> k: ElementwiseUniforms;

fn unit_of(invocation: vec3<u32>) -> u32 {
    return invocation.y * k.row + invocation.x;
}

// Three reads, two writes: the pattern of the step with momentum.
@compute @workgroup_size(256)
fn copy_two(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = unit_of(invocation);
    if unit >= k.count {
        return;
    }
    let swap = k.swap != 0u;
    let from_x = x[unit];
    let from_y = y[unit];
    let from_z = z[unit];
    z[unit] = select(from_x, from_y, swap);
    x[unit] = select(from_z, from_y, swap);
}

// Two reads, one write: the pattern of the plain step.
@compute @workgroup_size(256)
fn copy_one(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = unit_of(invocation);
    if unit >= k.count {
        return;
    }
    let from_x = x[unit];
    let from_y = y[unit];
    x[unit] = select(from_x, from_y, k.swap == 0u);
}

// x <- factor*x
@compute @workgroup_size(256)
fn scale(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = unit_of(invocation);
    if unit >= k.count {
        return;
    }
    x[unit] = k.factor * x[unit];
}

// x <- factor*y
@compute @workgroup_size(256)
fn scale_into(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = unit_of(invocation);
    if unit >= k.count {
        return;
    }
    x[unit] = k.factor * y[unit];
}

// x <- x + y
@compute @workgroup_size(256)
fn add(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = unit_of(invocation);
    if unit >= k.count {
        return;
    }
    x[unit] = x[unit] + y[unit];
}

// x <- x - y
@compute @workgroup_size(256)
fn subtract(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = unit_of(invocation);
    if unit >= k.count {
        return;
    }
    x[unit] = x[unit] - y[unit];
}
