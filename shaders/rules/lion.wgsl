// Lion:
//
//     h     = g, negated to maximize, + lambda*theta
//     u     = sign(beta1*m + c1*h)
//     m     <- beta2*m + c2*h
//     theta <- rho*theta - lr*u
//
// CPU twin: src/rules/lion.rs, same names, same statement order.

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let h = direction(k, theta, g);
    let m = (*state).exp_avg;
    let u = sign(k.beta1 * m + k.c1 * h);
    (*state).exp_avg = k.beta2 * m + k.c2 * h;
    return decayed(k, theta) - k.lr * u;
}
