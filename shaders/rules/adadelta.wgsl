// Adadelta:
//
//     h     = g, negated to maximize, + lambda*theta
//     s     <- keep*s + c*h^2
//     d     = sqrt(acc + eps) / sqrt(s + eps) * h
//     acc   <- keep*acc + c*d^2
//     theta <- rho*theta - lr*d
//
// CPU twin: src/rules/adadelta.rs, same names, same statement order.

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let h = direction(k, theta, g);
    let s = k.keep * (*state).square_avg + k.c * (h * h);
    let acc = (*state).acc_delta;
    let d = sqrt(acc + k.eps) / sqrt(s + k.eps) * h;
    (*state).square_avg = s;
    (*state).acc_delta = k.keep * acc + k.c * (d * d);
    return decayed(k, theta) - k.lr * d;
}
