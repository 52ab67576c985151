// Adamax:
//
//     h     = g, negated to maximize, + lambda*theta
//     m     <- beta1*m + c1*h
//     u     <- max(beta2*u, |h| + eps)
//     theta <- rho*theta - a * m/u, with epsilon in the denominator instead of the norm: m/(u + eps)
//
// CPU twin: src/rules/adamax.rs, same names, same statement order.

override EPS_IN_NORM: bool = false;

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let h = direction(k, theta, g);
    let m = k.beta1 * (*state).exp_avg + k.c1 * h;
    var norm = abs(h);
    if EPS_IN_NORM {
        norm = norm + k.eps;
    }
    let u = max(k.beta2 * (*state).exp_inf, norm);
    (*state).exp_avg = m;
    (*state).exp_inf = u;
    var denominator = u;
    if !EPS_IN_NORM {
        denominator = u + k.eps;
    }
    return decayed(k, theta) - k.a * (m / denominator);
}
