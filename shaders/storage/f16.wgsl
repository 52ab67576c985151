// f16, IEEE's binary16, in integers: pack2x16float may round either way, and devices may flush what is subnormal.
// CPU twin: src/storage/f16.rs, same names, same statement order.

// From the exponent of an f16 to that of an f32, in the bits of the latter.
const wo_REBIAS: u32 = 0x38000000u;

// Four of them in two words, as the bits of f32.
fn wo_unpack_f16(words: vec2<u32>) -> vec4<u32> {
    let half = vec4(words.x & 0xffffu, words.x >> 16u, words.y & 0xffffu, words.y >> 16u);
    let sign = (half & vec4(0x8000u)) << vec4(16u);
    let magnitude = (half & vec4(0x7fffu)) << vec4(13u);
    let exponent = magnitude & vec4(0x0f800000u);
    let quiet = select(vec4(0u), vec4(0x00400000u), magnitude > vec4(0x0f800000u));
    let not_finite = (magnitude + vec4(2u * wo_REBIAS)) | quiet;
    // So many 2^-24, exactly.
    let subnormal = bitcast<vec4<u32>>(vec4<f32>(half & vec4(0x03ffu)) * bitcast<f32>(0x33800000u));
    let small = select(magnitude + vec4(wo_REBIAS), subnormal, exponent == vec4(0u));
    return sign | select(small, not_finite, exponent == vec4(0x0f800000u));
}

fn wo_subnormal_shift(magnitude: vec4<u32>) -> vec4<u32> {
    let exponent = magnitude >> vec4(23u);
    return min(vec4(126u) - min(exponent, vec4(125u)), vec4(31u));
}

fn wo_nearest_f16(bits: vec4<u32>) -> vec4<u32> {
    let sign = (bits >> vec4(16u)) & vec4(0x8000u);
    let magnitude = bits & vec4(0x7fffffffu);
    let mantissa = (magnitude & vec4(0x007fffffu)) | vec4(0x00800000u);
    let shift = wo_subnormal_shift(magnitude);
    let half_up = (vec4(1u) << (shift - vec4(1u))) - vec4(1u);
    let subnormal = (mantissa + half_up + ((mantissa >> shift) & vec4(1u))) >> shift;
    let odd = (magnitude >> vec4(13u)) & vec4(1u);
    let normal = (magnitude - vec4(wo_REBIAS) + vec4(0x0fffu) + odd) >> vec4(13u);
    let finite = select(normal, subnormal, magnitude < vec4(0x38800000u));
    let rounded = select(finite, vec4(0x7c00u), magnitude >= vec4(0x47800000u));
    let nan = vec4(0x7e00u) | ((magnitude >> vec4(13u)) & vec4(0x03ffu));
    return sign | select(rounded, nan, magnitude > vec4(0x7f800000u));
}

fn wo_stochastic_f16(bits: vec4<u32>, random: vec4<u32>) -> vec4<u32> {
    let near = wo_nearest_f16(bits);
    let sign = (bits >> vec4(16u)) & vec4(0x8000u);
    let magnitude = bits & vec4(0x7fffffffu);
    // Below 2^-32 random bits do not reach far enough.
    let is_tiny = magnitude < vec4(0x2f800000u);
    let mantissa = select((magnitude & vec4(0x007fffffu)) | vec4(0x00800000u), vec4(0u), is_tiny);
    let shift = wo_subnormal_shift(magnitude);
    let subnormal = (mantissa + (random & ((vec4(1u) << shift) - vec4(1u)))) >> shift;
    let normal = (magnitude - vec4(wo_REBIAS) + (random & vec4(0x1fffu))) >> vec4(13u);
    let rounded = min(select(normal, subnormal, magnitude < vec4(0x38800000u)), vec4(0x7bffu));
    return select(sign | rounded, near, (near & vec4(0x7fffu)) >= vec4(0x7c00u));
}
