// What the kernels bind that the fused step is measured against: copies with its access pattern, and the operations of which a
// tensor library would put momentum together (src/lab/bench/elementwise.rs). One array element is four values.

@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> y: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> z: array<vec4<f32>>;
@group(1) @binding(0) var<uniform> k: ElementwiseUniforms;

struct ElementwiseUniforms {
    count: u32,
    row: u32,
    // Never set, but only the host knows, so no compiler can leave out a read.
    swap: u32,
    factor: f32,
    // From one slot of the state to the next.
    section: u32,
}

fn unit_of(invocation: vec3<u32>) -> u32 {
    return invocation.y * k.row + invocation.x;
}
