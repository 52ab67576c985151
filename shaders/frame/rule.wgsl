
// What the frame declares for a rule (shaders/rules/), and what it asks before it steps. Names of the frame begin with `wo_`,
// and no name of a rule does. src/wgsl/ puts the files together by its template.rs.

struct Scalars {
//# for SCALARS
    SCALAR: f32,
//# end
//# if not SCALARS
    none: f32,
//# end
}

struct State {
//# for SLOTS
    SLOT: vec4<f32>,
//# end
//# if not SLOTS
    none: f32,
//# end
}

//# if SUMS
// What four elements add to the sums over their tensor.
struct Summands {
//# for SUMS
    SUM: vec4<f32>,
//# end
}

// The sums over a tensor.
struct Sums {
//# for SUMS
    SUM: f32,
//# end
}

//# end
// `wo_k`. A unit is what an invocation updates: see unit.wgsl.
struct wo_Uniforms {
//# if not CONTROLLED
//# for SCALARS
    rule_SCALAR: f32,
//# end
//# end
    // Where the dispatch starts in the bindings of parameters and state, in units; in chunks the first of these.
    first: u32,
    // How much further on the gradients start in theirs, modulo 2^32: in units, or elements where items are words.
    grads_shift: u32,
    // How many units the dispatch covers, or how many chunks.
    count: u32,
    // Invocations in one row of the grid, or workgroups: a dispatch past the per-dimension limit folds into y.
    row: u32,
    // Where items are words: after `head` units, `gap` units are skipped.
    head: u32,
    gap: u32,
    // Batches only: bit i says whether tensor i is updated, and bit 16 + i whether it has an odd number of elements.
    tensor_mask: u32,
    // From one slot of the state to the next: in units, or elements where items are words.
    section: u32,
//# if WIDE
    // The elements that the dispatch may update, counted from the start of the parameters' binding.
    begin: u32,
    end: u32,
    // Of random bits: the first element of the binding as the tensor counts, modulo 2^32, and the tensor's stream at this
    // step.
    index: u32,
    key_x: u32,
    key_y: u32,
//# end
}

//# if CONTROLLED
// What a control decides (shaders/control/): select.wgsl fills it for every class of tensors.
struct wo_Control {
    skip: u32,
    unscale: f32,
    clip: f32,
    clip_value: f32,
    key_x: u32,
    key_y: u32,
//# for SCALARS
    rule_SCALAR: f32,
//# end
}

//# if CHUNKS
// Uniform bindings start on 256 bytes everywhere, and other dispatches bind these as such.
struct wo_Block {
    @size(256) control: wo_Control,
}

@group(GROUP) @binding(0) var<storage, read> wo_blocks: array<wo_Block>;
var<private> wo_c: wo_Control;
//# else
@group(GROUP) @binding(0) var<uniform> wo_c: wo_Control;
//# end

fn wo_is_skipped() -> bool {
    return wo_c.skip != 0u;
}

// CPU twin: Factors::apply in src/control/verdict.rs.
fn wo_gradient(g: vec4<f32>) -> vec4<f32> {
    let scaled = g * wo_c.unscale * wo_c.clip;
//# if CLIPS
    // By the bits: compilers may assume that there is no NaN, which stays what it is.
    let bits = bitcast<vec4<u32>>(scaled);
    let magnitude = bits & vec4(0x7fffffffu);
    let most = vec4(bitcast<u32>(wo_c.clip_value));
    let is_cut = (magnitude > most) & (magnitude <= vec4(0x7f800000u));
    return bitcast<vec4<f32>>(select(bits, (bits & vec4(0x80000000u)) | most, is_cut));
//# else
    return scaled;
//# end
}
//# else
// Where nobody controls a step, gradients are what they are, and every step is applied.
fn wo_is_skipped() -> bool {
    return false;
}

fn wo_gradient(g: vec4<f32>) -> vec4<f32> {
    return g;
}
//# end

fn wo_scalars() -> Scalars {
    return Scalars(
//# for SCALARS
        HOLDER.rule_SCALAR,
//# end
    );
}
