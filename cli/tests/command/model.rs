//! Models in a directory of their own.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use safetensors::Dtype;
use safetensors::tensor::{SafeTensors, TensorView};
use tempfile::TempDir;
use wgpu_optim::half::{bf16, f16};

use crate::wgpu_optim;

/// A tensor of a file, bytes and all.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    pub fn f32(shape: &[usize], values: &[f32]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len());
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self {
            dtype: Dtype::F32,
            shape: shape.to_vec(),
            bytes,
        }
    }

    /// Values rounded to the nearest of 16 bits, or as they are.
    pub fn stored_as(dtype: Dtype, shape: &[usize], values: &[f32]) -> Self {
        let bytes = |value: &f32| match dtype {
            Dtype::BF16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
            _ => value.to_le_bytes().to_vec(),
        };
        Self {
            dtype,
            bytes: values.iter().flat_map(bytes).collect(),
            ..Self::f32(shape, values)
        }
    }

    pub fn i64(values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self {
            dtype: Dtype::I64,
            shape: vec![values.len()],
            bytes,
        }
    }

    pub fn values(&self) -> Vec<f32> {
        let halves = || self.bytes.chunks(2).map(|b| b.try_into().unwrap());
        match self.dtype {
            Dtype::F32 => self
                .bytes
                .chunks(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect(),
            Dtype::BF16 => halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
            Dtype::F16 => halves().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
            other => panic!("{other}"),
        }
    }
}

/// A safetensors file in memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Model {
    pub tensors: BTreeMap<String, Tensor>,
    pub metadata: Option<HashMap<String, String>>,
}

impl Model {
    pub fn new<const N: usize>(tensors: [(&str, Tensor); N]) -> Self {
        let tensors = tensors
            .map(|(name, tensor)| (name.to_owned(), tensor))
            .into();
        Self {
            tensors,
            metadata: None,
        }
    }

    pub fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let owned = |(name, view): (String, TensorView<'_>)| {
            let (dtype, shape) = (view.dtype(), view.shape().to_vec());
            (
                name,
                Tensor {
                    dtype,
                    shape,
                    bytes: view.data().to_vec(),
                },
            )
        };
        Self {
            tensors: tensors.tensors().into_iter().map(owned).collect(),
            metadata: header.metadata().clone(),
        }
    }

    pub fn write(&self, path: &Path) {
        let views = self.tensors.iter().map(|(name, tensor)| {
            let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap();
            (name.clone(), view)
        });
        fs::write(
            path,
            safetensors::serialize(views, self.metadata.clone()).unwrap(),
        )
        .unwrap();
    }
}

/// A directory with the files of a step.
pub struct Workspace(TempDir);

impl Workspace {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A directory with `params` and `grads`.
    pub fn with(params: &Model, grads: &Model) -> Self {
        let workspace = Self::new();
        params.write(&workspace.path("params"));
        grads.write(&workspace.path("grads"));
        workspace
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The command with these arguments, started in the directory.
    pub fn command(&self, line: &str) -> Command {
        let mut command = wgpu_optim();
        command.current_dir(self.0.path()).args(line.split(' '));
        command
    }

    /// `step` from `params` and `grads` to `out_params` and `out_state`, whatever state an earlier one has left there.
    pub fn step(&self) -> Command {
        let mut step = self.step_between("params", ["out_params", "out_state"]);
        step.arg("--overwrite-state");
        step
    }

    /// `step` from these parameters and `grads` to these outputs.
    pub fn step_between(&self, params: &str, [out_params, out_state]: [&str; 2]) -> Command {
        let mut step = self.command("step --grads grads");
        step.args(["--params", params])
            .args(["--out-params", out_params])
            .args(["--out-state", out_state]);
        step
    }

    /// Makes the outputs of a step the inputs of the next.
    pub fn go_on(&self) {
        for (output, input) in [("out_params", "params"), ("out_state", "state")] {
            fs::rename(self.path(output), self.path(input)).unwrap();
        }
    }

    /// Every file with its content.
    pub fn snapshot(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let entries = fs::read_dir(self.0.path())
            .unwrap()
            .map(|entry| entry.unwrap().path());
        entries
            .map(|path| {
                let content = if path.is_file() {
                    fs::read(&path).unwrap()
                } else {
                    Vec::new()
                };
                (path, content)
            })
            .collect()
    }
}

/// Values of both signs around one, none of them zero.
pub fn values(seed: u64, numel: usize) -> Vec<f32> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let value = |_| (0.25 + rng.f32()) * if rng.bool() { 1.0 } else { -1.0 };
    (0..numel).map(value).collect()
}
