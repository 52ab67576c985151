//! burn's tensors as its backend has them. With fusion they need not have been computed yet; then the step is an
//! operation in burn's queue, which is executed at once.

use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::tensor::FloatTensor;
use burn::backend::{BackendTensor, Cube, DispatchTensorKind};
use burn::module::ParamId;
use burn::tensor::Tensor;
use burn_cubecl::CubeDevice;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use wgpu_optim::{Rule, wgpu};

use crate::device::SharedDevice;
use crate::engine::{self, Engine, SharedEngine};
use crate::error::StepError;
use crate::rates::Rates;
use crate::stepped::{Copied, Expected, Stepped};

/// The primitive of a tensor without autodiff that has been checked to be on the shared device.
pub(crate) fn of<const D: usize>(tensor: Tensor<D>) -> FloatTensor<Cube> {
    match tensor.into_dispatch().kind {
        DispatchTensorKind::Cube(BackendTensor::Float(primitive)) => primitive,
        other => unreachable!("a float tensor on a checked device is {other:?}"),
    }
}

/// A tensor that can be written in place, or copied where it cannot.
fn settle_params(params: CubeTensor, copied: &mut Copied) -> CubeTensor {
    let is_strided = params.meta.is_tiled() || !params.is_contiguous();
    let is_shared = !params.can_mut();
    copied.params += usize::from(is_strided || is_shared);
    if is_strided {
        into_contiguous(params)
    } else if is_shared {
        params.copy()
    } else {
        params
    }
}

fn settle_grads(grads: CubeTensor, copied: &mut Copied) -> CubeTensor {
    copied.grads += usize::from(grads.meta.is_tiled() || !grads.is_contiguous());
    into_contiguous(grads)
}

fn step<R: Rule>(
    engine: &Mutex<Engine<R>>,
    rates: &Rates,
    tensors: &[Stepped<CubeTensor>],
    copied: Copied,
) -> Result<(), StepError> {
    let mut engine = engine.lock().unwrap_or_else(PoisonError::into_inner);
    engine.step(rates, tensors, copied)
}

#[cfg(not(feature = "fusion"))]
pub(crate) use direct::{Pending, filled};

#[cfg(not(feature = "fusion"))]
mod direct {
    use super::*;

    /// The tensor with the start of a buffer in it.
    pub(crate) fn filled(
        place: Tensor<1>,
        source: wgpu::Buffer,
        shared: &SharedDevice,
    ) -> Result<CubeTensor, StepError> {
        let place = settle_params(of(place), &mut Copied::default());
        engine::fill(&place, &source, &shared.kernels)?;
        Ok(place)
    }

    /// Parameters and gradients on their way to the step.
    #[derive(Default)]
    pub(crate) struct Pending {
        tensors: Vec<Stepped<CubeTensor>>,
        copied: Copied,
    }

    impl Pending {
        pub(crate) fn new(_expected: &[Expected], _device: &CubeDevice) -> Self {
            Self::default()
        }

        /// Returns the tensor that holds the parameters after the step.
        pub(crate) fn push(&mut self, _id: ParamId, stepped: Stepped<CubeTensor>) -> CubeTensor {
            let params = settle_params(stepped.params, &mut self.copied);
            let grads = settle_grads(stepped.grads, &mut self.copied);
            self.tensors.push(Stepped {
                path: stepped.path,
                shape: stepped.shape,
                dtype: stepped.dtype,
                params: params.clone(),
                grads,
            });
            params
        }

        pub(crate) fn step<R: Rule>(
            self,
            engine: &SharedEngine<R>,
            rates: Rates,
        ) -> Result<(), StepError> {
            step(engine, &rates, &self.tensors, self.copied)
        }
    }
}

#[cfg(feature = "fusion")]
pub(crate) use fused::{Pending, filled};

#[cfg(feature = "fusion")]
mod fused {
    use std::collections::HashMap;
    use std::fmt;

    use burn::backend::fusion::custom::{
        CustomOpIr, HandleContainer, Operation, OperationIr, OperationOutput, StreamId, TensorId,
        TensorIr,
    };
    use burn::backend::fusion::{
        Client, ExecutionError, FusionBackend, FusionHandle, FusionTensor, get_client,
    };
    use burn::tensor::{DType, Shape};
    use burn_cubecl::CubeBackend;
    use wgpu_optim::Kernels;

    use super::*;

    type Runtime = <CubeBackend as FusionBackend>::FusionRuntime;

    /// Parameters and gradients on their way to the step, and the tensors that will hold their updated values.
    pub(crate) struct Pending {
        client: Client<Runtime>,
        announced: HashMap<ParamId, FusionTensor<Runtime>>,
        tensors: Vec<Stepped<FusionTensor<Runtime>>>,
        updated: Vec<TensorId>,
    }

    impl Pending {
        /// Announces to burn all tensors that are expected, as results of one operation.
        pub(crate) fn new(expected: &[Expected], device: &CubeDevice) -> Self {
            let client = get_client::<CubeBackend>(device);
            let kinds = expected.iter().map(|param| (&param.shape, param.dtype));
            let ids = expected.iter().map(|expected| expected.id);
            Self {
                announced: ids.zip(announce(&client, kinds)).collect(),
                tensors: Vec::with_capacity(expected.len()),
                updated: Vec::with_capacity(expected.len()),
                client,
            }
        }

        /// Returns the tensor that holds the parameters after the step.
        pub(crate) fn push(
            &mut self,
            id: ParamId,
            stepped: Stepped<FusionTensor<Runtime>>,
        ) -> FusionTensor<Runtime> {
            let updated = match self.announced.remove(&id) {
                Some(updated) => updated,
                // A module that is visited otherwise than mapped.
                None => announce(&self.client, [(&stepped.shape, stepped.dtype)]).output(),
            };
            self.updated.push(updated.id);
            self.tensors.push(stepped);
            updated
        }

        pub(crate) fn step<R: Rule>(
            self,
            engine: &SharedEngine<R>,
            rates: Rates,
        ) -> Result<(), StepError> {
            if self.tensors.is_empty() {
                return step(engine, &rates, &[], Copied::default());
            }
            // A tensor that nobody else has is given away here, and so may be written.
            let ir = |stepped: Stepped<FusionTensor<Runtime>>| Stepped {
                path: stepped.path,
                shape: stepped.shape,
                dtype: stepped.dtype,
                params: stepped.params.into_ir(),
                grads: stepped.grads.into_ir(),
            };
            let tensors: Vec<_> = self.tensors.into_iter().map(ir).collect();
            let inputs: Vec<_> = tensors
                .iter()
                .flat_map(|stepped| [stepped.params.clone(), stepped.grads.clone()])
                .collect();
            let result = Arc::new(Mutex::new(None));
            let operation = StepOperation {
                engine: engine.clone(),
                rates,
                tensors,
                updated: self.updated,
                result: result.clone(),
            };
            // What it writes is registered by itself: the tensors are in the module already.
            let ir = CustomOpIr::new("wgpu_optim.step", &inputs, &[]);
            let ir = OperationIr::Custom(ir);
            self.client.register(StreamId::current(), ir, operation);
            let executed = self.client.try_sync(|| ());
            executed.map_err(|error| StepError::Runtime {
                message: format!("{error:?}"),
            })?;
            let result = result.lock().unwrap_or_else(PoisonError::into_inner).take();
            result.unwrap_or_else(|| {
                Err(StepError::Runtime {
                    message: "an operation that the step depends on has failed".to_owned(),
                })
            })
        }
    }

    /// Tensors that burn may use before the step has made them: whatever uses them is executed after it.
    fn announce<'s>(
        client: &Client<Runtime>,
        kinds: impl IntoIterator<Item = (&'s Vec<usize>, DType)>,
    ) -> Vec<FusionTensor<Runtime>> {
        let out = |(shape, dtype): (&Vec<usize>, DType)| {
            let id = client.create_empty_handle();
            TensorIr::uninit(id, Shape::from(shape.clone()), dtype)
        };
        let outputs: Vec<_> = kinds.into_iter().map(out).collect();
        let ir = OperationIr::Custom(CustomOpIr::new("wgpu_optim.announced", &[], &outputs));
        client.register(StreamId::current(), ir, Announced)
    }

    /// The tensor with the start of a buffer in it, once burn has come so far.
    pub(crate) fn filled(
        place: Tensor<1>,
        source: wgpu::Buffer,
        shared: &SharedDevice,
    ) -> Result<FusionTensor<Runtime>, StepError> {
        let client = get_client::<CubeBackend>(&shared.cube_device);
        let (shape, dtype) = (place.shape(), place.dtype());
        let place = of(place).into_ir();
        let out = TensorIr::uninit(client.create_empty_handle(), shape, dtype);
        let ir = CustomOpIr::new(
            "wgpu_optim.fill",
            std::slice::from_ref(&place),
            std::slice::from_ref(&out),
        );
        let operation = FillOperation {
            place,
            filled: out.id,
            source,
            kernels: shared.kernels.clone(),
        };
        let ir = OperationIr::Custom(ir);
        Ok(client.register(StreamId::current(), ir, operation).output())
    }

    #[derive(Debug)]
    struct FillOperation {
        place: TensorIr,
        filled: TensorId,
        source: wgpu::Buffer,
        kernels: Kernels,
    }

    impl Operation<Runtime> for FillOperation {
        fn execute(
            &self,
            handles: &mut HandleContainer<FusionHandle<Runtime>>,
        ) -> Result<(), ExecutionError> {
            let place = handles.get_float_tensor::<CubeBackend>(&self.place);
            let place = settle_params(place, &mut Copied::default());
            let filled = engine::fill(&place, &self.source, &self.kernels);
            handles.register_float_tensor::<CubeBackend>(&self.filled, place);
            filled.map_err(|error| ExecutionError::WithContext {
                reason: error.to_string(),
            })
        }
    }

    #[derive(Debug)]
    struct Announced;

    impl Operation<Runtime> for Announced {
        fn execute(
            &self,
            _handles: &mut HandleContainer<FusionHandle<Runtime>>,
        ) -> Result<(), ExecutionError> {
            Ok(())
        }
    }

    struct StepOperation<R: Rule> {
        engine: SharedEngine<R>,
        rates: Rates,
        tensors: Vec<Stepped<TensorIr>>,
        updated: Vec<TensorId>,
        result: Arc<Mutex<Option<Result<(), StepError>>>>,
    }

    impl<R: Rule> fmt::Debug for StepOperation<R> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.debug_struct("StepOperation")
                .field("tensors", &self.tensors.len())
                .finish_non_exhaustive()
        }
    }

    impl<R: Rule> Operation<Runtime> for StepOperation<R> {
        fn execute(
            &self,
            handles: &mut HandleContainer<FusionHandle<Runtime>>,
        ) -> Result<(), ExecutionError> {
            let mut copied = Copied::default();
            let mut tensors = Vec::with_capacity(self.tensors.len());
            for (stepped, updated) in self.tensors.iter().zip(&self.updated) {
                let params = handles.get_float_tensor::<CubeBackend>(&stepped.params);
                let grads = handles.get_float_tensor::<CubeBackend>(&stepped.grads);
                let params = settle_params(params, &mut copied);
                handles.register_float_tensor::<CubeBackend>(updated, params.clone());
                tensors.push(Stepped {
                    path: stepped.path.clone(),
                    shape: stepped.shape.clone(),
                    dtype: stepped.dtype,
                    params,
                    grads: settle_grads(grads, &mut copied),
                });
            }
            let result = step(&self.engine, &self.rates, &tensors, copied);
            *self.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
            Ok(())
        }
    }
}
