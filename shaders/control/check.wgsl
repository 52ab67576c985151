// Whether there are scalars for every class of an optimizer's tensors, before the step is decided: where the device is behind
// what the host knew by more than the class's entries allow for (select.wgsl), the step is skipped as a whole. Recorded only
// where so many steps are on their way that it may be.

struct Verdict {
    skip: u32,
    is_too_far_ahead: u32,
    factors: array<vec2<u32>, 16>,
}

@group(0) @binding(0) var<storage, read> inputs: array<u32>;
@group(0) @binding(1) var<storage, read> counted: array<u32>;
@group(0) @binding(2) var<storage, read_write> verdict: Verdict;

const CLASS: u32 = 7u;
const HEADER: u32 = 3u;

@compute @workgroup_size(1)
fn check_scalars() {
    for (var i = 0u; i < inputs[0]; i++) {
        let at = HEADER + CLASS * i;
        let behind = bitcast<i32>(inputs[at + 1u] - counted[inputs[at]]);
        if behind > bitcast<i32>(inputs[at + 3u]) {
            verdict.is_too_far_ahead = 1u;
        }
    }
}
