// Schedule-free SGD; theta is where the gradient is taken, y:
//
//     h     = g, negated to maximize, + lambda*y
//     y     <- keep*y + c*z - a*h
//     z     <- z - b*h                 z starts as y
//
// CPU twin: src/rules/schedule_free_sgd.rs, same names, same statement order.

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let h = direction(k, theta, g);
    let z = started((*state).z, theta);
    (*state).z = z - k.b * h;
    return k.keep * theta + k.c * z - k.a * h;
}
