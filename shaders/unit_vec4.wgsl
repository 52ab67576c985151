// What one invocation updates of each tensor of a batch: four elements.
alias Unit = vec4<f32>;

fn stored(value: vec4<f32>) -> Unit {
    return value;
}
