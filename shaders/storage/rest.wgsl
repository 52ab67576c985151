// A bf16 and what it leaves of an f32: sixteen bits that make up the f32 again, exactly. CPU twin: src/storage/rest.rs,
// which says why of two that are as near this takes the larger in magnitude.

// Of four f32, as their bits.
fn wo_split_bf16(bits: vec4<u32>) -> vec4<u32> {
    let upper = bits >> vec4(16u);
    let is_nan = (bits & vec4(0x7fffffffu)) > vec4(0x7f800000u);
    return select(upper + ((bits >> vec4(15u)) & vec4(1u)), upper | vec4(0x0040u), is_nan);
}

// The bits of four f32, of their bf16 in two words and their rests in two others. A half that somebody else has written
// since, zero or infinity, may not go with its rest: then it stands alone, so that no NaN comes of two numbers.
fn wo_join_bf16(words: vec2<u32>, rest_words: vec2<u32>) -> vec4<u32> {
    let half = vec4(words.x & 0xffffu, words.x >> 16u, words.y & 0xffffu, words.y >> 16u);
    let rest = vec4(rest_words.x & 0xffffu, rest_words.x >> 16u, rest_words.y & 0xffffu, rest_words.y >> 16u);
    let magnitude = half & vec4(0x7fffu);
    let is_carried = rest >= vec4(0x8000u);
    let is_alone = ((magnitude == vec4(0u)) & is_carried) | ((magnitude == vec4(0x7f80u)) & !is_carried);
    let carried = select(vec4(0u), vec4(1u), is_carried & (magnitude <= vec4(0x7f80u)) & !is_alone);
    return ((half - carried) << vec4(16u)) | select(rest, vec4(0u), is_alone);
}
