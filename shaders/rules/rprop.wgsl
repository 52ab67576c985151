// Rprop:
//
//     h         = g, negated to maximize, + lambda*theta
//     agreement = sign(h) * sign(prev)
//     size      <- size * eta_plus, eta_minus or 1, as that is 1, -1 or 0, within least and most; lr at the first step
//     prev      <- h, or zero where the agreement is -1
//     theta     <- rho*theta - sign(prev) * size
//
// CPU twin: src/rules/rprop.rs, same names, same statement order.

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let h = direction(k, theta, g);
    let agreement = sign(h) * sign((*state).prev);
    let agrees = agreement > vec4(0.0);
    let differs = agreement < vec4(0.0);
    var size = started((*state).step_size, vec4(k.lr));
    let factor = select(select(vec4(1.0), vec4(k.eta_plus), agrees), vec4(k.eta_minus), differs);
    size = clamp(size * factor, vec4(k.least), vec4(k.most));
    let d = select(h, vec4(0.0), differs);
    (*state).prev = d;
    (*state).step_size = size;
    return decayed(k, theta) - sign(d) * size;
}
