//! The CPU twin over tensors that are not stored as f32.

use wgpu_optim::cpu::{SliceError, TensorValues as Values};
use wgpu_optim::files::{Dtype, Header};
use wgpu_optim::half::bf16;
use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::state::SlotState;
use wgpu_optim::storage::{self, Codec, MASTER_PARAMS, PARAMS_REST, rest};
use wgpu_optim::{
    AnyRule, CpuOptimizer, Masters, Optimizer, OptimizerState, ParamGroups, Precision, Rule,
    ScheduleFreeSgdConfig, SgdConfig, StateError, StorageType, TensorSlice, TensorSliceMut,
    TensorSpec,
};

use crate::cases::{LRS, values};
use crate::stored::{Stored, all};

fn optimizer(config: &AnyRule, stored: &Stored, numels: &[usize]) -> CpuOptimizer<AnyRule> {
    let groups = ParamGroups::new(config.clone()).with_precision(stored.precision);
    let tensors = numels.iter().map(|numel| {
        TensorSpec::new(numel.to_string(), [*numel])
            .params_type(stored.params)
            .grads_type(stored.grads)
    });
    CpuOptimizer::with_groups(&groups, tensors).unwrap()
}

fn start(stored: &Stored, numels: &[usize]) -> (Vec<Values>, Vec<Values>) {
    let of = |of, seed| move |numel: &usize| Values::new(of, &values(seed + *numel as u64, *numel));
    (
        numels.iter().map(of(stored.params, 0)).collect(),
        numels.iter().map(of(stored.grads, 50)).collect(),
    )
}

fn step(optimizer: &mut CpuOptimizer<AnyRule>, params: &mut [Values], grads: &[Values]) {
    let mut params: Vec<_> = params.iter_mut().map(Values::slice_mut).collect();
    let grads: Vec<_> = grads.iter().map(Values::slice).collect();
    optimizer.step_mixed(&mut params, &grads).unwrap();
}

#[test]
fn every_rule_over_every_way_to_store_stays_within_its_bound() {
    let numels = [0, 1, 2, 31, 32, 33, 1023, 1024, 1025];
    for preset in AnyRule::presets() {
        let config = preset.config(0.05).unwrap();
        let slots = config.slots();
        for stored in all(&slots) {
            let mut optimizer = optimizer(&config, &stored, &numels);
            let (mut params, grads) = start(&stored, &numels);
            let mut oracles: Vec<_> = params
                .iter()
                .map(|params| {
                    let oracle = Oracle::new(&params.to_f32(), Roundoff::NEAREST);
                    oracle.stored(stored.storage(&slots))
                })
                .collect();
            for lr in LRS {
                optimizer.set_lr(lr).unwrap();
                step(&mut optimizer, &mut params, &grads);
                for (oracle, grads) in oracles.iter_mut().zip(&grads) {
                    oracle.step(optimizer.config(), &grads.to_f32());
                }
            }
            let state = optimizer.state();
            for ((params, oracle), state) in params.iter().zip(&oracles).zip(&state.tensors) {
                let params = params.to_f32();
                let fail = |e| panic!("{config:?} {stored:?}: {e}");
                oracle.check_params(&params).unwrap_or_else(fail);
                for slot in &state.slots {
                    match slot.name.as_str() {
                        MASTER_PARAMS => oracle.check_masters(&slot.values.to_f32()),
                        PARAMS_REST => {
                            oracle.check_masters(&joined(&params, &slot.values.to_f32()))
                        }
                        name => oracle.check_slot(name, &slot.values.to_f32()),
                    }
                    .unwrap_or_else(fail);
                }
            }
        }
    }
}

/// Masters, of parameters and what those leave of them.
fn joined(params: &[f32], rests: &[f32]) -> Vec<f32> {
    let pairs = params.iter().zip(rests);
    pairs
        .map(|(param, rest)| {
            f32::from_bits(rest::join((param.to_bits() >> 16) as u16, *rest as u16))
        })
        .collect()
}

/// Large enough for several threads and for tensors in parts, which start at other elements.
#[test]
fn however_many_threads_there_are() {
    let config = AnyRule::preset("adamw", None, 0.01).unwrap();
    let numels = [300_001, 5, 70_000];
    for stored in all(&config.slots()) {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let mut optimizer = optimizer(&config, &stored, &numels);
            let (mut params, grads) = start(&stored, &numels);
            pool.install(|| {
                for _ in 0..2 {
                    step(&mut optimizer, &mut params, &grads);
                }
            });
            (params, optimizer.state())
        };
        assert!(run(1) == run(4), "{stored:?}");
    }
}

/// Parameters of bf16 with a state of f32.
fn in_bf16(grads: StorageType, masters: Masters, rounding: storage::Rounding) -> Stored {
    Stored {
        params: StorageType::Bf16,
        grads,
        precision: Precision {
            masters,
            rounding,
            ..Precision::default()
        },
    }
}

#[test]
fn masters_are_the_run_in_f32_and_rests_are_the_masters() {
    let config = AnyRule::preset("adamw", None, 0.01).unwrap();
    let numels = [4099];
    let with = |masters| in_bf16(StorageType::Bf16, masters, storage::Rounding::Nearest);
    let (start, grads) = start(&with(Masters::None), &numels);
    let mut in_f32 = start[0].to_f32();
    let mut reference = CpuOptimizer::new(config.clone(), [("4099", [4099])]).unwrap();
    let mut runs = [Masters::F32, Masters::LowBits]
        .map(|masters| (optimizer(&config, &with(masters), &numels), start.clone()));
    for _ in 0..20 {
        reference
            .step(&mut [&mut in_f32], &[&grads[0].to_f32()])
            .unwrap();
        for (optimizer, params) in &mut runs {
            step(optimizer, params, &grads);
        }
    }
    let [(masters, params), (rests, halves)] = runs;
    let state = masters.state();
    assert_eq!(state.tensors[0].slot(MASTER_PARAMS), Some(in_f32.clone()));
    assert_eq!(params[0], Values::new(StorageType::Bf16, &in_f32));
    let state = rests.state();
    let rests = state.tensors[0].slot(PARAMS_REST).unwrap();
    assert_eq!(joined(&halves[0].to_f32(), &rests), in_f32);
}

/// Updates below half a unit in the last place: the nearest stands still, masters and random bits do not.
#[test]
fn what_is_too_small_for_bf16_adds_up_in_masters_and_in_the_mean() {
    let config: AnyRule = SgdConfig::builder(1e-3).build().unwrap().into();
    let numel = 4096;
    let after = |masters, rounding| {
        let stored = in_bf16(StorageType::F32, masters, rounding);
        let mut optimizer = optimizer(&config, &stored, &[numel]);
        let mut params = [Values::new(StorageType::Bf16, &vec![1.0; numel])];
        // A thousand steps of 1e-4 each, where bf16 goes by 2^-7 from one on.
        let grads = [Values::F32(vec![-0.1; numel])];
        for _ in 0..1000 {
            step(&mut optimizer, &mut params, &grads);
        }
        let params = params[0].to_f32();
        params.iter().sum::<f32>() / numel as f32
    };
    let nearest = storage::Rounding::Nearest;
    assert_eq!(after(Masters::None, nearest), 1.0);
    // 1.1, and within half a unit in the last place of it.
    for masters in [Masters::F32, Masters::LowBits] {
        assert!((after(masters, nearest) - 1.1).abs() <= 1.0 / 256.0);
    }
    let random = storage::Rounding::Stochastic { seed: 1 };
    let mean = after(Masters::None, random);
    // Each parameter is a sum of a thousand independent errors, uniform at most, of at most a unit: the mean over all
    // of them strays by that over the root of their number; five times that is never seen.
    let deviation = (1000.0 / 4.0_f32).sqrt() / 128.0 / (numel as f32).sqrt();
    assert!((mean - 1.1).abs() < 5.0 * deviation, "{mean}");
}

#[test]
fn a_state_goes_on_where_it_was_and_masters_become_rests() {
    let config = AnyRule::preset("adamw", None, 0.01).unwrap();
    for stored in all(&config.slots()) {
        let numels = [77, 4];
        let (mut params, grads) = start(&stored, &numels);
        let mut optimizer_then = optimizer(&config, &stored, &numels);
        step(&mut optimizer_then, &mut params, &grads);
        let state = optimizer_then.state();
        let mut other = optimizer(&config, &stored, &numels);
        other.load_state(&state).unwrap();
        assert_eq!(other.state(), state);
        let mut others = params.clone();
        step(&mut optimizer_then, &mut params, &grads);
        step(&mut other, &mut others, &grads);
        assert_eq!(params, others, "{stored:?}");
        assert_eq!(optimizer_then.state(), other.state());
    }
    let with = |masters| in_bf16(StorageType::F16, masters, storage::Rounding::Nearest);
    let (mut params, grads) = start(&with(Masters::F32), &[100]);
    let mut masters = optimizer(&config, &with(Masters::F32), &[100]);
    step(&mut masters, &mut params, &grads);
    let mut rests = optimizer(&config, &with(Masters::LowBits), &[100]);
    rests.load_state(&masters.state()).unwrap();
    let mut others = params.clone();
    step(&mut masters, &mut params, &grads);
    step(&mut rests, &mut others, &grads);
    let state = rests.state();
    let joined = joined(
        &others[0].to_f32(),
        &state.tensors[0].slot(PARAMS_REST).unwrap(),
    );
    assert_eq!(masters.state().tensors[0].slot(MASTER_PARAMS), Some(joined));
}

/// A rule that keeps no slot leaves masters alone; they stay where one that keeps some goes on, whose slots start fresh. And
/// where a state without masters was loaded, none are given back before they are made.
#[test]
fn masters_and_slots_are_loaded_without_each_other() {
    let sgd = |momentum| -> AnyRule {
        let config = SgdConfig::builder(1e-3).momentum(momentum).build();
        config.unwrap().into()
    };
    let with = |masters| Stored {
        params: StorageType::Bf16,
        grads: StorageType::F32,
        precision: Precision {
            masters,
            ..Precision::default()
        },
    };
    for masters in [Masters::F32, Masters::LowBits] {
        let stored = with(masters);
        let (mut params, grads) = start(&stored, &[100]);
        let mut plain = optimizer(&sgd(0.0), &stored, &[100]);
        for _ in 0..3 {
            step(&mut plain, &mut params, &grads);
        }
        let saved = plain.state().tensors[0].slots.clone();
        assert_eq!(saved.len(), 1);
        let mut others = params.clone();
        let mut with_momentum = optimizer(&sgd(0.9), &stored, &[100]);
        with_momentum.load_state(&plain.state()).unwrap();
        let state = with_momentum.state();
        assert_eq!(state.tensors[0].slots, saved);
        assert_eq!(state.tensors[0].applied_steps, 0);
        with_momentum.load_state(&state).unwrap();
        // The first step with momentum is one without.
        step(&mut plain, &mut params, &grads);
        step(&mut with_momentum, &mut others, &grads);
        assert_eq!(params, others);
        let state = with_momentum.state();
        assert_eq!(state.tensors[0].slots[1..], plain.state().tensors[0].slots);

        let mut without = optimizer(&sgd(0.9), &with(Masters::None), &[100]);
        step(&mut without, &mut others, &grads);
        let mut loaded = optimizer(&sgd(0.9), &stored, &[100]);
        loaded.load_state(&without.state()).unwrap();
        assert_eq!(loaded.state(), without.state());
    }
}

#[test]
fn slices_of_other_types_are_refused_by_name() {
    let config: AnyRule = SgdConfig::builder(0.1).build().unwrap().into();
    let stored = Stored {
        params: StorageType::Bf16,
        grads: StorageType::F32,
        precision: Precision::default(),
    };
    let mut optimizer = optimizer(&config, &stored, &[3]);
    let expected = SliceError::Stored {
        tensor: "3".to_owned(),
        role: "params",
        expected: "bf16",
        actual: "f32",
    };
    let refused = optimizer.step(&mut [&mut [0.0; 3]], &[&[1.0; 3]]);
    assert_eq!(refused, Err(expected));
    let mut params = Values::new(StorageType::Bf16, &[1.0; 3]);
    let grads = Values::new(StorageType::F16, &[1.0; 3]);
    let refused = optimizer.step_mixed(&mut [params.slice_mut()], &[grads.slice()]);
    assert!(matches!(
        refused,
        Err(SliceError::Stored {
            role: "grads",
            expected: "f32",
            actual: "f16",
            ..
        })
    ));
    assert_eq!(params.to_f32(), [1.0; 3]);
    assert_eq!(optimizer.steps(), 0);
}

fn of_bf16(masters: Masters) -> ParamGroups<SgdConfig> {
    let config = SgdConfig::builder(0.0).build().unwrap();
    ParamGroups::new(config).with_precision(Precision {
        masters,
        ..Precision::default()
    })
}

fn bf16_optimizer(masters: Masters, numel: usize) -> CpuOptimizer {
    let weight = TensorSpec::new("weight", [numel]).params_type(StorageType::Bf16);
    CpuOptimizer::with_groups(&of_bf16(masters), [weight]).unwrap()
}

/// A step at a learning rate of zero leaves what it started from.
#[test]
fn masters_that_become_rests_are_off_by_their_last_bit_at_most() {
    let ties = [
        1.003_906_3_f32,
        -1.003_906_3,
        1.011_718_8,
        3.0e-39,
        1.0,
        1.0 + f32::EPSILON,
    ];
    let masters: Vec<f32> = ties.into();
    let mut params: Vec<_> = masters
        .iter()
        .map(|master| bf16::from_f32(*master))
        .collect();
    let mut state = bf16_optimizer(Masters::F32, masters.len()).state();
    state.tensors[0].applied_steps = 1;
    state.tensors[0].slots = vec![SlotState {
        name: MASTER_PARAMS.into(),
        values: masters.clone().into(),
    }];
    let mut rests = bf16_optimizer(Masters::LowBits, masters.len());
    rests.load_state(&state).unwrap();
    let zeros = vec![0.0; masters.len()];
    rests
        .step_mixed(
            &mut [TensorSliceMut::Bf16(&mut params)],
            &[TensorSlice::F32(&zeros)],
        )
        .unwrap();
    let state = rests.state();
    let kept = state.tensors[0].slot(PARAMS_REST).unwrap();
    for ((param, rest), master) in params.iter().zip(kept).zip(&masters) {
        let joined = f32::from_bits(rest::join(param.to_bits(), rest as u16));
        let off = joined.to_bits().abs_diff(master.to_bits());
        assert!(off <= 1, "{joined} of {master}");
    }
}

/// A clamp by a program holds where it is said, for masters, rests and neither; and a pruned parameter is no NaN.
#[test]
fn parameters_that_a_program_writes_are_what_the_next_step_starts_from() {
    for masters in [Masters::F32, Masters::LowBits, Masters::None] {
        let config = SgdConfig::builder(0.5).build().unwrap();
        let mut optimizer = bf16_optimizer(masters, 3);
        optimizer.set_lr(config.lr()).unwrap();
        let mut params = [0.94, -0.5, 2.0].map(bf16::from_f32);
        let step = |optimizer: &mut CpuOptimizer, params: &mut [bf16], grads: &[f32]| {
            optimizer
                .step_mixed(
                    &mut [TensorSliceMut::Bf16(params)],
                    &[TensorSlice::F32(grads)],
                )
                .unwrap();
        };
        step(&mut optimizer, &mut params, &[0.001, 0.003, -0.002]);
        params = [0.10, -0.0, 0.0].map(bf16::from_f32);
        optimizer.params_changed("weight").unwrap();
        step(&mut optimizer, &mut params, &[0.0; 3]);
        assert_eq!(
            params.map(f32::from),
            [bf16::from_f32(0.10).to_f32(), 0.0, 0.0],
            "{masters:?}"
        );
        // Not said: rests and parameters without masters keep it anyway, and nothing is NaN.
        for zero in [0.0, -0.0] {
            step(&mut optimizer, &mut params, &[0.013, -0.017, 0.019]);
            params = [zero; 3].map(bf16::from_f32);
            step(&mut optimizer, &mut params, &[0.0; 3]);
            assert!(
                params.iter().all(|param| param.is_finite()),
                "{masters:?} {params:?}"
            );
            assert!(masters == Masters::F32 || params.iter().all(|param| param.to_f32() == 0.0));
        }
    }
    let unknown = bf16_optimizer(Masters::F32, 1)
        .params_changed("bias")
        .unwrap_err();
    assert_eq!(unknown.tensor, "bias");
}

/// The `z` of a schedule-free rule starts again as the parameters, and with it the average.
#[test]
fn an_average_starts_again_where_parameters_were_changed() {
    let config = ScheduleFreeSgdConfig::builder(0.5).build().unwrap();
    let mut optimizer = CpuOptimizer::new(config, [("weight", [2])]).unwrap();
    let mut weight = [1.0, -2.0];
    optimizer.step(&mut [&mut weight], &[&[0.5, 0.25]]).unwrap();
    weight = [10.0, 20.0];
    optimizer.params_changed("weight").unwrap();
    let state = optimizer.state();
    let z = state.tensors[0].slot("z").unwrap();
    assert_eq!(config.averaged_params(&weight, &z), weight);
    optimizer.step(&mut [&mut weight], &[&[0.0; 2]]).unwrap();
    let state = optimizer.state();
    assert_eq!(state.tensors[0].slot("z").unwrap(), [10.0, 20.0]);
    assert_eq!(weight, [10.0, 20.0]);
}

/// Each slot by its own codec, in memory and in a file.
#[test]
fn slots_of_one_rule_have_types_of_their_own() {
    let config = AnyRule::preset("adamw", None, 0.01).unwrap();
    let stored = Stored {
        params: StorageType::Bf16,
        grads: StorageType::F32,
        precision: Precision {
            state: StorageType::Bf16,
            slots: &[("exp_avg_sq", StorageType::F32)],
            masters: Masters::LowBits,
            ..Precision::default()
        },
    };
    let numels = [77];
    let (mut params, grads) = start(&stored, &numels);
    let mut then = optimizer(&config, &stored, &numels);
    step(&mut then, &mut params, &grads);
    let state = then.state();
    let codecs = state.tensors[0].slots.iter();
    let codecs: Vec<_> = codecs
        .map(|slot| (&*slot.name, slot.values.codec()))
        .collect();
    let expected = [
        ("exp_avg", Codec::Bf16),
        ("exp_avg_sq", Codec::F32),
        (PARAMS_REST, Codec::LowBits),
    ];
    assert_eq!(codecs, expected);

    let file = state.to_safetensors().unwrap();
    let header = Header::of(&file).unwrap();
    let dtype = |name: &str| {
        let mut entries = header.tensors().iter();
        entries.find(|entry| entry.name == name).unwrap().dtype
    };
    assert_eq!(dtype("77.exp_avg"), Dtype::BF16);
    assert_eq!(dtype("77.exp_avg_sq"), Dtype::F32);
    assert_eq!(dtype("77.params_rest"), Dtype::U16);
    let read = OptimizerState::<AnyRule>::from_safetensors(&file).unwrap();
    assert_eq!(read.tensors, state.tensors);

    // As files had them before: everything in F32, low bits as whole numbers.
    let mut old = state.clone();
    for slot in old.tensors.iter_mut().flat_map(|tensor| &mut tensor.slots) {
        slot.values = slot.values.to_f32().into();
    }
    let read = OptimizerState::<AnyRule>::from_safetensors(&old.to_safetensors().unwrap()).unwrap();
    for state in [read, state] {
        let mut resumed = optimizer(&config, &stored, &numels);
        resumed.load_state(&state).unwrap();
        assert_eq!(resumed.state(), then.state());
    }
    // In memory they are what they are called.
    let error = optimizer(&config, &stored, &numels).load_state(&old);
    let is_codec = |error: &StateError| matches!(error, StateError::Codec { slot, actual: "f32", .. } if slot == PARAMS_REST);
    assert!(is_codec(&error.unwrap_err()));
}

#[test]
fn a_slot_that_no_rule_has_is_an_error() {
    let config = AnyRule::preset("adamw", None, 0.01).unwrap();
    let precision = Precision {
        slots: &[("exp_avg_squared", StorageType::Bf16)],
        ..Precision::default()
    };
    let groups = ParamGroups::new(config).with_precision(precision);
    let error = CpuOptimizer::with_groups(&groups, [("weight", [4])]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "group \"default\": no slot \"exp_avg_squared\" to store as another type, expected one of \"exp_avg, exp_avg_sq, \
         max_exp_avg_sq\""
    );
    // A group that is added later may have it.
    let sgd = AnyRule::preset("sgd", None, 0.1).unwrap();
    let precision = Precision {
        slots: &[("exp_avg_sq", StorageType::Bf16)],
        ..Precision::default()
    };
    let groups = ParamGroups::new(sgd).with_precision(precision);
    let adamw = AnyRule::preset("adamw", None, 0.01).unwrap();
    let groups = groups.with("adamw", adamw, |_| true).unwrap();
    CpuOptimizer::with_groups(&groups, [("weight", [4])]).unwrap();
}
