// Partial sums of squares of gradients, behind sums.wgsl: every invocation adds those of its share in one order, and
// nobody else writes where it does. No invocation waits for another: software adapters run those of a workgroup one after
// the other, and a barrier takes them three times as long as the sums. src/gpu/control/norm.rs puts the files together,
// writes `add_middle_words`, `add_any_words` and, for batches, the entry point, and declares `k` by one of the frame's
// scalars_*.wgsl.

const WORKGROUP_SIZE: u32 = 64;

// What `k` holds.
struct wo_Uniforms {
    // Where the dispatch's chunks start, and how many there are: workgroups beyond have nothing to do.
    first: u32,
    count: u32,
    // Where its partial sums start.
    partial: u32,
    // Workgroups in one row of the grid.
    row: u32,
    // Which norm its gradients are part of.
    norm: u32,
    // Batches only: bit i says whether tensor i takes part.
    tensor_mask: u32,
    // Whether an earlier dispatch has sums in the same places, to which these are added.
    adds: u32,
}

// Invocations that walk side by side, each by 16 bytes: a cache line of GPUs, and what a software adapter computes at once.
// Each such group has a run of its own, so that whoever runs them one after the other reads memory in its order.
const GROUP: u32 = 8u;

// The run of a group of so many.
fn run_of(start: u32, end: u32, group: u32, groups: u32) -> vec2<u32> {
    let each = GROUP * ((max(end, start) - start + GROUP * groups - 1u) / (GROUP * groups));
    let first = min(start + group * each, end);
    return vec2(first, min(first + each, end));
}

fn store_partial(index: u32, sums: Sums) {
    let top = max(max(sums.top.x, sums.top.y), max(sums.top.z, sums.top.w));
    // 0: finite, 1: infinite, 2: NaN.
    var kind = u32(top >= 0x7f800000) + u32(top > 0x7f800000);
    var squares = vec3(sum(sums.middle), sum(sums.small), sum(sums.large));
    if wo_k.adds != 0u {
        let before = partials[index];
        squares += bitcast<vec3<f32>>(before.xyz);
        kind = max(kind, before.w & 3u);
    }
    partials[index] = vec4(bitcast<vec3<u32>>(squares), kind | (wo_k.norm << 2u));
}
