
// What the rule gets as parameters: what is stored, or the masters that are remembered beside.
//# for TENSORS
//# if not RESTS

fn wo_load_theta_TENSOR(at: wo_Place) -> wo_Unit {
//# if MASTERS
    var theta = wo_load_masters_TENSOR(at);
    // A master that is zero is what its parameter is.
    var is_any_new = false;
//# for PARTS
    let PART_is_new = theta.PART == vec4(0u);
    is_any_new |= any(PART_is_new);
//# end
    if is_any_new {
        let params = wo_load_params_TENSOR(at);
//# for PARTS
        theta.PART = select(theta.PART, params.PART, PART_is_new);
//# end
    }
    return theta;
//# else
    return wo_load_params_TENSOR(at);
//# end
}

fn wo_store_theta_TENSOR(at: wo_Place, theta: wo_Unit) {
//# if MASTERS
    wo_store_masters_TENSOR(at, theta);
//# end
    wo_store_params_TENSOR(at, theta);
}
//# end
//# end
