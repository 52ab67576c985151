//# if WIDE

// Words of two 16-bit values, the first in the lower half.

// Twice four values, as they lie in memory.
fn wo_packed(low: vec4<u32>, high: vec4<u32>) -> vec4<u32> {
    return vec4(
        low.x | (low.y << 16u),
        low.z | (low.w << 16u),
        high.x | (high.y << 16u),
        high.z | (high.w << 16u),
    );
}

// A word of which only some halves are the dispatch's to write.
fn wo_merged(kept: u32, halves: vec4<u32>, mine: vec2<bool>) -> u32 {
    let low = select(kept & 0xffffu, halves.x, mine.x);
    let high = select(kept >> 16u, halves.y, mine.y);
    return low | (high << 16u);
}

fn wo_half_of(word: u32, element: u32) -> u32 {
    return (word >> ((element & 1u) * 16u)) & 0xffffu;
}
//# end
