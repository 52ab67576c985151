// What a control says to each class of an optimizer's tensors: a block that the step's kernels bind, with the scalars of
// the step that it is on the device, which only the device knows. One workgroup.

const WORKGROUP_SIZE: u32 = 256;
// Words from one block to the next: uniform bindings start on 256 bytes everywhere.
const BLOCK: u32 = 64u;

struct Verdict {
    skip: u32,
    is_too_far_ahead: u32,
    factors: array<vec2<u32>, 16>,
}

// The numbers of classes and of tensors, and the words of an entry; and behind them classes, bits of which tensors take
// part, and entries.
@group(0) @binding(0) var<storage, read> inputs: array<u32>;
@group(0) @binding(1) var<storage, read> verdict: Verdict;
// Of each tensor, how many steps the device has applied to it since it counts, modulo 2^32.
@group(0) @binding(2) var<storage, read_write> counted: array<u32>;
@group(0) @binding(3) var<storage, read_write> blocks: array<u32>;
// The factors of tensors that are clipped one by one (tensors.wgsl).
@group(0) @binding(4) var<storage, read> tensor_factors: array<vec2<u32>>;

// Words of a class: one of its tensors, how many steps have been counted of that if none has been skipped that the host
// does not know of, how many entries there are (by how many have been, from none on), how many may have been, where the
// entries start (classes may share them), its norm (behind those of groups one for each tensor), and the largest gradient.
const CLASS: u32 = 7u;
const HEADER: u32 = 3u;
// Norms of groups.
const NORMS: u32 = 16u;

@compute @workgroup_size(WORKGROUP_SIZE)
fn select_scalars(@builtin(local_invocation_index) lane: u32) {
    let classes = inputs[0];
    let tensors = inputs[1];
    let entry_words = inputs[2];
    let bits_at = HEADER + CLASS * classes;
    for (var i = lane; i < classes; i += WORKGROUP_SIZE) {
        let at = HEADER + CLASS * i;
        // None where the device is ahead of what the host knew.
        let behind = max(bitcast<i32>(inputs[at + 1u] - counted[inputs[at]]), 0);
        let entry = inputs[at + 4u] + entry_words * min(u32(behind), inputs[at + 2u] - 1u);
        let norm = inputs[at + 5u];
        var factors = verdict.factors[min(norm, NORMS - 1u)];
        if norm >= NORMS {
            factors = tensor_factors[norm - NORMS];
        }
        let block = BLOCK * i;
        blocks[block] = verdict.skip;
        blocks[block + 1u] = factors.x;
        blocks[block + 2u] = factors.y;
        blocks[block + 3u] = inputs[at + 6u];
        for (var word = 0u; word < entry_words; word++) {
            blocks[block + 4u + word] = inputs[entry + word];
        }
    }
    storageBarrier();
    for (var i = lane; i < tensors; i += WORKGROUP_SIZE) {
        let takes_part = (inputs[bits_at + i / 32u] >> (i % 32u)) & 1u;
        counted[i] += takes_part & ~verdict.skip;
    }
}
