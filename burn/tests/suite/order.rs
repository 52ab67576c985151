//! What burn has queued before the step comes before it, and what burn does later comes after.

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use wgpu_optim_burn::Init as _;
use wgpu_optim_burn::wgpu_optim::SgdConfig;

use crate::{gpu, host, tensor, values};

#[derive(Module, Debug)]
struct Model {
    weights: Vec<Param<Tensor<1>>>,
}

const NUMELS: [usize; 3] = [5, 1000, 70_001];

impl Model {
    fn new() -> Self {
        let weight = |numel| tensor(&values(numel as u64, numel), [numel], &gpu().0);
        let weights = NUMELS.map(|numel| Param::from_tensor(weight(numel)));
        Self {
            weights: weights.into(),
        }
    }

    /// The slope of half the sum of squares: the parameters themselves, by way of burn's autodiff.
    fn grads(&self) -> GradientsParams {
        let squares = self
            .weights
            .iter()
            .map(|weight| weight.val().powf_scalar(2.0).sum());
        let loss = squares.reduce(|sum, next| sum + next).unwrap() * 0.5;
        GradientsParams::from_grads(loss.backward(), self)
    }
}

/// With a learning rate of a half each step halves the parameters, which rounds nothing.
fn halving() -> SgdConfig {
    SgdConfig::builder(0.5).build().unwrap()
}

#[test]
fn nothing_is_read_before_it_is_written() {
    let mut model = Model::new();
    let mut optimizer = halving().init(&gpu().1);
    let mut sums = Vec::new();
    for _ in 0..6 {
        let grads = model.grads();
        // Queued before the step: sees the values before it, whenever it is executed.
        let before = model.weights[2].val().inner() * 4.0;
        model = optimizer.step(0.5, model, grads).unwrap();
        // Queued after it: sees the values after it.
        let after = model.weights[2].val().inner() * 8.0;
        sums.push((before, after));
    }
    let start = NUMELS.map(|numel| values(numel as u64, numel));
    let scaled = |by: f32| start[2].iter().map(|value| by * value).collect::<Vec<_>>();
    for (step, (before, after)) in sums.into_iter().enumerate() {
        let halved = 0.5_f32.powi(step as i32);
        assert_eq!(host(before), scaled(4.0 * halved), "before step {step}");
        assert_eq!(host(after), scaled(4.0 * halved), "after step {step}");
    }
    for (weight, start) in model.weights.iter().zip(start) {
        let expected: Vec<_> = start.iter().map(|value| value / 64.0).collect();
        assert_eq!(host(weight.val()), expected);
    }
}

#[test]
fn gradients_of_another_thread_are_waited_for() {
    let mut model = Model::new();
    let mut optimizer = halving().init(&gpu().1);
    for _ in 0..5 {
        let (sender, receiver) = std::sync::mpsc::channel();
        let of_thread = model.clone();
        // The thread is gone before the step, its work still queued.
        std::thread::spawn(move || sender.send(of_thread.grads()).unwrap())
            .join()
            .unwrap();
        model = optimizer
            .step(0.5, model, receiver.recv().unwrap())
            .unwrap();
    }
    for (weight, numel) in model.weights.iter().zip(NUMELS) {
        let start = values(numel as u64, numel);
        let expected: Vec<_> = start.iter().map(|value| value / 32.0).collect();
        assert_eq!(host(weight.val()), expected);
    }
}

#[test]
fn two_optimizers_take_turns() {
    let mut models = [Model::new(), Model::new()];
    let mut optimizers = [halving().init(&gpu().1), halving().init(&gpu().1)];
    for _ in 0..3 {
        let [first, second] = models;
        let grads = [first.grads(), second.grads()];
        let [of_first, of_second] = grads;
        models = [
            optimizers[0].step(0.5, first, of_first).unwrap(),
            optimizers[1].step(0.5, second, of_second).unwrap(),
        ];
    }
    for model in &models {
        for (weight, numel) in model.weights.iter().zip(NUMELS) {
            let start = values(numel as u64, numel);
            let expected: Vec<_> = start.iter().map(|value| value / 8.0).collect();
            assert_eq!(host(weight.val()), expected);
        }
    }
}
