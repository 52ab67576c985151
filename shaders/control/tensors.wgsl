// Clips tensors one by one, behind factors.wgsl and after finish.wgsl: a workgroup takes the norm of a tensor from its partial
// sums.

struct Inputs {
    count: u32,
    // Workgroups in one row of the grid.
    row: u32,
    // The number of the step.
    step: u32,
    max_norm: f32,
    // Where the optimizer's partial sums start.
    partial: u32,
    unused: u32,
    // Of each tensor the first of its partial sums, counted from the optimizer's, and how many there are.
    ranges: array<vec2<u32>>,
}

// Words of `Record` in finish.wgsl, and which of them is its clip factor.
const RECORD: u32 = 8u;
const CLIP_FACTOR: u32 = 2u;
const HISTORY: u32 = 64u;

struct Verdict {
    skip: u32,
    is_too_far_ahead: u32,
    factors: array<vec2<u32>, 16>,
}

@group(0) @binding(0) var<storage, read> k: Inputs;
@group(0) @binding(1) var<storage, read> partials: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> verdict: Verdict;
@group(0) @binding(3) var<storage, read_write> factors: array<vec2<u32>>;
@group(0) @binding(4) var<storage, read_write> latest: array<atomic<u32>>;
@group(0) @binding(5) var<storage, read_write> history: array<atomic<u32>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn clip_tensors(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tensor = workgroup.y * k.row + workgroup.x;
    if tensor >= k.count {
        return;
    }
    let range = k.ranges[tensor];
    // It is frozen, or clipped by the norm of its group.
    if range.y == 0u {
        return;
    }
    var total = Partial();
    for (var i = lane; i < range.y; i += WORKGROUP_SIZE) {
        total = both(total, partial_of(partials[k.partial + range.x + i]));
    }
    let sums = reduced(total, lane);
    if lane != 0u {
        return;
    }
    // Of the norm of all tensors, which does not clip.
    let unscale = bitcast<f32>(verdict.factors[0].x);
    let clipped = factors_of(sums, k.max_norm, unscale);
    factors[tensor] = clipped.pair;
    // Bits of what is not negative are in order; a record that says NaN keeps it.
    if atomicLoad(&latest[CLIP_FACTOR]) != NAN {
        atomicMin(&latest[CLIP_FACTOR], clipped.clip);
        atomicMin(&history[RECORD * (k.step % HISTORY) + CLIP_FACTOR], clipped.clip);
    }
}
