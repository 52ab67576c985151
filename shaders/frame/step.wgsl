
// The step of a rule over the units of one tensor, or of a batch of them.

const wo_WORKGROUP_SIZE: u32 = LANES;
//# if CHUNKS
// Elements of a unit.
const wo_UNIT: u32 = u32(ELEMS);
//# if MEASURES
// The most units of a chunk.
const wo_CHUNK_UNITS: u32 = 256;
//# end
//# end

fn wo_unit_of(invocation: vec3<u32>) -> u32 {
    return invocation.y * wo_k.row + invocation.x;
}

// Four values at a time.
fn wo_stepped(k: Scalars, theta: wo_Unit, g: wo_Unit, s: ptr<function, wo_States>) -> wo_Unit {
//# for PARTS
    var s_PART = (*s).PART;
    let g_PART = wo_gradient(bitcast<vec4<f32>>(g.PART));
    let theta_PART = update(k, bitcast<vec4<f32>>(theta.PART), g_PART, &s_PART);
    (*s).PART = s_PART;
//# end
    return wo_Unit(
//# for PARTS
        bitcast<vec4<u32>>(theta_PART),
//# end
    );
}
//# for TENSORS

fn wo_load_state_TENSOR(at: wo_Place) -> wo_States {
    var s: wo_States;
//# for KEPT
    let slot_SLOT = wo_load_slot_SLOT_TENSOR(at);
//# for PARTS
    s.PART.SLOT = bitcast<vec4<f32>>(slot_SLOT.PART);
//# end
//# end
    return s;
}

fn wo_store_state_TENSOR(at: wo_Place, s: wo_States) {
//# for KEPT
    wo_store_slot_SLOT_TENSOR(at, wo_Unit(
//# for PARTS
        bitcast<vec4<u32>>(s.PART.SLOT),
//# end
    ));
//# end
}
//# end
//# if BATCH

//# if PAIRS
// Where a unit of a tensor lies, if that has so many, the last of one element or two. Sections start on 16 bytes.
fn wo_place_of(unit: u32, units: u32, is_odd: bool) -> wo_Place {
    let is_pair = !is_odd || unit + 1u < units;
    return wo_Place(unit, 2u * unit, vec2(true, is_pair), (units + 3u) & ~3u);
}
//# else
// Where a unit of a tensor lies, if that has so many. Sections start on 16 bytes.
fn wo_place_of(unit: u32, units: u32) -> wo_Place {
//# if VECTORS
    return wo_Place(unit, units);
//# else
    return wo_Place(unit, (units + 3u) & ~3u);
//# end
}
//# end
//# for TENSORS

// A tensor of a batch fills its bindings, so their length is its own.
fn wo_units_of_TENSOR() -> u32 {
//# if PAIRS
    return (arrayLength(&wo_params_TENSOR) + ITEMS - 1u) / ITEMS;
//# else
    return arrayLength(&wo_params_TENSOR) / ITEMS;
//# end
}

fn wo_tensor_TENSOR(unit: u32) {
    if (wo_k.tensor_mask & (1u << u32(TENSOR))) == 0u || unit >= wo_units_of_TENSOR() {
        return;
    }
//# if PAIRS
    let is_odd = (wo_k.tensor_mask & (0x10000u << u32(TENSOR))) != 0u;
    let at = wo_place_of(unit, wo_units_of_TENSOR(), is_odd);
//# else
    let at = wo_place_of(unit, wo_units_of_TENSOR());
//# end
    let theta = wo_load_theta_TENSOR(at);
    let g = wo_load_grads_TENSOR(at);
    var s = wo_load_state_TENSOR(at);

    let theta_new = wo_stepped(wo_scalars(), theta, g, &s);
    wo_store_state_TENSOR(at, s);
    wo_store_theta_TENSOR(at, theta_new);
}
//# end

@compute @workgroup_size(wo_WORKGROUP_SIZE)
fn ENTRY(@builtin(global_invocation_id) invocation: vec3<u32>) {
    if wo_is_skipped() {
        return;
    }
//# for TENSORS
    wo_tensor_TENSOR(invocation.x);
//# end
}
//# else

//# if CHUNKS
// Of each workgroup the elements from and to which it updates, counted from the start of the parameters' binding, the class
// of their tensors, and the tensor where they are of one.
@group(GROUP) @binding(1) var<storage, read> wo_chunks: array<vec4<u32>>;
//# end

//# if SUMS
//# if MEASURES
// The sums of each chunk, in so many parts.
const wo_PARTS: u32 = 8;
@group(GROUP) @binding(2) var<storage, read_write> wo_partials: array<vec4<f32>>;
//# else
// shaders/frame/totals.wgsl.
struct wo_Total {
    sums: vec4<f32>,
    numel: f32,
}
@group(GROUP) @binding(2) var<storage, read> wo_totals: array<wo_Total>;

// The scalars that the rule decides on for a tensor.
fn wo_decided(tensor: u32) -> Scalars {
    let total = wo_totals[tensor];
    return decide(wo_scalars(), Sums(
//# for SUMS
        total.sums[INDEX],
//# end
    ), total.numel);
}
//# end

//# end
// Where a unit of the dispatch lies in the arrays of parameters and state, and in that of the gradients.
//# if CHUNKS
fn wo_place_of(unit: u32, chunk: vec4<u32>) -> wo_Place {
//# if PAIRS
    let elements = vec2(2u * unit, 2u * unit + 1u);
    let mine = (elements >= vec2(chunk.x)) & (elements < vec2(chunk.y));
    return wo_Place(unit, 2u * unit, mine);
//# else
    return wo_Place(unit, wo_k.section);
//# end
}
//# else
fn wo_place_of(unit: u32) -> wo_Place {
//# if VECTORS
//# if OFFSET
    return wo_Place(wo_k.first + unit, wo_k.section);
//# else
    // Most tensors start with their bindings, and then one address, without a sum, serves all arrays.
    return wo_Place(unit, wo_k.section);
//# end
//# else
//# if not PAIRS
    // Before the others: AMD's compilers then wait less.
    let section = wo_k.section;
//# end
    let i = wo_k.first + unit + select(0u, wo_k.gap, unit >= wo_k.head);
//# if PAIRS
    let elements = vec2(2u * i, 2u * i + 1u);
    let mine = (elements >= vec2(wo_k.begin)) & (elements < vec2(wo_k.end));
    return wo_Place(i, 2u * i, mine);
//# else
    return wo_Place(i, section);
//# end
//# end
}
//# end

fn wo_grads_place_of(at: wo_Place) -> wo_Place {
    var grads = at;
//# if PAIRS
    grads.element += wo_k.grads_shift;
//# else
//# if OFFSET
    grads.unit += wo_k.grads_shift;
//# end
//# end
    return grads;
}

//# if MEASURES
// What the elements of a unit that are the dispatch's add to a sum.
fn wo_sum_of(at: wo_Place, summands: vec4<f32>) -> f32 {
//# if VECTORS
    return (summands.x + summands.y) + (summands.z + summands.w);
//# else
//# if PAIRS
    return select(0.0, summands.x, at.mine.x) + select(0.0, summands.y, at.mine.y);
//# else
    return summands.x;
//# end
//# end
}

fn wo_measured(k: Scalars, at: wo_Place) -> vec4<f32> {
    let theta = wo_load_theta_0(at);
    let g = wo_load_grads_0(wo_grads_place_of(at));
    let s = wo_load_state_0(at);
    var sums = vec4<f32>();
//# for PARTS
    let g_PART = wo_gradient(bitcast<vec4<f32>>(g.PART));
    let summands_PART = measure(k, bitcast<vec4<f32>>(theta.PART), g_PART, s.PART);
//# for SUMS
    sums[INDEX] += wo_sum_of(at, summands_PART.SUM);
//# end
//# end
    return sums;
}

//# if BARRIERS
var<workgroup> wo_shared: array<vec4<f32>, wo_WORKGROUP_SIZE>;

//# end
// A workgroup adds up its chunk. On software adapters it has as many invocations as the sum has parts, and none waits for
// another.
@compute @workgroup_size(wo_WORKGROUP_SIZE)
fn ENTRY(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = workgroup.y * wo_k.row + workgroup.x;
    let chunk = wo_chunks[wo_k.first + min(index, wo_k.count - 1u)];
//# if CONTROLLED
    wo_c = wo_blocks[chunk.z].control;
//# end
    let scalars = wo_scalars();
    let is_measured = index < wo_k.count && !wo_is_skipped();
    var sums = vec4<f32>();
    if is_measured {
        let end = min(chunk.x / wo_UNIT + wo_CHUNK_UNITS, (chunk.y + wo_UNIT - 1u) / wo_UNIT);
        for (var unit = chunk.x / wo_UNIT + lane; unit < end; unit += wo_WORKGROUP_SIZE) {
            sums += wo_measured(scalars, wo_place_of(unit, chunk));
        }
    }
//# if BARRIERS
    wo_shared[lane] = sums;
    for (var width = wo_WORKGROUP_SIZE / 2u; width >= wo_PARTS; width /= 2u) {
        workgroupBarrier();
        if lane < width {
            wo_shared[lane] += wo_shared[lane + width];
        }
    }
    sums = wo_shared[lane];
//# end
    if is_measured && lane < wo_PARTS {
        wo_partials[(wo_k.first + index) * wo_PARTS + lane] = sums;
    }
}
//# else
// All loads come before the first store: buffers may alias for all that a compiler knows, so it cannot move a load up over a
// store, and a wave would wait for memory twice. All arithmetic does too: a value that is still needed when it is stored is
// copied first (five of 33 instructions on AMD's Vega).

@compute @workgroup_size(wo_WORKGROUP_SIZE)
//# if DOUBLED
// For software adapters: an invocation updates two units that follow each other, which share what an invocation costs there. On
// a GPU each load of a wave would reach twice as many cache lines. Scalars are read before the guard: lavapipe reads them once
// for all lanes there, and lane by lane behind it.
fn ENTRY(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let scalars = wo_scalars();
    let unit = 2u * wo_unit_of(invocation);
    let at_0 = wo_place_of(unit);
    if unit >= wo_k.count || wo_is_skipped() {
        return;
    }
    // The last one may be alone: then it is loaded twice and stored once.
    let is_pair = unit + 1u < wo_k.count;
    var at_1 = at_0;
    at_1.unit += select(0u, 1u, is_pair);
    let theta_0 = wo_load_theta_0(at_0);
    let theta_1 = wo_load_theta_0(at_1);
    let g_0 = wo_load_grads_0(wo_grads_place_of(at_0));
    let g_1 = wo_load_grads_0(wo_grads_place_of(at_1));
    var s_0 = wo_load_state_0(at_0);
    var s_1 = wo_load_state_0(at_1);

    let theta_new_0 = wo_stepped(scalars, theta_0, g_0, &s_0);
    let theta_new_1 = wo_stepped(scalars, theta_1, g_1, &s_1);
    wo_store_state_0(at_0, s_0);
    wo_store_theta_0(at_0, theta_new_0);
    if is_pair {
        wo_store_state_0(at_1, s_1);
        wo_store_theta_0(at_1, theta_new_1);
    }
}
//# else
//# if CHUNKS
// What is the same for all lanes is read before any of them returns, as software adapters want it.
fn ENTRY(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = workgroup.y * wo_k.row + workgroup.x;
    let chunk = wo_chunks[wo_k.first + min(index, wo_k.count - 1u)];
//# if CONTROLLED
    wo_c = wo_blocks[chunk.z].control;
//# end
//# if SUMS
    let scalars = wo_decided(chunk.w);
//# else
    let scalars = wo_scalars();
//# end
    let unit = chunk.x / wo_UNIT + lane;
    if index >= wo_k.count || unit * wo_UNIT >= chunk.y || wo_is_skipped() {
        return;
    }
    let at = wo_place_of(unit, chunk);
//# else
fn ENTRY(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let unit = wo_unit_of(invocation);
    if unit >= wo_k.count || wo_is_skipped() {
        return;
    }
    let at = wo_place_of(unit);
//# end
    let theta = wo_load_theta_0(at);
    let g = wo_load_grads_0(wo_grads_place_of(at));
    var s = wo_load_state_0(at);

//# if CHUNKS
    let theta_new = wo_stepped(scalars, theta, g, &s);
//# else
    let theta_new = wo_stepped(wo_scalars(), theta, g, &s);
//# end
    wo_store_state_0(at, s);
    wo_store_theta_0(at, theta_new);
}
//# end
//# end
//# end
