// Partial sums of squares of gradients, behind sums.wgsl: a workgroup adds those of its chunk in one order, and nobody
// else writes where it does. src/gpu/control/norm.rs puts the files together, writes `add_words` and, for batches, the
// functions of each tensor, and declares `k` by one of the frame's scalars_*.wgsl.

const WORKGROUP_SIZE: u32 = 256;

// What `k` holds.
struct Uniforms {
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

struct Partial {
    middle: f32,
    small: f32,
    large: f32,
    top: u32,
}

var<workgroup> shared_sums: array<Partial, 256>;

fn sum(values: vec4<f32>) -> f32 {
    return (values.x + values.y) + (values.z + values.w);
}

fn both(x: Partial, y: Partial) -> Partial {
    return Partial(x.middle + y.middle, x.small + y.small, x.large + y.large, max(x.top, y.top));
}

// Adds up what the workgroup's invocations have, 16 at a time: fewer barriers than a tree, which cost a software adapter
// more than the sums. The first invocation returns all of it.
fn sum_of_workgroup(sums: Sums, lane: u32) -> Partial {
    let top = max(max(sums.top.x, sums.top.y), max(sums.top.z, sums.top.w));
    shared_sums[lane] = Partial(sum(sums.middle), sum(sums.small), sum(sums.large), top);
    workgroupBarrier();
    var total = Partial();
    if lane < 16u {
        for (var i = 0u; i < 16u; i++) {
            total = both(total, shared_sums[16u * lane + i]);
        }
    }
    workgroupBarrier();
    if lane < 16u {
        shared_sums[lane] = total;
    }
    workgroupBarrier();
    total = Partial();
    if lane == 0u {
        for (var i = 0u; i < 16u; i++) {
            total = both(total, shared_sums[i]);
        }
    }
    return total;
}

fn store_partial(index: u32, total: Partial) {
    // 0: finite, 1: infinite, 2: NaN.
    let kind = u32(total.top >= 0x7f800000u) + u32(total.top > 0x7f800000u);
    partials[index] = vec4(
        bitcast<u32>(total.middle),
        bitcast<u32>(total.small),
        bitcast<u32>(total.large),
        kind | (k.norm << 2u),
    );
}
