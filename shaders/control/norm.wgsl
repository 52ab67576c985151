// Partial sums of squares of gradients, behind sums.wgsl: every invocation adds those of its share in one order, and
// nobody else writes where it does. No invocation waits for another: software adapters run those of a workgroup one after
// the other, and a barrier takes them three times as long as the sums. src/wgsl/norm.rs puts the files together.

const WORKGROUP_SIZE: u32 = 64;

// What `wo_k` holds.
struct wo_Uniforms {
    // Where the dispatch's chunks start, and how many there are: workgroups beyond have nothing to do.
    first: u32,
    count: u32,
    // Where its partial sums start.
    partial: u32,
    // Workgroups in one row of the grid.
    row: u32,
    // Which norm its gradients are part of.
    norm: u32,
    // Batches only: bit i says whether tensor i takes part, and bit 16 + i whether it has an odd number of elements.
    tensor_mask: u32,
    // Whether an earlier dispatch has sums in the same places, to which these are added.
    adds: u32,
}

// Invocations that walk side by side, each by 16 bytes: a cache line of GPUs, and what a software adapter computes at once.
// Each such group has a run of its own, so that whoever runs them one after the other reads memory in its order.
const GROUP: u32 = 8u;

// The run of a group of so many.
fn run_of(start: u32, end: u32, group: u32, groups: u32) -> vec2<u32> {
    let each = GROUP * ((max(end, start) - start + GROUP * groups - 1u) / (GROUP * groups));
    let first = min(start + group * each, end);
    return vec2(first, min(first + each, end));
}

fn store_partial(index: u32, sums: Sums) {
    let top = max(max(sums.top.x, sums.top.y), max(sums.top.z, sums.top.w));
    // 0: finite, 1: infinite, 2: NaN.
    var kind = u32(top >= 0x7f800000) + u32(top > 0x7f800000);
    var squares = vec3(sum(sums.middle), sum(sums.small), sum(sums.large));
    if wo_k.adds != 0u {
        let before = partials[index];
        squares += bitcast<vec3<f32>>(before.xyz);
        kind = max(kind, before.w & 3u);
    }
    partials[index] = vec4(bitcast<vec3<u32>>(squares), kind | (wo_k.norm << 2u));
}

// Magnitudes of the gradients in four words.
fn low_of(words: vec4<u32>) -> vec4<i32> {
//# if HALF
    return magnitude_of(wo_unpack_CODEC(words.xy));
//# else
    return magnitude_of(words);
//# end
}
//# if HALF

fn high_of(words: vec4<u32>) -> vec4<i32> {
    return magnitude_of(wo_unpack_CODEC(words.zw));
}
//# end

fn add_middle_words(sums: ptr<function, Sums>, words: vec4<u32>) {
//# for PARTS
    add_middle(sums, PART_of(words));
//# end
}

fn add_any_words(sums: ptr<function, Sums>, words: vec4<u32>) {
//# for PARTS
    add_any(sums, PART_of(words));
//# end
}
//# if BATCH

// Each tensor of a batch fills its binding.
//# if VECTORS
alias Item = vec4<u32>;
//# else
alias Item = u32;
//# end

fn words_of(item: Item) -> vec4<u32> {
//# if VECTORS
    return item;
//# else
    return vec4(item, 0u, 0u, 0u);
//# end
}
//# for TENSORS

@group(0) @binding(TENSOR) var<storage, read> grads_TENSOR: array<Item>;

fn item_of_TENSOR(i: u32) -> Item {
//# if HALVES
    // The half behind an odd number of elements is somebody else's.
    let is_odd = (wo_k.tensor_mask & (0x10000u << u32(TENSOR))) != 0u;
    let is_cut = is_odd && i + 1u == arrayLength(&grads_TENSOR);
    return grads_TENSOR[i] & select(0xffffffffu, 0xffffu, is_cut);
//# else
    return grads_TENSOR[i];
//# end
}
//# end

@group(0) @binding(PARTIALS) var<storage, read_write> partials: array<vec4<u32>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn norm(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let groups = wo_k.count * WORKGROUP_SIZE / GROUP;
    let group = (workgroup.x * WORKGROUP_SIZE + lane) / GROUP;
    var sums = Sums();
//# for TENSORS
    if (wo_k.tensor_mask & (1u << u32(TENSOR))) != 0u {
        let run = run_of(0u, arrayLength(&grads_TENSOR), group, groups);
        for (var i = run.x + lane % GROUP; i < run.y; i += GROUP) {
            add_middle_words(&sums, words_of(item_of_TENSOR(i)));
        }
    }
//# end
    if is_beyond_middle(sums) {
        sums = Sums();
//# for TENSORS
        if (wo_k.tensor_mask & (1u << u32(TENSOR))) != 0u {
            let run = run_of(0u, arrayLength(&grads_TENSOR), group, groups);
            for (var i = run.x + lane % GROUP; i < run.y; i += GROUP) {
                add_any_words(&sums, words_of(item_of_TENSOR(i)));
            }
        }
//# end
    }
    store_partial(wo_k.partial + workgroup.x * WORKGROUP_SIZE + lane, sums);
}
//# else

// The gradients of a piece. A workgroup's chunk is some runs of elements, counted from the start of the binding, of tensors
// that take part: `chunks` says which of its other members they are.
@group(0) @binding(0) var<storage, read> grads: array<vec4<u32>>;
// The same by the word, for what does not fill a vec4: one entry point may not bind one place twice.
@group(0) @binding(1) var<storage, read> grads_word: array<u32>;
@group(0) @binding(2) var<storage, read> chunks: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read_write> partials: array<vec4<u32>>;

// Elements of a vec4.
const UNIT = u32(ELEMS);

fn add_four_words(sums: ptr<function, Sums>, a: vec4<u32>, b: vec4<u32>, c: vec4<u32>, d: vec4<u32>) {
//# for PARTS
    add_four_middle(sums, PART_of(a), PART_of(b), PART_of(c), PART_of(d));
//# end
}

fn bits_of(element: u32) -> u32 {
//# if HALF
    let half = (grads_word[element / 2u] >> (16u * (element & 1u))) & 0xffffu;
    return wo_unpack_CODEC(vec2(half, 0u)).x;
//# else
    return grads_word[element];
//# end
}

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
//# end
