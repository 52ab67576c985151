// bf16: the upper half of an f32. CPU twin: src/storage/bf16.rs, same names, same statement order.

// Four of them in two words, as the bits of f32.
fn wo_unpack_bf16(words: vec2<u32>) -> vec4<u32> {
    let halves = vec4(words.x & 0xffffu, words.x >> 16u, words.y & 0xffffu, words.y >> 16u);
    return halves << vec4(16u);
}

fn wo_nearest_bf16(bits: vec4<u32>) -> vec4<u32> {
    let rounded = (bits + vec4(0x7fffu) + ((bits >> vec4(16u)) & vec4(1u))) >> vec4(16u);
    let is_nan = (bits & vec4(0x7fffffffu)) > vec4(0x7f800000u);
    return select(rounded, (bits >> vec4(16u)) | vec4(0x0040u), is_nan);
}

fn wo_stochastic_bf16(bits: vec4<u32>, random: vec4<u32>) -> vec4<u32> {
    let near = wo_nearest_bf16(bits);
    let rounded = (bits + (random & vec4(0xffffu))) >> vec4(16u);
    let is_carried = (rounded & vec4(0x7fffu)) >= vec4(0x7f80u);
    let finite = select(rounded, rounded - vec4(1u), is_carried);
    return select(finite, near, (near & vec4(0x7fffu)) >= vec4(0x7f80u));
}
