// AdaBelief:
//
//     h     = g, negated to maximize, + lambda*theta
//     m     <- beta1*m + c1*h
//     s     <- beta2*s + c2*(h - m)^2 + eps_root
//     theta <- rho*theta - a * m / (sqrt(r*s) + eps)
//
// CPU twin: src/rules/adabelief.rs, same names, same statement order.

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let h = direction(k, theta, g);
    let m = k.beta1 * (*state).exp_avg + k.c1 * h;
    let e = h - m;
    let s = k.beta2 * (*state).exp_avg_var + k.c2 * (e * e) + k.eps_root;
    (*state).exp_avg = m;
    (*state).exp_avg_var = s;
    let update = k.a * (m / (sqrt(k.r * s) + k.eps));
    return decayed(k, theta) - update;
}
