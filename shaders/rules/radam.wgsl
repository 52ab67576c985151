// RAdam:
//
//     h     = g, negated to maximize, + lambda*theta
//     m     <- beta1*m + c1*h
//     v     <- beta2*v + c2*h^2
//     u     = m, rectified: m / (sqrt(r*v + eps_root) + eps)
//     theta <- rho*theta - a*u
//
// CPU twin: src/rules/radam.rs, same names, same statement order.

override HAS_R: bool = false;
override HAS_EPS_ROOT: bool = false;

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let h = direction(k, theta, g);
    let m = k.beta1 * (*state).exp_avg + k.c1 * h;
    let v = k.beta2 * (*state).exp_avg_sq + k.c2 * (h * h);
    (*state).exp_avg = m;
    (*state).exp_avg_sq = v;
    var u = m;
    if k.rectify != 0.0 {
        var w = v;
        if HAS_R {
            w = k.r * w;
        }
        if HAS_EPS_ROOT {
            w = w + k.eps_root;
        }
        u = m / (sqrt(w) + k.eps);
    }
    return decayed(k, theta) - k.a * u;
}
