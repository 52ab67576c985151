// What one invocation updates of each tensor of a batch: four elements.
alias wo_Unit = vec4<f32>;

fn wo_stored(value: vec4<f32>) -> wo_Unit {
    return value;
}

// From one slot of a tensor's state to the next, where the tensor has so many units.
fn wo_section_of(units: u32) -> u32 {
    return units;
}
