// What the fused step is measured against: a plain copy with its access pattern, and the operations of which a
// tensor library would put momentum together. One array element is four values.

struct ElementwiseUniforms {
    count: u32,
    row: u32,
    // Never set, but only the host knows, so no compiler can leave out a read.
    swap: u32,
    factor: f32,
    // From one slot of the state to the next.
    section: u32,
}

@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> y: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> z: array<vec4<f32>>;
@group(1) @binding(0) var<uniform> k: ElementwiseUniforms;

fn unit_of(invocation: vec3<u32>) -> u32 {
    return invocation.y * k.row + invocation.x;
}

// Three reads, two writes: the pattern of a step with one slot, momentum for one.
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

// Four reads, three writes: the pattern of a step with two slots, which are sections of one array.
// Everything moves on by one array.
@compute @workgroup_size(256)
fn copy_three(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = unit_of(invocation);
    if unit >= k.count {
        return;
    }
    let from_x = x[unit];
    let from_y = y[unit];
    let from_z0 = z[unit];
    let from_z1 = z[unit + k.section];
    z[unit] = from_x;
    z[unit + k.section] = from_z0;
    x[unit] = select(from_z1, from_y, k.swap != 0u);
}

// Five reads, four writes: three slots.
@compute @workgroup_size(256)
fn copy_four(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = unit_of(invocation);
    if unit >= k.count {
        return;
    }
    let from_x = x[unit];
    let from_y = y[unit];
    let from_z0 = z[unit];
    let from_z1 = z[unit + k.section];
    let from_z2 = z[unit + 2u * k.section];
    z[unit] = from_x;
    z[unit + k.section] = from_z0;
    z[unit + 2u * k.section] = from_z1;
    x[unit] = select(from_z2, from_y, k.swap != 0u);
}

// Six reads, five writes: four slots.
@compute @workgroup_size(256)
fn copy_five(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = unit_of(invocation);
    if unit >= k.count {
        return;
    }
    let from_x = x[unit];
    let from_y = y[unit];
    let from_z0 = z[unit];
    let from_z1 = z[unit + k.section];
    let from_z2 = z[unit + 2u * k.section];
    let from_z3 = z[unit + 3u * k.section];
    z[unit] = from_x;
    z[unit + k.section] = from_z0;
    z[unit + 2u * k.section] = from_z1;
    z[unit + 3u * k.section] = from_z2;
    x[unit] = select(from_z3, from_y, k.swap != 0u);
}

// Two reads, one write: the pattern of a step without state.
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
