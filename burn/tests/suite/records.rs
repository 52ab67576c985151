//! A record that is loaded goes on as if nothing had been.

use burn::module::Module;
use wgpu_optim_burn::Init as _;

use crate::{Odd, gpu, rules};

#[test]
fn a_record_resumes_on_the_same_trajectory() {
    let (device, shared, _) = gpu();
    for rule in rules() {
        let mut module = Odd::new(device);
        let mut optimizer = rule.clone().init(shared);
        for step in 0..3 {
            let (grads, _) = module.grads(step);
            module = optimizer.step(0.1, module, grads).unwrap();
        }
        let record = optimizer.to_record().unwrap().unwrap();

        // Another process builds the same structure, with identities of its own, and loads the values.
        let mut resumed_module = Odd::new(device).load_record(module.clone().into_record());
        let mut resumed = rule.clone().init(shared).load_record(record.clone());
        assert_eq!(resumed.to_record().unwrap(), Some(record));
        for step in 3..6 {
            let (grads, _) = module.grads(step);
            module = optimizer.step(0.1, module, grads).unwrap();
            let (grads, _) = resumed_module.grads(step);
            resumed_module = resumed.step(0.1, resumed_module, grads).unwrap();
        }
        assert_eq!(resumed_module.host(), module.host(), "{rule:?}");
        assert_eq!(resumed.to_record().unwrap(), optimizer.to_record().unwrap());
    }
}

#[test]
fn a_parameter_that_waits_for_its_gradient_keeps_what_the_record_says() {
    let (device, shared, _) = gpu();
    let [adamw, ..] = rules();
    let mut module = Odd::new(device);
    let mut optimizer = adamw.clone().init(shared);
    let (grads, _) = module.grads(0);
    module = optimizer.step(0.1, module, grads).unwrap();
    let mut resumed = adamw
        .init(shared)
        .load_record(optimizer.to_record().unwrap().unwrap());
    let mut kept = module.clone();
    for step in 1..3 {
        for (optimizer, module) in [(&mut optimizer, &mut module), (&mut resumed, &mut kept)] {
            let (mut grads, _) = module.grads(step);
            if step == 1 {
                grads.remove::<4>(module.cube.id);
            }
            *module = optimizer.step(0.1, module.clone(), grads).unwrap();
        }
    }
    assert_eq!(kept.host(), module.host());
}
