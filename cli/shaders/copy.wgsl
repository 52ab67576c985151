// A plain copy with the access pattern of the momentum step: three 16-byte reads, two 16-byte writes, no
// arithmetic. `swap` is never set, but only the host knows, so no compiler can leave out the third read.

struct CopyUniforms {
    count: u32,
    row: u32,
    swap: u32,
}

@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> y: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> z: array<vec4<f32>>;
@group(1) @binding(0) var<uniform> k: CopyUniforms;

@compute @workgroup_size(256)
fn copy(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = invocation.y * k.row + invocation.x;
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
