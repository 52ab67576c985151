
// What an invocation updates of a tensor, a unit, and what it loads and stores at once, an item:
//
//                    items of four words    items of one word, for what does not fill four or does not line up with them
//     all f32        four elements          one element
//     some 16 bits   eight elements         two elements, which may share a word

//# if VECTORS
alias wo_Item = vec4<u32>;
//# else
alias wo_Item = u32;
//# end

// Four values, or what there is of them, as the bits of f32, so that nothing is rounded or flushed on the way; eight are two
// times four.
struct wo_Unit {
//# for PARTS
    PART: vec4<u32>,
//# end
}

struct wo_States {
//# for PARTS
    PART: State,
//# end
}

// Where a unit lies in the arrays of parameters and state, or of gradients.
struct wo_Place {
    unit: u32,
//# if PAIRS
    // The first element, and which of both are the dispatch's to write.
    element: u32,
    mine: vec2<bool>,
//# end
//# if SECTIONED
    // Units from one section of the state to the next.
    section: u32,
//# end
}

//# for TENSORS
@group(0) @binding(PARAMS) var<storage, read_write> wo_params_TENSOR: array<wo_Item>;
@group(0) @binding(GRADS) var<storage, ACCESS> wo_grads_TENSOR: array<wo_Item>;
@group(0) @binding(STATE) var<storage, read_write> wo_state_TENSOR: array<wo_Item>;
//# end

// Where a section begins before which so many items lie for each unit.
fn wo_start_of(first: u32, at: wo_Place) -> u32 {
//# if SECTIONED
    return first * at.section;
//# else
    // Counted in elements, and read where it is needed: AMD's compilers take more registers if it is read before.
    return first * (wo_k.section / 2u);
//# end
}
