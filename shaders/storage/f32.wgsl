
// f32. Accessors of the sections that are stored so. START is where a section begins in its array.
//# for TENSORS
//# for SECTIONS

fn wo_load_SECTION_TENSOR(at: wo_Place) -> wo_Unit {
//# if PAIRS
    let i = START + at.element;
    return wo_Unit(vec4(wo_ARRAY_TENSOR[i], wo_ARRAY_TENSOR[i + 1u], 0u, 0u));
//# else
    let i = START + ITEMS * at.unit;
//# if WIDE
    return wo_Unit(wo_ARRAY_TENSOR[i], wo_ARRAY_TENSOR[i + 1u]);
//# else
    return wo_Unit(vec4(wo_ARRAY_TENSOR[i]));
//# end
//# end
}
//# if STORED

fn wo_store_SECTION_TENSOR(at: wo_Place, unit: wo_Unit) {
//# if PAIRS
    let i = START + at.element;
    if at.mine.x {
        wo_ARRAY_TENSOR[i] = unit.low.x;
    }
    if at.mine.y {
        wo_ARRAY_TENSOR[i + 1u] = unit.low.y;
    }
//# else
    let i = START + ITEMS * at.unit;
//# if VECTORS
    wo_ARRAY_TENSOR[i] = unit.low;
//# else
    wo_ARRAY_TENSOR[i] = unit.low.x;
//# end
//# if WIDE
    wo_ARRAY_TENSOR[i + 1u] = unit.high;
//# end
//# end
}
//# end
//# end
//# end
