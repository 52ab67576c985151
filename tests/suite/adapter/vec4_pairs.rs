//! Kernels as software adapters have them beside those of GPUs, whatever the adapter is: all other tests run the ones
//! that it gets by default.

use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::rules::AmsGrad;
use wgpu_optim::{
    AdamConfig, AnyRule, Arena, GpuControl, GpuOptimizer, Optimizer, OptimizerState, Rule,
    SgdConfig, StepControl, wgpu,
};

use super::control::rules;
use super::{Bench, bindings_at, gpu_test};
use crate::cases::{LRS, sizes, values};

const CANARY: f32 = -4_321.125;

/// Bits of the parameters, canaries among them, and those of every slot.
type Outcome = (Vec<u32>, Vec<u32>);

fn outcome(params: &[f32], state: &OptimizerState<AnyRule>) -> Outcome {
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let slots = state.tensors.iter().flat_map(|tensor| &tensor.slots);
    (
        bits(params),
        slots.flat_map(|slot| bits(&slot.values.to_f32())).collect(),
    )
}

/// Around whole pairs of whole workgroups, too.
fn numels() -> impl Iterator<Item = usize> {
    sizes().chain([2044, 2047, 2048, 2052, 4100, 70_001])
}

/// Four steps of tensors of every size, at offsets that line up and that do not, one frozen in between; within the bounds.
async fn scattered(bench: &Bench, rule: &AnyRule, shift: usize, is_software: bool) -> Outcome {
    let mut next = 0;
    let mut places = Vec::new();
    for (index, numel) in numels().enumerate() {
        let start = next + index % 9;
        places.push((start, numel));
        next = start + numel + 1;
    }
    let mut host_params = vec![CANARY; next + 8];
    for (start, numel) in &places {
        host_params[*start..start + numel].copy_from_slice(&values(*numel as u64, *numel));
    }
    let host_grads = values(9, next + shift + 8);
    let params = bench.buffer_of(&host_params);
    let grads = bench.buffer_of(&host_grads);
    let names: Vec<_> = (0..places.len()).map(|index| index.to_string()).collect();
    let of = |(start, numel): &(usize, usize)| (*numel, [*start, start + shift]);
    let tensors = bindings_at(&names, (&params, &grads), places.iter().map(of));
    let kernels = bench.kernels.clone().as_for_software(is_software);
    let mut optimizer = GpuOptimizer::new(&kernels, rule.clone(), &tensors).unwrap();
    let mut oracles: Vec<_> = places
        .iter()
        .map(|(start, numel)| Oracle::new(&host_params[*start..start + numel], Roundoff::WGSL))
        .collect();
    for (step, lr) in LRS.into_iter().enumerate() {
        optimizer.set_frozen("20", step == 1).unwrap();
        optimizer.set_lr(lr).unwrap();
        bench.submit(|encoder| optimizer.step(encoder).unwrap());
        for (index, oracle) in oracles.iter_mut().enumerate() {
            if index != 20 || step != 1 {
                let (start, numel) = places[index];
                oracle.step(optimizer.config(), &host_grads[start + shift..][..numel]);
            }
        }
    }
    let after = bench.download(&params).await;
    let state = bench.wait(optimizer.state()).await.unwrap();
    let mut rest = after.clone();
    for (((start, numel), oracle), state) in places.iter().zip(&oracles).zip(&state.tensors) {
        let here = format!("{numel} elements at {start}, {rule:?}");
        oracle
            .check_params(&after[*start..start + numel])
            .unwrap_or_else(|e| panic!("{here}: {e}"));
        for slot in &state.slots {
            oracle
                .check_slot(&slot.name, &slot.values.to_f32())
                .unwrap_or_else(|e| panic!("{here}: {e}"));
        }
        rest[*start..start + numel].fill(CANARY);
    }
    assert!(rest.iter().all(|value| *value == CANARY), "{rule:?}");
    outcome(&after, &state)
}

/// Neighbours in an arena under a control, which skips the second of three steps.
async fn controlled(bench: &Bench, rule: &AnyRule, is_software: bool) -> Outcome {
    let kernels = bench.kernels.clone().as_for_software(is_software);
    let named = numels().enumerate().map(|(i, n)| (i.to_string(), [n]));
    let arena = Arena::new(&bench.device, &bench.queue, named).unwrap();
    let of = |seed: u64| -> Vec<_> { numels().map(|n| values(seed + n as u64, n)).collect() };
    arena.upload_all_params(&of(1)).unwrap();
    let control = StepControl::builder().max_norm(3.0).clip_value(0.01);
    let mut control = GpuControl::new(&kernels, control.build().unwrap()).unwrap();
    let mut optimizer = GpuOptimizer::new(&kernels, rule.clone(), &arena.bindings()).unwrap();
    for step in 0..3 {
        let mut grads = of(2 + step);
        if step == 1 {
            grads[13][3] = f32::NAN;
        }
        arena.upload_all_grads(&grads).unwrap();
        bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
    }
    let after = bench.download(&arena.params()[0]).await;
    let state = bench.wait(optimizer.state()).await.unwrap();
    assert_eq!(state.tensors[13].applied_steps, 2);
    outcome(&after, &state)
}

/// Rules with no slot, one, two and three.
fn by_slots() -> [AnyRule; 4] {
    let sgd = |momentum| SgdConfig::builder(0.05).momentum(momentum).build().unwrap();
    let adamw = |amsgrad| AdamConfig::adamw(0.05).amsgrad(amsgrad).build().unwrap();
    [
        sgd(0.0).into(),
        sgd(0.9).into(),
        adamw(AmsGrad::Off).into(),
        adamw(AmsGrad::OfAverage).into(),
    ]
}

/// Where the compiler fuses no products, as on software adapters, both give the same bits; and everywhere what the
/// oracle allows.
#[gpu_test]
async fn a_step_is_the_same_by_single_vec4_and_in_pairs() {
    for bench in Bench::both().await {
        let fuses = bench.device.adapter_info().device_type != wgpu::DeviceType::Cpu;
        for (rule, shift) in by_slots()
            .iter()
            .flat_map(|rule| [0, 4, 1].map(|s| (rule, s)))
        {
            let one = scattered(bench, rule, shift, false).await;
            let two = scattered(bench, rule, shift, true).await;
            assert!(fuses || one == two, "{rule:?}, {shift}");
        }
        // Software adapters add up in an order of their own.
        for rule in rules().into_iter().filter(|rule| rule.sums().is_empty()) {
            let one = controlled(bench, &rule, false).await;
            let two = controlled(bench, &rule, true).await;
            assert!(fuses || one == two, "{rule:?}");
        }
    }
}
