// A dense network and its gradient, one pipeline per layer and entry point. The CPU twin is cpu.rs: the same names, the
// same order of statements.
//
// A layer's inputs are rows of the dataset or another layer's activations; weights are [inputs, outputs]. Parameters and
// gradients are the arena's buffers, and a layer is two offsets in them.

struct Batch {
    // Where its rows start in `order`, and how many they are.
    first: u32,
    rows: u32,
    // Where its loss goes in `losses`.
    slot: u32,
    // What the error of a row weighs in the gradient beside the loss scale: 2 / rows.
    error_weight: f32,
}

override columns: u32 = 1;
override inputs: u32 = 1;
override outputs: u32 = 1;
override is_first: bool = false;
override is_last: bool = false;
// In elements.
override weight_at: u32 = 0;
override bias_at: u32 = 0;
override inputs_at: u32 = 0;
override outputs_at: u32 = 0;
// One of f32, two of f16.
override grads_per_word: u32 = 1;

@group(0) @binding(0) var<uniform> batch: Batch;
@group(0) @binding(1) var<storage, read> dataset: array<f32>;
@group(0) @binding(2) var<storage, read> order: array<u32>;
@group(0) @binding(3) var<storage, read> params: array<f32>;
@group(0) @binding(4) var<storage, read_write> grads: array<u32>;
@group(0) @binding(5) var<storage, read_write> activations: array<f32>;
@group(0) @binding(6) var<storage, read_write> deltas: array<f32>;
@group(0) @binding(7) var<storage, read_write> losses: array<f32>;
// The control's own, so that nobody has to read it back; 1 where there is none.
@group(0) @binding(8) var<uniform> loss_scale: f32;

// Where a row of the batch starts in `dataset`; its last column is what is to be predicted.
fn data_at(row: u32) -> u32 {
    return order[batch.first + row] * columns;
}

// Where what comes into the layer starts, and one of it.
fn row_at(row: u32) -> u32 {
    if is_first {
        return data_at(row);
    }
    return inputs_at + row * inputs;
}

fn input(at: u32) -> f32 {
    if is_first {
        return dataset[at];
    }
    return activations[at];
}

fn softsign(z: f32) -> f32 {
    return z / (1.0 + abs(z));
}

// One invocation for each output of each row.
@compute @workgroup_size(64)
fn forward(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= batch.rows * outputs {
        return;
    }
    let row = id.x / outputs;
    let unit = id.x % outputs;
    let at = row_at(row);
    var sum = params[bias_at + unit];
    for (var i = 0u; i < inputs; i++) {
        sum += input(at + i) * params[weight_at + i * outputs + unit];
    }
    if !is_last {
        sum = softsign(sum);
    }
    activations[outputs_at + id.x] = sum;
}

var<workgroup> lanes: array<f32, 64>;

// One workgroup: the mean squared error, and what each prediction weighs in it. Sums in a fixed order, so that a run
// repeats bit for bit.
@compute @workgroup_size(64)
fn loss(@builtin(local_invocation_index) lane: u32) {
    var sum = 0.0;
    for (var row = lane; row < batch.rows; row += 64u) {
        let error = activations[outputs_at + row] - dataset[data_at(row) + columns - 1u];
        deltas[outputs_at + row] = batch.error_weight * loss_scale * error;
        sum += error * error;
    }
    lanes[lane] = sum;
    for (var half = 32u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half {
            lanes[lane] += lanes[lane + half];
        }
    }
    if lane == 0u {
        losses[batch.slot] = lanes[0] / f32(batch.rows);
    }
}

// One invocation for each input of each row: through the weights and the slope of the activation, which is
// (1 - |a|)^2 of softsign.
@compute @workgroup_size(64)
fn backward(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= batch.rows * inputs {
        return;
    }
    let row = id.x / inputs;
    let i = id.x % inputs;
    var sum = 0.0;
    for (var unit = 0u; unit < outputs; unit++) {
        sum += params[weight_at + i * outputs + unit] * deltas[outputs_at + row * outputs + unit];
    }
    let rest = 1.0 - abs(activations[inputs_at + id.x]);
    deltas[inputs_at + id.x] = sum * (rest * rest);
}

fn weight_gradient(i: u32, unit: u32) -> f32 {
    var sum = 0.0;
    for (var row = 0u; row < batch.rows; row++) {
        sum += input(row_at(row) + i) * deltas[outputs_at + row * outputs + unit];
    }
    return sum;
}

fn bias_gradient(unit: u32) -> f32 {
    var sum = 0.0;
    for (var row = 0u; row < batch.rows; row++) {
        sum += deltas[outputs_at + row * outputs + unit];
    }
    return sum;
}

// That of a weight, or behind the weights that of a bias.
fn gradient_at(index: u32) -> f32 {
    if index < inputs * outputs {
        return weight_gradient(index / outputs, index % outputs);
    }
    return bias_gradient(index - inputs * outputs);
}

// The bits of the nearest f16, of two that are as near the even one, and infinity beyond. In integers: pack2x16float may
// round either way, and says nothing of what overflows.
fn nearest_f16(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u { // NaN
        return sign | 0x7e00u;
    }
    if magnitude >= 0x47800000u { // 65536
        return sign | 0x7c00u;
    }
    if magnitude >= 0x38800000u { // 2^-14; what is rounded up to 65536 is infinity, too
        return sign | ((magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13u) & 1u)) >> 13u);
    }
    // Subnormal: so many 2^-24.
    let shift = min(126u - (magnitude >> 23u), 31u);
    let mantissa = (magnitude & 0x007fffffu) | 0x00800000u;
    return sign | ((mantissa + (1u << (shift - 1u)) - 1u + ((mantissa >> shift) & 1u)) >> shift);
}

// A word of a tensor's gradients, from the first of them on. Behind the tensor's last one there is nothing.
fn gradient_word(first: u32, end: u32) -> u32 {
    let gradient = gradient_at(first);
    if grads_per_word == 1u {
        return bitcast<u32>(gradient);
    }
    var second = 0u;
    if first + 1u < end {
        second = nearest_f16(gradient_at(first + 1u));
    }
    return nearest_f16(gradient) | (second << 16u);
}

fn words(elems: u32) -> u32 {
    return (elems + grads_per_word - 1u) / grads_per_word;
}

// One invocation for each word of the weights' gradients, and behind them one for each of the biases'.
@compute @workgroup_size(64)
fn gradient(@builtin(global_invocation_id) id: vec3<u32>) {
    let weights = inputs * outputs;
    if id.x < words(weights) {
        grads[weight_at / grads_per_word + id.x] = gradient_word(id.x * grads_per_word, weights);
        return;
    }
    let word = id.x - words(weights);
    if word < words(outputs) {
        let first = weights + word * grads_per_word;
        grads[bias_at / grads_per_word + word] = gradient_word(first, weights + outputs);
    }
}
