// The momentum update, and plain gradient descent:
//
//     d     = g + lambda*theta
//     v     <- alpha*v + c*d
//     theta <- rho*theta - (a*v + b*d)
//
// CPU twin: src/rules/sgd/reference.rs, same names, same statement order.

// The terms that the config has; an absent term is compiled out.
override HAS_VELOCITY: bool = false;
override HAS_C: bool = false;
override HAS_LAMBDA: bool = false;
override HAS_B: bool = false;
override HAS_RHO: bool = false;

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let d = direction(k, theta, g);
    if !HAS_VELOCITY {
        return next_params_plain(k, theta, d);
    }
    let v = next_velocity(k, (*state).momentum_buffer, d);
    (*state).momentum_buffer = v;
    return next_params(k, theta, v, d);
}

fn direction(k: Scalars, theta: vec4<f32>, g: vec4<f32>) -> vec4<f32> {
    if HAS_LAMBDA {
        return g + k.lambda * theta;
    }
    return g;
}

fn next_velocity(k: Scalars, v: vec4<f32>, d: vec4<f32>) -> vec4<f32> {
    if HAS_C {
        return k.alpha * v + k.c * d;
    }
    return k.alpha * v + d;
}

fn next_params(k: Scalars, theta: vec4<f32>, v: vec4<f32>, d: vec4<f32>) -> vec4<f32> {
    var update = k.a * v;
    if HAS_B {
        update = update + k.b * d;
    }
    return decayed(k, theta) - update;
}

fn next_params_plain(k: Scalars, theta: vec4<f32>, d: vec4<f32>) -> vec4<f32> {
    return decayed(k, theta) - k.b * d;
}

fn decayed(k: Scalars, theta: vec4<f32>) -> vec4<f32> {
    if HAS_RHO {
        return k.rho * theta;
    }
    return theta;
}
