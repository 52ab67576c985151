//! The bounds must be able to fail: an oracle that accepts anything proves nothing.

use wgpu_optim::SgdConfig;
use wgpu_optim::oracle::{Disagreement, Oracle, Roundoff};

use crate::cases::values;
use crate::test;

fn stepped(steps: usize) -> Oracle {
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let mut oracle = Oracle::new(&values(1, 100), Roundoff::NEAREST);
    for step in 0..steps {
        oracle.step(&config, &values(2 + step as u64, 100));
    }
    oracle
}

#[test]
fn the_exact_values_rounded_agree() {
    let oracle = stepped(5);
    let params: Vec<_> = oracle.params().map(|x| x as f32).collect();
    let agreement = oracle.check_params(&params).unwrap();
    assert!(agreement.worst_ulp <= 0.5 && agreement.worst_ulp > 0.0);
    assert!(agreement.worst_share_of_bound < 1.0);
}

#[test]
fn a_few_ulps_too_many_are_found_and_named() {
    let oracle = stepped(1);
    let mut params: Vec<_> = oracle.params().map(|x| x as f32).collect();
    // One step passes through about ten roundings of the largest term, which is not far from theta here.
    let index = params.iter().position(|x| x.abs() > 1.0).unwrap();
    params[index] = f32::from_bits(params[index].to_bits() + 20);
    let Err(Disagreement::Value {
        index: found,
        wrong,
        error_ulp,
        ..
    }) = oracle.check_params(&params)
    else {
        panic!("20 ULPs went unseen");
    };
    assert_eq!((found, wrong), (index, 1));
    assert!(error_ulp > 19.0);
}

#[test]
fn a_value_that_is_not_finite_is_wrong_where_the_exact_one_is() {
    let oracle = stepped(1);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut params: Vec<_> = oracle.params().map(|x| x as f32).collect();
        params[7] = bad;
        let found = oracle.check_params(&params);
        assert!(
            matches!(found, Err(Disagreement::Value { index: 7, .. })),
            "{found:?}"
        );
    }
}

#[test]
fn lengths_are_compared() {
    let found = stepped(1).check_params(&[1.0]);
    assert!(matches!(
        found,
        Err(Disagreement::Length {
            expected: 100,
            actual: 1,
            ..
        })
    ));
}
