//! Parameters and gradients of 16 bits: masters, rounding, and states that go with them.

use std::fs;

use safetensors::Dtype;
use serde_json::json;
use wgpu_optim::cpu::TensorValues;
use wgpu_optim::storage::{Rounding, rest};
use wgpu_optim::{
    AnyRule, CpuOptimizer, Masters, OptimizerState, ParamGroups, Precision, SgdConfig, StorageType,
    TensorSpec,
};

use crate::DEVICES;
use crate::model::{Model, Tensor, Workspace, values};
use crate::refusals::refused;
use crate::reports::json as report_of;

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::BF16, Dtype::F16];
const STEP: [&str; 4] = ["--lr", "0.1", "--momentum", "0.9"];
const RESUME: [&str; 6] = ["--lr", "0.1", "--momentum", "0.9", "--state", "state"];
const NO_MASTERS: [&str; 2] = ["--masters", "none"];

/// A model of tensors of every dtype that is stepped, one for each that its gradient may have, and of some that are not.
fn every_mix(shape: &[usize]) -> Model {
    let numel = shape.iter().product();
    let mut model = Model::new([
        ("ids", Tensor::i64(&[1, 2, 3])),
        ("double", raw(Dtype::F64, 8)),
        ("eight", raw(Dtype::F8_E4M3, 3)),
        (
            "frozen",
            Tensor::stored_as(Dtype::BF16, &[3], &values(1, 3)),
        ),
        ("empty", Tensor::stored_as(Dtype::F16, &[0, 3], &[])),
    ]);
    for params in DTYPES {
        for grads in DTYPES {
            let tensor = Tensor::stored_as(params, shape, &values(numel as u64, numel));
            model.tensors.insert(format!("{params}.{grads}"), tensor);
        }
    }
    model
}

fn raw(dtype: Dtype, bytes: u8) -> Tensor {
    Tensor {
        dtype,
        shape: vec![usize::from(bytes) * 8 / dtype.bitsize()],
        bytes: (1..=bytes).collect(),
    }
}

/// Gradients for the tensors of [`every_mix`], of the dtypes that their names say.
fn grads_of(model: &Model, seed: u64) -> Model {
    let mut grads = Model::default();
    for (name, tensor) in &model.tensors {
        let dtype = DTYPES.into_iter().find(|dtype| {
            let ending = format!(".{dtype}");
            name.ends_with(&ending)
        });
        if let Some(dtype) = dtype {
            let values = values(seed, tensor.shape.iter().product());
            let gradient = Tensor::stored_as(dtype, &tensor.shape, &values);
            grads.tensors.insert(name.clone(), gradient);
        }
    }
    grads
}

/// The same values as F32, where they are floating-point numbers that are stepped.
fn as_f32(model: &Model) -> Model {
    let mut model = model.clone();
    for tensor in model.tensors.values_mut() {
        if DTYPES.contains(&tensor.dtype) {
            *tensor = Tensor::f32(&tensor.shape, &tensor.values());
        }
    }
    model
}

/// Three rounds over a model and over the same values as F32: masters and slots are those of the F32 model bit for bit,
/// and the parameters are the masters, rounded.
fn check_masters(
    device: &str,
    start: &Model,
    flags: &[&str],
    grads_of: impl Fn(&Model, u64) -> Model,
) {
    let [mixed, full] = [Workspace::new(), Workspace::new()];
    start.write(&mixed.path("params"));
    as_f32(start).write(&full.path("params"));
    for round in 0..3 {
        let grads = grads_of(start, round);
        grads.write(&mixed.path("grads"));
        as_f32(&grads).write(&full.path("grads"));
        for workspace in [&mixed, &full] {
            let mut step = workspace.step();
            step.args(["--device", device]).args(flags);
            if round > 0 {
                step.args(["--state", "state"]);
            }
            step.assert().success();
        }
        let [params, expected] = [&mixed, &full].map(|w| Model::read(&w.path("out_params")));
        let [mut state, mut expected_state] =
            [&mixed, &full].map(|w| Model::read(&w.path("out_state")));
        assert!(params.tensors.keys().eq(start.tensors.keys()));
        for (name, tensor) in &params.tensors {
            let here = format!("{device} {flags:?} round {round} {name}");
            let given = &start.tensors[name];
            assert_eq!((tensor.dtype, &tensor.shape), (given.dtype, &given.shape));
            let expected = &expected.tensors[name];
            let masters = state.tensors.remove(&format!("{name}.master_params"));
            let has_16_bits = [Dtype::BF16, Dtype::F16].contains(&tensor.dtype);
            let is_stepped = grads.tensors.contains_key(name);
            assert_eq!(masters.is_some(), has_16_bits && is_stepped, "{here}");
            match masters {
                Some(masters) => {
                    assert!(&masters == expected, "{here}");
                    let rounded = Tensor::stored_as(tensor.dtype, &tensor.shape, &masters.values());
                    assert!(tensor == &rounded, "{here}");
                }
                None if is_stepped => assert!(tensor == expected, "{here}"),
                None => assert!(tensor == given, "{here}"),
            }
        }
        // Which parameters they go with, F32 or not.
        for state in [&mut state, &mut expected_state] {
            state.metadata.as_mut().unwrap().remove("params_crc32");
        }
        assert!(state == expected_state, "{device} {flags:?} round {round}");
        mixed.go_on();
        full.go_on();
    }
}

/// The same over a model whose F32 tensors are stored as BF16, and its gradients, too.
pub fn check_as_bf16(device: &str, model: &Model) {
    let as_bf16 = |tensor: &Tensor| Tensor::stored_as(Dtype::BF16, &tensor.shape, &tensor.values());
    let mut start = model.clone();
    for tensor in start.tensors.values_mut() {
        if tensor.dtype == Dtype::F32 {
            *tensor = as_bf16(tensor);
        }
    }
    check_masters(device, &start, &STEP, |start, seed| {
        let mut grads = start.clone();
        grads
            .tensors
            .retain(|_, tensor| tensor.dtype == Dtype::BF16);
        for tensor in grads.tensors.values_mut() {
            let values = values(seed, tensor.shape.iter().product());
            *tensor = as_bf16(&Tensor::f32(&tensor.shape, &values));
        }
        grads
    });
}

#[test]
fn masters_are_what_a_model_in_f32_would_be() {
    let model = every_mix(&[7, 19]);
    for device in DEVICES {
        for flags in [
            &STEP[..],
            &["--lr", "0.01", "--rule", "adamw"],
            &["--lr", "0.5"],
            &["--lr", "0.1", "--momentum", "0.9", "--repeat", "3"],
        ] {
            check_masters(device, &model, flags, grads_of);
        }
    }
}

/// Tensors that are cut and tensors that share a window, on both devices.
#[test]
fn masters_of_a_model_of_many_windows() {
    let mut model = every_mix(&[3, 101_111]);
    let numel = 2_200_001;
    let large = Tensor::stored_as(Dtype::BF16, &[numel], &values(3, numel));
    model.tensors.insert("large.F16".into(), large);
    for device in DEVICES {
        check_masters(device, &model, &STEP, grads_of);
    }
}

/// Of a tensor that has been trained in F32, or without masters.
#[test]
fn masters_start_as_the_parameters_where_the_state_has_none() {
    let model = every_mix(&[33]);
    for device in DEVICES {
        for (trained, flags) in [(as_f32(&model), &[][..]), (model.clone(), &NO_MASTERS)] {
            let workspace = Workspace::new();
            grads_of(&model, 1).write(&workspace.path("grads"));
            let step = |params: &Model, args: &[&str]| {
                params.write(&workspace.path("params"));
                let mut step = workspace.step();
                step.args(["--device", device]).args(args);
                step.assert().success();
                ["out_params", "out_state"].map(|name| Model::read(&workspace.path(name)))
            };
            let [mut params, state] = step(&trained, &[&STEP[..], flags].concat());
            fs::rename(workspace.path("out_state"), workspace.path("state")).unwrap();
            let is_masters = |name: &String| name.ends_with(".master_params");
            assert!(!state.tensors.keys().any(is_masters));
            for (name, tensor) in &mut params.tensors {
                if DTYPES.contains(&tensor.dtype) {
                    let dtype = model.tensors[name].dtype;
                    *tensor = Tensor::stored_as(dtype, &tensor.shape, &tensor.values());
                }
            }
            let [_, state] = step(&params, &RESUME);
            let [expected, _] = step(&as_f32(&params), &RESUME);
            let masters = state.tensors.keys().filter(|name| is_masters(name));
            assert_eq!(masters.count(), 6);
            for (name, expected) in expected.tensors {
                if let Some(masters) = state.tensors.get(&format!("{name}.master_params")) {
                    assert!(masters == &expected, "{device} {flags:?} {name}");
                }
            }
        }
    }
}

/// A tensor of [`every_mix`] in memory.
/// The groups of a rule whose tensors are remembered so.
fn groups(config: &AnyRule, precision: Precision) -> ParamGroups<AnyRule> {
    ParamGroups::new(config.clone()).with_precision(precision)
}

/// The tensors that have a gradient, as they are stored.
fn specs(model: &Model, grads: &Model) -> Vec<TensorSpec> {
    let spec = |(name, grads): (&String, &Tensor)| {
        let params = &model.tensors[name];
        TensorSpec::new(name.clone(), params.shape.clone())
            .params_type(storage_type(params.dtype))
            .grads_type(storage_type(grads.dtype))
    };
    grads.tensors.iter().map(spec).collect()
}

/// What the library makes of a model in some steps by these gradients, and its state.
fn by_library(
    groups: &ParamGroups<AnyRule>,
    model: &Model,
    grads: &Model,
    state: Option<&OptimizerState<AnyRule>>,
) -> (Model, OptimizerState<AnyRule>) {
    let mut optimizer = CpuOptimizer::with_groups(groups, specs(model, grads)).unwrap();
    if let Some(state) = state {
        optimizer.load_state(state).unwrap();
    }
    let names = grads.tensors.keys();
    let mut params: Vec<_> = names.map(|name| stored(&model.tensors[name])).collect();
    let gradients: Vec<_> = grads.tensors.values().map(stored).collect();
    let gradients: Vec<_> = gradients.iter().map(TensorValues::slice).collect();
    let mut slices: Vec<_> = params.iter_mut().map(TensorValues::slice_mut).collect();
    optimizer.step_mixed(&mut slices, &gradients).unwrap();
    let mut stepped = model.clone();
    for (name, values) in grads.tensors.keys().zip(&params) {
        let tensor = stepped.tensors.get_mut(name).unwrap();
        *tensor = Tensor::stored_as(tensor.dtype, &tensor.shape, &values.to_f32());
    }
    (stepped, optimizer.state())
}

fn stored(tensor: &Tensor) -> TensorValues {
    TensorValues::new(storage_type(tensor.dtype), &tensor.values())
}

fn storage_type(dtype: Dtype) -> StorageType {
    match dtype {
        Dtype::BF16 => StorageType::Bf16,
        Dtype::F16 => StorageType::F16,
        _ => StorageType::F32,
    }
}

/// However its parameters are remembered and rounded, the command does what the library does, and its state files are
/// the library's.
#[test]
fn the_command_steps_as_the_cpu_optimizer() {
    // More than a window on the CPU.
    let model = every_mix(&[300_001]);
    let grads = grads_of(&model, 5);
    let config: AnyRule = SgdConfig::builder(1e-4)
        .momentum(0.9)
        .dampening(0.5)
        .build()
        .unwrap()
        .into();
    let flags = "--device cpu --lr 1e-4 --momentum 0.9 --dampening 0.5";
    let seeded = Rounding::Stochastic { seed: 1 << 40 };
    for (masters, rounding, more) in [
        (Masters::F32, Rounding::Nearest, ""),
        (Masters::None, Rounding::Nearest, "--masters none"),
        (
            Masters::None,
            seeded,
            "--masters none --rounding stochastic --seed 1099511627776",
        ),
    ] {
        let groups = groups(
            &config,
            Precision {
                masters,
                rounding,
                ..Precision::default()
            },
        );
        let (mut expected, mut state) = (model.clone(), None);
        let workspace = Workspace::with(&model, &grads);
        for repeat in [1, 2, 1] {
            for _ in 0..repeat {
                let (params, after) = by_library(&groups, &expected, &grads, state.as_ref());
                (expected, state) = (params, Some(after));
            }
            let mut step = workspace.step();
            step.args(flags.split_whitespace())
                .args(more.split_whitespace())
                .args(["--repeat", &repeat.to_string()]);
            if workspace.path("state").exists() {
                step.args(["--state", "state"]);
            }
            step.assert().success();
            workspace.go_on();
            let written = Model::read(&workspace.path("params"));
            for name in grads.tensors.keys() {
                let is_same = written.tensors[name] == expected.tensors[name];
                assert!(is_same, "{more}, {name}");
            }
            let written = fs::read(workspace.path("state")).unwrap();
            let written = OptimizerState::from_safetensors(&written).unwrap();
            let tensors = specs(&model, &grads);
            let mut loaded = CpuOptimizer::with_groups(&groups, tensors).unwrap();
            loaded.load_state(&written).unwrap();
            assert!(Some(loaded.state()) == state, "{more}");
        }
    }
}

#[test]
fn random_bits_are_those_of_the_seed() {
    let model = every_mix(&[1001]);
    for device in DEVICES {
        let workspace = Workspace::with(&model, &grads_of(&model, 1));
        let step = |args: &[&str]| {
            let mut step = workspace.step();
            step.args(["--device", device, "--lr", "1e-4"])
                .args(NO_MASTERS)
                .args(args);
            step.assert().success();
            fs::read(workspace.path("out_params")).unwrap()
        };
        let with = |seed: &str| step(&["--rounding", "stochastic", "--seed", seed]);
        let zero = with("0");
        assert!(zero == with("0"));
        assert!(zero == step(&["--rounding", "stochastic"]));
        assert!(zero != with("1"));
        assert!(with("1") != with("18446744073709551615"));
        let nearest = step(&[]);
        assert!(nearest == step(&["--rounding", "nearest"]) && nearest != zero);
        // Steps of a hundredth of a unit in the last place: only random bits let something of them through.
        let still = Model::read(&workspace.path("out_params"));
        assert!(still.tensors["BF16.F32"] == model.tensors["BF16.F32"]);
    }
}

#[test]
fn repeated_steps_are_rounded_in_between() {
    for device in DEVICES {
        for rule in ["sgd --momentum 0.9 --dampening 0.5", "adamw"] {
            for rounding in ["nearest", "stochastic"] {
                let flags = format!("--rule {rule} --masters none --rounding {rounding}");
                let workspace = Workspace::new();
                let model = every_mix(&[77]);
                grads_of(&model, 1).write(&workspace.path("grads"));
                let step = |args: &[&str]| {
                    let mut step = workspace.step();
                    step.args(["--device", device, "--lr", "1e-3"])
                        .args(flags.split_whitespace())
                        .args(args);
                    step.assert().success();
                    workspace.go_on();
                    ["params", "state"].map(|name| fs::read(workspace.path(name)).unwrap())
                };
                model.write(&workspace.path("params"));
                let at_once = step(&["--repeat", "3"]);
                model.write(&workspace.path("params"));
                step(&[]);
                step(&["--state", "state"]);
                assert!(step(&["--state", "state"]) == at_once, "{device} {flags}");
            }
        }
    }
}

/// A step of 16 bits, with its files.
fn stepped(device: &str) -> (Workspace, Model) {
    let model = every_mix(&[300_001]);
    let workspace = Workspace::with(&model, &grads_of(&model, 1));
    let mut step = workspace.step();
    step.args(["--device", device]).args(STEP);
    step.assert().success();
    workspace.go_on();
    let params = Model::read(&workspace.path("params"));
    (workspace, params)
}

fn set(model: &mut Model, tensor: &str, index: usize, half: u16) {
    let bytes = &mut model.tensors.get_mut(tensor).unwrap().bytes;
    bytes[2 * index..][..2].copy_from_slice(&half.to_le_bytes());
}

#[test]
fn parameters_of_another_step_than_the_state_are_refused() {
    for device in DEVICES {
        let (workspace, good) = stepped(device);
        let args = [&RESUME[..], &["--device", device]].concat();
        for (tensor, half, actual) in [
            ("BF16.F32", 0x4049, "3.140625"),
            ("F16.BF16", 0x7c00, "inf"),
        ] {
            let mut params = good.clone();
            // In the second window and the first; a NaN beside them does not change what is said.
            for index in [299_999, 262_143, 17, 18] {
                set(&mut params, tensor, index, half);
            }
            params.write(&workspace.path("params"));
            let index = "the parameter at index 17 is";
            let expected = good.tensors[tensor].values()[17];
            let expected = format!("is {actual}, expected {expected:?}");
            let tensor = format!("{tensor:?}");
            let words = [&tensor, index, &expected, "not of the same step"];
            refused(&workspace, &args, &words);
            let grads = Model::read(&workspace.path("grads"));
            let mut nan = grads.clone();
            set(&mut nan, "F32.BF16", 0, 0x7f81);
            nan.write(&workspace.path("grads"));
            for mode in ["refuse", "skip", "apply"] {
                refused(
                    &workspace,
                    &[&args[..], &["--nonfinite", mode]].concat(),
                    &words,
                );
            }
            grads.write(&workspace.path("grads"));
        }
        // The parameters of the step before.
        every_mix(&[300_001]).write(&workspace.path("params"));
        refused(&workspace, &args, &["index 0", "not of the same step"]);
        good.write(&workspace.path("params"));
        workspace.step().args(args).assert().success();
    }
}

#[test]
fn masters_that_would_be_lost_are_refused() {
    let (workspace, good) = stepped("cpu");
    let words = [
        "BF16.BF16",
        "master_params",
        "--masters none",
        "--masters f32",
    ];
    let args = [&RESUME[..], &NO_MASTERS].concat();
    refused(&workspace, &args, &words);
    // Even of a tensor that is frozen.
    let mut grads = Model::read(&workspace.path("grads"));
    grads.tensors.retain(|name, _| name.starts_with("F32"));
    grads.write(&workspace.path("grads"));
    refused(&workspace, &args, &words);
    // With masters it keeps them.
    workspace.step().args(RESUME).assert().success();
    let [before, after] = ["state", "out_state"].map(|name| Model::read(&workspace.path(name)));
    let masters = "BF16.F32.master_params";
    assert!(before.tensors[masters] == after.tensors[masters]);
    // In F32 there is nothing that they would be masters of.
    as_f32(&good).write(&workspace.path("params"));
    grads_of(&good, 1).write(&workspace.path("grads"));
    let words = ["\"BF16.F32\"", "master_params", "its parameters are F32"];
    refused(&workspace, &RESUME, &words);
}

/// Parameters and state of a program that keeps rests: the command goes on from the masters that both make up, and writes
/// those.
#[test]
fn rests_become_masters() {
    let model = every_mix(&[300_001]);
    let grads = grads_of(&model, 1);
    let config: AnyRule = SgdConfig::builder(0.1)
        .momentum(0.9)
        .build()
        .unwrap()
        .into();
    let workspace = Workspace::new();
    grads.write(&workspace.path("grads"));
    for device in DEVICES {
        let [masters, rests] = [Masters::F32, Masters::LowBits].map(|masters| {
            let groups = groups(
                &config,
                Precision {
                    masters,
                    ..Precision::default()
                },
            );
            let (params, state) = by_library(&groups, &model, &grads, None);
            params.write(&workspace.path("params"));
            write_state(&workspace, &state);
            let mut step = workspace.step();
            step.args(RESUME).args(["--device", device]);
            step.assert().success();
            ["out_params", "out_state"].map(|name| fs::read(workspace.path(name)).unwrap())
        });
        assert!(masters == rests, "{device}");
    }
    let words = ["\"BF16.BF16\"", "params_rest", "--masters f32"];
    refused(&workspace, &[&RESUME[..], &NO_MASTERS].concat(), &words);
    let good = Model::read(&workspace.path("params"));
    for dtype in [Dtype::F32, Dtype::F16] {
        let mut params = good.clone();
        let tensor = params.tensors.get_mut("BF16.F16").unwrap();
        *tensor = Tensor::stored_as(dtype, &tensor.shape, &tensor.values());
        params.write(&workspace.path("params"));
        let because = format!("its parameters are {dtype}");
        let words = ["\"BF16.F16\"", "params_rest", &because];
        refused(&workspace, &RESUME, &words);
    }
}

fn write_state(workspace: &Workspace, state: &OptimizerState<AnyRule>) {
    let bytes = state.to_safetensors().unwrap();
    fs::write(workspace.path("state"), bytes).unwrap();
}

/// A state whose slots have 16 bits, and masters' low bits in U16: tensors are stepped by what these stand for, and what has
/// no gradient this time stays as it is, dtype and all.
#[test]
fn slots_of_16_bits_are_stepped_as_what_they_stand_for_or_copied() {
    let model = every_mix(&[300_001]);
    let config = AnyRule::preset("adamw", None, 0.01).unwrap();
    let precision = Precision {
        masters: Masters::LowBits,
        slots: &[
            ("exp_avg", StorageType::Bf16),
            ("exp_avg_sq", StorageType::F16),
        ],
        ..Precision::default()
    };
    let groups = groups(&config, precision);
    let (params, state) = by_library(&groups, &model, &grads_of(&model, 1), None);
    let is_kept = |name: &str| name.contains(".F16.");
    let mut grads = grads_of(&model, 2);
    grads.tensors.retain(|name, _| !name.ends_with(".F16"));
    for device in DEVICES {
        let workspace = Workspace::with(&params, &grads);
        write_state(&workspace, &state);
        let before = Model::read(&workspace.path("state"));
        let step = |name: &str| {
            let mut step = workspace.step();
            step.args(["--rule", "adamw", "--lr", "0.01", "--device", device])
                .args(["--state", name]);
            step.assert().success();
            ["out_params", "out_state"].map(|name| Model::read(&workspace.path(name)))
        };
        let [stepped, after] = step("state");
        let mut dtypes = Vec::new();
        for (name, tensor) in before.tensors.iter().filter(|(name, _)| is_kept(name)) {
            assert!(after.tensors[name] == *tensor, "{device} {name}");
            dtypes.push(tensor.dtype);
        }
        dtypes.sort();
        dtypes.dedup();
        assert_eq!(dtypes, [Dtype::U16, Dtype::F16, Dtype::BF16, Dtype::F32]);

        // The same values in F32.
        let mut widened = before.clone();
        widened.tensors.retain(|name, _| is_kept(name));
        for (name, tensor) in before.tensors.iter().filter(|(name, _)| !is_kept(name)) {
            let (name, values) = match name.strip_suffix("params_rest") {
                Some(start) => {
                    let halves = params.tensors[start.trim_end_matches('.')].bytes.chunks(2);
                    let pairs = halves.zip(tensor.bytes.chunks(2));
                    let pairs = pairs.map(|(half, rest)| [half, rest].map(|b| [b[0], b[1]]));
                    let masters = pairs.map(|pair| {
                        let [half, rest] = pair.map(u16::from_le_bytes);
                        f32::from_bits(rest::join(half, rest))
                    });
                    (format!("{start}master_params"), masters.collect())
                }
                None => (name.clone(), tensor.values()),
            };
            let tensor = Tensor::f32(&tensor.shape, &values);
            widened.tensors.insert(name, tensor);
        }
        widened.write(&workspace.path("widened"));
        let [expected, expected_state] = step("widened");
        assert!(stepped == expected && stepped != params, "{device}");
        assert!(after == expected_state, "{device}");
    }
}

/// What a program has edited, a mask say: the bits that are left of a master are then those of no number that rounds to
/// the parameter. They made a NaN.
#[test]
fn rests_that_no_master_leaves_are_refused() {
    let [zero, minus_zero, one] = [0x0000, 0x8000, 0x3f80];
    for device in DEVICES {
        let workspace = Workspace::new();
        let mut grads = Model::default();
        let mut params = Model::default();
        for name in ["w", "x"] {
            let tensor = Tensor::stored_as(Dtype::BF16, &[5], &[1.0; 5]);
            params.tensors.insert(name.into(), tensor.clone());
            grads.tensors.insert(name.into(), tensor);
        }
        grads.write(&workspace.path("grads"));
        params.write(&workspace.path("params"));
        let args = ["--lr", "0.5", "--device", device];
        workspace.step().args(args).assert().success();
        let written = Model::read(&workspace.path("out_state"));
        let mut step = |halves: [u16; 5], rests: [f32; 5]| {
            let mut state = written.clone();
            state.tensors.clear();
            for name in ["w.params_rest", "x.params_rest"] {
                let zeros = Tensor::f32(&[5], &[0.0; 5]);
                state.tensors.insert(name.into(), zeros);
            }
            let edited = Tensor::f32(&[5], &rests);
            state.tensors.insert("x.params_rest".into(), edited);
            state.write(&workspace.path("state"));
            for (index, half) in halves.into_iter().enumerate() {
                set(&mut params, "x", index, half);
            }
            params.write(&workspace.path("params"));
            [&args[..], &["--state", "state"]].concat()
        };
        let rests = [0.0, 32_767.0, 1.0, 65_535.0, 32_768.0];
        for (half, shown) in [(zero, "0.0"), (minus_zero, "-0.0")] {
            let args = step([zero, minus_zero, one, one, half], rests);
            let parameter = format!("the parameter at index 4 is {shown}, and its params_rest");
            let words = ["tensor \"x\"", &parameter, "32768", "not of the same step"];
            for mode in ["refuse", "skip", "apply"] {
                let args = [&args[..], &["--nonfinite", mode]].concat();
                refused(&workspace, &args, &words);
            }
        }
        // No 16 bits at all.
        for (rest, shown) in [
            (0.5, "0.5"),
            (65_536.0, "65536"),
            (f32::NAN, "NaN"),
            (-1.0, "-1"),
        ] {
            let args = step([one; 5], [0.0, rest, 0.0, 0.0, 0.0]);
            let words = format!("index 1 is 1.0, and its params_rest in the state {shown}, which");
            refused(&workspace, &args, &[&words]);
        }
        // Those that masters have left, next to zero and from below the parameter.
        let args = step([zero, minus_zero, one, one, one], rests);
        workspace.step().args(args).assert().success();
        let masters = Model::read(&workspace.path("out_state")).tensors["x.master_params"].values();
        let half_an_ulp = f32::from_bits(0x3f7f_8000) - 0.5;
        assert_eq!(masters[..2], [-0.5, -0.5], "{masters:?}");
        assert_eq!(masters[4], half_an_ulp, "{masters:?}");
    }
}

/// A run without a state is a first step each time.
#[test]
fn random_bits_that_come_again_are_said() {
    let model = every_mix(&[5]);
    let workspace = Workspace::with(&model, &grads_of(&model, 1));
    let notes = |args: &[&str]| {
        let mut step = workspace.step();
        step.args(["--device", "cpu", "--lr", "0.1", "--json"]);
        let report = report_of(&step.args(NO_MASTERS).args(args).output().unwrap());
        report["notes"].as_array().unwrap().clone()
    };
    let seeded = ["--rounding", "stochastic", "--seed", "7"];
    let said = notes(&seeded);
    let note = said[0].as_str().unwrap();
    assert!(
        said.len() == 1 && note.contains("random bits of --seed 7 are the same"),
        "{said:?}"
    );
    assert!(notes(&[]).is_empty());
    workspace.go_on();
    assert!(notes(&[&seeded[..], &["--state", "state"]].concat()).is_empty());
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    let model = every_mix(&[3]);
    let workspace = Workspace::with(&model, &grads_of(&model, 1));
    for (args, words) in [
        (
            &["--rounding", "stochastic"][..],
            ["--rounding", "needs --masters none"],
        ),
        (
            &["--rounding", "nearest", "--masters", "f32"],
            ["--rounding", "needs --masters none"],
        ),
        (&["--seed", "1"], ["--seed", "needs --masters none"]),
        (
            &["--masters", "none", "--seed", "0"],
            ["--seed", "needs --rounding stochastic"],
        ),
        (
            &["--masters", "none", "--seed", "0", "--rounding", "nearest"],
            ["--seed", "needs --rounding stochastic"],
        ),
        (&["--masters", "rest"], ["--masters", "f32, none"]),
        (
            &["--masters", "none", "--rounding", "up"],
            ["--rounding", "nearest, stochastic"],
        ),
        (&["--seed=-1"], ["--seed", "-1"]),
        (&["--seed", "18446744073709551616"], ["--seed", "184"]),
    ] {
        refused(&workspace, &[&STEP[..], args].concat(), &words);
    }
}

#[test]
fn gradients_of_other_dtypes_are_refused() {
    let workspace = Workspace::new();
    let model = every_mix(&[3]);
    model.write(&workspace.path("params"));
    for (name, gradient, words) in [
        ("double", raw(Dtype::F64, 8), "the parameter is F64"),
        ("eight", raw(Dtype::F8_E4M3, 3), "the parameter is F8_E4M3"),
        ("frozen", raw(Dtype::F64, 24), "the gradient is F64"),
        ("frozen", raw(Dtype::F8_E5M2, 3), "the gradient is F8_E5M2"),
        ("frozen", raw(Dtype::I16, 6), "the gradient is I16"),
    ] {
        Model::new([(name, gradient)]).write(&workspace.path("grads"));
        let name = format!("tensor {name:?}");
        refused(
            &workspace,
            &STEP,
            &[&name, words, "expected F32, BF16 or F16"],
        );
    }
}

#[test]
fn gradients_of_16_bits_that_are_not_finite_are_found() {
    for device in DEVICES {
        let (workspace, params) = stepped(device);
        let args = [&RESUME[..], &["--device", device]].concat();
        let good = grads_of(&params, 2);
        for (tensor, half) in [
            ("BF16.BF16", 0x7f80),
            ("F16.BF16", 0xff81),
            ("F32.F16", 0xfc00),
            ("BF16.F16", 0x7c01),
        ] {
            let mut grads = good.clone();
            set(&mut grads, tensor, 299_999, half);
            grads.write(&workspace.path("grads"));
            let words =
                "1 of 300001 gradient elements are infinite or NaN, the first at index 299999";
            refused(&workspace, &args, &[tensor, words]);
        }
        // Skipped, masters and all are as they were.
        let mut step = workspace.step();
        step.args(&args).args(["--nonfinite", "skip"]);
        step.assert().success();
        let files = workspace.snapshot();
        for name in ["params", "state"] {
            let out = workspace.path(&format!("out_{name}"));
            assert!(files[&out] == files[&workspace.path(name)], "{name}");
        }
        // The largest that are finite.
        let mut grads = good.clone();
        set(&mut grads, "BF16.BF16", 0, 0x7f7f);
        set(&mut grads, "F16.F16", 0, 0xfbff);
        grads.write(&workspace.path("grads"));
        workspace.step().args(&args).assert().success();
    }
}

#[test]
fn the_report_says_where_masters_are() {
    let model = every_mix(&[10]);
    for device in DEVICES {
        let workspace = Workspace::with(&model, &grads_of(&model, 1));
        let run = |args: &[&str]| {
            let args = [&["--device", device], &STEP[..], args].concat();
            let mut step = workspace.step();
            let text = step.args(args).output().unwrap().stdout;
            let text = String::from_utf8(text).unwrap();
            (text, report_of(&step.arg("--json").output().unwrap()))
        };
        // Integers, a double, eights, and what is frozen.
        let copied = 24 + 8 + 3 + 6;
        let (params, grads) = (30 * (4 + 2 + 2), 30 * (4 + 2 + 2));
        let (text, report) = run(&[]);
        assert!(
            text.contains("16 bits     6 of the updated; masters in out_state\n"),
            "{text}"
        );
        assert_eq!(
            report["sixteen_bits"],
            json!({"tensors": 6, "masters": "f32", "masters_in": "out_state", "rounding": "nearest", "seed": null})
        );
        assert_eq!(report["bytes_read"], copied + params + grads);
        let slots = 4 * (90 + 60);
        assert_eq!(report["bytes_written"], copied + params + slots);
        workspace.go_on();
        let (_, report) = run(&["--state", "state"]);
        assert_eq!(report["bytes_read"], copied + params + grads + slots);
        assert_eq!(report["bytes_written"], copied + params + slots);

        for (args, text, rounding, seed) in [
            (&[][..], "rounded to the nearest", "nearest", json!(null)),
            (
                &["--rounding", "stochastic", "--seed", "7"],
                "rounded stochastically, seed 7",
                "stochastic",
                json!(7),
            ),
        ] {
            let (printed, report) = run(&[&NO_MASTERS[..], args].concat());
            let text = format!("16 bits     6 of the updated; no masters, {text}\n");
            assert!(printed.contains(&text), "{printed}");
            assert_eq!(
                report["sixteen_bits"],
                json!({"tensors": 6, "masters": "none", "masters_in": null, "rounding": rounding, "seed": seed})
            );
            assert_eq!(report["bytes_written"], copied + params + 4 * 90);
        }
        as_f32(&model).write(&workspace.path("params"));
        let (text, report) = run(&[]);
        assert!(!text.contains("16 bits"), "{text}");
        assert_eq!(report["sixteen_bits"]["tensors"], 0);
        assert_eq!(report["sixteen_bits"]["masters_in"], json!(null));
    }
}
