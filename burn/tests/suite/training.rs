//! burn's own kind of test: a small network, by burn's layers and autodiff.

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{Linear, LinearConfig, Relu};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use wgpu_optim_burn::Init as _;

use crate::{gpu, rules, tensor, values};

#[derive(Module, Debug)]
struct Network {
    conv: Conv2d,
    linear: Linear,
    relu: Relu,
}

impl Network {
    fn new(device: &Device) -> Self {
        Self {
            conv: Conv2dConfig::new([1, 3], [3, 3]).init(device),
            linear: LinearConfig::new(3 * 6 * 6, 1).init(device),
            relu: Relu::new(),
        }
    }

    fn loss(&self, images: Tensor<4>, targets: Tensor<2>) -> Tensor<1> {
        let hidden = self.relu.forward(self.conv.forward(images));
        let outputs = self.linear.forward(hidden.flatten(1, 3));
        (outputs - targets).powf_scalar(2.0).mean()
    }
}

#[test]
fn the_loss_falls_and_a_record_resumes() {
    let (device, shared, _) = gpu();
    let images = tensor(&values(0, 8 * 8 * 8), [8, 1, 8, 8], device);
    let targets = tensor(&values(1, 8), [8, 1], device);
    let loss = |network: &Network| network.loss(images.clone(), targets.clone());
    for rule in rules() {
        let mut network = Network::new(device);
        let mut optimizer = rule.clone().init(shared);
        let first = loss(&network).into_scalar::<f32>();
        for step in 0..60 {
            let grads = GradientsParams::from_grads(loss(&network).backward(), &network);
            network = optimizer.step(0.01, network, grads).unwrap();
            // The weights of a convolution get strided gradients from burn.
            assert_eq!(optimizer.copied().params, 0, "step {step}");
        }
        let last = loss(&network).into_scalar::<f32>();
        assert!(last < 0.5 * first, "{rule:?}: from {first} to {last}");

        let record = optimizer.to_record().unwrap().unwrap();
        let names: Vec<_> = record
            .tensors
            .iter()
            .map(|entry| entry.name.as_str())
            .collect();
        for name in ["conv.weight", "conv.bias", "linear.weight", "linear.bias"] {
            assert!(names.contains(&name), "{names:?}");
        }
        let mut resumed = rule.init(shared).load_record(record);
        let mut copy = network.clone();
        for _ in 0..3 {
            let grads = GradientsParams::from_grads(loss(&network).backward(), &network);
            network = optimizer.step(0.01, network, grads).unwrap();
            let grads = GradientsParams::from_grads(loss(&copy).backward(), &copy);
            copy = resumed.step(0.01, copy, grads).unwrap();
        }
        let [a, b] = [&network, &copy].map(|network| loss(network).into_scalar::<f32>());
        assert_eq!(a, b);
        assert!(network.valid().conv.weight.val().device() == device.clone().inner());
    }
}
