// What one invocation updates of each tensor of a batch: one element.
alias Unit = f32;

fn stored(value: vec4<f32>) -> Unit {
    return value.x;
}
