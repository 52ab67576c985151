// What all rules make of gradient, parameter and slots before their own work begins. Twin: src/rules/decay.rs.

override MAXIMIZE: bool = false;
override HAS_LAMBDA: bool = false;
override HAS_RHO: bool = false;

// The gradient, negated to maximize, with the coupled weight decay.
fn direction(k: Scalars, theta: vec4<f32>, g: vec4<f32>) -> vec4<f32> {
    var h = g;
    if MAXIMIZE {
        h = -g;
    }
    if HAS_LAMBDA {
        h = h + k.lambda * theta;
    }
    return h;
}

// A slot that is made at its tensor's first step is NaN until then. By the bits: compilers may assume that there is none.
fn started(slot: vec4<f32>, start: vec4<f32>) -> vec4<f32> {
    let is_new = (bitcast<vec4<u32>>(slot) & vec4(0x7fffffffu)) > vec4(0x7f800000u);
    return select(slot, start, is_new);
}

// The parameter after the decoupled weight decay.
fn decayed(k: Scalars, theta: vec4<f32>) -> vec4<f32> {
    if HAS_RHO {
        return k.rho * theta;
    }
    return theta;
}
