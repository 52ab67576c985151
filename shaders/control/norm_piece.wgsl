// The gradients of a piece. A workgroup's chunk is some runs of elements, counted from the start of the binding, of tensors
// that take part: `chunks` says which of its other members they are.
@group(0) @binding(0) var<storage, read> grads: array<vec4<u32>>;
// The same by the word, for what does not fill a vec4: one entry point may not bind one place twice.
@group(0) @binding(1) var<storage, read> grads_word: array<u32>;
@group(0) @binding(2) var<storage, read> chunks: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read_write> partials: array<vec4<u32>>;

// One element of the ends of a run, which do not fill a vec4; zero if there is none for this invocation.
fn ends_of(run: vec2<u32>, whole: vec2<u32>, lane: u32) -> vec4<u32> {
    let head = min(whole.x * UNIT, run.y);
    let tail = max(whole.y * UNIT, head);
    var ends = vec4(0u);
    if run.x + lane < head {
        ends.x = bits_of(run.x + lane);
    }
    if tail + lane < run.y {
        ends.y = bits_of(tail + lane);
    }
    return ends;
}

fn whole_of(run: vec2<u32>) -> vec2<u32> {
    return vec2((run.x + UNIT - 1u) / UNIT, run.y / UNIT);
}

fn add_middle_run(sums: ptr<function, Sums>, run: vec2<u32>, lane: u32) {
    let whole = whole_of(run);
    add_middle(sums, magnitude_of(ends_of(run, whole, lane)));
    let share = run_of(whole.x, whole.y, lane / GROUP, WORKGROUP_SIZE / GROUP);
    var i = share.x + lane % GROUP;
    // Four loads in flight.
    for (; i + 3u * GROUP < share.y; i += 4u * GROUP) {
        add_four_words(sums, grads[i], grads[i + GROUP], grads[i + 2u * GROUP], grads[i + 3u * GROUP]);
    }
    for (; i < share.y; i += GROUP) {
        add_middle_words(sums, grads[i]);
    }
}

fn add_any_run(sums: ptr<function, Sums>, run: vec2<u32>, lane: u32) {
    let whole = whole_of(run);
    add_any(sums, magnitude_of(ends_of(run, whole, lane)));
    let share = run_of(whole.x, whole.y, lane / GROUP, WORKGROUP_SIZE / GROUP);
    for (var i = share.x + lane % GROUP; i < share.y; i += GROUP) {
        add_any_words(sums, grads[i]);
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn norm(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = workgroup.y * wo_k.row + workgroup.x;
    if index >= wo_k.count {
        return;
    }
    let runs = chunks[wo_k.first + index];
    var sums = Sums();
    for (var run = runs.x; run < runs.y; run++) {
        add_middle_run(&sums, chunks[run], lane);
    }
    if is_beyond_middle(sums) {
        sums = Sums();
        for (var run = runs.x; run < runs.y; run++) {
            add_any_run(&sums, chunks[run], lane);
        }
    }
    store_partial(wo_k.partial + index * WORKGROUP_SIZE + lane, sums);
}
