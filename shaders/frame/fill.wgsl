// Words of the state that become one value, but for the halves of the first and the last that are a neighbour's.
// src/gpu/fill.rs records it.

const WORKGROUP_SIZE: u32 = 256;

struct Fill {
    first: u32,
    count: u32,
    // Invocations in one row of the grid.
    row: u32,
    value: u32,
    // Bits of the first word and of the last one that stay as they are.
    kept_first: u32,
    kept_last: u32,
}

@group(0) @binding(0) var<storage, read_write> words: array<u32>;
@group(0) @binding(1) var<uniform> run: Fill;

@compute @workgroup_size(WORKGROUP_SIZE)
fn fill_words(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let word = invocation.y * run.row + invocation.x;
    if word >= run.count {
        return;
    }
    let is_first = word == 0u;
    let is_last = word + 1u == run.count;
    let kept = select(0u, run.kept_first, is_first) | select(0u, run.kept_last, is_last);
    words[run.first + word] = (words[run.first + word] & kept) | (run.value & ~kept);
}
