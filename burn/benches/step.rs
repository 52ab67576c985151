//! A step of a whole module beside burn's own optimizer, in turn: `cargo bench -p wgpu-optim-burn --bench step`. Words
//! behind `--` choose tensors and rules: `resnet-50`, `1000x1000`, `momentum`, `adamw`, `clipped` (AdamW whose gradients are
//! clipped tensor by tensor, which is burn's way), `control` (by the norm of all, beside that).

use std::error::Error;
use std::time::{Duration, Instant};

use burn::grad_clipping::GradientClippingConfig;
use burn::module::{Module, Param};
use burn::optim::momentum::MomentumConfig;
use burn::optim::{AdamWConfig, GradientsParams, SgdConfig as BurnSgdConfig};
use burn::tensor::{Device, Distribution, Tensor};
use wgpu_optim_burn::wgpu_optim::{AdamConfig, AnyRule, SgdConfig, StepControl};
use wgpu_optim_burn::{Control, Init as _, SharedDevice};

const ROUNDS: usize = 25;
const WARM_UP: usize = 5;
const LR: f64 = 1e-3;
/// Below the norms that gradients here have.
const MAX_NORM: f32 = 1.0;

/// Tensors of any shape: an update by element does not ask for it.
#[derive(Module, Debug)]
struct Tensors {
    params: Vec<Param<Tensor<1>>>,
}

impl Tensors {
    fn random(numels: &[usize], device: &Device) -> Self {
        let random = |numel: &usize| Tensor::random([*numel], Distribution::Default, device);
        Self {
            params: numels
                .iter()
                .map(|numel| Param::from_tensor(random(numel)))
                .collect(),
        }
    }
}

/// The 161 parameters of ResNet-50, as torchvision has them.
fn resnet_50() -> Vec<usize> {
    let mut numels = vec![64 * 3 * 7 * 7, 64, 64];
    let mut inputs = 64;
    for (blocks, width) in [(3, 64), (4, 128), (6, 256), (3, 512)] {
        for block in 0..blocks {
            let outputs = 4 * width;
            for (conv, channels) in [
                (inputs * width, width),
                (width * width * 9, width),
                (width * outputs, outputs),
            ] {
                numels.extend([conv, channels, channels]);
            }
            if block == 0 {
                numels.extend([inputs * outputs, outputs, outputs]);
            }
            inputs = outputs;
        }
    }
    numels.extend([2048 * 1000, 1000]);
    numels
}

/// Gradients as a backward pass leaves them: new tensors at each step, those of the last layer first.
fn grads(
    model: &Tensors,
    values: &[Tensor<1>],
    device: &Device,
) -> Result<GradientsParams, Box<dyn Error>> {
    let mut grads = GradientsParams::new();
    for (param, values) in model.params.iter().zip(values).rev() {
        grads.register(param.id, values.clone().add_scalar(1.0));
    }
    device.sync()?;
    Ok(grads)
}

/// Milliseconds of a step, from an idle device to an idle device.
fn timed<T>(device: &Device, step: impl FnOnce() -> T) -> Result<(T, Duration), Box<dyn Error>> {
    let start = Instant::now();
    let value = step();
    device.sync()?;
    Ok((value, start.elapsed()))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<(), Box<dyn Error>> {
    let (device, setup) = Device::wgpu_options().init_with_setup()?;
    let shared = SharedDevice::new(&device, &setup)?;
    let info = setup.adapter.get_info();
    let fusion = if cfg!(feature = "fusion") {
        "with"
    } else {
        "without"
    };
    println!(
        "{} ({}), burn {fusion} fusion, medians of {ROUNDS} steps in turn",
        info.name, info.driver_info
    );
    println!("tensors     rule      burn ms  ours ms  burn/ours  dispatches");

    let momentum = BurnSgdConfig::new().with_momentum(Some(MomentumConfig::new()));
    let words: Vec<_> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with("--"))
        .collect();
    let is_chosen = |name: &str, rule: &str| {
        words
            .iter()
            .all(|word| [name, rule].contains(&word.as_str()))
    };
    let cases = [("resnet-50", resnet_50()), ("1000x1000", vec![1000; 1000])];
    for (name, numels) in &cases {
        let adamw: AnyRule = AdamConfig::adamw(LR)
            .eps(1e-5)
            .decoupled_weight_decay(1e-4)
            .build()?
            .into();
        let clipped =
            AdamWConfig::new().with_grad_clipping(Some(GradientClippingConfig::Norm(MAX_NORM)));
        let by_tensor = StepControl::builder().tensor_max_norm(MAX_NORM.into());
        let by_norm = StepControl::builder().max_norm(MAX_NORM.into());
        let sgd = SgdConfig::builder(LR).momentum(0.9).dampening(0.1);
        let rules: [(_, AnyRule, Option<StepControl>, _); 4] = [
            ("momentum", sgd.build()?.into(), None, momentum.init()),
            ("adamw", adamw.clone(), None, AdamWConfig::new().init()),
            (
                "clipped",
                adamw.clone(),
                Some(by_tensor.build()?),
                clipped.init(),
            ),
            ("control", adamw, Some(by_norm.build()?), clipped.init()),
        ];
        let values: Vec<_> = numels
            .iter()
            .map(|numel| Tensor::random([*numel], Distribution::Default, &device))
            .collect();
        let autodiff = device.clone().autodiff();
        for (rule, config, control, mut theirs) in rules {
            if !is_chosen(name, rule) {
                continue;
            }
            let mut ours = config.init(&shared);
            if let Some(control) = control {
                ours = ours.with_control(&Control::new(&shared, control)?);
            }
            let mut our_model = Tensors::random(numels, &autodiff);
            let mut their_model = Tensors::random(numels, &autodiff);
            let (mut our_ms, mut their_ms, mut ratios) = (vec![], vec![], vec![]);
            for round in 0..WARM_UP + ROUNDS {
                let step = grads(&their_model, &values, &device)?;
                let (model, their_time) = timed(&device, || theirs.step(LR, their_model, step))?;
                their_model = model;
                let step = grads(&our_model, &values, &device)?;
                let (model, our_time) = timed(&device, || ours.step(LR, our_model, step))?;
                our_model = model?;
                if round >= WARM_UP {
                    let [theirs, ours] =
                        [their_time, our_time].map(|time| time.as_secs_f64() * 1e3);
                    their_ms.push(theirs);
                    our_ms.push(ours);
                    ratios.push(theirs / ours);
                }
            }
            println!(
                "{name:<11} {rule:<9} {:>7.2}  {:>7.2}  {:>9.2}  {:>10}",
                median(their_ms),
                median(our_ms),
                median(ratios),
                ours.dispatches(),
            );
            let copied = ours.copied();
            if copied.params + copied.grads > 0 {
                println!("  copied before the last step: {copied:?}");
            }
        }
    }
    Ok(())
}
