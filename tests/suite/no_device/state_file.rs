use serde::Deserialize;
use std::collections::BTreeMap;
use wgpu_optim::files::HeaderError;
use wgpu_optim::oracle::{Oracle, Rounding};
use wgpu_optim::{CpuOptimizer, MomentumForm, OptimizerState, SgdConfig, StateFileError};

use super::groups::{TENSORS, groups, shapes};
use crate::cases::{configs, values};

#[test]
fn every_config_survives_a_file_and_goes_on_bit_for_bit() {
    for config in configs() {
        let sizes = [("b", 5), ("a", 33), ("never", 2)];
        let shapes = sizes.map(|(name, numel)| (name, [numel]));
        let fresh = || CpuOptimizer::new(config, shapes).unwrap();
        let mut params: Vec<_> = sizes.iter().map(|(_, n)| values(*n as u64, *n)).collect();
        let step = |optimizer: &mut CpuOptimizer, params: &mut [Vec<f32>]| {
            let grads: Vec<_> = sizes
                .iter()
                .map(|(_, n)| values(7 + *n as u64, *n))
                .collect();
            let mut slices: Vec<_> = params.iter_mut().map(Vec::as_mut_slice).collect();
            let grads: Vec<_> = grads.iter().map(Vec::as_slice).collect();
            optimizer.step(&mut slices, &grads).unwrap();
        };
        let mut optimizer = fresh();
        optimizer.set_frozen("never", true).unwrap();
        step(&mut optimizer, &mut params);
        let file = optimizer.state().to_safetensors().unwrap();
        let mut resumed_params = params.clone();
        step(&mut optimizer, &mut params);

        let state = OptimizerState::from_safetensors(&file).unwrap();
        assert_eq!((state.config, state.steps), (config, 1));
        let mut resumed = fresh();
        resumed.set_frozen("never", true).unwrap();
        resumed.load_state(&state).unwrap();
        step(&mut resumed, &mut resumed_params);
        assert_eq!(resumed_params, params);
        assert_eq!(resumed.state(), optimizer.state());
    }
}

fn state() -> OptimizerState {
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let mut optimizer = CpuOptimizer::new(config, [("a", [6])]).unwrap();
    optimizer.step(&mut [&mut [1.0; 6]], &[&[0.5; 6]]).unwrap();
    let mut state = optimizer.state();
    state.tensors[0].shape = vec![2, 3];
    state
}

#[test]
fn shapes_are_kept() {
    let file = state().to_safetensors().unwrap();
    assert_eq!(OptimizerState::from_safetensors(&file).unwrap(), state());
    let mut wrong = state();
    // The second is more than there is memory for.
    for shape in [vec![7], vec![1 << 58]] {
        wrong.tensors[0].shape = shape;
        assert!(matches!(
            wrong.to_safetensors(),
            Err(StateFileError::Header(HeaderError::Values { .. }))
        ));
    }
}

/// The learning rate and the decay are those of a state whose file an inexact parser read back as a decay over one.
#[test]
fn the_same_state_makes_the_same_bytes_and_every_number_reads_back_as_itself() {
    let (lr, decay) = (0.073, 13.698_630_136_986_303);
    let config = SgdConfig::builder(lr)
        .momentum(0.1 + 0.2)
        .decoupled_weight_decay(decay);
    let mut state = state();
    state.config = config.build().unwrap();
    let file = state.to_safetensors().unwrap();
    for _ in 0..20 {
        assert_eq!(state.to_safetensors().unwrap(), file);
    }
    assert_eq!(OptimizerState::from_safetensors(&file).unwrap(), state);
}

#[test]
fn names_that_no_file_can_hold_are_refused_when_it_is_written() {
    let with_names = |names: [&str; 2]| {
        let mut state = state();
        state.tensors.push(state.tensors[0].clone());
        for (tensor, name) in state.tensors.iter_mut().zip(names) {
            tensor.name = name.to_owned();
        }
        state
    };
    let reserved = with_names(["a", "__metadata__"]).to_safetensors();
    assert!(
        matches!(
            reserved,
            Err(StateFileError::Header(HeaderError::ReservedName))
        ),
        "{reserved:?}"
    );
    let twice = with_names(["a", "a"]).to_safetensors();
    assert!(
        matches!(&twice, Err(StateFileError::DuplicateCount { tensor }) if tensor == "a"),
        "{twice:?}"
    );
    let file = with_names(["a", "metadata"]).to_safetensors().unwrap();
    OptimizerState::from_safetensors(&file).unwrap();
}

#[test]
fn files_that_are_no_states_are_refused_by_name() {
    use safetensors::tensor::{Dtype, TensorView};
    use std::collections::HashMap;

    let refused = |change: &dyn Fn(&mut HashMap<String, String>)| {
        let mut metadata: HashMap<String, String> = [
            ("format_version", "1"),
            ("form", "heavy-ball"),
            (
                "config",
                r#"{"lr":0.1,"momentum":0.9,"dampening":0,"nesterov":false,"weight_decay":0,
                    "decoupled_weight_decay":0,"maximize":false,"time_step":1}"#,
            ),
            ("steps", "1"),
            ("applied_steps", r#"{"a":1}"#),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        let bytes = [0; 4];
        let read = |metadata: &HashMap<String, String>| {
            let view = TensorView::new(Dtype::F32, vec![1], &bytes).unwrap();
            let file = safetensors::serialize([("a", view)], Some(metadata.clone())).unwrap();
            OptimizerState::from_safetensors(&file)
        };
        read(&metadata).unwrap();
        change(&mut metadata);
        read(&metadata).unwrap_err().to_string()
    };
    for key in ["format_version", "form", "config", "steps", "applied_steps"] {
        let message = refused(&|metadata| drop(metadata.remove(key)));
        assert_eq!(
            message,
            format!("not a state file: its metadata has no {key}")
        );
    }
    let set = |key: &'static str, value: &'static str| {
        refused(&|metadata| drop(metadata.insert(key.to_owned(), value.to_owned())))
    };
    assert!(set("format_version", "2").contains("version is 2, expected 1"));
    assert!(set("form", "nonsense").contains("unknown form \"nonsense\""));
    assert!(set("config", "{}").contains("config does not read"));
    assert!(set("steps", "-1").contains("steps does not read"));
    assert!(set("applied_steps", "[1]").contains("applied_steps does not read"));
    assert!(set("applied_steps", "{}").contains("tensor \"a\" has no applied step count"));
    let twice = set("applied_steps", r#"{"a":1,"a":2}"#);
    assert_eq!(twice, "tensor \"a\" has two applied step counts");
    let text = OptimizerState::from_safetensors(b"this is text").unwrap_err();
    assert!(matches!(text, StateFileError::Header(_)));
}

#[derive(Deserialize)]
struct PyTorchRun {
    config: PyTorchConfig,
    names: Vec<String>,
    start: BTreeMap<String, Vec<f32>>,
    steps: Vec<PyTorchStep>,
}

#[derive(Deserialize)]
struct PyTorchConfig {
    lr: f64,
    momentum: f64,
    dampening: f64,
    weight_decay: f64,
}

#[derive(Deserialize)]
struct PyTorchStep {
    grads: BTreeMap<String, Vec<f32>>,
    params: BTreeMap<String, Vec<f32>>,
}

/// The parameters of the golden file.
const PYTORCHS: [(&str, &[usize]); 3] = [("weight", &[3, 4]), ("bias", &[5]), ("late", &[2, 2])];

fn pytorchs() -> impl Iterator<Item = (&'static str, Vec<usize>)> {
    PYTORCHS
        .into_iter()
        .map(|(name, shape)| (name, shape.to_vec()))
}

/// A state that PyTorch wrote resumes here, on PyTorch's own trajectory; and goes back as it came.
#[test]
fn a_state_that_pytorch_wrote_goes_on_here() {
    let file = include_bytes!("../../golden/pytorch_state.safetensors");
    let golden: PyTorchRun =
        serde_json::from_str(include_str!("../../golden/pytorch_state.json")).unwrap();
    let config = SgdConfig::builder(golden.config.lr)
        .momentum(golden.config.momentum)
        .dampening(golden.config.dampening)
        .weight_decay(golden.config.weight_decay)
        .build()
        .unwrap();
    let names: Vec<_> = golden.names.iter().map(String::as_str).collect();
    assert_eq!(names, PYTORCHS.map(|(name, _)| name));
    let state = OptimizerState::from_pytorch(file, config, pytorchs()).unwrap();
    for (tensor, (_, shape)) in state.tensors.iter().zip(PYTORCHS) {
        assert_eq!(tensor.shape, shape);
    }
    assert!(
        state.tensors[2].slots.is_empty(),
        "the late one had no gradient yet"
    );

    let shapes = state.tensors.iter().map(|t| (&*t.name, &*t.shape));
    let mut optimizer = CpuOptimizer::new(config, shapes).unwrap();
    optimizer.load_state(&state).unwrap();
    let mut params: Vec<_> = names
        .iter()
        .map(|name| golden.start[*name].clone())
        .collect();
    let mut oracles: Vec<_> = state
        .tensors
        .iter()
        .zip(&params)
        .map(|(tensor, params)| Oracle::resume(&config, params, tensor, Rounding::NEAREST))
        .collect();
    assert_eq!(golden.steps.len(), 4);
    for step in &golden.steps {
        let grads: Vec<_> = names
            .iter()
            .map(|name| step.grads[*name].as_slice())
            .collect();
        let mut slices: Vec<_> = params.iter_mut().map(Vec::as_mut_slice).collect();
        optimizer.step(&mut slices, &grads).unwrap();
        for (index, name) in names.iter().enumerate() {
            oracles[index].step(&config, grads[index]);
            oracles[index].check_params(&params[index]).unwrap();
            oracles[index].check_params(&step.params[*name]).unwrap();
        }
    }

    let exported = state.to_pytorch().unwrap();
    let (ours, theirs) = (
        safetensors::SafeTensors::deserialize(&exported).unwrap(),
        safetensors::SafeTensors::deserialize(file).unwrap(),
    );
    assert_eq!(ours.len(), 2);
    for (name, view) in theirs.iter() {
        assert_eq!(ours.tensor(name).unwrap(), view);
    }
}

/// A tensor of a group without momentum has no velocity in either file, and goes on from both.
#[test]
fn files_leave_out_velocities_that_are_not_there() {
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
        safetensors::SafeTensors::deserialize(&file).unwrap().len(),
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

fn step_all(optimizer: &mut CpuOptimizer, params: &mut [Vec<f32>], grads: &[&[f32]]) {
    let mut params: Vec<_> = params.iter_mut().map(Vec::as_mut_slice).collect();
    optimizer.step(&mut params, grads).unwrap();
}

#[test]
fn what_pytorch_could_not_have_written_is_refused() {
    let file = include_bytes!("../../golden/pytorch_state.safetensors");
    let config = |form| {
        SgdConfig::builder(0.1)
            .momentum(0.9)
            .form(form)
            .build()
            .unwrap()
    };
    let heavy_ball = config(MomentumForm::HeavyBall);
    let only_one = [("only one", vec![3, 4])];
    let refused = OptimizerState::from_pytorch(file, heavy_ball, only_one).unwrap_err();
    assert!(matches!(
        refused,
        StateFileError::UnknownKey { parameters: 1, .. }
    ));
    let ours = state().to_safetensors().unwrap();
    let refused = OptimizerState::from_pytorch(&ours, heavy_ball, [("a", vec![2, 3])]).unwrap_err();
    assert!(matches!(refused, StateFileError::UnknownKey { key, .. } if key == "a"));
    let inside = config(MomentumForm::LrInside);
    let refused = OptimizerState::from_pytorch(file, inside, pytorchs()).unwrap_err();
    assert!(refused.to_string().contains("lr-inside"));
    // Swapped, transposed, or flat: as many elements, and another tensor.
    for (index, shape) in [(0, vec![4, 3]), (0, vec![12]), (1, vec![5, 1]), (1, vec![])] {
        let mut tensors: Vec<_> = pytorchs().collect();
        let (name, expected) = &mut tensors[index];
        let refused =
            format!("tensor {name:?}: the velocity has shape {expected:?}, expected {shape:?}");
        *expected = shape;
        let error = OptimizerState::from_pytorch(file, heavy_ball, tensors).unwrap_err();
        assert_eq!(error.to_string(), refused);
    }
    OptimizerState::from_pytorch(file, heavy_ball, pytorchs()).unwrap();
    let mut state = state();
    state.config = inside;
    assert!(matches!(
        state.to_pytorch(),
        Err(StateFileError::NotPyTorchsForm { .. })
    ));
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
        r#"tensor "down": the velocity has shape [2, 3], expected [3, 2]"#
    );
}

/// Nesterov momentum needs a momentum above zero, in a file too.
#[test]
fn a_momentum_that_has_gone_down_to_zero_survives_a_file() {
    for config in configs().into_iter().filter(SgdConfig::has_velocity) {
        for momentum in [0.0, 1e-50] {
            let mut state = state();
            state.config = config.with_momentum(momentum).unwrap();
            for tensor in &mut state.tensors {
                tensor.meaning = config.form().to_string();
            }
            let file = state.to_safetensors().unwrap();
            assert_eq!(OptimizerState::from_safetensors(&file).unwrap(), state);
        }
    }
}
