// Not a rule of anybody's: what is written is what is read, and the frame converts it. No arithmetic, so that NaN and
// what is subnormal stay what they are.

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    return g;
}
