// What the frame asks where nobody controls a step: gradients are what they are, and every step is applied.
fn wo_is_skipped() -> bool {
    return false;
}

fn wo_gradient(g: vec4<f32>) -> vec4<f32> {
    return g;
}
