// Half the squared distance of a tensor to what it is to learn, and its gradient: one workgroup, one order of sums.

@group(0) @binding(0) var<uniform> step: u32;
@group(0) @binding(1) var<storage, read> params: array<f32>;
@group(0) @binding(2) var<storage, read_write> grads: array<f32>;
@group(0) @binding(3) var<storage, read_write> loss: f32;

var<workgroup> sums: array<f32, 64>;

// Other data at every step: between -1 and 1, by the step and the element.
fn noise(element: u32) -> f32 {
    var bits = (element ^ (step * 0x9e3779b9u)) * 0x7feb352du;
    bits = (bits ^ (bits >> 15u)) * 0x846ca68bu;
    return f32(bits >> 8u) / 8388608.0 - 1.0;
}

@compute @workgroup_size(64)
fn backward(@builtin(local_invocation_index) lane: u32) {
    var sum = 0.0;
    for (var i = lane; i < arrayLength(&params); i += 64u) {
        let error = params[i] - sin(f32(i)) + 0.1 * noise(i);
        grads[i] = error;
        sum += 0.5 * error * error;
    }
    sums[lane] = sum;
    workgroupBarrier();
    if lane == 0u {
        var total = 0.0;
        for (var i = 0u; i < 64u; i++) {
            total += sums[i];
        }
        loss = total;
    }
}
