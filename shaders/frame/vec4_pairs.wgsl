// The vec4 entry point of piece.wgsl for software adapters: an invocation updates two vec4 that follow each other, which
// share what an invocation costs there. On a GPU each load of a wave would reach twice as many cache lines.
//
// Scalars are read before the guard: lavapipe reads them once for all lanes there, and lane by lane behind it.

// What `load_vec4_pairs` and `store_vec4_pairs` take for it.
var<private> section: u32;

@compute @workgroup_size(WORKGROUP_SIZE)
fn RULE_vec4_pairs(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let scalars = rule_scalars();
    section = k.section;
    let unit = 2u * unit_of(invocation);
    if unit >= k.count || is_skipped() {
        return;
    }
    // The last one may be alone: then it is loaded twice and stored once.
    let is_pair = unit + 1u < k.count;
    let next = select(unit, unit + 1u, is_pair);
    let i_0 = vec4_of(unit);
    let i_1 = vec4_of(next);
    let theta_0 = params[i_0];
    let theta_1 = params[i_1];
    let g_0 = grads[grads_vec4_of(unit)];
    let g_1 = grads[grads_vec4_of(next)];
    var s_0 = load_vec4_pairs(i_0);
    var s_1 = load_vec4_pairs(i_1);

    let theta_new_0 = update(scalars, theta_0, gradient(g_0), &s_0);
    let theta_new_1 = update(scalars, theta_1, gradient(g_1), &s_1);
    store_vec4_pairs(i_0, s_0);
    params[i_0] = theta_new_0;
    if is_pair {
        store_vec4_pairs(i_1, s_1);
        params[i_1] = theta_new_1;
    }
}
