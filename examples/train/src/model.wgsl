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
    // What the error of a row weighs in the gradient: 2 / rows.
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

@group(0) @binding(0) var<uniform> batch: Batch;
@group(0) @binding(1) var<storage, read> dataset: array<f32>;
@group(0) @binding(2) var<storage, read> order: array<u32>;
@group(0) @binding(3) var<storage, read> params: array<f32>;
@group(0) @binding(4) var<storage, read_write> grads: array<f32>;
@group(0) @binding(5) var<storage, read_write> activations: array<f32>;
@group(0) @binding(6) var<storage, read_write> deltas: array<f32>;
@group(0) @binding(7) var<storage, read_write> losses: array<f32>;

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
        deltas[outputs_at + row] = batch.error_weight * error;
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

// One invocation for each weight, and behind them one for each bias.
@compute @workgroup_size(64)
fn gradient(@builtin(global_invocation_id) id: vec3<u32>) {
    let i = id.x / outputs;
    let unit = id.x % outputs;
    if i > inputs {
        return;
    }
    var sum = 0.0;
    if i < inputs {
        for (var row = 0u; row < batch.rows; row++) {
            sum += input(row_at(row) + i) * deltas[outputs_at + row * outputs + unit];
        }
        grads[weight_at + id.x] = sum;
    } else {
        for (var row = 0u; row < batch.rows; row++) {
            sum += deltas[outputs_at + row * outputs + unit];
        }
        grads[bias_at + unit] = sum;
    }
}
