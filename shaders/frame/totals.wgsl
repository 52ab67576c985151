// From partial sums to those over whole tensors, between the two passes of a step: a workgroup a tensor, in one order.
// src/gpu/sums.rs records it.

const WORKGROUP_SIZE: u32 = 64;
// Parts of a chunk's sums: `wo_PARTS` in step.wgsl.
const PARTS: u32 = 8;

struct Inputs {
    // How many tensors there are, and workgroups in one row of the grid.
    count: u32,
    row: u32,
    unused: vec2<u32>,
    // Of each tensor its first run of chunks, how many there are, the bits of its number of elements as f32, and which tensor
    // it is; behind them of each run the first chunk and how many.
    words: array<vec4<u32>>,
}

// `wo_Total` in step.wgsl.
struct Total {
    sums: vec4<f32>,
    numel: f32,
}

@group(0) @binding(0) var<storage, read> inputs: Inputs;
@group(0) @binding(1) var<storage, read> partials: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> totals: array<Total>;

var<workgroup> shared_sums: array<vec4<f32>, WORKGROUP_SIZE>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn add_sums(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = workgroup.y * inputs.row + workgroup.x;
    let tensor = inputs.words[min(index, inputs.count - 1u)];
    var sums = vec4<f32>();
    for (var run = tensor.x; run < tensor.x + tensor.y; run++) {
        let chunks = inputs.words[run];
        let end = PARTS * (chunks.x + chunks.y);
        for (var i = PARTS * chunks.x + lane; i < end; i += WORKGROUP_SIZE) {
            sums += partials[i];
        }
    }
    shared_sums[lane] = sums;
    for (var width = WORKGROUP_SIZE / 2u; width > 0u; width /= 2u) {
        workgroupBarrier();
        if lane < width {
            shared_sums[lane] += shared_sums[lane + width];
        }
    }
    if lane == 0u && index < inputs.count {
        totals[tensor.w] = Total(shared_sums[0], bitcast<f32>(tensor.z));
    }
}
