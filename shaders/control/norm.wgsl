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
    let kind = u32(top >= 0x7f800000) + u32(top > 0x7f800000);
    partials[index] = vec4(
        bitcast<u32>(sum(sums.middle)),
        bitcast<u32>(sum(sums.small)),
        bitcast<u32>(sum(sums.large)),
        kind | (wo_k.norm << 2u),
    );
}
