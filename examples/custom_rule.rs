//! A rule of one's own, on the GPU and on the CPU: every element moves by the learning rate, against the sign of the
//! average of its gradients. `cargo run --release --example custom_rule`

use wgpu_optim::rules::{Scalars, Slot, Slots, Twin};
use wgpu_optim::{
    AdapterRequest, ConfigError, CpuOptimizer, Gpu, GpuOptimizer, Kernels, Rule, TensorBinding,
    readback,
};

#[derive(Clone, Debug, PartialEq)]
struct SignDescent {
    lr: f64,
    beta: f64,
}

const WGSL: &str = "
fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    let average = k.beta * (*state).exp_avg + k.taken_in * g;
    (*state).exp_avg = average;
    return theta - k.lr * sign(average);
}";

#[rustfmt::skip]
impl Rule for SignDescent {
    fn stem(&self) -> &'static str { "sign_descent" }
    fn slots(&self) -> Slots { [Slot::new("exp_avg")].into() }
    fn wgsl(&self) -> String { WGSL.into() }
    fn scalar_names(&self) -> &'static [&'static str] { &["lr", "beta", "taken_in"] }
    fn phase(&self, _applied_steps: u64) -> u64 { 0 }
    fn scalars(&self, _phase: u64) -> Scalars { [self.lr as f32, self.beta as f32, (1.0 - self.beta) as f32].into() }
    fn state_kind(&self) -> String { self.stem().to_owned() }
    fn lr(&self) -> f64 { self.lr }
    fn with_lr(&self, lr: f64) -> Result<Self, ConfigError> { Ok(Self { lr, ..self.clone() }) }
    fn momentum(&self) -> Option<f64> { Some(self.beta) }
    fn with_momentum(&self, beta: f64) -> Result<Self, ConfigError> { Ok(Self { beta, ..self.clone() }) }
}

impl Twin for SignDescent {
    fn step(&self, scalars: &Scalars, params: &mut [f32], state: &mut [&mut [f32]], grads: &[f32]) {
        let ([lr, beta, taken_in], [average]) = (scalars.as_slice(), state) else {
            return;
        };
        for ((theta, average), g) in params.iter_mut().zip(average.iter_mut()).zip(grads) {
            *average = beta * *average + taken_in * g;
            *theta -= lr
                * if *average == 0.0 {
                    0.0
                } else {
                    average.signum()
                };
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (rule, grads) = (
        SignDescent {
            lr: 0.25,
            beta: 0.9,
        },
        [3.0, 0.0, -0.01],
    );
    let mut on_cpu = [1.0, 2.0, 3.0];
    let mut optimizer = CpuOptimizer::new(rule.clone(), [("weight", [3])])?;
    optimizer.step(&mut [&mut on_cpu], &[&grads])?;

    let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default())?;
    let params = readback::storage_buffer(&device, &queue, "params", &[1.0, 2.0, 3.0])?;
    let grads = readback::storage_buffer(&device, &queue, "grads", &grads)?;
    let weight = TensorBinding::new("weight", &params, &grads, [3]);
    let mut optimizer = GpuOptimizer::new(&Kernels::new(&device, &queue)?, rule, &[weight])?;
    let mut encoder = device.create_command_encoder(&Default::default());
    optimizer.step(&mut encoder)?;
    queue.submit([encoder.finish()]);
    let on_gpu = readback::download_blocking(&device, &queue, &params, 0, 3)?;
    println!("CPU {on_cpu:?}, GPU {on_gpu:?}");
    assert_eq!(on_gpu, on_cpu);
    Ok(())
}
