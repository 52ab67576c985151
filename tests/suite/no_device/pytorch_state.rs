use std::collections::BTreeMap;

use safetensors::SafeTensors;
use serde::Deserialize;
use wgpu_optim::cpu::TensorValues;
use wgpu_optim::files::Dtype;
use wgpu_optim::oracle::{Oracle, Roundoff, Textbook};
use wgpu_optim::rules::sgd::MomentumForm;
use wgpu_optim::rules::{AdamForm, AmsGrad, Twin};
use wgpu_optim::state::StateFileError;
use wgpu_optim::storage::MASTER_PARAMS;
use wgpu_optim::{
    AdamConfig, AnyRule, CpuOptimizer, Masters, NAdamConfig, Optimizer, OptimizerState,
    ParamGroups, Precision, SgdConfig, StorageType, TensorSpec,
};

use super::groups::{TENSORS, groups, shapes};
use crate::cases::{in_form, values};
use crate::rule_cases::rules;
use crate::test;

#[derive(Deserialize)]
struct PyTorchRun<C> {
    config: C,
    names: Vec<String>,
    start: BTreeMap<String, Vec<f32>>,
    steps: Vec<PyTorchStep>,
}

#[derive(Deserialize)]
struct PyTorchsSgd {
    lr: f64,
    momentum: f64,
    dampening: f64,
    weight_decay: f64,
}

#[derive(Deserialize)]
struct PyTorchsAdamW {
    lr: f64,
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
    amsgrad: bool,
}

#[derive(Deserialize)]
struct PyTorchStep {
    grads: BTreeMap<String, Vec<f32>>,
    params: BTreeMap<String, Vec<f32>>,
}

const SGD: &[u8] = include_bytes!("../../golden/pytorch_state.safetensors");
const ADAMW: &[u8] = include_bytes!("../../golden/pytorch_state_adamw.safetensors");

/// The parameters of the golden files.
const PYTORCHS: [(&str, &[usize]); 3] = [("weight", &[3, 4]), ("bias", &[5]), ("late", &[2, 2])];

fn pytorchs() -> impl Iterator<Item = (&'static str, Vec<usize>)> {
    PYTORCHS
        .into_iter()
        .map(|(name, shape)| (name, shape.to_vec()))
}

fn adamw() -> AdamConfig {
    let json = include_str!("../../golden/pytorch_state_adamw.json");
    let golden: PyTorchRun<PyTorchsAdamW> = serde_json::from_str(json).unwrap();
    let config = golden.config;
    assert!(config.amsgrad);
    AdamConfig::adamw(config.lr)
        .betas(config.betas.0, config.betas.1)
        .eps(config.eps)
        .decoupled_weight_decay(config.weight_decay)
        .amsgrad(AmsGrad::OfAverage)
        .build()
        .unwrap()
}

/// A state that PyTorch wrote resumes here, on PyTorch's own trajectory; and goes back as it came.
fn check_that_it_goes_on<R, C>(file: &[u8], golden: &PyTorchRun<C>, config: R, steps: u64)
where
    R: Textbook + Twin + Into<AnyRule>,
{
    let names: Vec<_> = golden.names.iter().map(String::as_str).collect();
    assert_eq!(names, PYTORCHS.map(|(name, _)| name));
    let state = OptimizerState::from_pytorch(file, config.clone(), pytorchs()).unwrap();
    assert_eq!(state.steps, steps);
    for (tensor, (_, shape)) in state.tensors.iter().zip(PYTORCHS) {
        assert_eq!(tensor.shape, shape);
    }
    let late = &state.tensors[2];
    assert!(
        late.slots.is_empty() && late.applied_steps == 0,
        "the late one had no gradient yet"
    );

    let shapes = state.tensors.iter().map(|t| (&*t.name, &*t.shape));
    let mut optimizer = CpuOptimizer::new(config.clone(), shapes).unwrap();
    optimizer.load_state(&state).unwrap();
    let mut params: Vec<_> = names
        .iter()
        .map(|name| golden.start[*name].clone())
        .collect();
    let mut oracles: Vec<_> = state
        .tensors
        .iter()
        .zip(&params)
        .map(|(tensor, params)| Oracle::resume(&config, params, tensor, Roundoff::NEAREST))
        .collect();
    assert_eq!(golden.steps.len(), 4);
    for step in &golden.steps {
        let grads: Vec<_> = names
            .iter()
            .map(|name| step.grads[*name].as_slice())
            .collect();
        step_all(&mut optimizer, &mut params, &grads);
        for (index, name) in names.iter().enumerate() {
            oracles[index].step(&config, grads[index]);
            oracles[index].check_params(&params[index]).unwrap();
            oracles[index].check_params(&step.params[*name]).unwrap();
        }
    }

    let exported = state.to_pytorch().unwrap();
    let (ours, theirs) = (
        SafeTensors::deserialize(&exported).unwrap(),
        SafeTensors::deserialize(file).unwrap(),
    );
    assert_eq!(ours.len(), theirs.len());
    for (name, view) in theirs.iter() {
        assert_eq!(ours.tensor(name).unwrap(), view);
    }
}

#[test]
fn states_that_pytorch_wrote_go_on_here() {
    let json = include_str!("../../golden/pytorch_state.json");
    let golden: PyTorchRun<PyTorchsSgd> = serde_json::from_str(json).unwrap();
    let config = SgdConfig::builder(golden.config.lr)
        .momentum(golden.config.momentum)
        .dampening(golden.config.dampening)
        .weight_decay(golden.config.weight_decay)
        .build()
        .unwrap();
    // PyTorch's own does not count steps.
    check_that_it_goes_on(SGD, &golden, config, 1);

    let json = include_str!("../../golden/pytorch_state_adamw.json");
    let golden: PyTorchRun<PyTorchsAdamW> = serde_json::from_str(json).unwrap();
    check_that_it_goes_on(ADAMW, &golden, adamw(), 3);
    let by_name: AnyRule = adamw().into();
    let state = OptimizerState::from_pytorch(ADAMW, by_name, pytorchs()).unwrap();
    let known = OptimizerState::from_pytorch(ADAMW, adamw(), pytorchs()).unwrap();
    assert_eq!(state.tensors, known.tensors);
}

/// Every rule that PyTorch has, by what `pytorch_scalars` says of it.
#[test]
fn every_rule_of_pytorch_goes_there_and_back() {
    let tensors = [("stepped", vec![3, 5]), ("late", vec![7])];
    for config in rules() {
        let mut optimizer = CpuOptimizer::new(config.clone(), tensors.clone()).unwrap();
        let mut params = [values(1, 15), values(2, 7)];
        optimizer.set_frozen("late", true).unwrap();
        for seed in 0..3 {
            let grads = [values(seed, 15), values(seed, 7)];
            let grads = grads.each_ref().map(Vec::as_slice);
            step_all(&mut optimizer, &mut params, &grads);
        }
        let state = optimizer.state();
        let Some(scalars) = config.pytorch_scalars(3) else {
            let refused = state.to_pytorch();
            assert!(
                matches!(refused, Err(StateFileError::NotPyTorchs { .. })),
                "{config:?}"
            );
            continue;
        };
        let file = state.to_pytorch().unwrap();
        let tensor = &state.tensors[0];
        let keys = SafeTensors::deserialize(&file).unwrap().len();
        let expected = match tensor.slots.len() {
            0 => 0,
            slots => slots + scalars.len(),
        };
        assert_eq!(keys, expected, "{config:?}");
        let back = OptimizerState::from_pytorch(&file, config.clone(), tensors.clone()).unwrap();
        for (tensor, expected) in back.tensors.iter().zip(&state.tensors) {
            assert_eq!(tensor.slots, expected.slots, "{config:?}");
        }
        if scalars.iter().any(|(name, _)| *name == "step") {
            assert_eq!(back, state);
        }
    }
}

/// A tensor of a group without momentum has no slot in either file, and goes on from both.
#[test]
fn files_leave_out_slots_that_are_not_there() {
    let fresh = || CpuOptimizer::with_groups(&groups(), shapes()).unwrap();
    let mut optimizer = fresh();
    let mut params = TENSORS.map(|(_, n)| values(1, n));
    let grads = TENSORS.map(|(_, n)| values(2, n));
    let grads = grads.each_ref().map(Vec::as_slice);
    step_all(&mut optimizer, &mut params, &grads);
    let state = optimizer.state();
    let tensors = shapes();
    let ours = OptimizerState::from_safetensors(&state.to_safetensors().unwrap()).unwrap();
    let file = state.to_pytorch().unwrap();
    assert_eq!(
        SafeTensors::deserialize(&file).unwrap().len(),
        TENSORS.len() - 1
    );
    let pytorchs = OptimizerState::from_pytorch(&file, state.config, tensors).unwrap();

    let start = params.clone();
    step_all(&mut optimizer, &mut params, &grads);
    for state in [ours, pytorchs] {
        let mut resumed = fresh();
        resumed.load_state(&state).unwrap();
        let mut resumed_params = start.clone();
        step_all(&mut resumed, &mut resumed_params, &grads);
        assert_eq!(resumed_params, params);
    }
}

fn step_all<R: Twin>(optimizer: &mut CpuOptimizer<R>, params: &mut [Vec<f32>], grads: &[&[f32]]) {
    let mut params: Vec<_> = params.iter_mut().map(Vec::as_mut_slice).collect();
    optimizer.step(&mut params, grads).unwrap();
}

#[test]
fn what_pytorch_could_not_have_written_is_refused() {
    let file = SGD;
    let config = |form| in_form(form, 0.1, 0.9);
    let heavy_ball = config(MomentumForm::HeavyBall);
    let only_one = [("only one", vec![3, 4])];
    let refused = OptimizerState::from_pytorch(file, heavy_ball, only_one).unwrap_err();
    assert!(matches!(
        refused,
        StateFileError::UnknownKey { parameters: 1, .. }
    ));
    let mut state = OptimizerState::from_pytorch(file, heavy_ball, pytorchs()).unwrap();
    let ours = state.to_safetensors().unwrap();
    let refused = OptimizerState::from_pytorch(&ours, heavy_ball, pytorchs()).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "key \"bias.momentum_buffer\": expected state.INDEX.NAME with an index below 3 and a name among momentum_buffer, \
         master_params"
    );
    let inside = config(MomentumForm::LrInside);
    let refused = OptimizerState::from_pytorch(file, inside, pytorchs()).unwrap_err();
    assert!(refused.to_string().contains("lr-inside"));
    // Swapped, transposed, or flat: as many elements, and another tensor.
    for (index, shape) in [(0, vec![4, 3]), (0, vec![12]), (1, vec![5, 1]), (1, vec![])] {
        let mut tensors: Vec<_> = pytorchs().collect();
        let (name, expected) = &mut tensors[index];
        let refused = format!(
            "tensor {name:?}: the momentum_buffer has shape {expected:?}, expected {shape:?}"
        );
        *expected = shape;
        let error = OptimizerState::from_pytorch(file, heavy_ball, tensors).unwrap_err();
        assert_eq!(error.to_string(), refused);
    }
    state.config = inside;
    assert!(matches!(
        state.to_pytorch(),
        Err(StateFileError::NotPyTorchs { .. })
    ));
    state.config = heavy_ball;
    state.tensors[1].state_kind = "adam".into();
    assert_eq!(
        state.to_pytorch().unwrap_err().to_string(),
        "tensor \"bias\": the state is of the adam form, expected heavy-ball as the default group"
    );
}

/// A file of `ADAMW` with one of its entries changed: taken out, or of another dtype, shape and content.
fn with(key: &str, other: Option<(Dtype, Vec<usize>, &[u8])>) -> Vec<u8> {
    let file = SafeTensors::deserialize(ADAMW).unwrap();
    let mut views: BTreeMap<_, _> = file.iter().collect();
    views.remove(key).unwrap();
    if let Some((dtype, shape, bytes)) = other {
        let view = safetensors::tensor::TensorView::new(dtype, shape, bytes);
        views.insert(key, view.unwrap());
    }
    safetensors::serialize(views, None).unwrap()
}

#[test]
fn what_pytorchs_adamw_could_not_have_written_is_refused() {
    let refused = |file: &[u8]| {
        let read = OptimizerState::from_pytorch(file, adamw(), pytorchs());
        read.unwrap_err().to_string()
    };
    for key in ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"] {
        let key = format!("state.1.{key}");
        let missing = format!("tensor \"bias\": there is no key {key:?} beside its others");
        assert_eq!(refused(&with(&key, None)), missing);
    }
    let step = |value: f32| {
        let bytes = value.to_le_bytes();
        with("state.0.step", Some((Dtype::F32, vec![], &bytes)))
    };
    for value in [
        -1.0,
        0.5,
        f32::NAN,
        f32::INFINITY,
        18_446_744_073_709_551_616.0,
    ] {
        let no_count =
            format!("tensor \"weight\": the step is {value:?}, expected a whole number of steps");
        assert_eq!(refused(&step(value)), no_count);
    }
    for value in [0.0, 7.0, 16_777_216.0, 18_446_742_974_197_923_840.0] {
        let state = OptimizerState::from_pytorch(&step(value), adamw(), pytorchs()).unwrap();
        assert_eq!(state.tensors[0].applied_steps as f32, value);
        assert_eq!(state.to_pytorch().unwrap(), step(value));
    }
    let wide = with("state.0.step", Some((Dtype::F64, vec![], &[0; 8])));
    assert_eq!(
        refused(&wide),
        "tensor \"weight\": the step is F64, expected F32, BF16 or F16"
    );
    let long = with("state.0.step", Some((Dtype::F32, vec![1], &[0; 4])));
    assert_eq!(
        refused(&long),
        "tensor \"weight\": the step has shape [1], expected []"
    );
    // A slot of another rule, and one that the configuration does not keep.
    let sgd = OptimizerState::from_pytorch(
        ADAMW,
        SgdConfig::builder(0.1).momentum(0.9).build().unwrap(),
        pytorchs(),
    );
    assert!(matches!(sgd, Err(StateFileError::UnknownKey { .. })));
    let without = AdamConfig::adamw(0.1).build().unwrap();
    let state = OptimizerState::from_pytorch(ADAMW, without, pytorchs()).unwrap();
    let mut optimizer = CpuOptimizer::new(without, pytorchs()).unwrap();
    assert!(optimizer.load_state(&state).is_err());
    let keras = AdamConfig::builder(0.1).form(AdamForm::EpsilonHat).build();
    let keras = OptimizerState::from_pytorch(ADAMW, keras.unwrap(), pytorchs());
    assert_eq!(
        keras.unwrap_err().to_string(),
        "torch.optim has no adam, or not as it is configured here"
    );
}

/// What PyTorch multiplies up from step to step says with which momentum it ran.
#[test]
fn scalars_of_another_configuration_are_refused() {
    let tensors = [("w", vec![3])];
    let config = NAdamConfig::builder(0.1).build().unwrap();
    let mut optimizer = CpuOptimizer::new(config, tensors.clone()).unwrap();
    let mut params = [values(1, 3)];
    for seed in 0..2 {
        step_all(&mut optimizer, &mut params, &[&values(seed, 3)]);
    }
    let file = optimizer.state().to_pytorch().unwrap();
    let read = |beta1| {
        let config = NAdamConfig::builder(0.1).beta1(beta1).build();
        OptimizerState::from_pytorch(&file, config.unwrap(), tensors.clone())
    };
    assert_eq!(read(config.beta1()).unwrap(), optimizer.state());
    // What f32 may be off by is not another configuration.
    read(config.beta1() * (1.0 + 1e-5)).unwrap();
    let refused = read(config.beta1() * 1.01).unwrap_err();
    assert!(
        matches!(&refused, StateFileError::Scalar { tensor, name: "mu_product", .. } if tensor == "w"),
        "{refused}"
    );
}

/// Two weights of as many elements, one the other's transpose.
#[test]
fn swapped_names_are_refused_by_their_shapes() {
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let tensors = || [("up", vec![2, 3]), ("down", vec![3, 2])];
    let mut optimizer = CpuOptimizer::new(config, [("up", [6]), ("down", [6])]).unwrap();
    let mut params = [values(1, 6), values(2, 6)];
    let grads = [values(3, 6), values(4, 6)];
    step_all(
        &mut optimizer,
        &mut params,
        &grads.each_ref().map(Vec::as_slice),
    );
    let mut state = optimizer.state();
    for (tensor, (_, shape)) in state.tensors.iter_mut().zip(tensors()) {
        tensor.shape = shape;
    }
    let file = state.to_pytorch().unwrap();
    assert_eq!(
        OptimizerState::from_pytorch(&file, config, tensors()).unwrap(),
        state
    );
    let mut swapped = tensors();
    swapped.swap(0, 1);
    let refused = OptimizerState::from_pytorch(&file, config, swapped).unwrap_err();
    assert_eq!(
        refused.to_string(),
        r#"tensor "down": the momentum_buffer has shape [2, 3], expected [3, 2]"#
    );
}

/// Masters of a rule with slots and of one without go out and come back; rests are refused by their tensor's name.
#[test]
fn masters_go_to_pytorch_and_back_and_rests_do_not() {
    let shapes = [("whole", vec![3, 5]), ("half", vec![7]), ("late", vec![2])];
    let types = [StorageType::F32, StorageType::Bf16, StorageType::F16];
    let specs = || {
        let stored = shapes.clone().into_iter().zip(types);
        stored.map(|((name, shape), of)| TensorSpec::new(name, shape).params_type(of))
    };
    let rules: [AnyRule; 3] = [
        adamw().into(),
        SgdConfig::builder(0.1).build().unwrap().into(),
        SgdConfig::builder(0.1)
            .momentum(0.9)
            .build()
            .unwrap()
            .into(),
    ];
    for config in rules {
        let after_a_step = |masters| {
            let groups = ParamGroups::new(config.clone()).with_precision(Precision {
                masters,
                ..Precision::default()
            });
            let mut optimizer = CpuOptimizer::with_groups(&groups, specs()).unwrap();
            optimizer.set_frozen("late", true).unwrap();
            let numels = [15, 7, 2];
            let mut params: Vec<_> = (1..)
                .zip(numels.into_iter().zip(types))
                .map(|(seed, (numel, of))| TensorValues::new(of, &values(seed, numel)))
                .collect();
            let grads = numels.map(|numel| TensorValues::F32(values(9, numel)));
            let grads = grads.each_ref().map(TensorValues::slice);
            let mut slices: Vec<_> = params.iter_mut().map(TensorValues::slice_mut).collect();
            optimizer.step_mixed(&mut slices, &grads).unwrap();
            optimizer
        };
        let mut optimizer = after_a_step(Masters::F32);
        let state = optimizer.state();
        assert!(state.tensors[1].slot(MASTER_PARAMS).is_some(), "{config:?}");
        let file = state.to_pytorch().unwrap();
        let back = OptimizerState::from_pytorch(&file, config.clone(), shapes.clone()).unwrap();
        for (tensor, expected) in back.tensors.iter().zip(&state.tensors) {
            assert_eq!(tensor.slots, expected.slots, "{config:?}");
        }
        optimizer.load_state(&back).unwrap();
        assert_eq!(optimizer.state().tensors, back.tensors, "{config:?}");

        let refused = after_a_step(Masters::LowBits).state().to_pytorch();
        assert!(
            matches!(&refused, Err(StateFileError::RestsForPyTorch { tensor }) if tensor == "half"),
            "{refused:?}"
        );
    }
}
