// Adam and AdamW:
//
//     h     = g, negated to maximize, + lambda*theta
//     m     <- m + c1*(h - m)
//     v     <- beta2*v + c2*h^2
//     w     = v, or its largest value so far (AMSGrad; with its correction r*v), plus eps_root
//     theta <- rho*theta - a * m / (sqrt(w) + eps)
//
// The bias corrections are in a, eps and eps_root.
//
// CPU twin: src/rules/adam.rs, same names, same statement order.

// The terms that the config has; an absent term is compiled out.
override HAS_EPS_ROOT: bool = false;
override HAS_MAX: bool = false;
override HAS_MAX_OF_CORRECTED: bool = false;

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let h = direction(k, theta, g);
    let m = (*state).exp_avg + k.c1 * (h - (*state).exp_avg);
    let v = k.beta2 * (*state).exp_avg_sq + k.c2 * (h * h);
    (*state).exp_avg = m;
    (*state).exp_avg_sq = v;
    var w = v;
    if HAS_MAX_OF_CORRECTED {
        w = k.r * w;
    }
    if HAS_MAX || HAS_MAX_OF_CORRECTED {
        w = max((*state).max_exp_avg_sq, w);
        (*state).max_exp_avg_sq = w;
    }
    if HAS_EPS_ROOT {
        w = w + k.eps_root;
    }
    let update = k.a * (m / (sqrt(w) + k.eps));
    return decayed(k, theta) - update;
}
