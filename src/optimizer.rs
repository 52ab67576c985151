//! The trait of all optimizers.

use crate::rules::{ConfigError, GroupError, Groups, Rule};
use crate::state::UnknownTensor;

/// An optimizer between two steps: hyper-parameters, frozen tensors and step counts, by the same names wherever it steps.
///
/// [`CpuOptimizer`](crate::CpuOptimizer), `GpuOptimizer` and the `ShardedOptimizer` of `wgpu-optim-mpi` implement it. The
/// step itself takes what each of them needs (slices, an encoder, ranks), so it is not a part of the trait. A schedule is,
/// and is written once:
///
/// ```
/// use wgpu_optim::{ConfigError, CpuOptimizer, Optimizer, SgdConfig, schedule};
///
/// /// Sets what the next step takes: on the CPU, on the GPU or over ranks.
/// fn follow_schedule(optimizer: &mut impl Optimizer) -> Result<(), ConfigError> {
///     let step = optimizer.steps();
///     optimizer.set_lr(schedule::warmup_cosine(step, 10, 100, 0.1, 0.001))
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = SgdConfig::builder(0.1).momentum(0.9).build()?;
/// let mut on_cpu = CpuOptimizer::new(config, [("weight", [3])])?;
/// let mut weight = [1.0, 2.0, 3.0];
/// follow_schedule(&mut on_cpu)?;
/// on_cpu.step(&mut [&mut weight], &[&[1.0, 0.0, -1.0]])?;
/// assert_eq!(weight, [0.99, 2.0, 3.01]);
///
/// # #[cfg(feature = "gpu")] {
/// use wgpu_optim::{AdapterRequest, Gpu, GpuOptimizer, Kernels, TensorBinding, readback};
///
/// let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default())?;
/// let params = readback::storage_buffer(&device, &queue, "params", &[1.0, 2.0, 3.0])?;
/// let grads = readback::storage_buffer(&device, &queue, "grads", &[1.0, 0.0, -1.0])?;
/// let kernels = Kernels::new(&device, &queue)?;
/// let binding = TensorBinding::new("weight", &params, &grads, [3]);
/// let mut on_gpu = GpuOptimizer::new(&kernels, config, &[binding])?;
/// let mut encoder = device.create_command_encoder(&Default::default());
/// follow_schedule(&mut on_gpu)?;
/// on_gpu.step(&mut encoder)?;
/// queue.submit([encoder.finish()]);
/// assert_eq!(readback::download_blocking(&device, &queue, &params, 0, 3)?, weight);
/// # }
/// # Ok(())
/// # }
/// ```
///
/// Setters of hyper-parameters allocate nothing. All hold from the next step on; on the GPU, from the next step that is recorded.
pub trait Optimizer {
    /// The rule of its parameter groups.
    type Rule: Rule;

    /// The parameter groups, with the hyper-parameters of the next step.
    fn groups(&self) -> &Groups<Self::Rule>;

    /// The parameter groups, to be changed.
    fn groups_mut(&mut self) -> &mut Groups<Self::Rule>;

    /// The number of steps that have been made, whatever was frozen: the position in a schedule. On the GPU a step has been
    /// made when it has been recorded, unless its encoder was dropped.
    #[must_use]
    fn steps(&self) -> u64;

    /// Sets the number of steps that have been made: for a run that goes on at another position in its schedule. Steps
    /// applied to tensors, on which bias corrections depend, stay as they are.
    fn set_steps(&mut self, steps: u64);

    /// The names of the tensors, in the order in which they were given.
    #[must_use]
    fn names(&self) -> Vec<&str>;

    /// The number of steps that have been applied to a tensor: none while it was frozen. [`None`] where no tensor has this name.
    ///
    /// Under a control on the GPU these are the steps that are known to have been applied, by what has been read so far
    /// (`GpuControl::read`, later steps, `GpuOptimizer::state`).
    #[must_use]
    fn applied_steps(&self, tensor: &str) -> Option<u64>;

    /// Freezes a tensor, or lets it go on: a frozen tensor is left as it is by steps, state and step count included.
    ///
    /// # Errors
    /// [`UnknownTensor`] if no tensor has this name.
    fn set_frozen(&mut self, tensor: &str, frozen: bool) -> Result<(), UnknownTensor>;

    /// Freezes the tensors whose names `is_frozen` holds for, and lets all others go on.
    ///
    /// ```
    /// use wgpu_optim::{CpuOptimizer, Optimizer, SgdConfig};
    ///
    /// let config = SgdConfig::builder(1.0).build()?;
    /// let mut optimizer = CpuOptimizer::new(config, [("body.weight", [1]), ("head.weight", [1])])?;
    /// optimizer.set_frozen_where(|name| !name.starts_with("head."));
    /// let (mut body, mut head) = ([0.0], [0.0]);
    /// optimizer.step(&mut [&mut body, &mut head], &[&[1.0], &[1.0]])?;
    /// assert_eq!((body, head), ([0.0], [-1.0]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    fn set_frozen_where(&mut self, is_frozen: impl Fn(&str) -> bool)
    where
        Self: Sized,
    {
        let names = self.names().into_iter().map(str::to_owned);
        for name in names.collect::<Vec<_>>() {
            // The tensor is there.
            let _ = self.set_frozen(&name, is_frozen(&name));
        }
    }

    /// The configuration, with the hyper-parameters of the next step; that of the default group where there are several.
    #[must_use]
    fn config(&self) -> &Self::Rule {
        self.groups().default_config()
    }

    /// The configuration of one group, with the hyper-parameters of the next step. [`None`] where no group has this name.
    #[must_use]
    fn group_config(&self, group: &str) -> Option<&Self::Rule> {
        self.groups().by_name(group)
    }

    /// Sets the learning rate, in every group by its ratio to the default group's. A group without a ratio
    /// ([`ParamGroups::with`](crate::ParamGroups::with)) keeps its own.
    ///
    /// # Errors
    /// [`ConfigError`] as [`Rule::with_lr`]; every learning rate stays as it was.
    fn set_lr(&mut self, lr: f64) -> Result<(), ConfigError> {
        self.groups_mut().set_lr(lr)
    }

    /// Sets the learning rate of one group, until [`set_lr`](Self::set_lr) sets it again by its ratio.
    ///
    /// # Errors
    /// [`GroupError`] if there is no such group, or as [`Rule::with_lr`]; the learning rate stays as it was.
    fn set_group_lr(&mut self, group: &str, lr: f64) -> Result<(), GroupError> {
        self.groups_mut().set_group_lr(group, lr)
    }

    /// Sets the momentum, in every group that has momentum; Adam's is `beta1`.
    ///
    /// # Errors
    /// [`ConfigError`] as [`Rule::with_momentum`]; every momentum stays as it was.
    fn set_momentum(&mut self, momentum: f64) -> Result<(), ConfigError> {
        self.groups_mut().set_momentum(momentum)
    }
}
