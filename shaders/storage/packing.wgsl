
// For shaders of the caller's: four values in two words, as the kernels read and write them. src/wgsl/packing.rs hands it out.

// Rounded to the nearest, ties to even; NaN and infinity stay what they are.
fn wo_pack_CODEC(values: vec4<f32>) -> vec2<u32> {
    let halves = wo_nearest_CODEC(bitcast<vec4<u32>>(values));
    return vec2(halves.x | (halves.y << 16u), halves.z | (halves.w << 16u));
}

fn wo_values_CODEC(words: vec2<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(wo_unpack_CODEC(words));
}
