// NAdam:
//
//     h     = g, negated to maximize, + lambda*theta
//     m     <- beta1*m + c1*h
//     v     <- beta2*v + c2*h^2
//     theta <- rho*theta - (a*m + b*h) / (sqrt(r*v + eps_root) + eps)
//
// CPU twin: src/rules/nadam.rs, same names, same statement order.

override HAS_EPS_ROOT: bool = false;

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let h = direction(k, theta, g);
    let m = k.beta1 * (*state).exp_avg + k.c1 * h;
    let v = k.beta2 * (*state).exp_avg_sq + k.c2 * (h * h);
    (*state).exp_avg = m;
    (*state).exp_avg_sq = v;
    var w = k.r * v;
    if HAS_EPS_ROOT {
        w = w + k.eps_root;
    }
    let update = (k.a * m + k.b * h) / (sqrt(w) + k.eps);
    return decayed(k, theta) - update;
}
