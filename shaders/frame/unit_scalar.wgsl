// What one invocation updates of each tensor of a batch: one element.
alias Unit = f32;

fn stored(value: vec4<f32>) -> Unit {
    return value.x;
}

// From one slot of a tensor's state to the next, where the tensor has so many units: slots start on 16 bytes.
fn section_of(units: u32) -> u32 {
    return (units + 3u) & ~3u;
}
