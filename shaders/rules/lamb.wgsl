// LAMB:
//
//     h     = g, negated to maximize, + lambda*theta
//     m     <- m + c1*(h - m)
//     v     <- beta2*v + c2*h^2
//     d     = a * m / (sqrt(v + eps_root) + eps) + w*theta
//     lr    = lr * |theta| / |d|, norms over the tensor; lr where one of them is zero
//     theta <- theta - lr*d
//
// The bias corrections are in a, eps and eps_root.
//
// CPU twin: src/rules/lamb.rs, same names, same statement order.

override ADAPTS: bool = true;
// The ratio of the norms is one at most.
override HAS_CLIP: bool = false;
override HAS_EPS_ROOT: bool = false;
override HAS_W: bool = false;

fn average(k: Scalars, h: vec4<f32>, m: vec4<f32>) -> vec4<f32> {
    return m + k.c1 * (h - m);
}

fn average_sq(k: Scalars, h: vec4<f32>, v: vec4<f32>) -> vec4<f32> {
    return k.beta2 * v + k.c2 * (h * h);
}

fn moved(k: Scalars, theta: vec4<f32>, m: vec4<f32>, v: vec4<f32>) -> vec4<f32> {
    var under = v;
    if HAS_EPS_ROOT {
        under = v + k.eps_root;
    }
    var d = k.a * (m / (sqrt(under) + k.eps));
    if HAS_W {
        d = d + k.w * theta;
    }
    return d;
}

fn measure(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: State) -> Summands {
    let h = direction(k, theta, g);
    let m = average(k, h, state.exp_avg);
    let v = average_sq(k, h, state.exp_avg_sq);
    let d = moved(k, theta, m, v);
    return Summands(theta * theta, d * d);
}

fn decide(k: Scalars, sums: Sums, numel: f32) -> Scalars {
    var decided = k;
    if ADAPTS && sums.params_sq > 0.0 && sums.update_sq > 0.0 {
        var ratio = sqrt(sums.params_sq) / sqrt(sums.update_sq);
        if HAS_CLIP {
            ratio = min(ratio, 1.0);
        }
        decided.lr = k.lr * ratio;
    }
    return decided;
}

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let h = direction(k, theta, g);
    let m = average(k, h, (*state).exp_avg);
    let v = average_sq(k, h, (*state).exp_avg_sq);
    (*state).exp_avg = m;
    (*state).exp_avg_sq = v;
    return theta - k.lr * moved(k, theta, m, v);
}
