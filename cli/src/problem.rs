//! One problem, the ways to step through it, and the comparison of each with the oracle.

use anyhow::anyhow;
use rayon::prelude::*;
use wgpu_optim::oracle::{Agreement, Disagreement, Oracle, Rounding};
use wgpu_optim::{
    Arena, Coefficients, CpuOptimizer, GpuOptimizer, OptimizerState, SgdConfig, Terms, readback,
    reference, wgpu,
};

use crate::Failure;
use crate::backend::OpenGpu;

/// Learning rates of the steps that are checked.
const CHECKED_LRS: [f64; 3] = [0.1, 0.03, 0.2];

/// A configuration, and tensors to step through with it, one after the other.
pub struct Problem {
    config: SgdConfig,
    /// Elements of each tensor.
    sizes: Vec<usize>,
    start: Vec<f32>,
    grads: Vec<f32>,
}

impl Problem {
    pub fn new(config: SgdConfig, sizes: Vec<usize>) -> Self {
        let numel = sizes.iter().sum();
        let mut rng = fastrand::Rng::with_seed(numel as u64);
        let mut values = |largest: f32| {
            let value = |_| {
                let magnitude = largest * (0.5 + 0.5 * rng.f32());
                if rng.bool() { magnitude } else { -magnitude }
            };
            (0..numel).map(value).collect()
        };
        // Gradients small enough that the checked steps never cancel a parameter, whose ULP would then say
        // nothing of the arithmetic.
        Self {
            config,
            sizes,
            start: values(1.0),
            grads: values(0.125),
        }
    }

    pub fn config(&self) -> &SgdConfig {
        &self.config
    }

    pub fn grads(&self) -> &[f32] {
        &self.grads
    }

    pub fn numel(&self) -> usize {
        self.start.len()
    }

    /// Elements of each tensor.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// Start and gradients of each tensor.
    pub fn values(&self) -> impl Iterator<Item = (&[f32], &[f32])> {
        let grads = self.split(&self.grads);
        self.split(&self.start).into_iter().zip(grads)
    }

    /// Tensors by name and shape.
    fn named(&self) -> impl Iterator<Item = (String, [usize; 1])> {
        let sizes = self.sizes.iter().enumerate();
        sizes.map(|(index, numel)| (index.to_string(), [*numel]))
    }

    /// Values that lie one after the other, by tensor.
    fn split<'v>(&self, mut values: &'v [f32]) -> Vec<&'v [f32]> {
        let mut tensors = Vec::with_capacity(self.sizes.len());
        for numel in &self.sizes {
            let (tensor, rest) = values.split_at(*numel);
            tensors.push(tensor);
            values = rest;
        }
        tensors
    }

    fn config_at(&self, lr: f64) -> Result<SgdConfig, Failure> {
        self.config.with_lr(lr).map_err(Failure::failed)
    }

    /// Makes a few steps and compares every parameter and every velocity. A wrong one is a failure.
    pub fn check(
        &self,
        stepper: &mut dyn Stepper,
        rounding: Rounding,
    ) -> Result<Agreement, Failure> {
        for lr in CHECKED_LRS {
            stepper.step(lr)?;
        }
        let (params, velocity) = stepper.results()?;
        self.compare(&params, velocity.as_deref(), rounding)
    }

    fn compare(
        &self,
        params: &[f32],
        velocity: Option<&[f32]>,
        rounding: Rounding,
    ) -> Result<Agreement, Failure> {
        // In chunks, or the oracle would take eight times the memory of the problem.
        const CHUNK: usize = 1 << 16;
        let configs = CHECKED_LRS
            .iter()
            .map(|lr| self.config_at(*lr))
            .collect::<Result<Vec<_>, _>>()?;
        let compare_chunk = |index: usize| -> Result<Agreement, Disagreement> {
            let start = index * CHUNK;
            let range = start..self.start.len().min(start + CHUNK);
            let mut oracle = Oracle::new(&self.start[range.clone()], rounding);
            for config in &configs {
                oracle.step(config, &self.grads[range.clone()]);
            }
            let mut worst = Agreement::default();
            worst = worst.worst(oracle.check_params(&params[range.clone()])?, start);
            if let Some(velocity) = velocity {
                worst = worst.worst(oracle.check_velocity(&velocity[range])?, start);
            }
            Ok(worst)
        };
        (0..self.start.len().div_ceil(CHUNK))
            .into_par_iter()
            .map(compare_chunk)
            .try_reduce(Agreement::default, |x, y| Ok(x.worst(y, 0)))
            .map_err(|wrong| Failure::Wrong(anyhow!("wrong results: {wrong}")))
    }
}

/// One way to make a step.
pub trait Stepper {
    fn step(&mut self, lr: f64) -> Result<(), Failure>;

    /// The parameters, and the velocity if there is one, as they are now.
    fn results(&self) -> Result<(Vec<f32>, Option<Vec<f32>>), Failure>;
}

/// Records, submits and waits: what a step costs a program that needs its result.
pub fn submit_and_wait(
    open: &OpenGpu,
    record: impl FnOnce(&mut wgpu::CommandEncoder) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut encoder = open.gpu.device.create_command_encoder(&Default::default());
    record(&mut encoder)?;
    open.gpu.queue.submit([encoder.finish()]);
    open.finish()
}

pub struct OnGpu<'a> {
    open: &'a OpenGpu,
    arena: Arena,
    optimizer: GpuOptimizer,
}

impl<'a> OnGpu<'a> {
    pub fn new(open: &'a OpenGpu, problem: &Problem) -> Result<Self, Failure> {
        let (device, queue) = (&open.gpu.device, &open.gpu.queue);
        let arena = Arena::new(device, queue, problem.named()).map_err(Failure::failed)?;
        let (start, grads): (Vec<_>, Vec<_>) = problem.values().unzip();
        arena.upload_all_params(&start).map_err(Failure::failed)?;
        arena.upload_all_grads(&grads).map_err(Failure::failed)?;
        let optimizer = GpuOptimizer::new(&open.kernels, problem.config, &arena.bindings())
            .map_err(Failure::failed)?;
        Ok(Self {
            open,
            arena,
            optimizer,
        })
    }

    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    pub fn optimizer_mut(&mut self) -> &mut GpuOptimizer {
        &mut self.optimizer
    }

    /// Dispatches of the last step.
    pub fn dispatches(&self) -> usize {
        self.optimizer.dispatches()
    }
}

impl Stepper for OnGpu<'_> {
    fn step(&mut self, lr: f64) -> Result<(), Failure> {
        self.optimizer.set_lr(lr).map_err(Failure::failed)?;
        let optimizer = &mut self.optimizer;
        submit_and_wait(self.open, |encoder| {
            optimizer.step(encoder).map_err(Failure::failed)
        })
    }

    fn results(&self) -> Result<(Vec<f32>, Option<Vec<f32>>), Failure> {
        let device = &self.open.gpu.device;
        let params = readback::block_on(device, self.arena.download_all_params())
            .map_err(Failure::failed)?;
        let state = readback::block_on(device, self.optimizer.state()).map_err(Failure::failed)?;
        Ok((params.concat(), velocity_in(state)))
    }
}

/// The velocities of all tensors, one after the other.
fn velocity_in(state: OptimizerState) -> Option<Vec<f32>> {
    let velocities: Option<Vec<_>> = state
        .tensors
        .into_iter()
        .map(|mut t| t.slots.pop().map(|slot| slot.values))
        .collect();
    velocities.map(|velocities| velocities.concat())
}

pub struct OnCpu {
    params: Vec<Vec<f32>>,
    grads: Vec<Vec<f32>>,
    optimizer: CpuOptimizer,
}

impl OnCpu {
    pub fn new(problem: &Problem) -> Result<Self, Failure> {
        let optimizer =
            CpuOptimizer::new(problem.config, problem.named()).map_err(Failure::failed)?;
        let values = problem.values();
        let (params, grads) = values.map(|(p, g)| (p.to_vec(), g.to_vec())).unzip();
        Ok(Self {
            params,
            grads,
            optimizer,
        })
    }
}

impl Stepper for OnCpu {
    fn step(&mut self, lr: f64) -> Result<(), Failure> {
        self.optimizer.set_lr(lr).map_err(Failure::failed)?;
        let mut params: Vec<_> = self.params.iter_mut().map(Vec::as_mut_slice).collect();
        let grads: Vec<_> = self.grads.iter().map(Vec::as_slice).collect();
        self.optimizer
            .step(&mut params, &grads)
            .map_err(Failure::failed)
    }

    fn results(&self) -> Result<(Vec<f32>, Option<Vec<f32>>), Failure> {
        Ok((self.params.concat(), velocity_in(self.optimizer.state())))
    }
}

/// One thread, all tensors as one.
pub struct OnReference<'a> {
    problem: &'a Problem,
    params: Vec<f32>,
    velocity: Vec<f32>,
    steps: u64,
}

impl<'a> OnReference<'a> {
    pub fn new(problem: &'a Problem) -> Self {
        Self {
            problem,
            params: problem.start.clone(),
            velocity: vec![0.0; problem.start.len()],
            steps: 0,
        }
    }
}

impl Stepper for OnReference<'_> {
    fn step(&mut self, lr: f64) -> Result<(), Failure> {
        let config = self.problem.config_at(lr)?;
        let k = Coefficients::new(&config, self.steps == 0).cast();
        let has = Terms::of(&config);
        let grads = &self.problem.grads;
        if has.velocity {
            reference::sgd(&k, has, &mut self.params, &mut self.velocity, grads);
        } else {
            reference::sgd_plain(&k, has, &mut self.params, grads);
        }
        self.steps += 1;
        Ok(())
    }

    fn results(&self) -> Result<(Vec<f32>, Option<Vec<f32>>), Failure> {
        let velocity = self
            .problem
            .config
            .has_velocity()
            .then(|| self.velocity.clone());
        Ok((self.params.clone(), velocity))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_element_is_found() {
        let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
        let problem = Problem::new(config, vec![70_000, 30_001]);
        let mut stepper = OnReference::new(&problem);
        let right = problem.check(&mut stepper, Rounding::NEAREST).unwrap();
        assert!(right.worst_ulp > 0.0 && right.worst_ulp < 10.0, "{right:?}");
        let (mut params, velocity) = stepper.results().unwrap();
        let mut velocity = velocity.unwrap();
        let right = params[100_000];
        params[100_000] = f32::from_bits(right.to_bits() + 20);
        let wrong = problem.compare(&params, Some(&velocity), Rounding::NEAREST);
        assert!(matches!(wrong, Err(Failure::Wrong(e)) if e.to_string().contains("wrong results")));
        params[100_000] = right;
        velocity[70_000] = f32::NAN;
        assert!(
            problem
                .compare(&params, Some(&velocity), Rounding::NEAREST)
                .is_err()
        );
    }
}
