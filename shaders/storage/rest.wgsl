// A bf16 and what it leaves of an f32: sixteen bits that make up the f32 again, exactly. CPU twin: src/storage/rest.rs,
// which says why of two that are as near this takes the larger in magnitude.

// Of four f32, as their bits.
fn wo_split_bf16(bits: vec4<u32>) -> vec4<u32> {
    let upper = bits >> vec4(16u);
    let is_nan = (bits & vec4(0x7fffffffu)) > vec4(0x7f800000u);
    return select(upper + ((bits >> vec4(15u)) & vec4(1u)), upper | vec4(0x0040u), is_nan);
}

// The bits of four f32, of their bf16 in two words and their rests in two others. A half that somebody else has written
// since may not go with its rest: what they make ends at zero and at infinity, so that no NaN comes of two numbers.
fn wo_join_bf16(words: vec2<u32>, rest_words: vec2<u32>) -> vec4<u32> {
    let value = vec4(words.x << 16u, words.x & 0xffff0000u, words.y << 16u, words.y & 0xffff0000u);
    let rests = bitcast<vec2<i32>>(rest_words);
    // Rests from 0x8000 on are what the next half is too large by.
    let rest = vec4(extractBits(rests.x, 0u, 16u), rests.x >> 16u, extractBits(rests.y, 0u, 16u), rests.y >> 16u);
    let magnitude = bitcast<vec4<i32>>(value & vec4(0x7fffffffu));
    let most = max(magnitude, vec4(0x7f800000));
    let joined = clamp(magnitude + rest, vec4(0), most);
    return (value & vec4(0x80000000u)) | bitcast<vec4<u32>>(joined);
}

// Parameters in bf16, and behind the slots their rests, from START on.
//# for TENSORS
//# for SECTIONS

fn wo_load_theta_TENSOR(at: wo_Place) -> wo_Unit {
    let words = wo_params_TENSOR[at.unit];
    let rests = wo_ARRAY_TENSOR[START + at.unit];
//# if VECTORS
    return wo_Unit(wo_join_bf16(words.xy, rests.xy), wo_join_bf16(words.zw, rests.zw));
//# else
    return wo_Unit(wo_join_bf16(vec2(words, 0u), vec2(rests, 0u)));
//# end
}

fn wo_store_theta_TENSOR(at: wo_Place, theta: wo_Unit) {
    let i = START + at.unit;
//# if VECTORS
    wo_params_TENSOR[at.unit] = wo_packed(wo_split_bf16(theta.low), wo_split_bf16(theta.high));
    wo_ARRAY_TENSOR[i] = wo_packed(theta.low & vec4(0xffffu), theta.high & vec4(0xffffu));
//# else
    wo_params_TENSOR[at.unit] = wo_merged(wo_params_TENSOR[at.unit], wo_split_bf16(theta.low), at.mine);
    wo_ARRAY_TENSOR[i] = wo_merged(wo_ARRAY_TENSOR[i], theta.low & vec4(0xffffu), at.mine);
//# end
}
//# end
//# end
