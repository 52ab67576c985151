//! The step itself: burn's buffers in, one pass submitted.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use burn::backend::StreamId;
use burn::backend::wgpu::AutoCompiler;
use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn_cubecl::cubecl::client::Client;
use burn_cubecl::cubecl::wgpu::WgpuServer;
use burn_cubecl::tensor::CubeTensor;
use wgpu_optim::readback::block_on;
use wgpu_optim::state::{SlotState, TensorState};
use wgpu_optim::storage::{MASTER_PARAMS, PARAMS_REST};
use wgpu_optim::{
    GpuOptimizer, Kernels, OptimizerState, ParamGroups, Rule, StorageType, TensorBinding,
    TensorSpec, TransferError, wgpu,
};

use crate::control::Control;
use crate::error::StepError;
use crate::module::storage_type;
use crate::rates::Rates;
use crate::stepped::{Copied, Expected, Stepped};

/// burn executes steps on a thread of its own.
pub(crate) type SharedEngine<R> = Arc<Mutex<Engine<R>>>;

/// An optimizer, and the tensors that it knows.
type Known<R> = (GpuOptimizer<R>, SpecsByName);
type SpecsByName = HashMap<String, TensorSpec>;

/// An optimizer that gets to know its tensors as they come.
pub(crate) struct Engine<R: Rule> {
    kernels: Kernels,
    groups: ParamGroups<R>,
    /// None before the first step.
    optimizer: Option<Known<R>>,
    /// The record that the next step continues from.
    record: Option<OptimizerState<R>>,
    control: Option<Control>,
    /// Why there is no going on from a record.
    failed: Option<StepError>,
    pub(crate) copied: Copied,
}

impl<R: Rule> Engine<R> {
    pub(crate) fn new(kernels: &Kernels, groups: ParamGroups<R>) -> Self {
        Self {
            kernels: kernels.clone(),
            groups,
            optimizer: None,
            record: None,
            control: None,
            failed: None,
            copied: Copied::default(),
        }
    }

    pub(crate) fn set_control(&mut self, control: &Control) {
        self.control = Some(control.clone());
    }

    pub(crate) fn optimizer(&self) -> Option<&GpuOptimizer<R>> {
        self.optimizer.as_ref().map(|(optimizer, _)| optimizer)
    }

    pub(crate) fn load(&mut self, record: OptimizerState<R>) {
        // A loss may be scaled before the next step.
        let loaded = self.control.as_ref().zip(record.control.as_ref());
        let loaded = loaded.map_or(Ok(()), |(control, state)| control.load_state(state));
        self.failed = loaded.err().map(StepError::from);
        self.optimizer = None;
        self.record = Some(record);
    }

    /// Makes no step until another record is loaded.
    #[cfg(feature = "train")]
    pub(crate) fn fail(&mut self, error: StepError) {
        self.failed = Some(error);
    }

    /// The state of the optimizer; one that is to be gone on from, or without tensors, before the first step.
    #[cfg(feature = "train")]
    pub(crate) fn record_or_start(&self) -> Result<OptimizerState<R>, StepError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        if let Some(record) = self.record()? {
            return Ok(record);
        }
        let nothing: [(String, Vec<usize>); 0] = [];
        let optimizer = GpuOptimizer::unbound(&self.kernels, &self.groups, nothing)?;
        let mut start = block_on(self.kernels.device(), optimizer.state())?;
        start.control = self.control.as_ref().map(Control::state).transpose()?;
        Ok(start)
    }

    /// The learning rates of a step, which every group takes.
    pub(crate) fn check_rates(
        &mut self,
        lr: &ModuleLearningRate,
        expected: &[Expected],
    ) -> Result<Rates, StepError> {
        let rates = Rates::of(lr, expected, &self.groups)?;
        match &mut self.optimizer {
            Some((optimizer, _)) => rates.set(optimizer)?,
            None => {
                let nothing: [(String, Vec<usize>); 0] = [];
                rates.set(&mut GpuOptimizer::unbound(
                    &self.kernels,
                    &self.groups,
                    nothing,
                )?)?;
            }
        }
        Ok(rates)
    }

    /// The state of the optimizer; none before the first step.
    pub(crate) fn record(&self) -> Result<Option<OptimizerState<R>>, TransferError> {
        let Some(optimizer) = self.optimizer() else {
            return Ok(self.record.clone());
        };
        let mut record = block_on(self.kernels.device(), optimizer.state())?;
        record.control = self.control.as_ref().map(Control::state).transpose()?;
        Ok(Some(record))
    }

    /// Records one step over tensors whose elements lie one after the other, and submits it after everything that burn
    /// has queued so far.
    pub(crate) fn step(
        &mut self,
        rates: &Rates,
        tensors: &[Stepped<CubeTensor>],
        copied: Copied,
    ) -> Result<(), StepError> {
        self.copied = copied;
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        let Some(first) = tensors.first() else {
            return Ok(());
        };
        let client = first.params.client.clone();
        // On burn's own thread and at one go: each question to it would otherwise wait for that thread by itself.
        client
            .exclusive(|| self.step_exclusively(&client, rates, tensors))
            .map_err(runtime)?
    }

    fn step_exclusively(
        &mut self,
        client: &Client,
        rates: &Rates,
        tensors: &[Stepped<CubeTensor>],
    ) -> Result<(), StepError> {
        // Its memory is not given to anyone else until a resource is dropped.
        let resource = |stepped: &Stepped<CubeTensor>, role, tensor: &CubeTensor| {
            let resource = client.get_resource::<WgpuServer<AutoCompiler>>(tensor.handle.clone());
            resource.map_err(|error| no_buffer(&stepped.path, role, &error))
        };
        let mut places = Vec::with_capacity(tensors.len());
        for tensor in tensors.iter().filter(|tensor| !tensor.shape.contains(&0)) {
            let params = resource(tensor, "params", &tensor.params)?;
            let grads = resource(tensor, "grads", &tensor.grads)?;
            places.push((tensor, params, grads));
        }
        flush(
            client,
            tensors
                .iter()
                .flat_map(|tensor| [&tensor.params, &tensor.grads]),
        )?;

        let bindings: Vec<_> = places
            .iter()
            .map(|(tensor, params, grads)| {
                let (params, grads) = (params.resource(), grads.resource());
                let shape = tensor.shape.as_slice();
                TensorBinding::new(&tensor.path, &params.buffer, &grads.buffer, shape)
                    .params_type(storage_type(tensor.params.dtype).unwrap_or_default())
                    .grads_type(storage_type(tensor.grads.dtype).unwrap_or_default())
                    .params_at(params.offset)
                    .grads_at(grads.offset)
            })
            .collect();
        let (mut optimizer, specs) = match self.optimizer.take() {
            Some((optimizer, specs)) if knows(&specs, &bindings) => (optimizer, specs),
            known => match self.acquainted(known.as_ref(), &bindings) {
                Ok(acquainted) => acquainted,
                Err(error) => {
                    self.optimizer = known;
                    return Err(error);
                }
            },
        };
        let device = self.kernels.device();
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor {
            label: Some("wgpu_optim_burn.step"),
        });
        let recorded = rates
            .set(&mut optimizer)
            .and_then(|()| Ok(optimizer.rebind(&mut encoder, &bindings)?))
            .and_then(|()| match &self.control {
                Some(control) => Ok(optimizer.step_with(&mut encoder, &mut control.lock())?),
                None => Ok(optimizer.step(&mut encoder)?),
            });
        // An error of these leaves it as it was.
        self.optimizer = Some((optimizer, specs));
        recorded?;
        self.kernels.queue().submit([encoder.finish()]);
        Ok(())
    }

    /// An optimizer that goes on from the record and from one that does not know all of these tensors.
    fn acquainted(
        &mut self,
        known: Option<&Known<R>>,
        bindings: &[TensorBinding<'_>],
    ) -> Result<Known<R>, StepError> {
        let device = self.kernels.device();
        let (record, mut specs) = match known {
            Some((optimizer, specs)) => (Some(block_on(device, optimizer.state())?), specs.clone()),
            None => (self.record.clone(), SpecsByName::new()),
        };
        specs.extend(
            bindings
                .iter()
                .map(|binding| (binding.name.to_owned(), spec(binding))),
        );
        let recorded = record.as_ref().map_or(&[][..], |record| &record.tensors);
        let names: Vec<_> = recorded.iter().map(|entry| entry.name.clone()).collect();
        for entry in recorded {
            let spec = || waiting(entry);
            specs.entry(entry.name.clone()).or_insert_with(spec);
        }
        let fresh = bindings
            .iter()
            .map(|binding| binding.name.to_owned())
            .filter(|name| !names.contains(name));
        let order: Vec<_> = names.iter().cloned().chain(fresh).collect();
        let tensors = order.iter().map(|name| specs[name].clone());
        let mut optimizer = GpuOptimizer::unbound(&self.kernels, &self.groups, tensors)?;
        if let Some(mut record) = record {
            // A record names all tensors, the new ones as they start.
            let fresh = block_on(device, optimizer.state())?.tensors;
            record
                .tensors
                .extend(fresh.into_iter().skip(record.tensors.len()));
            optimizer.load_state(&record)?;
        }
        self.record = None;
        // A file does not say the shape of what has no slots: known when it comes.
        let is_here = |name: &str| bindings.iter().any(|binding| binding.name == name);
        specs.retain(|name, spec| is_here(name) || !spec.shape.is_empty());
        Ok((optimizer, specs))
    }
}

fn spec(binding: &TensorBinding<'_>) -> TensorSpec {
    TensorSpec::new(binding.name, binding.shape.clone())
        .params_type(binding.params_type)
        .grads_type(binding.grads_type)
}

/// A tensor of a record that has not come with a gradient yet. It is remembered in one way for either type of 16 bits.
fn waiting(entry: &TensorState) -> TensorSpec {
    let of_16_bits = |slot: &SlotState| [MASTER_PARAMS, PARAMS_REST].contains(&&*slot.name);
    let params_type = match entry.slots.iter().any(of_16_bits) {
        true => StorageType::Bf16,
        false => StorageType::F32,
    };
    TensorSpec::new(entry.name.clone(), entry.shape.clone()).params_type(params_type)
}

/// Whether an optimizer of these tensors can be bound to those, types included.
fn knows(specs: &SpecsByName, bindings: &[TensorBinding<'_>]) -> bool {
    bindings.iter().all(|binding| {
        let known = specs.get(binding.name);
        known.is_some_and(|known| {
            (known.params_type, known.grads_type) == (binding.params_type, binding.grads_type)
        })
    })
}

/// Copies from the start of a buffer into a tensor, after everything that burn has queued so far.
pub(crate) fn fill(
    tensor: &CubeTensor,
    source: &wgpu::Buffer,
    kernels: &Kernels,
) -> Result<(), StepError> {
    let client = &tensor.client;
    let copy = || {
        let resource = client.get_resource::<WgpuServer<AutoCompiler>>(tensor.handle.clone());
        let resource = resource.map_err(|error| no_buffer("loss", "scale", &error))?;
        flush(client, [tensor])?;
        let (device, place) = (kernels.device(), resource.resource());
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor {
            label: Some("wgpu_optim_burn.fill"),
        });
        let size = (tensor.meta.num_elements() * tensor.dtype.size()) as u64;
        encoder.copy_buffer_to_buffer(source, 0, &place.buffer, place.offset, size);
        kernels.queue().submit([encoder.finish()]);
        Ok(())
    };
    client.exclusive(copy).map_err(runtime)?
}

/// Submits what burn has queued, on every stream that tensors come from.
fn flush<'t>(
    client: &Client,
    tensors: impl IntoIterator<Item = &'t CubeTensor>,
) -> Result<(), StepError> {
    let streams: BTreeSet<u64> = tensors
        .into_iter()
        .map(|tensor| tensor.handle.stream.value)
        .chain([StreamId::current().value])
        .collect();
    for value in streams {
        StreamId { value }
            .executes(|| client.flush())
            .map_err(runtime)?;
    }
    Ok(())
}

fn no_buffer(param: &str, role: &'static str, error: &impl std::fmt::Display) -> StepError {
    StepError::Buffer {
        param: param.to_owned(),
        role,
        message: error.to_string(),
    }
}

pub(crate) fn runtime(error: impl std::fmt::Display) -> StepError {
    StepError::Runtime {
        message: error.to_string(),
    }
}
