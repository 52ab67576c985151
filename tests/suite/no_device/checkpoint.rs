//! Checkpoints in memory and in files.

use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use wgpu_optim::control::{ControlRecord, ControlState};
use wgpu_optim::cpu::{CheckpointError, TensorValues};
use wgpu_optim::files::{Dtype, Header, HeaderError};
use wgpu_optim::state::{
    Checkpoint, CheckpointFileError, CheckpointMismatch, StateFileError, TensorParams,
};
use wgpu_optim::storage::SectionValues;
use wgpu_optim::{
    AdamConfig, CpuControl, CpuOptimizer, LossScale, Optimizer, SgdConfig, StepControl,
    StorageType, TensorSpec,
};

use crate::cases::values;

const TENSORS: [(&str, [usize; 2], StorageType); 3] = [
    ("b.weight", [3, 5], StorageType::Bf16),
    ("a", [2, 2], StorageType::F32),
    ("b.bias", [1, 7], StorageType::F16),
];

struct Run {
    optimizer: CpuOptimizer<AdamConfig>,
    control: CpuControl,
    params: Vec<TensorValues>,
}

impl Run {
    fn new(start: f32) -> Self {
        let specs = TENSORS.map(|(name, shape, of)| TensorSpec::new(name, shape).params_type(of));
        let scale = LossScale {
            initial: 8.0,
            growth_interval: 2,
            ..LossScale::default()
        };
        let control = StepControl::builder().max_norm(1.0).loss_scale(scale);
        let params = TENSORS.map(|(_, [rows, width], of)| {
            let numel = rows * width;
            TensorValues::new(of, &vec![start; numel])
        });
        let config = AdamConfig::adamw(0.01).build().unwrap();
        Self {
            optimizer: CpuOptimizer::new(config, specs).unwrap(),
            control: CpuControl::new(control.build().unwrap()),
            params: params.into(),
        }
    }

    fn steps(&mut self, steps: std::ops::Range<u64>) -> Vec<ControlRecord> {
        let step = |step: u64| {
            let grads = TENSORS.map(|(_, [rows, width], _)| {
                let mut grads = values(step, rows * width);
                if step % 3 == 1 {
                    grads[0] = f32::NAN;
                }
                TensorValues::new(StorageType::F32, &grads)
            });
            let grads: Vec<_> = grads.iter().map(TensorValues::slice).collect();
            let slices = self.params.iter_mut().map(TensorValues::slice_mut);
            let mut slices: Vec<_> = slices.collect();
            let control = &mut self.control;
            let record = self.optimizer.step_mixed_with(&mut slices, &grads, control);
            record.unwrap()
        };
        steps.map(step).collect()
    }

    fn checkpoint(&self) -> Checkpoint<AdamConfig> {
        let params: Vec<_> = self.params.iter().map(TensorValues::slice).collect();
        let checkpoint = self.optimizer.checkpoint(&params, Some(&self.control));
        checkpoint.unwrap()
    }

    fn load(&mut self, checkpoint: &Checkpoint<AdamConfig>) -> Result<(), CheckpointError> {
        let slices = self.params.iter_mut().map(TensorValues::slice_mut);
        let mut slices: Vec<_> = slices.collect();
        let control = Some(&mut self.control);
        self.optimizer
            .load_checkpoint(checkpoint, &mut slices, control)
    }
}

/// Names and contents of a folder.
fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let mut files: Vec<_> = entries
        .filter(|entry| entry.file_type().unwrap().is_file())
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    files
}

#[test]
fn a_run_goes_on_from_a_file_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    for stop in 0..6 {
        let path = folder.path().join(format!("{stop}.safetensors"));
        let mut whole = Run::new(0.5);
        whole.steps(0..stop);
        whole.checkpoint().save(&path).unwrap();
        let expected = whole.steps(stop..9);

        let mut resumed = Run::new(7.0);
        resumed.load(&Checkpoint::load(&path).unwrap()).unwrap();
        assert_eq!(resumed.optimizer.steps(), stop);
        let records = resumed.steps(stop..9);
        // Some norms are NaN.
        assert_eq!(format!("{records:?}"), format!("{expected:?}"));
        assert_eq!(records[0].step, stop + 1);
        let [resumed, whole] = [resumed, whole].map(|run| run.checkpoint());
        assert_eq!(
            resumed.to_safetensors().unwrap(),
            whole.to_safetensors().unwrap()
        );
    }
}

#[test]
fn any_reader_of_the_format_finds_the_parameters() {
    let mut run = Run::new(0.5);
    run.steps(0..1);
    let file = run.checkpoint().to_safetensors().unwrap();
    let read = SafeTensors::deserialize(&file).unwrap();
    let weight = read.tensor("b.weight").unwrap();
    assert_eq!((weight.dtype(), weight.shape()), (Dtype::BF16, &[3, 5][..]));
    let saved = run.checkpoint();
    assert_eq!(weight.data(), saved.params[0].values.bytes());
    assert!(read.tensor("b.weight.exp_avg").is_ok());
}

#[test]
fn a_file_is_replaced_at_once_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.safetensors");
    let mut run = Run::new(0.5);
    run.checkpoint().save(&path).unwrap();
    let before = files(folder.path());
    assert_eq!(before.len(), 1, "nothing is left beside it");

    // What no file can hold.
    let good = run.checkpoint();
    let mut unwritable = good.clone();
    unwritable.params.push(good.params[0].clone());
    let error = unwritable.save(&path).unwrap_err();
    let CheckpointFileError::State(StateFileError::Header(HeaderError::DuplicateTensor { tensor })) =
        error
    else {
        panic!("{error}");
    };
    assert_eq!(
        (&*tensor, files(folder.path())),
        ("b.weight", before.clone())
    );
    let mut foreign = good.clone();
    foreign.params[1].name = "c".to_owned();
    let error = foreign.save(&path).unwrap_err();
    assert!(
        matches!(&error, CheckpointFileError::UnknownParams { tensor } if tensor == "c"),
        "{error}"
    );
    let mut fewer = good.clone();
    fewer.params.pop();
    let error = fewer.save(&path).unwrap_err();
    assert!(
        matches!(&error, CheckpointFileError::MissingParams { tensor } if tensor == "b.bias"),
        "{error}"
    );
    assert_eq!(files(folder.path()), before);

    // Where none can be.
    for elsewhere in [
        folder.path().to_owned(),
        folder.path().join("no folder/run"),
    ] {
        let error = good.save(&elsewhere).unwrap_err();
        assert!(
            matches!(&error, CheckpointFileError::Io { action: "write", path, .. } if *path == elsewhere),
            "{error}"
        );
    }
    assert_eq!(files(folder.path()), before);

    run.steps(0..1);
    run.checkpoint().save(&path).unwrap();
    assert_ne!(files(folder.path()), before);
    assert_eq!(files(folder.path()).len(), 1);
}

#[cfg(unix)]
#[test]
fn a_file_keeps_its_permissions_and_a_link_its_place() {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    let folder = tempfile::tempdir().unwrap();
    let [path, link, other] = ["run", "latest", "other"].map(|name| folder.path().join(name));
    let mut run = Run::new(0.5);
    run.checkpoint().save(&path).unwrap();
    fs::write(&other, "").unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&path), mode(&other), "as any new file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    symlink("run", &link).unwrap();
    run.steps(0..1);
    run.checkpoint().save(&link).unwrap();
    assert_eq!(mode(&path) & 0o777, 0o640);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    let saved = Checkpoint::<AdamConfig>::load(&path).unwrap();
    assert_eq!(saved.state.steps, 1);
}

#[test]
fn what_is_no_checkpoint_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.safetensors");
    let mut run = Run::new(0.5);
    run.steps(0..2);
    let load = |content: &[u8]| {
        fs::write(&path, content).unwrap();
        let error = Checkpoint::<AdamConfig>::load(&path).unwrap_err();
        assert!(error.to_string().contains("run.safetensors"), "{error}");
        match error {
            CheckpointFileError::In { source, .. } => *source,
            error => error,
        }
    };
    let good = run.checkpoint();
    let state = good.state.to_safetensors().unwrap();
    // Tensors come in alphabetical order.
    assert!(matches!(load(&state), CheckpointFileError::MissingParams { tensor } if tensor == "a"));
    let file = good.to_safetensors().unwrap();
    for length in (0..file.len()).step_by(13) {
        let error = load(&file[..length]);
        assert!(matches!(error, CheckpointFileError::State(_)), "{error}");
    }
    let header = Header::of(&file).unwrap();
    let entries = header.tensors().iter().map(|tensor| {
        let dtype = match tensor.dtype {
            Dtype::F32 if tensor.name == "a" => Dtype::I32,
            dtype => dtype,
        };
        (tensor.name.clone(), dtype, tensor.shape.clone())
    });
    let header = Header::new(header.metadata.clone(), entries).unwrap();
    let mut whole_numbers = header.to_bytes().unwrap();
    whole_numbers.resize(whole_numbers.len() + header.data_len() as usize, 0);
    let error = load(&whole_numbers);
    assert!(
        matches!(&error, CheckpointFileError::Dtype { tensor, actual: Dtype::I32 } if tensor == "a"),
        "{error}"
    );
    let other_rule = Checkpoint::<SgdConfig>::from_safetensors(&file).unwrap_err();
    assert!(
        matches!(
            other_rule,
            CheckpointFileError::State(StateFileError::Rule(_))
        ),
        "{other_rule}"
    );
    fs::remove_file(&path).unwrap();
    let error = Checkpoint::<AdamConfig>::load(&path).unwrap_err();
    assert!(
        matches!(error, CheckpointFileError::Io { action: "read", .. }),
        "{error}"
    );
}

/// A parameter whose name is that of another's slot.
#[test]
fn names_that_would_meet_in_a_file_are_refused() {
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let names = [("a", [1]), ("a.momentum_buffer", [1])];
    let mut optimizer = CpuOptimizer::new(config, names).unwrap();
    let (mut a, mut b) = ([0.0], [0.0]);
    let slices = |optimizer: &CpuOptimizer, a: &[f32], b: &[f32]| {
        optimizer.checkpoint(&[a.into(), b.into()], None).unwrap()
    };
    assert!(slices(&optimizer, &a, &b).to_safetensors().is_ok());
    optimizer
        .step(&mut [&mut a, &mut b], &[&[1.0], &[1.0]])
        .unwrap();
    let error = slices(&optimizer, &a, &b).to_safetensors().unwrap_err();
    assert!(error.to_string().contains("a.momentum_buffer"), "{error}");
}

#[test]
fn what_belongs_to_other_tensors_changes_nothing() {
    let mut other = Run::new(7.0);
    other.steps(0..5);
    let good = other.checkpoint();
    let mut run = Run::new(0.5);
    run.steps(0..2);
    let before = run.checkpoint();
    let mut reshaped = good.clone();
    reshaped.params[0] = TensorParams {
        shape: vec![5, 3],
        ..reshaped.params[0].clone()
    };
    let mut retyped = good.clone();
    retyped.params[1].values = SectionValues::new(StorageType::F16.into(), &[0.0; 4]);
    let mut renamed = good.clone();
    renamed.state.tensors[2].name = "c".to_owned();
    let mut uncontrolled = good.clone();
    uncontrolled.state.control = None;
    for (wrong, expected) in [
        (
            reshaped,
            "\"b.weight\": the checkpoint has shape [5, 3], expected [3, 5]",
        ),
        (
            retyped,
            "\"a\": the checkpoint has params of f16, expected f32",
        ),
        (renamed, "the state has no tensor \"b.bias\""),
        (uncontrolled, "without a control"),
    ] {
        let error = run.load(&wrong).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(run.checkpoint(), before);
    }
    let mut slices: Vec<_> = run.params.iter_mut().map(TensorValues::slice_mut).collect();
    let alone = run.optimizer.load_checkpoint(&good, &mut slices, None);
    assert_eq!(alone, Err(CheckpointMismatch::UnusedControl.into()));
    assert_eq!(run.checkpoint(), before);
    run.load(&good).unwrap();
    assert_eq!(run.checkpoint(), good);
}

#[test]
fn names_steps_and_frozen_tensors_are_set() {
    let mut run = Run::new(0.5);
    assert_eq!(run.optimizer.names(), TENSORS.map(|(name, ..)| name));
    run.optimizer
        .set_frozen_where(|name| name.starts_with("b."));
    run.steps(0..1);
    let applied = |run: &Run| TENSORS.map(|(name, ..)| run.optimizer.applied_steps(name));
    assert_eq!(applied(&run), [Some(0), Some(1), Some(0)]);
    // Others go on.
    run.optimizer.set_frozen_where(|name| name == "a");
    run.steps(2..3);
    assert_eq!(applied(&run), [Some(1); 3]);
    run.optimizer.set_steps(100);
    run.steps(3..4);
    assert_eq!(
        (run.optimizer.steps(), applied(&run)),
        (101, [Some(2), Some(1), Some(2)])
    );
    let numbers: ControlState = run.control.state();
    assert_eq!(numbers.steps, 3);
}

/// Rows and tensors that come: what there is goes on bit for bit, what is new as a fresh optimizer has it, but for the count.
#[test]
fn a_state_of_fewer_rows_and_tensors_goes_on() {
    use wgpu_optim::{
        AdagradConfig, AnyRule, Masters, ParamGroups, Precision, Rule, ScheduleFreeSgdConfig,
    };

    let rules: [AnyRule; 4] = [
        AdamConfig::adamw(0.01).build().unwrap().into(),
        SgdConfig::builder(0.1)
            .momentum(0.9)
            .build()
            .unwrap()
            .into(),
        ScheduleFreeSgdConfig::builder(0.1).build().unwrap().into(),
        AdagradConfig::builder(0.1)
            .initial_accumulator_value(0.5)
            .build()
            .unwrap()
            .into(),
    ];
    for rule in rules {
        for (of, masters) in [
            (StorageType::F32, Masters::None),
            (StorageType::Bf16, Masters::F32),
            (StorageType::Bf16, Masters::LowBits),
        ] {
            let precision = Precision {
                masters,
                ..Precision::default()
            };
            let groups = ParamGroups::new(rule.clone()).with_precision(precision);
            let spec = |name: &str, rows: usize| TensorSpec::new(name, [rows, 3]).params_type(of);
            let step = |optimizer: &mut CpuOptimizer<AnyRule>, params: &mut [TensorValues]| {
                let grads = params.iter().map(|params| {
                    let numel = params.to_f32().len();
                    // The same for a row, wherever it is.
                    TensorValues::new(StorageType::F32, &values(3, 30)[..numel])
                });
                let grads: Vec<_> = grads.collect();
                let grads: Vec<_> = grads.iter().map(TensorValues::slice).collect();
                let slices = params.iter_mut().map(TensorValues::slice_mut);
                optimizer
                    .step_mixed(&mut slices.collect::<Vec<_>>(), &grads)
                    .unwrap();
            };
            let mut few = CpuOptimizer::with_groups(&groups, [spec("rows", 2)]).unwrap();
            let mut few_params = [TensorValues::new(of, &values(1, 6))];
            for _ in 0..3 {
                step(&mut few, &mut few_params);
            }
            let specs = [spec("new", 1), spec("rows", 4)];
            let mut many = CpuOptimizer::with_groups(&groups, specs).unwrap();
            many.load_grown_state(&few.state()).unwrap();
            assert_eq!(many.applied_steps("rows"), Some(3));
            assert_eq!((many.steps(), many.applied_steps("new")), (3, Some(0)));
            let new = values(2, 6);
            let rows = [few_params[0].to_f32(), new.clone()].concat();
            let mut many_params = [
                TensorValues::new(of, &[0.5; 3]),
                TensorValues::new(of, &rows),
            ];
            let here = format!("{rule:?} {of:?} {masters:?}");
            for _ in 0..3 {
                step(&mut few, &mut few_params);
                step(&mut many, &mut many_params);
                let there = many_params[1].to_f32();
                assert_eq!(there[..6], few_params[0].to_f32(), "{here}");
                let moved = there[6..].iter().zip(&new).filter(|(x, y)| x != y).count();
                assert!(
                    there.iter().all(|x| x.is_finite()) && moved > 0,
                    "{here}: {there:?}"
                );
            }
            let state = many.state();
            for slot in rule.slots().kept_names() {
                assert!(
                    state.tensors[1]
                        .slot(slot)
                        .unwrap()
                        .iter()
                        .all(|x| x.is_finite()),
                    "{here}"
                );
            }
            for (name, shape) in [("rows", [1, 3]), ("rows", [4, 2]), ("other", [2, 3])] {
                let spec = TensorSpec::new(name, shape).params_type(of);
                let mut other = CpuOptimizer::with_groups(&groups, [spec]).unwrap();
                let before = other.state();
                assert!(other.load_grown_state(&few.state()).is_err(), "{here}");
                assert_eq!(other.state(), before);
            }
        }
    }
}
