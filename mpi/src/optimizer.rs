//! An optimizer whose state is sharded over ranks.

use std::ops::Range;

use mpi::traits::Communicator;
use wgpu_optim::control::{ControlRecord, GradNorm, GradNorms, Verdict};
use wgpu_optim::cpu::SliceError;
use wgpu_optim::rules::{Groups, Twin};
use wgpu_optim::state::UnknownTensor;
use wgpu_optim::storage::Storage;
use wgpu_optim::{
    Arena, CpuControl, CpuOptimizer, Kernels, Optimizer, OptimizerState, ParamGroups, Rule,
    StepControl, StorageType, TensorSlice, TensorSliceMut, TensorSpec,
};
use wgpu_optim_files::round::WeightedSum;

use crate::buckets::{Buckets, Memory, Staging, Stored};
use crate::error::ShardError;
use crate::memory::Host;
use crate::ranks::{Ranks, Terms, Traffic};
use crate::share::{CpuShare, GpuShare, Share};
use crate::shares::{Shares, Slice};

/// The reduction of the gradients of all ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduction {
    /// Their mean, as PyTorch's `DistributedDataParallel` takes it.
    #[default]
    Mean,
    /// Their sum.
    Sum,
}

/// The settings of a [`ShardedOptimizer`], the same on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Sharding {
    /// The reduction of the gradients of all ranks.
    pub reduction: Reduction,
    /// The treatment of the reduced gradients before they are applied. Norms are taken over all ranks.
    pub control: Option<StepControl>,
    /// About how many bytes of `f32` are on their way at a time: 16 MiB. Two such buckets are in memory, as they are sent and
    /// as they are received.
    pub bucket_bytes: u64,
}

impl Default for Sharding {
    fn default() -> Self {
        Self {
            reduction: Reduction::Mean,
            control: None,
            bucket_bytes: 16 << 20,
        }
    }
}

/// An optimizer of parameters that every rank has, whose state is cut into a share for each: stage 1 of
/// [ZeRO](https://arxiv.org/abs/1910.02054).
///
/// A step takes each rank's own gradients. They are reduce-scattered, each rank steps the elements of its share, and the
/// parameters are all-gathered in place. All methods that say so are *collective*: every rank of the communicator calls
/// them, in the same order; and they return errors on all ranks together.
///
/// Gradients are summed in the order of the ranks and in `f64`, and rounded to `f32` once, so a run repeats bit for bit with
/// as many ranks. Nothing else depends on how many there are.
///
/// ```
/// use wgpu_optim::{AdamConfig, ParamGroups};
/// use wgpu_optim_mpi::mpi::traits::Communicator;
/// use wgpu_optim_mpi::{ShardedOptimizer, Sharding, mpi};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // Other threads compute, and this one talks to other ranks.
/// let threads = mpi::Threading::Funneled;
/// let (universe, _) = mpi::initialize_with_threading(threads).ok_or("MPI has been initialized")?;
/// let world = universe.world();
/// let groups = ParamGroups::new(AdamConfig::adamw(1e-3).weight_decay(0.01).build()?);
/// let tensors = [("weight", vec![100, 10]), ("bias", vec![10])];
/// let mut optimizer = ShardedOptimizer::on_cpu(&world, &groups, tensors, &Sharding::default())?;
///
/// let (mut weight, mut bias) = (vec![1.0; 1000], vec![0.0; 10]);
/// // Of this rank's part of the batch.
/// let (weight_grads, bias_grads) = (vec![world.rank() as f32; 1000], vec![1.0; 10]);
/// optimizer.step(
///     &mut [(&mut weight[..]).into(), (&mut bias[..]).into()],
///     &[(&weight_grads[..]).into(), (&bias_grads[..]).into()],
/// )?;
/// // The same on every rank.
/// assert!((bias[0] + 1e-3).abs() < 1e-9);
///
/// let folder = std::env::temp_dir().join("wgpu-optim-mpi-example");
/// std::fs::create_dir_all(&folder)?;
/// optimizer.save(&folder.join("state.safetensors.index.json"))?;
/// # std::fs::remove_dir_all(&folder)?;
/// # drop(optimizer);
/// # Ok(())
/// # }
/// ```
///
/// It has a communicator of its own, so drop it before MPI is finalized, which is when the `Universe` is dropped.
pub struct ShardedOptimizer<S: Share> {
    pub(crate) ranks: Ranks,
    pub(crate) buckets: Buckets,
    pub(crate) tensors: Vec<TensorSpec>,
    pub(crate) share: S,
    /// The names of all groups, and of each tensor's.
    groups: Vec<String>,
    group_of: Vec<String>,
    weights: WeightedSum,
    control: Option<CpuControl>,
    /// The reduced gradients of the share, tensor by tensor.
    grads: Vec<Vec<f32>>,
    staging: Staging,
    steps: u64,
    is_half_way: bool,
}

/// The part of a sharded optimizer that does not depend on where the share is stepped.
struct Layout {
    ranks: Ranks,
    buckets: Buckets,
    tensors: Vec<TensorSpec>,
    groups: Vec<String>,
    group_of: Vec<String>,
    elems: Vec<Range<u64>>,
}

impl Layout {
    fn new<R: Rule>(
        communicator: &impl Communicator,
        groups: &ParamGroups<R>,
        tensors: Vec<TensorSpec>,
        sharding: &Sharding,
    ) -> Result<Self, ShardError> {
        let ranks = Ranks::new(communicator);
        let mut terms = Terms::default();
        terms.add("the version of wgpu-optim-mpi", env!("CARGO_PKG_VERSION"));
        terms.add("the sharding", format!("{sharding:?}"));
        for (group, config, precision) in groups.iter() {
            terms.add(
                format!("group {group:?}"),
                format!("{config:?}, {precision:?}"),
            );
        }
        terms.add("the number of tensors", tensors.len().to_string());
        let mut checked = Ok(());
        for (index, tensor) in tensors.iter().enumerate() {
            let TensorSpec {
                name,
                shape,
                params_type,
                grads_type,
            } = tensor;
            let group = groups.group_of(name);
            terms.add(format!("the name of tensor {index}"), format!("{name:?}"));
            terms.add(
                format!("tensor {name:?}"),
                format!(
                    "{shape:?} of {}, gradients of {}, in group {group:?}",
                    params_type.name(),
                    grads_type.name()
                ),
            );
            let group = groups.iter().find(|(known, ..)| *known == group);
            let is_stochastic = group.is_some_and(|(_, config, precision)| {
                let (params, grads) = (*params_type, *grads_type);
                Storage::new(params, grads, config.slots().kept_names(), precision).is_stochastic
            });
            if is_stochastic {
                checked = Err(ShardError::Stochastic {
                    tensor: name.clone(),
                });
            }
        }
        let mut with_sums = groups
            .iter()
            .filter(|(_, config, _)| !config.sums().is_empty());
        if let Some((group, config, _)) = with_sums.next() {
            checked = Err(ShardError::Sums {
                group: (*group).to_owned(),
                rule: config.stem(),
            });
        }
        let is_known = |name: &&str| groups.iter().any(|(group, ..)| group == *name);
        let mut clipped = sharding.control.iter().flat_map(StepControl::groups);
        if let Some(group) = clipped.find(|name| !is_known(name)) {
            let group = group.to_owned();
            checked = Err(SliceError::UnknownGroup { group }.into());
        }
        let control = sharding.control.as_ref();
        if control.is_some_and(|control| control.tensor_max_norm().is_some()) {
            checked = Err(ShardError::ClipsTensors);
        }
        ranks.agree(checked.map(|()| &terms))?;

        let numels: Vec<_> = tensors.iter().map(numel).collect();
        let shares = Shares::new(&numels, ranks.size());
        let stored = tensors.iter().map(|tensor| Stored {
            params: tensor.params_type,
            grads: tensor.grads_type,
            is_frozen: false,
        });
        let elems = |tensor| shares.of_tensor(ranks.rank(), tensor);
        Ok(Self {
            elems: (0..tensors.len()).map(elems).collect(),
            buckets: Buckets::new(shares, stored.collect(), sharding.bucket_bytes),
            groups: groups.iter().map(|(group, ..)| group.to_owned()).collect(),
            group_of: tensors
                .iter()
                .map(|tensor| groups.group_of(&tensor.name).to_owned())
                .collect(),
            tensors,
            ranks,
        })
    }

    fn with<S: Share>(
        self,
        share: Result<S, ShardError>,
        sharding: &Sharding,
    ) -> Result<ShardedOptimizer<S>, ShardError> {
        let share = self.ranks.all_well(share)?;
        let size = self.ranks.size();
        Ok(ShardedOptimizer {
            grads: self
                .elems
                .iter()
                .map(|elems| vec![0.0; (elems.end - elems.start) as usize])
                .collect(),
            share,
            groups: self.groups,
            group_of: self.group_of,
            weights: WeightedSum {
                factors: vec![1.0; size],
                divisor: match sharding.reduction {
                    Reduction::Mean => size as f64,
                    Reduction::Sum => 1.0,
                },
            },
            control: sharding.control.clone().map(CpuControl::new),
            ranks: self.ranks,
            buckets: self.buckets,
            tensors: self.tensors,
            staging: Staging::default(),
            steps: 0,
            is_half_way: false,
        })
    }
}

pub(crate) fn numel(tensor: &TensorSpec) -> u64 {
    let sizes = tensor.shape.iter();
    sizes.fold(1, |numel: u64, size| numel.saturating_mul(*size as u64))
}

impl<R: Twin> ShardedOptimizer<CpuShare<R>> {
    /// One whose ranks step their shares with the CPU twin, of tensors that lie in memory. Collective.
    ///
    /// # Errors
    /// [`ShardError`] where ranks differ in anything, or a tensor is one that cannot be stepped in shares.
    pub fn on_cpu(
        communicator: &impl Communicator,
        groups: &ParamGroups<R>,
        tensors: impl IntoIterator<Item: Into<TensorSpec>>,
        sharding: &Sharding,
    ) -> Result<Self, ShardError> {
        let tensors = tensors.into_iter().map(Into::into).collect();
        let layout = Layout::new(communicator, groups, tensors, sharding)?;
        let own = layout
            .tensors
            .iter()
            .zip(&layout.elems)
            .map(|(tensor, elems)| {
                // Reduced gradients are f32, whatever they were sent as.
                TensorSpec::new(&*tensor.name, [(elems.end - elems.start) as usize])
                    .params_type(tensor.params_type)
            });
        let optimizer = CpuOptimizer::with_groups(groups, own);
        layout.with(optimizer.map(CpuShare).map_err(Into::into), sharding)
    }

    /// Applies one step: `params[i]`, the same on every rank, moves by `grads[i]` of all ranks, in the order in which the
    /// tensors were given. Collective. Returns what the control made of it, if there is one.
    ///
    /// # Errors
    /// [`ShardError`], where nothing has changed unless this step or one before [went half-way](ShardError::HalfWay).
    pub fn step(
        &mut self,
        params: &mut [TensorSliceMut<'_>],
        grads: &[TensorSlice<'_>],
    ) -> Result<Option<ControlRecord>, ShardError> {
        let checked = self.check_slices(params, grads);
        let (shares, rank) = (&self.buckets.shares, self.ranks.rank());
        let own = (0..self.tensors.len()).map(|tensor| shares.of_tensor(rank, tensor));
        let own: Vec<_> = own
            .map(|elems| elems.start as usize..elems.end as usize)
            .collect();
        self.step_in(
            &mut Host { params, grads },
            checked,
            |share, host, reduced| {
                let params = host.params.iter_mut().zip(own);
                let mut params: Vec<_> = params
                    .map(|(params, own)| match params {
                        TensorSliceMut::F32(params) => TensorSliceMut::F32(&mut params[own]),
                        TensorSliceMut::Bf16(params) => TensorSliceMut::Bf16(&mut params[own]),
                        TensorSliceMut::F16(params) => TensorSliceMut::F16(&mut params[own]),
                    })
                    .collect();
                let grads = reduced.grads.iter().map(|grads| TensorSlice::F32(grads));
                let grads: Vec<_> = grads.collect();
                let stepped = match reduced.verdict {
                    Some(verdict) => {
                        let norms = GradNorms::default();
                        share.0.step_by(&mut params, &grads, &norms, verdict)
                    }
                    None => share.0.step_mixed(&mut params, &grads),
                };
                Ok(stepped?)
            },
        )
    }

    fn check_slices(
        &self,
        params: &[TensorSliceMut<'_>],
        grads: &[TensorSlice<'_>],
    ) -> Result<(), SliceError> {
        let expected = |of: fn(&TensorSpec) -> StorageType| {
            let tensors = self.tensors.iter();
            tensors.map(move |tensor| (&*tensor.name, of(tensor), numel(tensor)))
        };
        let params = params
            .iter()
            .map(|slice| (slice.storage_type(), slice.len()));
        let grads = grads
            .iter()
            .map(|slice| (slice.storage_type(), slice.len()));
        SliceError::check("params", expected(|tensor| tensor.params_type), params)?;
        SliceError::check("grads", expected(|tensor| tensor.grads_type), grads)
    }
}

impl<R: Rule> ShardedOptimizer<GpuShare<R>> {
    /// One whose ranks step their shares on their devices, of the tensors of an arena, which every rank has one of.
    /// Collective.
    ///
    /// # Errors
    /// [`ShardError`] where ranks differ in anything, a tensor is one that cannot be stepped in shares, or an optimizer
    /// cannot be built.
    pub fn on_gpu(
        communicator: &impl Communicator,
        kernels: &Kernels,
        groups: &ParamGroups<R>,
        arena: &Arena,
        sharding: &Sharding,
    ) -> Result<Self, ShardError> {
        let tensors = arena.bindings().into_iter().map(|binding| {
            TensorSpec::new(binding.name, binding.shape)
                .params_type(binding.params_type)
                .grads_type(binding.grads_type)
        });
        let layout = Layout::new(communicator, groups, tensors.collect(), sharding)?;
        let share = GpuShare::new(kernels, groups, arena, &layout.elems);
        layout.with(share, sharding)
    }

    /// Applies one step: the arena's parameters, the same on every rank, move by its gradients on all ranks. Collective.
    /// Submits, and waits for the device; what was submitted before has been done. Returns what the control made of it, if
    /// there is one.
    ///
    /// # Errors
    /// [`ShardError`], where nothing has changed unless this step or one before [went half-way](ShardError::HalfWay).
    pub fn step_arena(&mut self) -> Result<Option<ControlRecord>, ShardError> {
        let mut device = self.share.whole.clone();
        self.step_in(&mut device, Ok(()), |share, _, reduced| {
            if let Some(verdict) = reduced.verdict {
                if verdict.record().is_skipped {
                    return Ok(());
                }
                for (grads, group) in reduced.grads.iter_mut().zip(reduced.group_of) {
                    verdict.apply_to(group, None, grads);
                }
            }
            share.step(reduced.grads)
        })
    }

    /// Dispatches of the last step on this rank's device.
    #[must_use]
    pub fn dispatches(&self) -> usize {
        self.share.dispatches()
    }
}

/// Gradients of a rank's share, and the control's verdict on them.
struct Reduced<'a> {
    /// The gradients of all ranks, tensor by tensor.
    grads: &'a mut [Vec<f32>],
    /// The parameter group of each tensor.
    group_of: &'a [String],
    verdict: Option<&'a Verdict>,
}

impl<S: Share> ShardedOptimizer<S> {
    /// Makes a step of parameters and gradients that lie in `memory`; `step` applies it to this rank's share.
    fn step_in<M: Memory<Error = ShardError>>(
        &mut self,
        memory: &mut M,
        checked: Result<(), SliceError>,
        step: impl FnOnce(&mut S, &mut M, Reduced<'_>) -> Result<(), ShardError>,
    ) -> Result<Option<ControlRecord>, ShardError> {
        self.agree(checked)?;
        let (ranks, buckets, staging) = (&self.ranks, &self.buckets, &mut self.staging);
        let take = |_: &mut M, slices: &[Slice], mut reduced: &[f64]| {
            for slice in slices {
                let own = buckets.shares.of_tensor(ranks.rank(), slice.tensor);
                let start = (slice.elems.start - own.start) as usize;
                let (of_slice, rest) = reduced.split_at(slice.numel() as usize);
                let to = &mut self.grads[slice.tensor][start..start + of_slice.len()];
                for (to, grad) in to.iter_mut().zip(of_slice) {
                    *to = *grad as f32;
                }
                reduced = rest;
            }
            Ok(())
        };
        buckets.reduce(ranks, memory, &self.weights, staging, take)?;
        let verdict = self.decide()?;
        let record = verdict.as_ref().map(|verdict| *verdict.record());
        let reduced = Reduced {
            grads: &mut self.grads,
            group_of: &self.group_of,
            verdict: verdict.as_ref(),
        };
        let stepped = step(&mut self.share, memory, reduced);
        let is_skipped = record.is_some_and(|record| record.is_skipped);
        self.is_half_way = !is_skipped;
        self.ranks.all_well(stepped)?;
        if !is_skipped {
            // Every rank gets the parameters that have been stepped.
            let staging = &mut self.staging;
            self.buckets.gather(&self.ranks, memory, staging)?;
        }
        self.is_half_way = false;
        self.steps = self.steps.saturating_add(1);
        Ok(record)
    }

    /// The loss scale of the next step: 1 without a control.
    #[must_use]
    pub fn loss_scale(&self) -> f32 {
        self.control.as_ref().map_or(1.0, CpuControl::loss_scale)
    }

    /// The shares into which the elements are cut.
    #[must_use]
    pub const fn shares(&self) -> &Shares {
        &self.buckets.shares
    }

    /// The number of this rank.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.ranks.rank()
    }

    /// The bytes that have been exchanged so far.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.ranks.traffic()
    }

    /// Bytes of host memory that this rank has beside parameters, gradients and state: the reduced gradients of its share, and
    /// buckets on their way.
    #[must_use]
    pub fn working_bytes(&self) -> usize {
        let reduced = self.grads.iter().map(|grads| size_of_val(&**grads));
        reduced.sum::<usize>() + self.staging.bytes()
    }

    /// The state of this rank: of each tensor the elements of its share, as a tensor of one dimension. Not collective.
    ///
    /// # Errors
    /// [`ShardError::State`] if the device is lost or out of memory.
    pub fn state(&self) -> Result<OptimizerState<S::Rule>, ShardError> {
        let state = self.share.state()?;
        Ok(OptimizerState {
            steps: self.steps,
            control: self.control.as_ref().map(CpuControl::state),
            ..state
        })
    }

    pub(crate) fn load_own(&mut self, state: &OptimizerState<S::Rule>) -> Result<(), ShardError> {
        self.share.load_state(state)?;
        self.steps = state.steps;
        if let Some((control, state)) = self.control.as_mut().zip(state.control.as_ref()) {
            control.load_state(state);
        }
        self.is_half_way = false;
        Ok(())
    }

    /// Makes sure that every rank is about to make the same step.
    fn agree(&self, checked: Result<(), SliceError>) -> Result<(), ShardError> {
        let mut terms = Terms::default();
        terms.add("the number of steps made", self.steps.to_string());
        for group in &self.groups {
            let config = self.group_config(group);
            terms.add(format!("group {group:?}"), format!("{config:?}"));
        }
        for (tensor, stored) in self.tensors.iter().zip(&self.buckets.tensors) {
            if stored.is_frozen {
                terms.add(format!("frozen tensor {:?}", tensor.name), "frozen");
            }
        }
        if let Some(control) = &self.control {
            terms.add("the control's state", format!("{:?}", control.state()));
        }
        let checked = match self.is_half_way {
            true => Err(ShardError::HalfWay),
            false => checked.map_err(Into::into),
        };
        self.ranks.agree(checked.map(|()| &terms))
    }

    /// Decides about the step, by the norms of all ranks.
    fn decide(&mut self) -> Result<Option<Verdict>, ShardError> {
        let Some(control) = &mut self.control else {
            return Ok(None);
        };
        let groups = self.group_of.iter().zip(&self.buckets.tensors);
        let groups = groups.map(|(group, stored)| (!stored.is_frozen).then_some(group.as_str()));
        let groups: Vec<_> = groups.collect();
        let norms = self
            .share
            .grad_norms(&self.grads, &groups, control.control());
        let norms = self.ranks.all_well(norms.map_err(ShardError::from))?;
        let mut of_ranks = vec![Vec::with_capacity(norms.len()); self.ranks.size()];
        for norm in norms {
            let norms = self.ranks.gather(norm.to_bytes()).into_iter();
            for (of_rank, norm) in of_ranks.iter_mut().zip(norms) {
                of_rank.push(GradNorm::from_bytes(norm));
            }
        }
        let of_ranks = of_ranks.into_iter().map(|shared| GradNorms {
            shared,
            ..GradNorms::default()
        });
        Ok(Some(control.decide(&of_ranks.collect::<Vec<_>>())))
    }
}

/// Setters are called on every rank alike, before its next step. Nothing is exchanged for a frozen tensor. A step that a
/// control skips counts as made.
impl<S: Share> Optimizer for ShardedOptimizer<S> {
    type Rule = S::Rule;

    fn groups(&self) -> &Groups<S::Rule> {
        self.share.optimizer().groups()
    }

    fn groups_mut(&mut self) -> &mut Groups<S::Rule> {
        self.share.optimizer_mut().groups_mut()
    }

    fn steps(&self) -> u64 {
        self.steps
    }

    fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }

    fn names(&self) -> Vec<&str> {
        self.share.optimizer().names()
    }

    fn applied_steps(&self, tensor: &str) -> Option<u64> {
        self.share.optimizer().applied_steps(tensor)
    }

    fn set_frozen(&mut self, tensor: &str, frozen: bool) -> Result<(), UnknownTensor> {
        self.share.optimizer_mut().set_frozen(tensor, frozen)?;
        let tensors = self.tensors.iter().zip(&mut self.buckets.tensors);
        for (_, stored) in { tensors }.filter(|(known, _)| known.name == tensor) {
            stored.is_frozen = frozen;
        }
        Ok(())
    }
}
