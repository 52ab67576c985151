// State that moves from one buffer to another, once: the copy is recorded with every step until the device is known to have
// made it, since the encoder of any of them may be dropped. src/gpu/moves.rs records it.

const WORKGROUP_SIZE: u32 = 256;

struct Move {
    // Where it starts and where it goes, and how much it is, in words.
    first: u32,
    to_first: u32,
    count: u32,
    // Invocations in one row of the grid.
    row: u32,
}

@group(0) @binding(0) var<storage, read> source: array<u32>;
@group(0) @binding(1) var<storage, read_write> moved: array<u32>;
@group(0) @binding(2) var<uniform> run: Move;
// Whether it has been made.
@group(0) @binding(3) var<storage, read> is_made: array<u32>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn move_state(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let word = invocation.y * run.row + invocation.x;
    if word < run.count && is_made[0] == 0u {
        moved[run.to_first + word] = source[run.first + word];
    }
}
