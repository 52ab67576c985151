// What one invocation updates of each tensor of a batch: one element.
alias wo_Unit = f32;

fn wo_stored(value: vec4<f32>) -> wo_Unit {
    return value.x;
}

// From one slot of a tensor's state to the next, where the tensor has so many units: slots start on 16 bytes.
fn wo_section_of(units: u32) -> u32 {
    return (units + 3u) & ~3u;
}
