// A bf16 and what it leaves of an f32: sixteen bits that make up the f32 again, exactly. CPU twin: src/storage/rest.rs,
// which says why of two that are as near this takes the larger in magnitude.

// Of four f32, as their bits.
fn split_bf16(bits: vec4<u32>) -> vec4<u32> {
    let upper = bits >> vec4(16u);
    let is_nan = (bits & vec4(0x7fffffffu)) > vec4(0x7f800000u);
    return select(upper + ((bits >> vec4(15u)) & vec4(1u)), upper | vec4(0x0040u), is_nan);
}

// The bits of four f32, of their bf16 in two words and their rests in two others.
fn join_bf16(words: vec2<u32>, rest_words: vec2<u32>) -> vec4<u32> {
    let half = vec4(words.x & 0xffffu, words.x >> 16u, words.y & 0xffffu, words.y >> 16u);
    let rest = vec4(rest_words.x & 0xffffu, rest_words.x >> 16u, rest_words.y & 0xffffu, rest_words.y >> 16u);
    let is_nan = (half & vec4(0x7fffu)) > vec4(0x7f80u);
    let carried = select(rest >> vec4(15u), vec4(0u), is_nan);
    return ((half - carried) << vec4(16u)) | rest;
}
