// Signum and signSGD:
//
//     h     = g, negated to maximize, + lambda*theta
//     m     <- mu*m + c*h
//     theta <- rho*theta - lr*sign(m), or sign(h) without momentum
//
// CPU twin: src/rules/signum.rs, same names, same statement order.

override HAS_MOMENTUM: bool = false;

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    var m = direction(k, theta, g);
    if HAS_MOMENTUM {
        m = k.mu * (*state).momentum_buffer + k.c * m;
        (*state).momentum_buffer = m;
    }
    return decayed(k, theta) - k.lr * sign(m);
}
