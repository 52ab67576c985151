//! Groups of parameters, with rules, rates and schedules of their own.

use burn::lr_scheduler::linear::LinearLrSchedulerConfig;
use burn::lr_scheduler::module_lr_scheduler::{ModuleLrScheduler, ModuleLrSchedulerConfig};
use burn::module::ParamGroup;
use wgpu_optim_burn::wgpu_optim::{AdamConfig, AnyRule, LionConfig, ParamGroups, Rule as _};
use wgpu_optim_burn::{ModuleOptimizer, StepError};

use crate::{Odd, Oracles, gpu, momentum};

/// AdamW, but Lion for the cube and momentum without decay for vectors.
fn configs() -> [AnyRule; 3] {
    [
        AdamConfig::adamw(0.1).build().unwrap().into(),
        LionConfig::builder(0.01).build().unwrap().into(),
        momentum().with_lr(0.2).unwrap().into(),
    ]
}

fn optimizer() -> ModuleOptimizer<AnyRule> {
    let [adamw, lion, momentum] = configs();
    let groups = ParamGroups::new(adamw)
        .with("cube", lion, |path| path == "cube")
        .and_then(|groups| groups.with("vectors", momentum, |path| path.starts_with("vectors.")))
        .unwrap();
    ModuleOptimizer::with_groups(&gpu().1, groups)
}

/// The rule of a tensor, by its place in the module.
fn rule_of(index: usize) -> usize {
    index.min(2)
}

#[test]
fn groups_have_rules_and_rates_of_their_own() {
    let mut module = Odd::new(&gpu().0);
    let mut optimizer = optimizer();
    let mut oracles = Oracles::new(&module);
    for (step, lr) in [0.1, 0.3, 0.0, 0.05].into_iter().enumerate() {
        let (grads, on_host) = module.grads(1000 * step as u64);
        module = optimizer.step(lr, module, grads).unwrap();
        // Ratios to the default group's learning rate of 0.1.
        let rules = configs();
        let rates = [lr, 0.01 / 0.1 * lr, 0.2 / 0.1 * lr];
        for (index, (oracle, grads)) in oracles.0.iter_mut().zip(&on_host).enumerate() {
            let rule = rule_of(index);
            oracle.step(&rules[rule].with_lr(rates[rule]).unwrap(), grads);
        }
        oracles.check(&module);
    }
    let record = optimizer.to_record().unwrap().unwrap();
    let slots = |name: &str| {
        let entry = record
            .tensors
            .iter()
            .find(|entry| entry.name == name)
            .unwrap();
        entry
            .slots
            .iter()
            .map(|slot| slot.name.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(slots("matrix"), ["exp_avg", "exp_avg_sq"]);
    assert_eq!(slots("cube"), ["exp_avg"]);
    assert_eq!(slots("vectors.3"), ["momentum_buffer"]);
}

fn schedule(of_vectors: ParamGroup) -> ModuleLrScheduler {
    ModuleLrSchedulerConfig::new(LinearLrSchedulerConfig::new(0.1, 0.02, 4).into())
        .with_group(of_vectors, LinearLrSchedulerConfig::new(0.01, 0.1, 3))
        .init()
        .unwrap()
}

#[test]
fn schedules_of_burn_set_the_rates_of_groups() {
    let mut module = Odd::new(&gpu().0);
    let mut optimizer = optimizer();
    let mut oracles = Oracles::new(&module);
    let mut schedule = schedule(ParamGroup::from_predicate("vectors."));
    // At the fourth step both schedules are elsewhere than at the first, and they cross on the way.
    for step in 0..5 {
        let lr = schedule.step();
        let of_vectors = lr.lr_from_param(module.vectors[0].id, Some("vectors.0"));
        let (grads, on_host) = module.grads(1000 * step);
        module = optimizer.step(lr.clone(), module, grads).unwrap();
        let rates = [lr.base(), 0.01 / 0.1 * lr.base(), 0.2 / 0.1 * of_vectors];
        for (index, (oracle, grads)) in oracles.0.iter_mut().zip(&on_host).enumerate() {
            let rule = rule_of(index);
            oracle.step(&configs()[rule].with_lr(rates[rule]).unwrap(), grads);
        }
        oracles.check(&module);
    }
}

#[test]
fn parameters_of_one_group_have_one_rate() {
    let module = Odd::new(&gpu().0);
    let mut optimizer = optimizer();
    let lr = schedule(ParamGroup::from_path("vectors.2")).step();
    let (grads, _) = module.grads(0);
    let before = module.host();
    let error = optimizer.step(lr, module.clone(), grads).unwrap_err();
    let is_named = matches!(
        &error,
        StepError::Rates { group, param, first, .. }
            if [group, param, first] == ["vectors", "vectors.2", "vectors.0"]
    );
    assert!(is_named, "{error}");
    assert_eq!(module.host(), before);
    // What the schedule leaves out of the step is of no matter.
    let lr = schedule(ParamGroup::from_path("vectors.2")).step();
    let (mut grads, _) = module.grads(0);
    grads.remove::<1>(module.vectors[2].id);
    let module = optimizer.step(lr, module, grads).unwrap();
    assert_ne!(module.host()[0], before[0]);
    assert_eq!(module.host()[4], before[4]);
}
