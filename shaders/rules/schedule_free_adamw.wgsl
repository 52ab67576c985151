// Schedule-free AdamW; theta is where the gradient is taken, y:
//
//     h     = g, negated to maximize, + lambda*y
//     v     <- beta2*v + c2*h^2
//     d     = h / (sqrt(r*v) + eps) + mu*y
//     y     <- keep*y + c*z - a*d
//     z     <- z - b*d                 z starts as y
//
// CPU twin: src/rules/schedule_free_adamw.rs, same names, same statement order.

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let h = direction(k, theta, g);
    let v = k.beta2 * (*state).exp_avg_sq + k.c2 * (h * h);
    (*state).exp_avg_sq = v;
    var d = h / (sqrt(k.r * v) + k.eps);
    if HAS_RHO {
        d = d + k.mu * theta;
    }
    let z = started((*state).z, theta);
    (*state).z = z - k.b * d;
    return k.keep * theta + k.c * z - k.a * d;
}
