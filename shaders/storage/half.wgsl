
// Accessors of the sections that are stored in sixteen bits by CODEC. START is where a section begins in its
// array, NUMBER which of the tensor's values it is, for random bits.
//# for SECTIONS
//# if STORED

// `index` is that of the first element in the tensor.
fn wo_round_SECTION(bits: vec4<u32>, index: u32) -> vec4<u32> {
//# if RANDOM
    return wo_stochastic_CODEC(bits, wo_random(index, NUMBER));
//# else
    return wo_nearest_CODEC(bits);
//# end
}
//# end
//# for TENSORS

fn wo_load_SECTION_TENSOR(at: wo_Place) -> wo_Unit {
//# if VECTORS
    let words = wo_ARRAY_TENSOR[START + at.unit];
    return wo_Unit(wo_unpack_CODEC(words.xy), wo_unpack_CODEC(words.zw));
//# else
//# if ALIGNED
    let word = wo_ARRAY_TENSOR[START + at.unit];
//# else
    // Gradients may begin in the middle of a word.
    let low = wo_half_of(wo_ARRAY_TENSOR[at.element / 2u], at.element);
    let high = wo_half_of(wo_ARRAY_TENSOR[(at.element + 1u) / 2u], at.element + 1u);
    let word = low | (high << 16u);
//# end
    return wo_Unit(wo_unpack_CODEC(vec2(word, 0u)));
//# end
}
//# if STORED

fn wo_store_SECTION_TENSOR(at: wo_Place, unit: wo_Unit) {
    let i = START + at.unit;
//# if VECTORS
    let index = wo_k.index + 8u * at.unit;
    let low = wo_round_SECTION(unit.low, index);
    let high = wo_round_SECTION(unit.high, index + 4u);
    wo_ARRAY_TENSOR[i] = wo_packed(low, high);
//# else
    let word = wo_ARRAY_TENSOR[i];
    let halves = wo_round_SECTION(unit.low, wo_k.index + at.element);
    wo_ARRAY_TENSOR[i] = wo_merged(word, halves, at.mine);
//# end
}
//# end
//# end
//# end
