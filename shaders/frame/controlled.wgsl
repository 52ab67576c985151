// What the frame asks where a control decides (shaders/control/): src/gpu/source.rs writes `Control`, which
// select.wgsl fills for every class of tensors, a rule's scalars included.

// Whether gradients are cut off.
override HAS_CLIP_VALUE: bool = false;

@group(CONTROL_GROUP) @binding(0) var<uniform> c: Control;

fn is_skipped() -> bool {
    return c.skip != 0u;
}

// CPU twin: Factors::apply in src/control/verdict.rs.
fn gradient(g: vec4<f32>) -> vec4<f32> {
    let scaled = g * c.unscale * c.clip;
    if !HAS_CLIP_VALUE {
        return scaled;
    }
    // NaN is neither larger nor smaller.
    let most = vec4(c.clip_value);
    return select(select(scaled, most, scaled > most), -most, scaled < -most);
}
