//! The way through a module: checks first, then the tensors out and the updated ones in.

use std::collections::HashSet;

use burn::backend::{Cube, GradientCheckpointingStrategy};
use burn::grad_clipping::GradientClipping;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor};
use wgpu_optim::StorageType;

use crate::error::StepError;
use crate::primitive::{self, Pending};
use crate::stepped::{Expected, Stepped};

/// Checks every parameter that has a gradient.
pub(crate) fn check<M: Module>(
    module: &M,
    grads: &GradientsParams,
    device: &Device,
) -> Result<Vec<Expected>, StepError> {
    let mut checker = Checker {
        path: Vec::new(),
        grads,
        device,
        expected: Vec::new(),
        seen: HashSet::new(),
        error: None,
    };
    module.visit(&mut checker);
    match checker.error {
        Some(error) => Err(error),
        None => Ok(checker.expected),
    }
}

struct Checker<'a> {
    path: Vec<String>,
    grads: &'a GradientsParams,
    device: &'a Device,
    expected: Vec<Expected>,
    /// A gradient belongs to the first parameter of its identity.
    seen: HashSet<ParamId>,
    error: Option<StepError>,
}

impl Checker<'_> {
    fn check<const D: usize>(
        &self,
        params: &Tensor<D>,
        grads: &Tensor<D>,
    ) -> Result<(), StepError> {
        let param = || self.path.join(".");
        for (role, tensor) in [("params", params), ("grads", grads)] {
            // Without regard to autodiff.
            let device = tensor.device();
            if device != *self.device {
                return Err(StepError::Device {
                    param: param(),
                    role,
                    expected: format!("{:?}", self.device),
                    actual: format!("{:?}", device.inner()),
                });
            }
            let actual = tensor.dtype();
            if storage_type(actual).is_none() {
                return Err(StepError::DType {
                    param: param(),
                    role,
                    actual,
                });
            }
            if !self.device.supports_dtype(actual) {
                return Err(StepError::Unsupported {
                    param: param(),
                    role,
                    actual,
                });
            }
        }
        let (expected, actual) = (params.dims().to_vec(), grads.dims().to_vec());
        if expected != actual {
            return Err(StepError::Shape {
                param: param(),
                expected,
                actual,
            });
        }
        Ok(())
    }
}

/// The storage type of a float tensor, if the kernels know it.
pub(crate) const fn storage_type(dtype: DType) -> Option<StorageType> {
    match dtype {
        DType::F32 => Some(StorageType::F32),
        DType::BF16 => Some(StorageType::Bf16),
        DType::F16 => Some(StorageType::F16),
        _ => None,
    }
}

impl ModuleVisitor for Checker<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.error.is_some() || self.seen.contains(&param.id) {
            return;
        }
        if let Some(grads) = self.grads.get::<D>(param.id) {
            self.seen.insert(param.id);
            match self.check(param, &grads) {
                Ok(()) => self.expected.push(Expected {
                    id: param.id,
                    path: self.path.join("."),
                    shape: grads.dims().to_vec(),
                    dtype: param.dtype(),
                }),
                Err(error) => self.error = Some(error),
            }
        }
    }
}

/// Takes parameters and gradients out of a checked module, and puts in the tensors that will hold the updated ones.
pub(crate) fn take<M: Module>(
    module: M,
    grads: &mut GradientsParams,
    clipping: Option<&GradientClipping>,
    pending: Pending,
) -> (M, Pending) {
    let mut taker = Taker {
        path: Vec::new(),
        grads,
        clipping,
        pending,
    };
    let module = module.map(&mut taker);
    (module, taker.pending)
}

struct Taker<'a> {
    path: Vec<String>,
    grads: &'a mut GradientsParams,
    clipping: Option<&'a GradientClipping>,
    pending: Pending,
}

impl ModuleMapper for Taker<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(mut grads) = self.grads.remove::<D>(param.id) else {
            return param;
        };
        if let Some(clipping) = self.clipping {
            grads = clipping.clip_gradient(grads);
        }
        let (id, tensor, mapper) = param.consume();
        let autodiff = Autodiff::of(&tensor);
        let stepped = Stepped {
            path: self.path.join("."),
            shape: tensor.dims().to_vec(),
            dtype: tensor.dtype(),
            params: primitive::of(tensor.inner()),
            grads: primitive::of(grads.inner()),
        };
        let updated = self.pending.push(id, stepped);
        let updated = Tensor::from_primitive::<Cube>(updated);
        Param::from_mapped_value(id, autodiff.restore(updated, id), mapper)
    }
}

/// The data that a parameter carries for autodiff, and its updated value has to carry again.
struct Autodiff {
    is_on: bool,
    requires_grad: bool,
    is_distributed: bool,
    checkpointing: Option<GradientCheckpointingStrategy>,
}

impl Autodiff {
    fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
        Self {
            is_on: tensor.is_autodiff(),
            requires_grad: tensor.is_require_grad(),
            is_distributed: tensor.is_distributed(),
            checkpointing: tensor.gradient_checkpointing_strategy(),
        }
    }

    fn restore<const D: usize>(self, updated: Tensor<D>, id: ParamId) -> Tensor<D> {
        if !self.is_on {
            return updated;
        }
        let mut tensor = Tensor::from_inner(updated);
        if let Some(strategy) = self.checkpointing {
            tensor = tensor.with_gradient_checkpointing_strategy(strategy);
        }
        if self.requires_grad {
            tensor = tensor.require_grad();
        }
        if self.is_distributed {
            tensor = tensor.set_distributed(id);
        }
        tensor
    }
}
