//! Memory that is not the parameter's alone, and elements that do not lie one after the other.

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use wgpu_optim_burn::{Copied, Init as _};

use crate::{Odd, gpu, host, momentum, runs, subtraction, tensor, values};

#[test]
fn clones_keep_their_values() {
    for (rule, mut optimizer, mut module, mut oracles) in runs() {
        for step in 0..4 {
            let before = module.host();
            let (grads, on_host) = module.grads(step);
            // Whole modules, one tensor, and none.
            let kept = (step % 2 == 0).then(|| module.clone());
            let cube = (step == 1).then(|| module.cube.val());
            module = optimizer.step(0.1, module, grads).unwrap();
            let copied = [14, 1, 14, 0][step as usize];
            assert_eq!(optimizer.copied().params, copied, "step {step}");
            oracles.step(&rule, &on_host);
            oracles.check(&module);
            if let Some(kept) = kept {
                assert_eq!(kept.host(), before);
            }
            if let Some(cube) = cube {
                assert_eq!(host(cube), before[1]);
            }
        }
    }
}

#[test]
fn views_keep_their_values() {
    let (device, shared, _) = gpu();
    let module = Odd::new(device);
    let before = module.host();
    let view = module.matrix.val().inner().transpose();
    let flat = module.cube.val().inner().reshape([5 * 3 * 7 * 7]);
    let transposed = host(view.clone());
    let mut optimizer = momentum().init(shared);
    let (grads, _) = module.grads(0);
    let module = optimizer.step(0.1, module, grads).unwrap();
    assert_eq!(host(view), transposed);
    assert_eq!(host(flat), before[1]);
    assert_ne!(module.host()[0], before[0]);
    assert_ne!(module.host()[1], before[1]);
}

#[derive(Module, Debug)]
struct Tied {
    first: Param<Tensor<1>>,
    second: Param<Tensor<1>>,
}

#[test]
fn parameters_that_were_one_tensor_part() {
    let (device, shared, _) = gpu();
    let start = values(0, 1000);
    let one = tensor(&start, [1000], device);
    let module = Tied {
        first: Param::from_tensor(one.clone()),
        second: Param::from_tensor(one),
    };
    let mut grads = GradientsParams::new();
    let inner = device.clone().inner();
    grads.register(module.first.id, tensor(&[1.0; 1000], [1000], &inner));
    grads.register(module.second.id, tensor(&[-1.0; 1000], [1000], &inner));
    let module = subtraction().init(shared).step(1.0, module, grads).unwrap();
    let shifted = |by: f32| start.iter().map(|value| value + by).collect::<Vec<_>>();
    assert_eq!(host(module.first.val()), shifted(-1.0));
    assert_eq!(host(module.second.val()), shifted(1.0));
}

#[derive(Module, Debug)]
struct Matrix {
    weight: Param<Tensor<2>>,
}

#[test]
fn strided_tensors_are_laid_out() {
    let (device, shared, _) = gpu();
    let inner = device.clone().inner();
    let (start, grad) = (values(0, 21 * 34), values(1, 21 * 34));
    for (transpose_params, transpose_grads) in [(true, false), (false, true), (true, true)] {
        let laid_out = |values: &[f32], transpose: bool| {
            let tensor = |shape| tensor(values, shape, &inner);
            if transpose {
                tensor([34, 21]).transpose()
            } else {
                tensor([21, 34])
            }
        };
        let params = laid_out(&start, transpose_params);
        let grads = laid_out(&grad, transpose_grads);
        let expected: Vec<_> = host(params.clone())
            .iter()
            .zip(host(grads.clone()))
            .map(|(param, grad)| param - grad)
            .collect();
        let module = Matrix {
            weight: Param::from_tensor(Tensor::from_inner(params).require_grad()),
        };
        let mut registered = GradientsParams::new();
        registered.register(module.weight.id, grads);
        let mut optimizer = subtraction().init(shared);
        let module = optimizer.step(1.0, module, registered).unwrap();
        assert_eq!(host(module.weight.val()), expected);
        let copied = Copied {
            params: usize::from(transpose_params),
            grads: usize::from(transpose_grads),
        };
        assert_eq!(optimizer.copied(), copied);
    }
}
