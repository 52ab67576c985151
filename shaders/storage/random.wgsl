//# if STOCHASTIC

// Random bits by number: the same for an element however a dispatch is cut. CPU twin: src/storage/random.rs.

fn wo_mix(word: vec4<u32>) -> vec4<u32> {
    let first = (word ^ (word >> vec4(16u))) * vec4(0x7feb352du);
    let second = (first ^ (first >> vec4(15u))) * vec4(0x846ca68bu);
    return second ^ (second >> vec4(16u));
}

// Of four elements that follow each other, from this one of the tensor on; of their parameters (0) or a slot.
fn wo_random(element: u32, value: u32) -> vec4<u32> {
    let elements = vec4(element) + vec4(0u, 1u, 2u, 3u);
    let key = wo_key();
    return wo_mix(wo_mix(elements ^ vec4(key.x)) + vec4(key.y + value * 0x9e3779b9u));
}

fn wo_key() -> vec2<u32> {
    return vec2(HOLDER.key_x, HOLDER.key_y);
}
//# end
