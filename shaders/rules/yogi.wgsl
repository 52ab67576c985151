// Yogi:
//
//     h     = g, negated to maximize, + lambda*theta
//     m     <- beta1*m + c1*h
//     v     <- v - c2*sign(v - h^2)*h^2
//     theta <- rho*theta - a * m / (sqrt(r*v) + eps)
//
// CPU twin: src/rules/yogi.rs, same names, same statement order.

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let h = direction(k, theta, g);
    let m = k.beta1 * (*state).exp_avg + k.c1 * h;
    let square = h * h;
    let v = (*state).exp_avg_sq - k.c2 * (sign((*state).exp_avg_sq - square) * square);
    (*state).exp_avg = m;
    (*state).exp_avg_sq = v;
    let update = k.a * (m / (sqrt(k.r * v) + k.eps));
    return decayed(k, theta) - update;
}
