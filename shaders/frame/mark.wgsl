// Behind all moves of state that belong together (move.wgsl): they have been made.

@group(0) @binding(0) var<storage, read_write> is_made: array<u32>;

@compute @workgroup_size(1)
fn mark_moved() {
    is_made[0] = 1u;
}
