// What one invocation updates of each tensor of a batch: four elements.
alias Unit = vec4<f32>;

fn stored(value: vec4<f32>) -> Unit {
    return value;
}

// From one slot of a tensor's state to the next, where the tensor has so many units.
fn section_of(units: u32) -> u32 {
    return units;
}
