// What a person wants to know of a side, added up in a fixed order. Stands behind terrain.wgsl.

struct Count {
    // Sum over balls that have not escaped.
    height: f32,
    // Sum, over the first balls, of the way since the last count.
    way: f32,
    deepest: u32,
    escaped: u32,
}

// Both are of the device: an encoder that was dropped has made no step.
struct Steps {
    // Of slope.wgsl, since the start.
    taken: u32,
    // As many when the last count was made.
    counted: u32,
}

struct Result {
    count: Count,
    steps: u32,
    // Since the count before.
    steps_since: u32,
}

struct Size {
    balls: u32,
    // Of how many balls the way is taken.
    sample: u32,
    // Left or right.
    side: u32,
}

@group(0) @binding(0) var<storage, read> params: array<vec2<f32>>;
@group(0) @binding(1) var<storage, read_write> before: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read_write> partials: array<Count>;
@group(0) @binding(3) var<storage, read_write> steps: Steps;
@group(0) @binding(4) var<storage, read_write> result: array<Result, 2>;
@group(0) @binding(5) var<uniform> size: Size;

const LANES = 256u;
var<workgroup> counts: array<Count, LANES>;

fn is_deepest(p: vec2<f32>) -> bool {
    var deepest = DEEPEST;
    for (var i = 0u; i < DEEPEST_COUNT; i++) {
        let d = p - deepest[i];
        if d.x * d.x + d.y * d.y < VALLEY_RADIUS_SQUARED {
            return true;
        }
    }
    return false;
}

// By its bits, because a compiler may take every number for finite.
fn is_near(p: vec2<f32>) -> bool {
    let magnitude = bitcast<vec2<u32>>(p) & vec2(0x7fffffffu);
    return max(magnitude.x, magnitude.y) < bitcast<u32>(4.0 * HALF_WIDTH);
}

fn both(a: Count, b: Count) -> Count {
    return Count(a.height + b.height, a.way + b.way, a.deepest + b.deepest, a.escaped + b.escaped);
}

fn in_lane_zero(lane: u32, own: Count) -> Count {
    counts[lane] = own;
    for (var stride = LANES / 2u; stride > 0u; stride /= 2u) {
        workgroupBarrier();
        if lane < stride {
            counts[lane] = both(counts[lane], counts[lane + stride]);
        }
    }
    return counts[0];
}

@compute @workgroup_size(LANES)
fn partial(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    var own = Count();
    for (var i = group.x * LANES + lane; i < size.balls; i += groups.x * LANES) {
        let p = params[i];
        if !is_near(p) {
            own.escaped += 1u;
            continue;
        }
        own.height += ground(p).height;
        own.deepest += u32(is_deepest(p));
        if i < size.sample {
            let d = p - before[i];
            own.way += sqrt(d.x * d.x + d.y * d.y);
            before[i] = p;
        }
    }
    let all = in_lane_zero(lane, own);
    if lane == 0u {
        partials[group.x] = all;
    }
}

@compute @workgroup_size(LANES)
fn total(@builtin(local_invocation_index) lane: u32) {
    var own = Count();
    for (var i = lane; i < arrayLength(&partials); i += LANES) {
        own = both(own, partials[i]);
    }
    let all = in_lane_zero(lane, own);
    if lane == 0u {
        result[size.side] = Result(all, steps.taken, steps.taken - steps.counted);
        steps.counted = steps.taken;
    }
}
