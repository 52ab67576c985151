//! Parameters and gradients of 16 bits.

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor, TensorData};
use wgpu_optim_burn::wgpu_optim::half::f16;
use wgpu_optim_burn::wgpu_optim::{Masters, ParamGroups, Precision, StepControl};
use wgpu_optim_burn::{Control, Init as _, ModuleOptimizer, StepError};

use crate::{gpu, rules, subtraction, values};

#[derive(Module, Debug)]
struct Vectors {
    params: Vec<Param<Tensor<1>>>,
}

const NUMELS: [usize; 4] = [1, 7, 1000, 8193];

/// Values that 16 bits hold.
fn exact(seed: u64, numel: usize) -> Vec<f32> {
    let values = values(seed, numel);
    values
        .iter()
        .map(|value| f16::from_f32(*value).to_f32())
        .collect()
}

fn typed(values: &[f32], dtype: DType, device: &Device) -> Tensor<1> {
    let data = TensorData::new(values.to_vec(), [values.len()]);
    Tensor::from_data(data, (device, dtype))
}

impl Vectors {
    fn new(dtype: DType) -> Self {
        let (device, ..) = gpu();
        let param = |(seed, numel)| Param::from_tensor(typed(&exact(seed, numel), dtype, device));
        Self {
            params: (0..).zip(NUMELS).map(param).collect(),
        }
    }

    fn grads(&self, seed: u64, dtype: DType) -> GradientsParams {
        let inner = gpu().0.clone().inner();
        let mut grads = GradientsParams::new();
        for ((param, numel), index) in self.params.iter().zip(NUMELS).zip(0..) {
            let values = exact(seed + index, numel);
            grads.register(param.id, typed(&values, dtype, &inner));
        }
        grads
    }

    fn host(&self) -> Vec<f32> {
        let values = |param: &Param<Tensor<1>>| param.val().into_data().convert::<f32>();
        let values = self.params.iter().map(values);
        values
            .flat_map(|data| data.try_to_vec::<f32>().unwrap())
            .collect()
    }
}

#[test]
fn masters_make_the_steps_of_f32_and_a_record_resumes() {
    let (_, shared, _) = gpu();
    assert!(
        shared.device().supports_dtype(DType::F16),
        "so says lavapipe"
    );
    for rule in rules() {
        let control = StepControl::builder().grad_scale(4.0).build().unwrap();
        let init = || {
            let control = Control::new(shared, control.clone()).unwrap();
            rule.clone().init(shared).with_control(&control)
        };
        let (mut optimizer, mut of_f32) = (init(), init());
        let (mut module, mut in_f32) = (Vectors::new(DType::F16), Vectors::new(DType::F32));
        for step in 0..6 {
            if step == 3 {
                let record = optimizer.to_record().unwrap().unwrap();
                let slots = &record.tensors[0].slots;
                assert!(slots.iter().any(|slot| slot.name == "master_params"));
                optimizer = init().load_record(record);
            }
            let mut grads = module.grads(1000 * step, DType::F16);
            let mut grads_in_f32 = in_f32.grads(1000 * step, DType::F32);
            if step == 3 {
                // A parameter of the record waits.
                grads.remove::<1>(module.params[1].id);
                grads_in_f32.remove::<1>(in_f32.params[1].id);
            }
            module = optimizer.step(0.01, module, grads).unwrap();
            in_f32 = of_f32.step(0.01, in_f32, grads_in_f32).unwrap();
            for (index, (actual, master)) in module.host().iter().zip(in_f32.host()).enumerate() {
                let expected = f16::from_f32(master).to_f32();
                assert_eq!(*actual, expected, "{rule:?}, step {step}, element {index}");
            }
        }
    }
}

#[test]
fn without_masters_parameters_are_what_is_stepped() {
    let (_, shared, _) = gpu();
    let groups = ParamGroups::new(subtraction()).with_precision(Precision {
        masters: Masters::None,
        ..Precision::default()
    });
    let mut optimizer = ModuleOptimizer::with_groups(shared, groups);
    let module = Vectors::new(DType::F16);
    let (before, grads) = (module.host(), module.grads(1000, DType::F32));
    let after = optimizer.step(1.0, module, grads).unwrap().host();
    let grads = (1000..)
        .zip(NUMELS)
        .flat_map(|(seed, numel)| exact(seed, numel));
    for ((before, after), grad) in before.iter().zip(after).zip(grads) {
        assert_eq!(after, f16::from_f32(before - grad).to_f32());
    }
    assert!(
        optimizer.to_record().unwrap().unwrap().tensors[0]
            .slots
            .is_empty()
    );
}

#[test]
fn a_type_that_burn_does_not_support_there_is_named() {
    let (device, shared, _) = gpu();
    if device.supports_dtype(DType::BF16) {
        return;
    }
    let module = Vectors::new(DType::F32);
    let grads = module.grads(0, DType::BF16);
    let mut optimizer = subtraction().init(shared);
    let error = optimizer.step(1.0, module.clone(), grads).unwrap_err();
    let expected = StepError::Unsupported {
        param: "params.0".into(),
        role: "grads",
        actual: DType::BF16,
    };
    assert_eq!(error, expected);
    let grads = module.grads(0, DType::F32);
    optimizer.step(1.0, module, grads).unwrap();
}
