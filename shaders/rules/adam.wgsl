// Adam and AdamW:
//
//     h     = g + lambda*theta
//     m     <- beta1*m + c1*h
//     v     <- beta2*v + c2*h^2
//     w     = v, or its largest value so far (AMSGrad); times r, plus eps_root
//     theta <- rho*theta - a * m / (sqrt(w) + eps)
//
// CPU twin: src/rules/adam.rs, same names, same statement order.

// The terms that the config has; an absent term is compiled out.
override HAS_LAMBDA: bool = false;
override HAS_RHO: bool = false;
override HAS_R: bool = false;
override HAS_EPS_ROOT: bool = false;
override HAS_MAX: bool = false;
override HAS_MAX_OF_CORRECTED: bool = false;

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    var h = g;
    if HAS_LAMBDA {
        h = g + k.lambda * theta;
    }
    let m = k.beta1 * (*state).exp_avg + k.c1 * h;
    let v = k.beta2 * (*state).exp_avg_sq + k.c2 * (h * h);
    (*state).exp_avg = m;
    (*state).exp_avg_sq = v;
    var w = v;
    if HAS_MAX {
        w = max((*state).max_exp_avg_sq, w);
        (*state).max_exp_avg_sq = w;
    }
    if HAS_R {
        w = k.r * w;
    }
    if HAS_MAX_OF_CORRECTED {
        w = max((*state).max_exp_avg_sq, w);
        (*state).max_exp_avg_sq = w;
    }
    if HAS_EPS_ROOT {
        w = w + k.eps_root;
    }
    let update = k.a * (m / (sqrt(w) + k.eps));
    if HAS_RHO {
        return k.rho * theta - update;
    }
    return theta - update;
}
