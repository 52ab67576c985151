// From partial sums to what becomes of the step, behind factors.wgsl: one workgroup, one order. CPU twin: src/control/verdict.rs.

const HISTORY: u32 = 64;

struct Settings {
    // The step's number, and how many partial sums there are.
    step: u32,
    partials: u32,
    // Norms that are told apart, the first one of all groups without one of their own.
    norms: u32,
    // Bit 0: skip what is not finite. Bit 1: the loss scale follows. Bit 2: tensors are clipped one by one (tensors.wgsl).
    flags: u32,
    growth_factor: f32,
    backoff_factor: f32,
    growth_interval: u32,
    // Where it does not follow; zero where it does.
    constant_scale: f32,
    // Of each norm; negative where it does not clip.
    max_norms: array<vec4<f32>, 4>,
}

struct Scale {
    scale: f32,
    growth_tracker: u32,
    skipped: u32,
    unused: u32,
}

struct Record {
    step: u32,
    // Bits of an f32, since it may not be finite.
    norm: u32,
    clip_factor: u32,
    // Bit 0: a gradient was not finite. Bit 1: the step was skipped. Bit 2: because there were no scalars for it.
    flags: u32,
    scale: f32,
    skipped: u32,
    unused: vec2<u32>,
}

struct Verdict {
    skip: u32,
    // check.wgsl has found a class of tensors for which there are no scalars.
    is_too_far_ahead: u32,
    // Of each norm: what gradients are multiplied by, one after the other.
    factors: array<vec2<u32>, 16>,
}

@group(0) @binding(0) var<uniform> k: Settings;
@group(0) @binding(1) var<storage, read> partials: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> scale: Scale;
@group(0) @binding(3) var<storage, read_write> verdict: Verdict;
@group(0) @binding(4) var<storage, read_write> latest: Record;
@group(0) @binding(5) var<storage, read_write> history: array<Record, HISTORY>;

// All that is part of a norm, at every invocation.
fn sum_of_norm(norm: u32, lane: u32) -> Partial {
    var total = Partial();
    for (var i = lane; i < k.partials; i += WORKGROUP_SIZE) {
        let partial = partials[i];
        if partial.w >> 2u == norm {
            total = both(total, partial_of(partial));
        }
    }
    return reduced(total, lane);
}

// The bits of what a magnitude is worth times `factor`: infinity where f32 cannot hold it, subnormals by hand.
fn bits_of(magnitude: Magnitude, factor: f32) -> u32 {
    let value = magnitude.value * magnitude.half * factor;
    if magnitude.half > 1.0 && value >= 0x1p+86f {
        return INFINITY;
    }
    let scaled = value * magnitude.half;
    if scaled < 0x1p-126f {
        // So many 2^-149.
        return u32(round(value * magnitude.subnormals));
    }
    return bitcast<u32>(scaled);
}

// One divided by a loss scale; exact for powers of two, for which a division need not be.
fn inverse(scale: f32) -> f32 {
    let bits = bitcast<u32>(scale);
    if (bits & 0x007fffffu) == 0u {
        return bitcast<f32>((254u << 23u) - bits);
    }
    return 1.0 / scale;
}

// torch._amp_update_scale_, but never to where the scale or its inverse is subnormal.
fn follow(found: bool) {
    var next = scale.scale;
    // A loaded state may say any number.
    var tracker = min(scale.growth_tracker, 0xfffffffeu) + 1u;
    if found {
        next *= k.backoff_factor;
        tracker = 0u;
    } else if tracker >= k.growth_interval {
        next *= k.growth_factor;
        tracker = 0u;
    }
    if next >= 0x1p-126f && next <= 0x1p+126f {
        scale.scale = next;
    }
    scale.growth_tracker = tracker;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn finish(@builtin(local_invocation_index) lane: u32) {
    let current = select(scale.scale, k.constant_scale, k.constant_scale > 0.0);
    let unscale = inverse(current);
    var total = Partial();
    var clip_factor = bitcast<u32>(1.0);
    for (var norm = 0u; norm < k.norms; norm++) {
        let sums = sum_of_norm(norm, lane);
        let factors = factors_of(sums, k.max_norms[norm / 4u][norm % 4u], unscale);
        if lane == 0u {
            verdict.factors[norm] = factors.pair;
        }
        total = both(total, sums);
        // Bits of what is not negative are in order.
        if factors.clip < clip_factor || factors.clip == NAN {
            clip_factor = factors.clip;
        }
    }
    if lane != 0u {
        return;
    }
    let found = total.kind != 0u;
    let is_too_far_ahead = verdict.is_too_far_ahead != 0u;
    verdict.is_too_far_ahead = 0u;
    let skip = (found && (k.flags & 1u) != 0u) || is_too_far_ahead;
    if (k.flags & 4u) != 0u {
        // A norm that is not finite is one of theirs.
        clip_factor = select(select(clip_factor, 0u, total.kind == 1u), NAN, total.kind == 2u);
    }
    let finite = bits_of(root(total), unscale);
    let norm = select(select(finite, INFINITY, total.kind == 1u), NAN, total.kind == 2u);
    let skipped = scale.skipped + u32(skip);
    let flags = u32(found) | (u32(skip) << 1u) | (u32(is_too_far_ahead) << 2u);
    let record = Record(k.step, norm, clip_factor, flags, current, skipped, vec2(0u));
    latest = record;
    history[k.step % HISTORY] = record;
    verdict.skip = u32(skip);
    scale.skipped = skipped;
    if (k.flags & 2u) == 0u {
        scale.scale = current;
    } else if !is_too_far_ahead {
        follow(found);
    }
}
