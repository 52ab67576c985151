//! Every mistake is named, and the next step works.

use burn::backend::wgpu::WgpuSetup;
use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor, TensorData};
use wgpu_optim_burn::wgpu_optim::gpu::LoadError;
use wgpu_optim_burn::wgpu_optim::{ParamGroups, SgdConfig, StateError};
use wgpu_optim_burn::{Init as _, ModuleOptimizer, ShareError, SharedDevice, StepError};

use crate::{MATRIX, Odd, gpu, momentum, tensor, values};

/// The gradients of all parameters, with another one for the matrix.
fn with_matrix(module: &Odd, grad: Tensor<2>) -> GradientsParams {
    let (mut grads, _) = module.grads(0);
    grads.register(module.matrix.id, grad);
    grads
}

/// Handles of another device of the same adapter.
pub fn other_handles(setup: &WgpuSetup) -> WgpuSetup {
    let descriptor = burn::backend::wgpu::wgpu::DeviceDescriptor::default();
    let request = setup.adapter.request_device(&descriptor);
    let (device, queue) = pollster::block_on(request).unwrap();
    WgpuSetup {
        device,
        queue,
        ..setup.clone()
    }
}

/// The same adapter's device under another name.
pub fn other_device(setup: &WgpuSetup) -> Device {
    Device::wgpu_options().setup(setup.clone()).init().unwrap()
}

#[test]
fn mistakes_are_named_and_the_next_step_works() {
    let (device, shared, setup) = gpu();
    let module = Odd::new(device);
    let before = module.host();
    let inner = device.clone().inner();
    let mut optimizer = momentum().init(shared);
    let grad = values(0, MATRIX.iter().product());
    let param = || "matrix".to_owned();

    let data = TensorData::new(grad.clone(), MATRIX);
    let double = Tensor::from_data(data, (&inner, DType::F64));
    let transposed = tensor(&grad, [MATRIX[1], MATRIX[0]], &inner);
    let other = other_device(setup);
    let elsewhere = tensor(&grad, MATRIX, &other);
    let of_dtype = StepError::DType {
        param: param(),
        role: "grads",
        actual: DType::F64,
    };
    let of_shape = StepError::Shape {
        param: param(),
        expected: MATRIX.into(),
        actual: vec![MATRIX[1], MATRIX[0]],
    };
    let of_device = StepError::Device {
        param: param(),
        role: "grads",
        expected: format!("{inner:?}"),
        actual: format!("{other:?}"),
    };
    for (grad, expected) in [
        (double, of_dtype),
        (transposed, of_shape),
        (elsewhere, of_device),
    ] {
        let grads = with_matrix(&module, grad);
        let error = optimizer.step(0.1, module.clone(), grads).unwrap_err();
        assert_eq!(error, expected);
    }
    let moved = module.clone().fork(&other.clone().autodiff());
    let (grads, _) = module.grads(0);
    let error = optimizer.step(0.1, moved, grads).unwrap_err();
    assert!(
        matches!(error, StepError::Device { role: "params", .. }),
        "{error}"
    );

    let (grads, _) = module.grads(0);
    let error = optimizer.step(f64::NAN, module.clone(), grads).unwrap_err();
    assert!(matches!(error, StepError::Config(_)), "{error}");

    assert_eq!(module.host(), before);
    let (grads, _) = module.grads(0);
    let module = optimizer.step(0.1, module, grads).unwrap();
    assert!(
        module
            .host()
            .iter()
            .zip(&before)
            .all(|(after, before)| after != before)
    );
    assert_eq!(optimizer.to_record().unwrap().unwrap().steps, 1);
}

/// Before the first step and after it, and where only another group refuses it.
#[test]
fn a_learning_rate_is_checked_before_anything_is_copied() {
    let (device, shared, _) = gpu();
    let mut module = Odd::new(device);
    let cube = SgdConfig::builder(1e30);
    let groups = ParamGroups::new(momentum())
        .with("cube", cube.build().unwrap(), |name| name == "cube")
        .unwrap();
    let mut optimizer = ModuleOptimizer::with_groups(shared, groups);
    for step in 0..2 {
        let before = module.host();
        let copied = optimizer.copied();
        for lr in [f64::NAN, -0.1, 1e38] {
            let (grads, _) = module.grads(step);
            let error = optimizer.step(lr, module.clone(), grads).unwrap_err();
            assert!(matches!(error, StepError::Config(_)), "{error}");
            // The clone would have been copied.
            assert_eq!(optimizer.copied(), copied);
            assert_eq!(module.host(), before);
        }
        let (grads, _) = module.grads(step);
        module = optimizer.step(1e-3, module, grads).unwrap();
        assert_ne!(module.host(), before);
        assert_eq!(optimizer.to_record().unwrap().unwrap().steps, step + 1);
    }
}

#[test]
fn a_parameter_that_changes_its_shape_is_named() {
    let (device, shared, _) = gpu();
    let mut module = Odd::new(device);
    let mut optimizer = momentum().init(shared);
    let (grads, _) = module.grads(0);
    module = optimizer.step(0.1, module, grads).unwrap();
    let other = tensor(&[1.0; 6], [2, 3], device).require_grad();
    module.matrix = burn::module::Param::from_tensor(other);
    let grad = tensor(&[1.0; 6], [2, 3], &device.clone().inner());
    let grads = with_matrix(&module, grad);
    let error = optimizer.step(0.1, module, grads).unwrap_err();
    assert!(matches!(&error, StepError::Rebind(_)), "{error}");
    assert!(error.to_string().contains("matrix"), "{error}");
}

#[test]
fn what_is_remembered_survives_a_parameter_that_cannot_join() {
    let (device, shared, _) = gpu();
    let mut module = Odd::new(device);
    let mut optimizer = momentum().init(shared);
    let (mut grads, _) = module.grads(0);
    grads.remove::<4>(module.cube.id);
    module = optimizer.step(0.1, module, grads).unwrap();
    let remembered = optimizer.to_record().unwrap();

    // The cube is new, which makes the optimizer anew, and the matrix is not what it was.
    let mut changed = module.clone();
    changed.matrix = burn::module::Param::from_tensor(tensor(&[1.0; 6], [2, 3], device));
    let (mut grads, _) = module.grads(1);
    grads.remove::<2>(module.matrix.id);
    grads.register(
        changed.matrix.id,
        tensor(&[1.0; 6], [2, 3], &device.clone().inner()),
    );
    let error = optimizer.step(0.1, changed, grads).unwrap_err();
    assert!(error.to_string().contains("matrix"), "{error}");
    assert_eq!(optimizer.to_record().unwrap(), remembered);

    let (grads, _) = module.grads(1);
    optimizer.step(0.1, module, grads).unwrap();
    assert_eq!(optimizer.to_record().unwrap().unwrap().steps, 2);
}

#[test]
fn a_record_of_another_module_is_an_error_at_the_next_step() {
    let (device, shared, _) = gpu();
    let module = Odd::new(device);
    let mut optimizer = momentum().init(shared);
    let (grads, _) = module.grads(0);
    let module = optimizer.step(0.1, module, grads).unwrap();
    let mut record = optimizer.to_record().unwrap().unwrap();
    let index = record
        .tensors
        .iter()
        .position(|entry| entry.name == "cube")
        .unwrap();
    let values = &mut record.tensors[index].slots[0].values;
    *values = values.to_f32()[1..].to_vec().into();
    let mut resumed = momentum().init(shared).load_record(record);
    let (grads, _) = module.grads(1);
    let error = resumed.step(0.1, module.clone(), grads).unwrap_err();
    let is_length = matches!(&error, StepError::State(LoadError::State(StateError::Length { tensor, .. })) if tensor == "cube");
    assert!(is_length, "{error}");
    // The record is still there, and so is its fault.
    let (grads, _) = module.grads(1);
    assert_eq!(resumed.step(0.1, module.clone(), grads).unwrap_err(), error);
    let (grads, _) = module.grads(1);
    optimizer.step(0.1, module, grads).unwrap();
}

#[test]
fn handles_of_another_device_are_an_error() {
    let (device, _, setup) = gpu();
    let other = other_handles(setup);
    let shared = SharedDevice::new(device, &other).unwrap();
    let module = Odd::new(device);
    let (grads, _) = module.grads(0);
    let error = momentum()
        .init(&shared)
        .step(0.1, module, grads)
        .unwrap_err();
    assert!(
        matches!(error, StepError::Build(_) | StepError::Rebind(_)),
        "{error}"
    );
}

#[test]
fn errors_say_what_they_mean() {
    let error = ShareError::Backend {
        actual: "Flex".into(),
    };
    assert_eq!(
        error.to_string(),
        "expected a device of burn's wgpu backend, got Flex"
    );
}
