// The vec4 entry point of piece.wgsl for software adapters: an invocation updates two vec4 that follow each other, which
// share what an invocation costs there. On a GPU each load of a wave would reach twice as many cache lines.
//
// Scalars are read before the guard: lavapipe reads them once for all lanes there, and lane by lane behind it.

// What `load_vec4_pairs` and `store_vec4_pairs` take for it.
var<private> wo_section: u32;

@compute @workgroup_size(wo_WORKGROUP_SIZE)
fn wo_step_RULE_vec4_pairs(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let scalars = wo_scalars();
    wo_section = wo_k.section;
    let unit = 2u * wo_unit_of(invocation);
    if unit >= wo_k.count || wo_is_skipped() {
        return;
    }
    // The last one may be alone: then it is loaded twice and stored once.
    let is_pair = unit + 1u < wo_k.count;
    let next = select(unit, unit + 1u, is_pair);
    let i_0 = wo_vec4_of(unit);
    let i_1 = wo_vec4_of(next);
    let theta_0 = wo_params[i_0];
    let theta_1 = wo_params[i_1];
    let g_0 = wo_grads[wo_grads_vec4_of(unit)];
    let g_1 = wo_grads[wo_grads_vec4_of(next)];
    var s_0 = wo_load_vec4_pairs(i_0);
    var s_1 = wo_load_vec4_pairs(i_1);

    let theta_new_0 = update(scalars, theta_0, wo_gradient(g_0), &s_0);
    let theta_new_1 = update(scalars, theta_1, wo_gradient(g_1), &s_1);
    wo_store_vec4_pairs(i_0, s_0);
    wo_params[i_0] = theta_new_0;
    if is_pair {
        wo_store_vec4_pairs(i_1, s_1);
        wo_params[i_1] = theta_new_1;
    }
}
