// From partial sums of squares to the factors that clip gradients: the beginning of finish.wgsl and of tensors.wgsl. CPU twin:
// src/control/verdict.rs.

const WORKGROUP_SIZE: u32 = 256;

struct Partial {
    middle: f32,
    small: f32,
    large: f32,
    kind: u32,
}

var<workgroup> shared_sums: array<Partial, 256>;

fn both(x: Partial, y: Partial) -> Partial {
    return Partial(x.middle + y.middle, x.small + y.small, x.large + y.large, max(x.kind, y.kind));
}

// The partial sums of all invocations together, at each of them.
fn reduced(partial: Partial, lane: u32) -> Partial {
    workgroupBarrier();
    shared_sums[lane] = partial;
    for (var width = WORKGROUP_SIZE / 2u; width > 0u; width /= 2u) {
        workgroupBarrier();
        if lane < width {
            shared_sums[lane] = both(shared_sums[lane], shared_sums[lane + width]);
        }
    }
    workgroupBarrier();
    return shared_sums[0];
}

fn partial_of(words: vec4<u32>) -> Partial {
    let sums = bitcast<vec3<f32>>(words.xyz);
    return Partial(sums.x, sums.y, sums.z, words.w & 3u);
}

// value * half^2, where value is far from overflow and underflow. Powers of two that belong together are one literal:
// compilers multiply constants with each other, and what f32 does not hold is then zero or infinite.
struct Magnitude {
    value: f32,
    half: f32,
    // half * 2^-64.
    reduced: f32,
    // half * 2^149; zero where that is too large.
    subnormals: f32,
}

// The root of the three sums together. What vanishes is below the last place of what is there.
fn root(sums: Partial) -> Magnitude {
    let small = sqrt(sums.small);
    let middle = sqrt(sums.middle);
    if sums.large > 0.0 {
        let others = middle * 0x1p-84f;
        return Magnitude(sqrt(sums.large + others * others), 0x1p+42f, 0x1p-22f, 0.0);
    }
    if sums.middle > 0.0 {
        let others = small * 0x1p-90f;
        return Magnitude(sqrt(sums.middle + others * others), 1.0, 0x1p-64f, 0.0);
    }
    return Magnitude(small, 0x1p-45f, 0x1p-109f, 0x1p+104f);
}

const INFINITY: u32 = 0x7f800000u;
const NAN: u32 = 0x7fc00000u;

struct Factors {
    // What gradients are multiplied by, one after the other, as bits.
    pair: vec2<u32>,
    // By how much the norm clips.
    clip: u32,
}

fn factors_of(sums: Partial, max_norm: f32, unscale: f32) -> Factors {
    let one = bitcast<u32>(1.0);
    let pre = bitcast<u32>(unscale);
    if max_norm < 0.0 {
        return Factors(vec2(pre, one), one);
    }
    if sums.kind == 2u {
        return Factors(vec2(pre, NAN), NAN);
    }
    if sums.kind == 1u {
        return Factors(vec2(pre, 0u), 0u);
    }
    // The norm times 2^-64: where it is too small for that, 1e-6 is all that counts.
    let norm = root(sums);
    let reduced = norm.value * norm.half * unscale * norm.reduced + 1e-6 * 0x1p-64f;
    let factor = max_norm * 0x1p-64f / reduced;
    let clip = bitcast<u32>(factor);
    if factor >= 1.0 {
        return Factors(vec2(pre, one), one);
    }
    if factor < 0x1p-60f {
        // Too small for a factor, and not for two.
        return Factors(vec2(bitcast<u32>(unscale * 0x1p-64f), bitcast<u32>(max_norm / reduced)), clip);
    }
    return Factors(vec2(pre, clip), clip);
}
