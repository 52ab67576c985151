//! A small convolutional network learns to read digits, once with this crate's optimizer and once with burn's own, from
//! the same start on the same images: `cargo run --release -p wgpu-optim-burn --example digits`.
//!
//! The digits are drawn: strokes of random slant, size, place and width, under noise.

use std::error::Error;
use std::time::Instant;

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Linear, LinearConfig, Relu};
use burn::optim::momentum::MomentumConfig;
use burn::optim::{
    AdamWConfig, GradientsParams, ModuleOptimizer as BurnOptimizer, SgdConfig as BurnSgdConfig,
};
use burn::tensor::{Device, Int, Tensor, TensorData};
use wgpu_optim_burn::wgpu_optim::{AdamConfig, AnyRule, SgdConfig};
use wgpu_optim_burn::{Init as _, SharedDevice};

const SIZE: usize = 20;
const BATCH: usize = 64;
const STEPS: usize = 200;
const HELD_OUT: usize = 1000;
/// Most by which the losses may part, as a share of the first: both round, differently, and training carries it on.
const TOLERANCE: f32 = 0.01;

#[derive(Module, Debug)]
struct Network {
    conv1: Conv2d,
    conv2: Conv2d,
    head: Linear,
    relu: Relu,
}

impl Network {
    fn new(device: &Device) -> Self {
        let conv = |channels, size| Conv2dConfig::new(channels, [size, size]).with_stride([2, 2]);
        Self {
            conv1: conv([1, 8], 5).init(device),
            conv2: conv([8, 16], 3).init(device),
            head: LinearConfig::new(16 * 3 * 3, 10).init(device),
            relu: Relu::new(),
        }
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let x = self.relu.forward(self.conv1.forward(images));
        let x = self.relu.forward(self.conv2.forward(x));
        self.head.forward(x.flatten(1, 3))
    }
}

/// Strokes of a digit through points of the unit square, y downwards.
fn strokes(digit: usize) -> &'static [(f32, f32)] {
    match digit {
        0 => &[
            (0.5, 0.0),
            (0.9, 0.25),
            (0.9, 0.75),
            (0.5, 1.0),
            (0.1, 0.75),
            (0.1, 0.25),
            (0.5, 0.0),
        ],
        1 => &[(0.2, 0.25), (0.55, 0.0), (0.55, 1.0)],
        2 => &[(0.1, 0.2), (0.5, 0.0), (0.9, 0.25), (0.1, 1.0), (0.9, 1.0)],
        3 => &[
            (0.1, 0.0),
            (0.9, 0.0),
            (0.45, 0.4),
            (0.9, 0.7),
            (0.5, 1.0),
            (0.1, 0.85),
        ],
        4 => &[(0.7, 1.0), (0.7, 0.0), (0.1, 0.65), (0.95, 0.65)],
        5 => &[
            (0.9, 0.0),
            (0.2, 0.0),
            (0.15, 0.45),
            (0.6, 0.4),
            (0.9, 0.7),
            (0.5, 1.0),
            (0.1, 0.9),
        ],
        6 => &[
            (0.75, 0.0),
            (0.2, 0.5),
            (0.2, 0.85),
            (0.5, 1.0),
            (0.85, 0.8),
            (0.6, 0.5),
            (0.2, 0.65),
        ],
        7 => &[(0.1, 0.0), (0.9, 0.0), (0.4, 1.0)],
        8 => &[
            (0.5, 0.45),
            (0.15, 0.2),
            (0.5, 0.0),
            (0.85, 0.2),
            (0.5, 0.45),
            (0.1, 0.75),
            (0.5, 1.0),
            (0.9, 0.75),
            (0.5, 0.45),
        ],
        _ => &[
            (0.8, 0.35),
            (0.45, 0.5),
            (0.15, 0.25),
            (0.5, 0.0),
            (0.8, 0.2),
            (0.8, 0.35),
            (0.6, 1.0),
        ],
    }
}

fn distance((x, y): (f32, f32), (ax, ay): (f32, f32), (bx, by): (f32, f32)) -> f32 {
    let (dx, dy) = (bx - ax, by - ay);
    let along = ((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy);
    let along = along.clamp(0.0, 1.0);
    (x - ax - along * dx).hypot(y - ay - along * dy)
}

/// One image, row by row, dark is 0.
fn draw(digit: usize, rng: &mut fastrand::Rng) -> Vec<f32> {
    let mut within = |low: f32, high: f32| low + (high - low) * rng.f32();
    let (slant, turn) = (within(-0.3, 0.3), within(-0.25, 0.25));
    let (width, height) = (within(7.0, 12.0), within(10.0, 15.0));
    let (x, y) = (within(-2.5, 2.5), within(-2.0, 2.0));
    let (pen, noise) = (within(0.7, 1.5), within(0.1, 0.3));
    let (sin, cos) = turn.sin_cos();
    let place = |(px, py): (f32, f32)| {
        let (px, py) = ((px - 0.5 - slant * (py - 0.5)) * width, (py - 0.5) * height);
        let middle = SIZE as f32 / 2.0;
        (
            middle + x + cos * px - sin * py,
            middle + y + sin * px + cos * py,
        )
    };
    let points: Vec<_> = strokes(digit).iter().copied().map(place).collect();
    let pixel = |index: usize| {
        let at = ((index % SIZE) as f32 + 0.5, (index / SIZE) as f32 + 0.5);
        let lines = points.windows(2).map(|line| distance(at, line[0], line[1]));
        let ink = (pen + 0.5 - lines.fold(f32::MAX, f32::min)).clamp(0.0, 1.0);
        ink + noise * (2.0 * rng.f32() - 1.0)
    };
    (0..SIZE * SIZE).map(pixel).collect()
}

fn batch(count: usize, rng: &mut fastrand::Rng, device: &Device) -> (Tensor<4>, Tensor<1, Int>) {
    let digits: Vec<_> = (0..count).map(|_| rng.usize(0..10)).collect();
    let pixels: Vec<_> = digits.iter().flat_map(|digit| draw(*digit, rng)).collect();
    let labels: Vec<_> = digits.iter().map(|digit| *digit as i32).collect();
    (
        Tensor::from_data(TensorData::new(pixels, [count, 1, SIZE, SIZE]), device),
        Tensor::from_data(TensorData::new(labels, [count]), device),
    )
}

/// Loss and gradients of a batch.
fn backward(
    network: &Network,
    (images, labels): &(Tensor<4>, Tensor<1, Int>),
) -> Result<(f32, GradientsParams), Box<dyn Error>> {
    let logits = network.forward(images.clone());
    let loss = CrossEntropyLossConfig::new().init(&logits.device());
    let loss = loss.forward(logits, labels.clone());
    let value = loss.clone().into_scalar::<f32>();
    let grads = GradientsParams::from_grads(loss.backward(), network);
    network.conv1.weight.device().sync()?;
    Ok((value, grads))
}

/// Share of images that are read right.
fn accuracy(network: &Network, device: &Device) -> f32 {
    let (images, labels) = batch(HELD_OUT, &mut fastrand::Rng::with_seed(99), device);
    let read = network.valid().forward(images).argmax(1).flatten::<1>(0, 1);
    let right = read.equal(labels).int().sum().into_scalar::<i32>();
    right as f32 / HELD_OUT as f32
}

fn median(mut milliseconds: Vec<f64>) -> f64 {
    milliseconds.sort_by(f64::total_cmp);
    milliseconds[milliseconds.len() / 2]
}

fn train(
    name: &str,
    lr: f64,
    rule: AnyRule,
    mut theirs: BurnOptimizer,
    start: &Network,
    shared: &SharedDevice,
) -> Result<(), Box<dyn Error>> {
    let device = shared.device().clone().autodiff();
    let mut ours = rule.init(shared);
    let (mut our_network, mut their_network) = (start.clone(), start.clone());
    let mut rng = fastrand::Rng::with_seed(1);
    let (mut our_ms, mut their_ms) = (vec![], vec![]);
    let (mut first_loss, mut parted) = (None, 0.0_f32);
    println!("{name}\n  step  loss, burn's  loss, ours");
    for step in 0..=STEPS {
        let batch = batch(BATCH, &mut rng, &device);
        let (our_loss, our_grads) = backward(&our_network, &batch)?;
        let (their_loss, their_grads) = backward(&their_network, &batch)?;
        parted = parted.max((our_loss - their_loss).abs() / *first_loss.get_or_insert(their_loss));
        if step.is_multiple_of(25) {
            println!("  {step:>4}  {their_loss:>12.6}  {our_loss:>10.6}");
        }
        let timer = Instant::now();
        their_network = theirs.step(lr, their_network, their_grads);
        device.sync()?;
        their_ms.push(timer.elapsed().as_secs_f64() * 1e3);
        let timer = Instant::now();
        our_network = ours.step(lr, our_network, our_grads)?;
        device.sync()?;
        our_ms.push(timer.elapsed().as_secs_f64() * 1e3);
    }
    let [theirs, ours] =
        [&their_network, &our_network].map(|net| 100.0 * accuracy(net, shared.device()));
    println!("  of {HELD_OUT} other digits burn's reads {theirs:.1}%, ours {ours:.1}%");
    println!(
        "  a step takes burn's {:.2} ms, ours {:.2} ms",
        median(their_ms),
        median(our_ms)
    );
    println!(
        "  losses part by {:.4}% of the first at most\n",
        100.0 * parted
    );
    if parted > TOLERANCE {
        return Err(format!("{name}: the losses part by {parted} of the first").into());
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let (device, setup) = Device::wgpu_options().init_with_setup()?;
    let shared = SharedDevice::new(&device, &setup)?;
    device.seed(7);
    let network = Network::new(&device.clone().autodiff());
    println!(
        "{}, {} parameters, batches of {BATCH}\n",
        setup.adapter.get_info().name,
        network.num_params()
    );
    train(
        "momentum 0.9, learning rate 0.05",
        0.05,
        SgdConfig::builder(0.05).momentum(0.9).build()?.into(),
        BurnSgdConfig::new()
            .with_momentum(Some(MomentumConfig::new().with_dampening(0.0)))
            .init(),
        &network,
        &shared,
    )?;
    train(
        "AdamW, learning rate 0.003",
        0.003,
        AdamConfig::adamw(0.003)
            .eps(1e-5)
            .decoupled_weight_decay(0.01)
            .build()?
            .into(),
        AdamWConfig::new().with_weight_decay(0.01).init(),
        &network,
        &shared,
    )
}
