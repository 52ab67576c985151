//! One problem, the ways to step through it, and the comparison of each with the oracle.

use std::ops::Range;

use anyhow::anyhow;
use rayon::prelude::*;
use wgpu_optim::cpu::TensorValues;
use wgpu_optim::oracle::{Agreement, Disagreement, Oracle, Roundoff};
use wgpu_optim::rules::{Slot, Twin as _};
use wgpu_optim::storage::{Codec, Storage};
use wgpu_optim::{
    AnyRule, Arena, ConfigError, CpuControl, CpuOptimizer, GpuControl, GpuOptimizer, Optimizer,
    OptimizerState, ParamGroups, Precision, Rule as _, StepControl, StorageType, TensorSpec,
    readback, wgpu,
};

use crate::Failure;
use crate::backend::OpenGpu;
use crate::lab::storage::Stored;
use crate::rule::FieldArgs;

/// Learning rates of the steps that are checked, as multiples of the configuration's.
const CHECKED_LRS: [f64; 3] = [1.0, 0.3, 2.0];

/// Learning rate of measurements, unless it is too large for the checks.
const LR: f64 = 0.1;

/// Parameters and gradients have half to all of these magnitudes.
const LARGEST_PARAM: f32 = 1.0;
const LARGEST_GRAD: f32 = 0.125;

/// A rule of these fields at the learning rate that was given, else at a gentle one.
pub fn at_its_lr(fields: &FieldArgs, config: AnyRule) -> anyhow::Result<AnyRule> {
    Ok(match fields.has_lr() {
        true => config,
        false => at_a_gentle_lr(&config)?,
    })
}

/// The rule at a learning rate at which the checked steps move no parameter by more than half, for all that its corner
/// cases say. One that is nearly cancelled has a small ULP, which would say nothing of the arithmetic.
pub fn at_a_gentle_lr(rule: &AnyRule) -> Result<AnyRule, ConfigError> {
    let start = [LARGEST_PARAM / 2.0; 4];
    let grads = [1.0, 0.5, -0.5, -1.0].map(|share| share * LARGEST_GRAD);
    let mut rule = rule.with_lr(LR)?;
    for _ in 0..f64::MANTISSA_DIGITS {
        let mut oracle = Oracle::new(&start, Roundoff::NEAREST);
        let mut worst = 0.0f64;
        for lr in CHECKED_LRS {
            oracle.step(&rule.with_lr(lr * rule.lr())?, &grads);
            let moves = oracle.params().map(|theta| (theta - 0.5).abs());
            worst = moves.fold(worst, f64::max);
        }
        if worst <= 0.25 {
            break;
        }
        rule = rule.with_lr(rule.lr() / 2.0)?;
    }
    Ok(rule)
}

/// Elements that are compared at a time, by each thread: the oracle takes many times the memory of the problem.
const CHUNK: usize = 1 << 16;

/// Bytes that the oracle takes for an element, about.
const ORACLE_BYTES: u64 = 264;

/// Bytes that a tensor takes on the host beside its values, about: its name, its entries in lists, its objects on a device.
const TENSOR_BYTES: u64 = 1 << 10;

/// A configuration, and tensors to step through with it, one after the other.
pub struct Problem {
    config: AnyRule,
    stored: Stored,
    /// Elements of each tensor.
    sizes: Vec<usize>,
    start: Vec<f32>,
    grads: Vec<f32>,
}

impl Problem {
    pub fn new(config: AnyRule, sizes: Vec<usize>) -> Self {
        let numel = sizes.iter().sum();
        let mut rng = fastrand::Rng::with_seed(numel as u64);
        let mut values = |largest: f32| {
            let value = |_| {
                let magnitude = largest * (0.5 + 0.5 * rng.f32());
                if rng.bool() { magnitude } else { -magnitude }
            };
            (0..numel).map(value).collect()
        };
        Self {
            config,
            stored: Stored::default(),
            sizes,
            start: values(LARGEST_PARAM),
            grads: values(LARGEST_GRAD),
        }
    }

    /// Returns the problem with tensors that are stored otherwise.
    pub fn stored(mut self, stored: Stored) -> Self {
        let round = |of: StorageType, values: &mut [f32]| {
            values
                .iter_mut()
                .for_each(|value| *value = of.rounded(*value));
        };
        round(stored.params, &mut self.start);
        round(stored.grads, &mut self.grads);
        self.stored = stored;
        self
    }

    /// The types in which the tensors and the rule's slots are stored.
    pub fn storage(&self) -> Storage {
        self.stored.storage(&self.config.slots())
    }

    /// The memory that a problem of so many tensors and elements takes.
    pub fn bytes(tensors: usize, numel: usize) -> u64 {
        let values = (numel as u64).saturating_mul(2 * size_of::<f32>() as u64);
        values.saturating_add((tensors as u64).saturating_mul(TENSOR_BYTES))
    }

    /// Bytes that parameters, gradients, slots and masters take, wherever they are.
    pub fn stored_bytes(&self) -> u64 {
        let storage = self.storage();
        let elem = storage.params.bytes() + storage.grads.bytes() + storage.state_bytes();
        elem * self.numel() as u64
    }

    /// The memory that a [check](Self::check) takes: results are gathered tensor by tensor and as one.
    pub fn check_bytes(&self) -> u64 {
        let slots = self.config.slots().kept().count() as u64;
        let masters = self.storage().masters.codec().map_or(0, Codec::elem_bytes);
        let result = 2 * (1 + slots) * size_of::<f32>() as u64 + masters;
        let longest = self.compared().iter().map(Range::len).max();
        let compared = longest.unwrap_or_default() * rayon::current_num_threads();
        let compared = self.numel().min(compared);
        result * self.numel() as u64 + ORACLE_BYTES * compared as u64
    }

    fn bookkeeping_bytes(&self) -> u64 {
        self.sizes.len() as u64 * TENSOR_BYTES
    }

    /// Bytes that one step moves per element.
    pub fn bytes_per_elem(&self) -> u64 {
        let storage = self.storage();
        // Where sums are taken first, all is read once before.
        let measured = match self.config.sums().is_empty() {
            true => 0,
            false => storage.params.bytes() + storage.grads.bytes() + storage.state_bytes(),
        };
        storage.bytes_per_elem() + measured
    }

    /// The types in which the rule's slots and the parameters are remembered.
    pub fn precision(&self) -> &Precision {
        &self.stored.precision
    }

    fn groups(&self) -> ParamGroups<AnyRule> {
        ParamGroups::new(self.config.clone()).with_precision(self.stored.precision)
    }

    pub fn config(&self) -> &AnyRule {
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

    /// The tensors by name, shape and type.
    fn specs(&self) -> impl Iterator<Item = TensorSpec> {
        let Storage { params, grads, .. } = self.storage();
        let sizes = self.sizes.iter().enumerate();
        sizes.map(move |(index, numel)| {
            TensorSpec::new(index.to_string(), [*numel])
                .params_type(params)
                .grads_type(grads)
        })
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

    fn config_at(&self, lr: f64) -> Result<AnyRule, Failure> {
        self.config.with_lr(lr).map_err(Failure::failed)
    }

    fn checked_lrs(&self) -> [f64; CHECKED_LRS.len()] {
        CHECKED_LRS.map(|lr| lr * self.config.lr())
    }

    /// Makes a few steps and compares every parameter and every value of every slot. A wrong one is a failure.
    pub fn check(
        &self,
        stepper: &mut dyn Stepper,
        rounding: Roundoff,
    ) -> Result<Agreement, Failure> {
        for lr in self.checked_lrs() {
            stepper.step(lr)?;
        }
        self.compare(&stepper.results()?, rounding)
    }

    fn compare<'r>(&self, results: &'r Results, rounding: Roundoff) -> Result<Agreement, Failure> {
        let configs = self
            .checked_lrs()
            .into_iter()
            .map(|lr| self.config_at(lr))
            .collect::<Result<Vec<_>, _>>()?;
        let slots = self.config.slots();
        let compare_part = |range: Range<usize>| -> Result<Agreement, Disagreement> {
            let start = range.start;
            let oracle = Oracle::new(&self.start[range.clone()], rounding);
            let mut oracle = oracle.stored(self.storage());
            for config in &configs {
                oracle.step(config, &self.grads[range.clone()]);
            }
            // Where values are missing there are too few for the oracle.
            let part = |values: &'r [f32]| values.get(range.clone()).unwrap_or_default();
            let params = oracle.check_params(part(&results.params))?;
            let mut worst = Agreement::default().worst(params, start);
            for (slot, values) in slots.kept().zip(&results.slots) {
                worst = worst.worst(oracle.check_slot(slot.name, part(values))?, start);
            }
            Ok(worst)
        };
        self.compared()
            .into_par_iter()
            .map(compare_part)
            .try_reduce(Agreement::default, |x, y| Ok(x.worst(y, 0)))
            .map_err(|wrong| Failure::Wrong(anyhow!("wrong results: {wrong}")))
    }

    /// The elements that an oracle follows together: chunks, or whole tensors where the rule takes sums over them.
    fn compared(&self) -> Vec<Range<usize>> {
        if self.config.sums().is_empty() {
            let starts = (0..self.numel()).step_by(CHUNK);
            let chunks = starts.map(|start| start..self.numel().min(start + CHUNK));
            return chunks.collect();
        }
        let mut end = 0;
        let tensor = |numel: &usize| {
            end += numel;
            end - numel..end
        };
        self.sizes.iter().map(tensor).collect()
    }

    /// The values of each slot in a state, those of all tensors one after the other.
    fn slots_in(&self, state: &OptimizerState<AnyRule>) -> Vec<Vec<f32>> {
        let slots = self.config.slots();
        let values = |slot: &Slot| {
            let tensors = state.tensors.iter();
            let values: Vec<_> = tensors
                .filter_map(|tensor| tensor.slot(slot.name))
                .collect();
            values.concat()
        };
        slots.kept().map(values).collect()
    }
}

/// The result of steps: the values of all tensors, one after the other.
#[derive(Clone)]
pub struct Results {
    pub params: Vec<f32>,
    /// The slots that the rule keeps, in its order.
    pub slots: Vec<Vec<f32>>,
}

/// One way to make a step.
pub trait Stepper {
    fn step(&mut self, lr: f64) -> Result<(), Failure>;

    /// Everything as it is now.
    fn results(&self) -> Result<Results, Failure>;
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
    problem: &'a Problem,
    arena: Arena,
    optimizer: GpuOptimizer<AnyRule>,
    control: Option<GpuControl>,
}

/// The control of a step that is clipped: by a norm that nothing reaches, so that the result is the same.
fn control() -> Result<StepControl, Failure> {
    let control = StepControl::builder().max_norm(f32::MAX.into());
    control.build().map_err(Failure::failed)
}

impl<'a> OnGpu<'a> {
    /// The memory that it takes on the host, which is what some adapters have, too.
    pub fn bytes(open: &OpenGpu, problem: &Problem) -> u64 {
        let on_device = match open.shares_memory() {
            true => problem.stored_bytes(),
            false => 0,
        };
        on_device + 2 * problem.bookkeeping_bytes()
    }

    pub fn new(open: &'a OpenGpu, problem: &'a Problem) -> Result<Self, Failure> {
        let (device, queue) = (&open.gpu.device, &open.gpu.queue);
        let arena = Arena::new(device, queue, problem.specs()).map_err(Failure::failed)?;
        let (start, grads): (Vec<_>, Vec<_>) = problem.values().unzip();
        arena.upload_all_params(&start).map_err(Failure::failed)?;
        arena.upload_all_grads(&grads).map_err(Failure::failed)?;
        let groups = problem.groups();
        let optimizer = GpuOptimizer::with_groups(&open.kernels, &groups, &arena.bindings())
            .map_err(Failure::failed)?;
        Ok(Self {
            open,
            problem,
            arena,
            optimizer,
            control: None,
        })
    }

    /// Makes a step under a control.
    pub fn controlled(mut self) -> Result<Self, Failure> {
        let control = GpuControl::new(&self.open.kernels, control()?);
        self.control = Some(control.map_err(Failure::failed)?);
        Ok(self)
    }

    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// The optimizer, and what controls it.
    pub fn parts_mut(&mut self) -> (&mut GpuOptimizer<AnyRule>, Option<&mut GpuControl>) {
        (&mut self.optimizer, self.control.as_mut())
    }

    /// Dispatches of the last step.
    pub fn dispatches(&self) -> usize {
        self.optimizer.dispatches() + usize::from(self.control.is_some())
    }
}

impl Stepper for OnGpu<'_> {
    fn step(&mut self, lr: f64) -> Result<(), Failure> {
        self.optimizer.set_lr(lr).map_err(Failure::failed)?;
        let (optimizer, control) = (&mut self.optimizer, &mut self.control);
        submit_and_wait(self.open, |encoder| {
            match control {
                None => optimizer.step(encoder),
                Some(control) => optimizer.step_with(encoder, control),
            }
            .map_err(Failure::failed)
        })
    }

    fn results(&self) -> Result<Results, Failure> {
        let device = &self.open.gpu.device;
        let params = readback::block_on(device, self.arena.download_all_params())
            .map_err(Failure::failed)?;
        let state = readback::block_on(device, self.optimizer.state()).map_err(Failure::failed)?;
        Ok(Results {
            params: params.concat(),
            slots: self.problem.slots_in(&state),
        })
    }
}

pub struct OnCpu<'a> {
    problem: &'a Problem,
    params: Vec<TensorValues>,
    grads: Vec<TensorValues>,
    optimizer: CpuOptimizer<AnyRule>,
    control: Option<CpuControl>,
}

impl<'a> OnCpu<'a> {
    /// The memory that it takes.
    pub fn bytes(problem: &Problem) -> u64 {
        problem.stored_bytes() + problem.bookkeeping_bytes()
    }

    pub fn new(problem: &'a Problem) -> Result<Self, Failure> {
        let Storage { params, grads, .. } = problem.storage();
        let optimizer = CpuOptimizer::with_groups(&problem.groups(), problem.specs())
            .map_err(Failure::failed)?;
        let values = problem.values();
        let (params, grads) = values
            .map(|(p, g)| (TensorValues::new(params, p), TensorValues::new(grads, g)))
            .unzip();
        Ok(Self {
            problem,
            params,
            grads,
            optimizer,
            control: None,
        })
    }

    /// Makes a step under a control.
    pub fn controlled(mut self) -> Result<Self, Failure> {
        self.control = Some(CpuControl::new(control()?));
        Ok(self)
    }
}

impl Stepper for OnCpu<'_> {
    fn step(&mut self, lr: f64) -> Result<(), Failure> {
        self.optimizer.set_lr(lr).map_err(Failure::failed)?;
        let mut params: Vec<_> = self
            .params
            .iter_mut()
            .map(TensorValues::slice_mut)
            .collect();
        let grads: Vec<_> = self.grads.iter().map(TensorValues::slice).collect();
        match &mut self.control {
            None => self.optimizer.step_mixed(&mut params, &grads),
            Some(control) => {
                let stepped = self.optimizer.step_mixed_with(&mut params, &grads, control);
                stepped.map(drop)
            }
        }
        .map_err(Failure::failed)
    }

    fn results(&self) -> Result<Results, Failure> {
        let params: Vec<_> = self.params.iter().map(TensorValues::to_f32).collect();
        Ok(Results {
            params: params.concat(),
            slots: self.problem.slots_in(&self.optimizer.state()),
        })
    }
}

/// One thread, all tensors as one, one element after the other.
pub struct OnReference<'a> {
    problem: &'a Problem,
    results: Results,
    steps: u64,
}

impl<'a> OnReference<'a> {
    /// The memory that it takes.
    pub fn bytes(problem: &Problem) -> u64 {
        // It has the problem's gradients.
        problem.stored_bytes()
    }

    pub fn new(problem: &'a Problem) -> Self {
        let slots = problem.config.slots();
        let values = |slot: &Slot| vec![slot.start.value(); problem.numel()];
        Self {
            problem,
            results: Results {
                params: problem.start.clone(),
                slots: slots.kept().map(values).collect(),
            },
            steps: 0,
        }
    }
}

impl Stepper for OnReference<'_> {
    fn step(&mut self, lr: f64) -> Result<(), Failure> {
        let config = self.problem.config_at(lr)?;
        let Results { params, slots } = &mut self.results;
        let phase = config.phase(self.steps);
        let mut start = 0;
        for numel in &self.problem.sizes {
            let elems = start..start + numel;
            let (params, grads) = (
                &mut params[elems.clone()],
                &self.problem.grads[elems.clone()],
            );
            let state: Vec<_> = slots.iter().map(|slot| &slot[elems.clone()]).collect();
            let scalars = config.decided(phase, params, &state, grads);
            let state = slots.iter_mut().map(|slot| &mut slot[elems.clone()]);
            let mut state: Vec<_> = state.collect();
            config.step_in_turn(&scalars, params, &mut state, grads);
            start = elems.end;
        }
        self.steps += 1;
        Ok(())
    }

    fn results(&self) -> Result<Results, Failure> {
        Ok(self.results.clone())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn problem(rule: &str, numel: Vec<usize>) -> Problem {
        let config = AnyRule::preset(rule, None, LR).unwrap();
        Problem::new(at_a_gentle_lr(&config).unwrap(), numel)
    }

    #[test]
    fn one_wrong_element_is_found() {
        let problem = problem("adamw", vec![70_000, 30_001]);
        let mut stepper = OnReference::new(&problem);
        let right = problem.check(&mut stepper, Roundoff::NEAREST).unwrap();
        assert!(right.worst_ulp > 0.0 && right.worst_ulp < 10.0, "{right:?}");
        let mut results = stepper.results().unwrap();
        let is_wrong = |results: &Results| {
            let compared = problem.compare(results, Roundoff::NEAREST);
            matches!(compared, Err(Failure::Wrong(e)) if e.to_string().contains("wrong results"))
        };
        assert!(!is_wrong(&results));
        let right = results.params[100_000];
        results.params[100_000] = f32::from_bits(right.to_bits() + 20);
        assert!(is_wrong(&results));
        results.params[100_000] = right;
        for slot in 0..2 {
            let right = std::mem::replace(&mut results.slots[slot][70_000], f32::NAN);
            assert!(is_wrong(&results));
            results.slots[slot][70_000] = right;
        }
        results.slots[1].pop();
        assert!(is_wrong(&results));
    }

    #[test]
    fn checked_steps_cancel_no_parameter_whatever_the_rule() {
        for preset in AnyRule::presets() {
            let config = at_a_gentle_lr(&preset.config(LR).unwrap()).unwrap();
            let problem = Problem::new(config, vec![1000]);
            let mut stepper = OnReference::new(&problem);
            problem.check(&mut stepper, Roundoff::NEAREST).unwrap();
            for (start, params) in problem.start.iter().zip(stepper.results.params) {
                let moved = (params - start).abs();
                assert!(0.0 < moved && moved < 0.3, "{preset:?} moves by {moved}");
            }
        }
        // Momentum stays where its figures have always been taken.
        let config = AnyRule::preset("sgd", None, LR).unwrap();
        assert_eq!(at_a_gentle_lr(&config).unwrap(), config);
    }
}
