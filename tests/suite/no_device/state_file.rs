use std::collections::HashMap;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use wgpu_optim::control::ControlState;
use wgpu_optim::files::{Header, HeaderError};
use wgpu_optim::half::bf16;
use wgpu_optim::rules::{AmsGrad, Scalars, Slot, Slots, Start, Twin};
use wgpu_optim::state::{RecordError, Recorded, SlotEntry, SlotState, StateFileError, StateRecord};
use wgpu_optim::storage::{MASTER_PARAMS, PARAMS_REST};
use wgpu_optim::{
    AdamConfig, AnyRule, ConfigError, CpuOptimizer, Masters, Optimizer, OptimizerState,
    ParamGroups, Precision, Rule, SgdConfig, StateError, StorageType, TensorSlice, TensorSliceMut,
    TensorSpec,
};

use crate::cases::{configs, values};
use crate::rule_cases::rules;
use crate::test;

/// Names and sizes; the last is never stepped.
const TENSORS: [(&str, usize); 4] = [("layer.b", 5), ("a", 33), ("embed.norm", 7), ("never", 2)];

/// Steps by gradients of its own.
fn step<R: Twin>(optimizer: &mut CpuOptimizer<R>, params: &mut [Vec<f32>]) {
    let grads = TENSORS.map(|(_, n)| values(7 + n as u64, n));
    let mut slices: Vec<_> = params.iter_mut().map(Vec::as_mut_slice).collect();
    let grads = grads.each_ref().map(Vec::as_slice);
    optimizer.step(&mut slices, &grads).unwrap();
}

/// A state goes through a file, and the optimizer that loads it goes on as the one that saved it, bit for bit.
/// Returns the state and the file.
fn check_that_it_goes_on<R: Twin + Recorded>(
    groups: &ParamGroups<R>,
) -> (OptimizerState<R>, Vec<u8>) {
    let fresh = || {
        let shapes = TENSORS.map(|(name, numel)| (name, [numel]));
        let mut optimizer = CpuOptimizer::with_groups(groups, shapes).unwrap();
        optimizer.set_frozen("never", true).unwrap();
        optimizer
    };
    let mut params = TENSORS.map(|(_, n)| values(n as u64, n));
    let mut optimizer = fresh();
    step(&mut optimizer, &mut params);
    optimizer.set_frozen("a", true).unwrap();
    step(&mut optimizer, &mut params);
    let saved = optimizer.state();
    let file = saved.to_safetensors().unwrap();
    let mut resumed_params = params.clone();
    step(&mut optimizer, &mut params);

    let state = OptimizerState::from_safetensors(&file).unwrap();
    assert_eq!((&state.config, state.steps), (&saved.config, 2));
    let mut resumed = fresh();
    resumed.set_frozen("a", true).unwrap();
    resumed.load_state(&state).unwrap();
    assert_eq!(resumed.state(), saved);
    step(&mut resumed, &mut resumed_params);
    assert_eq!(resumed_params, params);
    assert_eq!(resumed.state(), optimizer.state());
    (saved, file)
}

#[test]
fn every_config_survives_a_file_and_goes_on_bit_for_bit() {
    for config in configs() {
        let (_, file) = check_that_it_goes_on(&ParamGroups::new(config));
        // A program that chooses rules by name writes the same.
        let by_name = ParamGroups::new(AnyRule::from(config));
        assert_eq!(check_that_it_goes_on(&by_name).1, file);
    }
    let presets = AnyRule::presets().map(|preset| preset.config(0.1).unwrap());
    for rule in presets.chain(rules()) {
        check_that_it_goes_on(&ParamGroups::new(rule));
    }
}

/// Momentum, plain descent, AdamW and AMSGrad side by side.
#[test]
fn groups_that_mix_rules_share_a_file() {
    let momentum = SgdConfig::builder(0.1).momentum(0.9);
    let amsgrad = AdamConfig::builder(0.01).amsgrad(AmsGrad::OfAverage);
    let plain = momentum.momentum(0.0).build().unwrap();
    let mixed = |default: AnyRule| {
        ParamGroups::new(default)
            .with("embeddings", amsgrad.build().unwrap(), |name| {
                name.starts_with("embed")
            })
            .unwrap()
            .with("plain", plain, |name| name == "a")
            .unwrap()
    };
    let (_, file) = check_that_it_goes_on(&mixed(momentum.build().unwrap().into()));
    let names = |file: &[u8]| {
        let mut names: Vec<_> = SafeTensors::deserialize(file)
            .unwrap()
            .names()
            .into_iter()
            .map(str::to_owned)
            .collect();
        names.sort();
        names
    };
    let of_amsgrad = [
        "embed.norm.exp_avg",
        "embed.norm.exp_avg_sq",
        "embed.norm.max_exp_avg_sq",
    ];
    assert_eq!(
        names(&file),
        [&of_amsgrad[..], &["layer.b.momentum_buffer"]].concat()
    );
    let header = Header::of(&file).unwrap();
    let keys = header.metadata.iter().map(|(key, _)| key.as_str());
    let expected = [
        "format_version",
        "rule",
        "steps",
        "applied_steps",
        "meanings",
    ];
    assert!(keys.eq(expected));
    let record = StateRecord::<AnyRule>::of(&header).unwrap();
    let meanings = record.state_kinds.iter();
    assert!(meanings.eq([(&"embed.norm".to_owned(), &"amsgrad".to_owned())]));
    assert_eq!(record.to_metadata().unwrap(), header.metadata);

    let adamw = AnyRule::preset("adamw", None, 0.1).unwrap();
    let (_, file) = check_that_it_goes_on(&mixed(adamw.clone()));
    let record = StateRecord::<AnyRule>::of(&Header::of(&file).unwrap()).unwrap();
    let meanings = record.state_kinds.values().collect::<Vec<_>>();
    assert_eq!(meanings, ["heavy-ball", "amsgrad"]);

    // Without groups the rule of a tensor is another one.
    let state = OptimizerState::<AnyRule>::from_safetensors(&file).unwrap();
    let shapes = TENSORS.map(|(name, numel)| (name, [numel]));
    let mut alone = CpuOptimizer::new(adamw, shapes).unwrap();
    let refused = alone.load_state(&state);
    assert!(
        matches!(&refused, Err(StateError::StateKind { tensor, .. }) if tensor == "a"),
        "{refused:?}"
    );
}

/// Masters are a slot behind those of the rule, whatever rule it is.
#[test]
fn masters_survive_a_file_and_go_on_bit_for_bit() {
    let momentum = SgdConfig::builder(1e-3).momentum(0.9).build().unwrap();
    let adamw = AnyRule::preset("adamw", None, 1e-3).unwrap();
    let plain = SgdConfig::builder(1e-3).build().unwrap();
    for config in [momentum.into(), adamw, plain.into()] {
        for (masters, slot) in [
            (Masters::F32, MASTER_PARAMS),
            (Masters::LowBits, PARAMS_REST),
        ] {
            let groups = ParamGroups::new(config.clone()).with_precision(Precision {
                masters,
                ..Precision::default()
            });
            let fresh = || {
                let spec = TensorSpec::new("a", [3, 11]);
                let spec = spec.params_type(StorageType::Bf16);
                CpuOptimizer::with_groups(&groups, [spec]).unwrap()
            };
            let grads = values(3, 33);
            let step = |optimizer: &mut CpuOptimizer<AnyRule>, params: &mut [bf16]| {
                let params = TensorSliceMut::Bf16(params);
                let grads = TensorSlice::F32(&grads);
                optimizer.step_mixed(&mut [params], &[grads]).unwrap();
            };
            let mut params: Vec<_> = values(2, 33).into_iter().map(bf16::from_f32).collect();
            let mut optimizer = fresh();
            step(&mut optimizer, &mut params);
            let saved = optimizer.state();
            let file = saved.to_safetensors().unwrap();
            let state = OptimizerState::from_safetensors(&file).unwrap();
            assert_eq!(state, saved);
            let kept = config.slots();
            let names = kept.kept().map(|slot| slot.name).chain([slot]);
            assert!(names.eq(state.tensors[0].slots.iter().map(|slot| &*slot.name)));

            let mut resumed = fresh();
            resumed.load_state(&state).unwrap();
            let mut resumed_params = params.clone();
            for _ in 0..2 {
                step(&mut optimizer, &mut params);
                step(&mut resumed, &mut resumed_params);
            }
            assert_eq!(resumed_params, params);
            assert_eq!(resumed.state(), optimizer.state());
        }
    }
}

/// A slot of another group's rule is known by its meaning alone; which it is shows when the state is loaded.
#[test]
fn slots_that_are_missing_or_strange_are_refused_when_the_state_is_loaded() {
    let adamw = AnyRule::preset("adamw", None, 0.1).unwrap();
    let (saved, _) = check_that_it_goes_on(&ParamGroups::new(adamw.clone()));
    let shapes = TENSORS.map(|(name, numel)| (name, [numel]));
    let refused = |change: &dyn Fn(&mut OptimizerState<AnyRule>)| {
        let mut state = saved.clone();
        change(&mut state);
        let file = state.to_safetensors().unwrap();
        let read = OptimizerState::from_safetensors(&file).unwrap();
        let mut optimizer = CpuOptimizer::new(adamw.clone(), shapes).unwrap();
        let before = optimizer.state();
        let error = optimizer.load_state(&read).unwrap_err().to_string();
        assert_eq!(optimizer.state(), before);
        error
    };
    let missing = refused(&|state| drop(state.tensors[1].slots.remove(0)));
    assert_eq!(
        missing,
        "tensor \"a\": the state has no exp_avg, which the rule keeps"
    );
    let strange = refused(&|state| {
        let slot = &mut state.tensors[1].slots[0];
        slot.name = "max_exp_avg_sq".into();
    });
    assert_eq!(
        strange,
        "tensor \"a\": the state holds its max_exp_avg_sq, which the rule does not keep"
    );
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
    for shape in [vec![7], vec![1 << 29, 1 << 29]] {
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
fn what_a_control_remembers_goes_with_a_state() {
    let mut state = state();
    for (scale, growth_tracker) in [(65536.0, 0), (0.1, 1999), (f32::MIN_POSITIVE, u32::MAX)] {
        state.control = Some(ControlState {
            scale,
            growth_tracker,
            is_dynamic: true,
            steps: u64::MAX,
            skipped: 3,
        });
        let file = state.to_safetensors().unwrap();
        assert_eq!(OptimizerState::from_safetensors(&file).unwrap(), state);
    }
    // One whose scale is no dynamic one says so; files that say nothing have a dynamic one.
    state.control = Some(ControlState {
        scale: 4.0,
        growth_tracker: 0,
        is_dynamic: false,
        steps: 7,
        skipped: 0,
    });
    let file = state.to_safetensors().unwrap();
    assert_eq!(OptimizerState::from_safetensors(&file).unwrap(), state);
    let mut header = Header::of(&file).unwrap();
    let mut entries = header.metadata.iter_mut();
    let (_, json) = entries.find(|(key, _)| key == "control").unwrap();
    *json = r#"{"scale":4.0,"growth_tracker":7}"#.to_owned();
    let record = StateRecord::<SgdConfig>::of(&header).unwrap();
    let expected = ControlState {
        scale: 4.0,
        growth_tracker: 7,
        is_dynamic: true,
        steps: 0,
        skipped: 0,
    };
    assert_eq!(record.control, Some(expected));
    for scale in [0.0, -1.0, f32::INFINITY, f32::NAN, 1e-40] {
        state.control = Some(ControlState {
            scale,
            growth_tracker: 1,
            is_dynamic: true,
            steps: 1,
            skipped: 1,
        });
        let file = state.to_safetensors().unwrap();
        let error = OptimizerState::<SgdConfig>::from_safetensors(&file).unwrap_err();
        assert!(error.to_string().contains("control"), "{error}");
    }
}

fn with_slots(names: [&str; 2], slots: [&str; 2]) -> OptimizerState {
    let mut state = state();
    state.tensors.push(state.tensors[0].clone());
    for ((tensor, name), slot) in state.tensors.iter_mut().zip(names).zip(slots) {
        tensor.name = name.to_owned();
        tensor.slots[0].name = slot.to_owned();
    }
    state
}

/// A tensor's name may have dots, and be what a file calls a slot of another.
#[test]
fn names_of_slots_never_meet() {
    let own = ["momentum_buffer"; 2];
    for names in [
        ["a", "a.momentum_buffer"],
        ["", "."],
        ["a.", "a..momentum_buffer"],
        ["__metadata__", "a"],
        [".momentum_buffer", "momentum_buffer"],
    ] {
        let state = with_slots(names, own);
        let file = state.to_safetensors().unwrap();
        let read = OptimizerState::<SgdConfig>::from_safetensors(&file).unwrap();
        assert_eq!(read.tensors.len(), 2);
        for tensor in &state.tensors {
            assert!(read.tensors.contains(tensor), "{tensor:?}");
        }
        let header = Header::of(&file).unwrap();
        let mut found: Vec<_> = SlotEntry::all_in(&header).map(|slot| slot.tensor).collect();
        found.sort();
        assert_eq!(found, names);
    }
}

#[test]
fn names_that_no_file_can_hold_are_refused_when_it_is_written() {
    let own = ["momentum_buffer"; 2];
    let twice = with_slots(["a", "a"], own).to_safetensors();
    assert!(
        matches!(&twice, Err(StateFileError::DuplicateCount { tensor }) if tensor == "a"),
        "{twice:?}"
    );
    for slot in ["b.momentum_buffer", "", "."] {
        let no_slot = with_slots(["a", "b"], ["momentum_buffer", slot]).to_safetensors();
        let name = format!("b.{slot}");
        assert!(
            matches!(&no_slot, Err(StateFileError::SlotName { name: of }) if *of == name),
            "{no_slot:?}"
        );
    }
    let strange = with_slots(["a", "b"], ["momentum_buffer", "exp_avg"]).to_safetensors();
    assert_eq!(
        strange.unwrap_err().to_string(),
        "tensor \"b\": the state holds its exp_avg, expected one of momentum_buffer"
    );
    let mut twice = state();
    let slot = twice.tensors[0].slots[0].clone();
    twice.tensors[0].slots.push(slot);
    assert!(matches!(
        twice.to_safetensors(),
        Err(StateFileError::Header(HeaderError::DuplicateTensor { tensor })) if tensor == "a.momentum_buffer"
    ));
}

/// A rule of the user's own: one slot, and a record of its own making.
#[derive(Clone, Debug, PartialEq)]
struct Own {
    lr: f64,
}

impl Rule for Own {
    fn stem(&self) -> &'static str {
        "own"
    }

    fn slots(&self) -> Slots {
        [Slot {
            name: "last",
            start: Start::Value(0.5),
            is_kept: true,
        }]
        .into()
    }

    fn wgsl(&self) -> String {
        "".into()
    }

    fn scalar_names(&self) -> &'static [&'static str] {
        &["lr"]
    }

    fn scalars(&self, _phase: u64) -> Scalars {
        [self.lr as f32].into()
    }

    fn state_kind(&self) -> String {
        "own".to_owned()
    }

    fn lr(&self) -> f64 {
        self.lr
    }

    fn with_lr(&self, lr: f64) -> Result<Self, ConfigError> {
        Ok(Self { lr })
    }
}

impl Twin for Own {
    fn step(&self, scalars: &Scalars, params: &mut [f32], state: &mut [&mut [f32]], grads: &[f32]) {
        let [lr] = scalars.as_slice() else { return };
        for ((theta, last), g) in params.iter_mut().zip(&mut *state[0]).zip(grads) {
            *theta -= lr * (g + *last);
            *last = *g;
        }
    }
}

impl Recorded for Own {
    fn to_record(&self) -> Result<String, RecordError> {
        Ok(format!("own {}", self.lr))
    }

    fn from_record(record: &str) -> Result<Self, RecordError> {
        let lr = record.strip_prefix("own ");
        let lr = lr.ok_or_else(|| RecordError::OtherRule {
            expected: "own",
            actual: record.to_owned(),
        })?;
        let lr = lr.parse().map_err(|_| RecordError::Malformed {
            message: format!("{lr:?} is no number"),
        })?;
        Ok(Self { lr })
    }
}

#[test]
fn a_rule_of_the_users_own_has_files_too() {
    let (_, file) = check_that_it_goes_on(&ParamGroups::new(Own { lr: 0.25 }));
    let error = OptimizerState::<AnyRule>::from_safetensors(&file).unwrap_err();
    assert!(
        matches!(error, StateFileError::Rule(RecordError::Malformed { .. })),
        "{error}"
    );
    let ours = state().to_safetensors().unwrap();
    let error = OptimizerState::<Own>::from_safetensors(&ours).unwrap_err();
    assert!(
        matches!(error, StateFileError::Rule(RecordError::OtherRule { .. })),
        "{error}"
    );
}

#[test]
fn a_state_of_another_rule_is_refused_by_both_names() {
    let ours = state().to_safetensors().unwrap();
    for file in [&*ours, &format_1()] {
        OptimizerState::<SgdConfig>::from_safetensors(file).unwrap();
        OptimizerState::<AnyRule>::from_safetensors(file).unwrap();
        let error = OptimizerState::<AdamConfig>::from_safetensors(file).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the state was made by the rule SgdConfig, expected AdamConfig"
        );
    }
}

/// A file as the first version wrote it, byte for byte.
fn format_1() -> Vec<u8> {
    let metadata = concat!(
        r#"{"__metadata__":{"format_version":"1","form":"ema","config":"{\"lr\":0.1,\"momentum\":0.9,"#,
        r#"\"dampening\":0.0,\"nesterov\":false,\"weight_decay\":0.0,\"decoupled_weight_decay\":0.5,"#,
        r#"\"maximize\":true,\"time_step\":1.0}","steps":"3","applied_steps":"{\"a\":1,\"layer.b\":3}"},"#,
        r#""layer.b":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}"#,
    );
    let padding = " ".repeat(metadata.len().next_multiple_of(8) - metadata.len());
    let mut file = ((metadata.len() + padding.len()) as u64)
        .to_le_bytes()
        .to_vec();
    file.extend(metadata.bytes().chain(padding.bytes()));
    file.extend([1.5_f32, -0.25].map(f32::to_le_bytes).as_flattened());
    file
}

#[test]
fn files_of_format_1_are_read() {
    let state = OptimizerState::<SgdConfig>::from_safetensors(&format_1()).unwrap();
    let config = SgdConfig::builder(0.1)
        .momentum(0.9)
        .decoupled_weight_decay(0.5)
        .maximize(true)
        .form(wgpu_optim::rules::sgd::MomentumForm::Ema)
        .build()
        .unwrap();
    assert_eq!((state.config, state.steps), (config, 3));
    let [a, b] = &*state.tensors else {
        panic!("{state:?}");
    };
    assert_eq!((&*a.name, a.applied_steps, &*a.slots), ("a", 1, &[][..]));
    assert_eq!((&*b.name, b.applied_steps), ("layer.b", 3));
    assert_eq!((&*b.shape, &*b.state_kind), (&[2, 1][..], "ema"));
    let velocity = SlotState {
        name: "momentum_buffer".to_owned(),
        values: vec![1.5, -0.25].into(),
    };
    assert_eq!(b.slots, [velocity]);
    // And written in the format of today.
    let file = state.to_safetensors().unwrap();
    assert_eq!(
        SafeTensors::deserialize(&file).unwrap().names(),
        ["layer.b.momentum_buffer"]
    );
    assert_eq!(OptimizerState::from_safetensors(&file).unwrap(), state);
}

/// A file of these F32 tensors, or others; all of one element.
fn read(
    metadata: &HashMap<String, String>,
    tensors: &[(&str, Dtype)],
) -> Result<OptimizerState, StateFileError> {
    let bytes = [0; 8];
    let view = |(name, dtype): &(&str, Dtype)| {
        let view = TensorView::new(*dtype, vec![1], &bytes[..dtype.bitsize() / 8]);
        (name.to_string(), view.unwrap())
    };
    let views = tensors.iter().map(view);
    let file = safetensors::serialize(views, Some(metadata.clone())).unwrap();
    OptimizerState::from_safetensors(&file)
}

/// What a change of good metadata is refused with.
fn refused(
    good: &[(&str, &str)],
    name: &str,
    change: impl Fn(&mut HashMap<String, String>),
) -> String {
    let good = good.iter();
    let mut metadata: HashMap<_, _> = good
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect();
    let tensors = [(name, Dtype::F32)];
    read(&metadata, &tensors).unwrap();
    change(&mut metadata);
    read(&metadata, &tensors).unwrap_err().to_string()
}

/// Every entry is needed. `name` is that of a tensor's slot in the file.
fn check_that_all_are_needed(good: &[(&str, &str)], name: &str) {
    for (key, _) in good {
        let message = refused(good, name, |metadata| drop(metadata.remove(*key)));
        assert_eq!(
            message,
            format!("not a state file: its metadata has no {key}")
        );
    }
    let set = |key: &'static str, value: &'static str| {
        refused(good, name, |metadata| {
            metadata.insert(key.to_owned(), value.to_owned());
        })
    };
    assert!(set("format_version", "3").contains("version is 3, expected 1 or 2"));
    assert!(set("steps", "-1").contains("steps does not read"));
    assert!(set("steps", "18446744073709551616").contains("steps does not read"));
    assert!(set("applied_steps", "[1]").contains("applied_steps does not read"));
    let past = set("applied_steps", r#"{"a":18446744073709551616}"#);
    assert!(past.contains("applied_steps does not read"));
    assert!(set("applied_steps", "{}").contains("tensor \"a\" has no applied step count"));
    let twice = set("applied_steps", r#"{"a":1,"a":2}"#);
    assert_eq!(twice, "tensor \"a\" has two applied step counts");
}

#[test]
fn files_that_are_no_states_are_refused_by_name() {
    let rule = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let rule = rule.to_record().unwrap();
    let good = [
        ("format_version", "2"),
        ("rule", &rule),
        ("steps", "1"),
        ("applied_steps", r#"{"a":1}"#),
    ];
    check_that_all_are_needed(&good, "a.momentum_buffer");
    let set = |key: &str, value: &str| {
        refused(&good, "a.momentum_buffer", |metadata| {
            metadata.insert(key.to_owned(), value.to_owned());
        })
    };
    assert!(set("rule", "{}").contains("its rule does not read: missing field `rule`"));
    let unknown = set("rule", r#"{"rule":"nonsense"}"#);
    assert!(unknown.contains("unknown variant `nonsense`, expected"));
    let stray = rule.replace("\"lr\":", "\"stray\":0,\"lr\":");
    assert!(set("rule", &stray).contains("unknown field `stray`"));
    let lr = rule.replace("\"lr\":0.1", "\"lr\":-1");
    assert!(set("rule", &lr).contains("lr = -1.0 is out of range"));
    assert!(set("meanings", "[]").contains("meanings does not read"));
    let twice = set("meanings", r#"{"a":"ema","a":"ema"}"#);
    assert!(twice.contains("meanings does not read: tensor \"a\" comes twice"));
    let uncounted = set("meanings", r#"{"b":"ema"}"#);
    assert!(uncounted.contains("tensor \"b\" has no applied step count"));

    let metadata: HashMap<_, _> = good
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
    let refused = |tensors: &[(&str, Dtype)], metadata: &HashMap<String, String>| {
        read(metadata, tensors).unwrap_err().to_string()
    };
    for (name, dtype, message) in [
        (
            "a",
            Dtype::F32,
            "\"a\" names no slot: expected TENSOR.SLOT, and no dot in SLOT",
        ),
        (
            "a.",
            Dtype::F32,
            "\"a.\" names no slot: expected TENSOR.SLOT, and no dot in SLOT",
        ),
        (
            "a.exp_avg",
            Dtype::F32,
            "tensor \"a\": the state holds its exp_avg, expected one of momentum_buffer",
        ),
        (
            "a.b.momentum_buffer",
            Dtype::F32,
            "not a state file: tensor \"a.b\" has no applied step count",
        ),
        (
            "a.momentum_buffer",
            Dtype::F64,
            "tensor \"a\": the momentum_buffer is F64, expected F32, BF16 or F16",
        ),
    ] {
        assert_eq!(refused(&[(name, dtype)], &metadata), message);
    }
    // Of another meaning, the slot may be any.
    let mut other = metadata;
    other.insert("meanings".into(), r#"{"a":"adam"}"#.into());
    let state = read(&other, &[("a.exp_avg", Dtype::F32)]).unwrap();
    assert_eq!(state.tensors[0].state_kind, "adam");
    assert_eq!(
        refused(&[("a.exp_avg", Dtype::I32)], &other),
        "tensor \"a\": the exp_avg is I32, expected F32, BF16 or F16"
    );
    let text = OptimizerState::<SgdConfig>::from_safetensors(b"this is text").unwrap_err();
    assert!(matches!(text, StateFileError::Header(_)));
}

#[test]
fn files_of_format_1_that_are_no_states_are_refused_by_name() {
    let good = [
        ("format_version", "1"),
        ("form", "heavy-ball"),
        (
            "config",
            r#"{"lr":0.1,"momentum":0.9,"dampening":0,"nesterov":false,"weight_decay":0,
                "decoupled_weight_decay":0,"maximize":false,"time_step":1}"#,
        ),
        ("steps", "1"),
        ("applied_steps", r#"{"a":1}"#),
    ];
    check_that_all_are_needed(&good, "a");
    let set = |key: &'static str, value: &'static str| {
        refused(&good, "a", |metadata| {
            metadata.insert(key.to_owned(), value.to_owned());
        })
    };
    assert!(set("form", "nonsense").contains("unknown form \"nonsense\""));
    assert!(set("config", "{}").contains("config does not read"));
}

/// All slots of a tensor are of its shape.
#[test]
fn slots_of_two_shapes_are_refused() {
    let (saved, _) =
        check_that_it_goes_on(&ParamGroups::new(AdamConfig::builder(0.1).build().unwrap()));
    let file = saved.to_safetensors().unwrap();
    let header = Header::of(&file).unwrap();
    let tensors = header.tensors().iter().map(|tensor| {
        let shape = match &*tensor.name {
            "a.exp_avg_sq" => vec![3, 11],
            _ => tensor.shape.clone(),
        };
        (tensor.name.clone(), tensor.dtype, shape)
    });
    let mixed = Header::new(header.metadata.clone(), tensors).unwrap();
    let mut mixed = mixed.to_bytes().unwrap();
    mixed.extend(&file[header.data_start() as usize..]);
    let error = OptimizerState::<AdamConfig>::from_safetensors(&mixed).unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"tensor "a": the exp_avg_sq has shape [3, 11], expected [33]"#
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
                tensor.state_kind = config.form().to_string();
            }
            let file = state.to_safetensors().unwrap();
            assert_eq!(OptimizerState::from_safetensors(&file).unwrap(), state);
        }
    }
}
