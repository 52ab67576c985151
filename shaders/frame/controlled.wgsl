// What the frame asks where a control decides (shaders/control/): src/gpu/source.rs writes `Control`, which
// select.wgsl fills for every class of tensors, a rule's scalars included.

// Whether gradients are cut off.
override wo_HAS_CLIP_VALUE: bool = false;

@group(CONTROL_GROUP) @binding(0) var<uniform> wo_c: wo_Control;

fn wo_is_skipped() -> bool {
    return wo_c.skip != 0u;
}

// CPU twin: Factors::apply in src/control/verdict.rs.
fn wo_gradient(g: vec4<f32>) -> vec4<f32> {
    let scaled = g * wo_c.unscale * wo_c.clip;
    if !wo_HAS_CLIP_VALUE {
        return scaled;
    }
    // By the bits: compilers may assume that there is no NaN, which stays what it is.
    let bits = bitcast<vec4<u32>>(scaled);
    let magnitude = bits & vec4(0x7fffffffu);
    let most = vec4(bitcast<u32>(wo_c.clip_value));
    let is_cut = (magnitude > most) & (magnitude <= vec4(0x7f800000u));
    return bitcast<vec4<f32>>(select(bits, (bits & vec4(0x80000000u)) | most, is_cut));
}
