// Adagrad:
//
//     h     = g, negated to maximize, + lambda*theta
//     sum   <- sum + h^2
//     theta <- rho*theta - a * h / (sqrt(sum) + eps), or h / sqrt(sum + eps)
//
// CPU twin: src/rules/adagrad.rs, same names, same statement order.

override EPS_IN_SQRT: bool = false;

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let h = direction(k, theta, g);
    let sum = (*state).sum + h * h;
    (*state).sum = sum;
    var d: vec4<f32>;
    if EPS_IN_SQRT {
        d = h / sqrt(sum + k.eps);
    } else {
        d = h / (sqrt(sum) + k.eps);
    }
    return decayed(k, theta) - k.a * d;
}
