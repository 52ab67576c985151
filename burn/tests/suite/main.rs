//! Modules of burn's, stepped on burn's device. These tests need a wgpu adapter; a software one will do.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod control;
mod errors;
mod groups;
mod learner;
mod order;
mod records;
mod sharing;
mod sixteen_bits;
mod steps;
mod training;

use std::sync::LazyLock;

use burn::backend::wgpu::WgpuSetup;
use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Shape, Tensor, TensorData};
use wgpu_optim_burn::wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim_burn::wgpu_optim::{AdamConfig, AnyRule, SgdConfig};
use wgpu_optim_burn::{Init as _, ModuleOptimizer, SharedDevice};

/// burn's device with autodiff, and what is shared of it.
fn gpu() -> &'static (Device, SharedDevice, WgpuSetup) {
    static GPU: LazyLock<(Device, SharedDevice, WgpuSetup)> = LazyLock::new(|| {
        let (device, setup) = Device::wgpu_options().init_with_setup().unwrap();
        let shared = SharedDevice::new(&device, &setup).unwrap();
        (device.autodiff(), shared, setup)
    });
    &GPU
}

fn momentum() -> SgdConfig {
    SgdConfig::builder(0.1).momentum(0.9).build().unwrap()
}

/// Learning rate one, so that each step subtracts the gradient.
fn subtraction() -> SgdConfig {
    SgdConfig::builder(1.0).build().unwrap()
}

/// Two slots, one, and none.
fn rules() -> [AnyRule; 3] {
    [
        AdamConfig::adamw(0.1).build().unwrap().into(),
        momentum().into(),
        SgdConfig::builder(0.1).build().unwrap().into(),
    ]
}

/// Values between 2^-6 and 4 in magnitude, of both signs, none of them zero.
fn values(seed: u64, numel: usize) -> Vec<f32> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let value = |rng: &mut fastrand::Rng| {
        let magnitude = (rng.f32() * 8.0 - 6.0).exp2();
        if rng.bool() { magnitude } else { -magnitude }
    };
    (0..numel).map(|_| value(&mut rng)).collect()
}

fn tensor<const D: usize>(values: &[f32], shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), Shape::new(shape)), device)
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

/// Parameters of odd and even sizes, small and large, of several ranks, one without elements.
#[derive(Module, Debug)]
struct Odd {
    matrix: Param<Tensor<2>>,
    cube: Param<Tensor<4>>,
    vectors: Vec<Param<Tensor<1>>>,
}

const MATRIX: [usize; 2] = [33, 97];
const CUBE: [usize; 4] = [5, 3, 7, 7];
const VECTORS: [usize; 12] = [1, 2, 3, 64, 65, 255, 1000, 1023, 4096, 8192, 8193, 30_001];

impl Odd {
    /// With values of these seeds.
    fn new(device: &Device) -> Self {
        let numel = |shape: &[usize]| shape.iter().product();
        let vector = |(seed, numel): (u64, usize)| {
            Param::from_tensor(tensor(&values(seed, numel), [numel], device))
        };
        Self {
            matrix: Param::from_tensor(tensor(&values(100, numel(&MATRIX)), MATRIX, device)),
            cube: Param::from_tensor(tensor(&values(101, numel(&CUBE)), CUBE, device)),
            vectors: (0..).zip(VECTORS).map(vector).collect(),
        }
    }

    /// All values, in the order of `names`.
    fn host(&self) -> Vec<Vec<f32>> {
        let vectors = self.vectors.iter().map(|vector| host(vector.val()));
        let mut values = vec![host(self.matrix.val()), host(self.cube.val())];
        values.extend(vectors);
        values
    }

    fn names() -> Vec<String> {
        let vectors = (0..VECTORS.len()).map(|index| format!("vectors.{index}"));
        let mut names = vec!["matrix".to_owned(), "cube".to_owned()];
        names.extend(vectors);
        names
    }

    /// Gradients that burn has yet to compute: twice some values, which rounds nothing. And the same on the host.
    fn grads(&self, seed: u64) -> (GradientsParams, Vec<Vec<f32>>) {
        let device = gpu().0.clone().inner();
        let mut grads = GradientsParams::new();
        let mut host = Vec::new();
        let mut next = |numel: usize| {
            let halves = values(seed + host.len() as u64, numel);
            host.push(halves.iter().map(|half| 2.0 * half).collect());
            halves
        };
        let halves = next(MATRIX.iter().product());
        grads.register(self.matrix.id, tensor(&halves, MATRIX, &device) * 2.0);
        let halves = next(CUBE.iter().product());
        grads.register(self.cube.id, tensor(&halves, CUBE, &device) * 2.0);
        for (vector, numel) in self.vectors.iter().zip(VECTORS) {
            let halves = next(numel);
            grads.register(vector.id, tensor(&halves, [numel], &device) * 2.0);
        }
        (grads, host)
    }
}

/// For each rule an optimizer, a module that it is to step, and its oracles.
fn runs() -> impl Iterator<Item = (AnyRule, ModuleOptimizer<AnyRule>, Odd, Oracles)> {
    let (device, shared, _) = gpu();
    rules().into_iter().map(move |rule| {
        let module = Odd::new(device);
        let oracles = Oracles::new(&module);
        (rule.clone(), rule.init(shared), module, oracles)
    })
}

/// An oracle for each tensor of a module.
struct Oracles(Vec<Oracle<AnyRule>>);

impl Oracles {
    fn new(module: &Odd) -> Self {
        let oracle = |params: &Vec<f32>| Oracle::new(params, Roundoff::WGSL);
        Self(module.host().iter().map(oracle).collect())
    }

    fn step(&mut self, rule: &AnyRule, grads: &[Vec<f32>]) {
        for (oracle, grads) in self.0.iter_mut().zip(grads) {
            oracle.step(rule, grads);
        }
    }

    fn check(&self, module: &Odd) {
        for ((oracle, params), name) in self.0.iter().zip(module.host()).zip(Odd::names()) {
            oracle
                .check_params(&params)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
}
