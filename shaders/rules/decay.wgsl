// What all rules make of gradient and parameter before their own work begins. Twin: src/rules/decay.rs.

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

// The parameter after the decoupled weight decay.
fn decayed(k: Scalars, theta: vec4<f32>) -> vec4<f32> {
    if HAS_RHO {
        return k.rho * theta;
    }
    return theta;
}
