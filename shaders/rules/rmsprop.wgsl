// RMSprop:
//
//     h     = g, negated to maximize, + lambda*theta
//     s     <- alpha*s + c*h^2
//     w     = s; centered: avg <- alpha*avg + c*h, w = s - avg^2, or zero if that rounds below it
//     d     = h / (sqrt(w) + eps), or h / sqrt(w + eps)
//     b     <- mu*b + d, theta <- rho*theta - lr*b; with Nesterov mu*b + d in place of b
//     without momentum theta <- rho*theta - lr*d; with the learning rate inside, d is multiplied by it, not b
//
// CPU twin: src/rules/rmsprop.rs, same names, same statement order.

override CENTERED: bool = false;
override EPS_IN_SQRT: bool = false;
override HAS_MOMENTUM: bool = false;
override NESTEROV: bool = false;
override LR_INSIDE: bool = false;

fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let h = direction(k, theta, g);
    let s = k.alpha * (*state).square_avg + k.c * (h * h);
    (*state).square_avg = s;
    var w = s;
    if CENTERED {
        let avg = k.alpha * (*state).grad_avg + k.c * h;
        (*state).grad_avg = avg;
        w = max(s - avg * avg, vec4(0.0));
    }
    var d: vec4<f32>;
    if EPS_IN_SQRT {
        d = h / sqrt(w + k.eps);
    } else {
        d = h / (sqrt(w) + k.eps);
    }
    if LR_INSIDE || !HAS_MOMENTUM {
        d = k.lr * d;
    }
    var u = d;
    if HAS_MOMENTUM {
        let b = k.mu * (*state).momentum_buffer + d;
        (*state).momentum_buffer = b;
        u = b;
        if NESTEROV {
            u = k.mu * b + d;
        }
        if !LR_INSIDE {
            u = k.lr * u;
        }
    }
    return decayed(k, theta) - u;
}
