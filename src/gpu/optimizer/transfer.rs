//! The state of an optimizer, to the host and back.

use std::borrow::Cow;
use std::ops::Range;

use super::GpuOptimizer;
use crate::gpu::error::{LoadError, TransferError};
use crate::gpu::moves::Moves;
use crate::gpu::readback::{self, Downloaded};
use crate::plan::Part;
use crate::rules::Rule;
use crate::state::{Counts, OptimizerState, Section, UnknownTensor};
use crate::storage::{Codec, SectionValues};

/// Some elements of a slot of a tensor's state, in a buffer of the optimizer's with the usages `STORAGE`, `COPY_SRC` and
/// `COPY_DST`.
#[derive(Clone, Debug)]
pub struct StateSlice<'o> {
    /// The elements of the tensor.
    pub elems: Range<u64>,
    /// The buffer they lie in.
    pub buffer: &'o wgpu::Buffer,
    /// Byte offset of the first of them there.
    pub offset_bytes: u64,
    /// The codec of the values.
    pub codec: Codec,
}

/// A section of a tensor's state, with its values if there are some.
type SavedSection<'s> = (Section, Option<Cow<'s, SectionValues>>);

/// The most that one transfer moves, so that a state of any size needs no larger staging buffer.
pub(super) const MAX_TRANSFER_BYTES: u64 = 1 << 28;

impl<R: Rule> GpuOptimizer<R> {
    /// The places of a slot of a tensor's state, in runs of its elements, so that a program can save it or put another in
    /// its place within an encoder of its own. None where the rule keeps no such slot, or there is no such tensor. Masters of
    /// 16-bit parameters are a slot, [`Masters::slot`](crate::Masters::slot); a master in `f32` that is zero stands for the
    /// parameter itself.
    pub fn state_slices(&self, tensor: &str, slot: &str) -> impl Iterator<Item = StateSlice<'_>> {
        let recorder = &self.recorder;
        let found = recorder.tensors.index_of(tensor).and_then(|index| {
            let tensor = &recorder.tensors.as_slice()[index];
            let slots = self.groups.config(tensor.group).slots();
            let mut sections = Section::all(&slots, &tensor.storage).enumerate();
            let (place, section) = sections.find(|(_, section)| section.name == slot)?;
            Some((index, place, section.codec))
        });
        found.into_iter().flat_map(move |(tensor, section, codec)| {
            let slice = move |part: &'_ Part| {
                Some(StateSlice {
                    elems: part.elems.clone(),
                    buffer: recorder.state[part.piece].as_ref()?,
                    offset_bytes: recorder.plan.state_bytes_of(part, section)?.start,
                    codec,
                })
            };
            recorder.plan.parts_of(tensor).iter().filter_map(slice)
        })
    }

    /// Says how many steps have been applied to a tensor: what goes with a state that was put in another's place. Takes
    /// effect before the commands of the next submission.
    ///
    /// # Errors
    /// [`UnknownTensor`] if no tensor has this name.
    pub fn set_applied_steps(&mut self, tensor: &str, steps: u64) -> Result<(), UnknownTensor> {
        let index = self.index_of(tensor)?;
        let mut applied = vec![None; self.recorder.tensors.as_slice().len()];
        applied[index] = Some(steps);
        self.set_counts(&applied, None);
        Ok(())
    }

    fn index_of(&self, tensor: &str) -> Result<usize, UnknownTensor> {
        let index = self.recorder.tensors.index_of(tensor);
        index.ok_or_else(|| UnknownTensor {
            tensor: tensor.to_owned(),
        })
    }

    /// Sets the counts of some tensors, and the number of steps perhaps.
    pub(super) fn set_counts(&mut self, applied: &[Option<u64>], steps: Option<u64>) {
        let recorder = &mut self.recorder;
        recorder.learn();
        let queue = recorder.kernels.queue();
        let so_far = recorder.submissions.so_far(queue);
        recorder.ledger.set(applied, steps, &so_far);
        recorder
            .device_counts
            .restart(queue, applied, &recorder.ledger);
        recorder.set_recounted();
    }

    /// Says that somebody else has written a tensor's parameters: what is remembered of them is made of them again, at
    /// this place in `encoder`. Masters and rests of 16-bit parameters are then what the parameters are, and slots that
    /// start as the parameters (the `z` of schedule-free rules) start again. Momenta, averages of gradients and step counts
    /// stay as they are.
    ///
    /// Record it after what writes the parameters and before the next step. Parameters of `f32` without such slots need
    /// nothing of the kind, nor do those of 16 bits without masters. Where `f32` masters are kept and this is not called,
    /// the next step undoes the change; where rests are, it keeps the change and adds what is left of the old value, less
    /// than half a unit in the last place.
    ///
    /// ```
    /// use wgpu_optim::{AdapterRequest, Gpu, GpuOptimizer, Kernels, SgdConfig, StorageType, TensorBinding, readback};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default())?;
    /// let params = readback::storage_buffer(&device, &queue, "params", &[0.0; 4])?; // eight bf16
    /// let grads = readback::storage_buffer(&device, &queue, "grads", &[1.0; 8])?;
    /// let weight = TensorBinding::new("weight", &params, &grads, [8]).params_type(StorageType::Bf16);
    /// let mut optimizer =
    ///     GpuOptimizer::new(&Kernels::new(&device, &queue)?, SgdConfig::builder(0.25).build()?, &[weight])?;
    ///
    /// let mut encoder = device.create_command_encoder(&Default::default());
    /// optimizer.step(&mut encoder)?; // -0.25
    /// encoder.clear_buffer(&params, 0, None); // or a mask, a clamp, weights that are loaded
    /// optimizer.params_changed(&mut encoder, "weight")?;
    /// optimizer.step(&mut encoder)?;
    /// queue.submit([encoder.finish()]);
    ///
    /// let pairs = readback::download_blocking(&device, &queue, &params, 0, 4)?;
    /// assert!(pairs.iter().all(|pair| pair.to_bits() == 0xbe80_be80)); // -0.25, twice
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`UnknownTensor`] if no tensor has this name.
    pub fn params_changed(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        tensor: &str,
    ) -> Result<(), UnknownTensor> {
        let index = self.index_of(tensor)?;
        let recorder = &mut self.recorder;
        let host = &recorder.tensors.as_slice()[index];
        let slots = self.groups.config(host.group).slots();
        let sections = Section::all(&slots, &host.storage).enumerate();
        let sections = sections.filter(|(_, section)| section.is_of_params());
        // NaN of any type, or a master that is zero.
        let bits = |section: &Section| match section.starts_at_zero() {
            true => 0,
            false => u32::MAX,
        };
        let sections = sections.map(|(index, section)| (index, bits(&section)));
        let sections: Vec<_> = sections.collect();
        let Some(fill) = recorder.fill.as_ref().filter(|_| !sections.is_empty()) else {
            return Ok(());
        };
        let submission = recorder.submissions.of_encoder(encoder);
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("wgpu_optim.params_changed"),
            timestamp_writes: None,
        });
        // State that is still on its way would come after.
        for moves in &mut recorder.moves {
            moves.record(&mut pass, &submission);
        }
        for part in recorder.plan.parts_of(index) {
            for (section, value) in &sections {
                let buffer = recorder.state[part.piece].as_ref();
                let bytes = recorder.plan.state_bytes_of(part, *section);
                if let Some((buffer, bytes)) = buffer.zip(bytes) {
                    fill.record(&mut pass, buffer, bytes, *value);
                }
            }
        }
        Ok(())
    }

    /// Copies what the optimizer remembers off the device, after everything submitted so far: a step that was recorded and
    /// is not submitted is no part of it. Submits and waits as [`readback::download`] does, under any executor.
    ///
    /// # Errors
    /// [`TransferError`] if the device is lost or out of memory.
    pub async fn state(&self) -> Result<OptimizerState<R>, TransferError> {
        let recorder = &self.recorder;
        let (device, queue) = (recorder.kernels.device(), recorder.kernels.queue());
        let moved = recorder.moves.iter().flat_map(Moves::buffers);
        let counted = recorder.device_counts.counted.iter();
        let buffers = recorder.state.iter().flatten().chain(moved).chain(counted);
        let mut buffers = buffers.peekable();
        if buffers.peek().is_none() {
            // What has been submitted is known when it is done.
            readback::wait(device, queue).await?;
        }
        let mut bytes = Downloaded::of(device, queue, buffers, MAX_TRANSFER_BYTES).await?;
        // State whose move has not been made lies where it was.
        recorder
            .moves
            .iter()
            .for_each(|moves| moves.make(&mut bytes));
        readback::wait_for_callbacks(|| recorder.ledger.are_pending());
        let counted = recorder.device_counts.counted.as_ref();
        let counted = counted.and_then(|counted| bytes.get(counted));
        let counted: Option<Vec<u32>> = counted.map(bytemuck::pod_collect_to_vec::<u8, u32>);
        let counts = recorder.ledger.done(counted.as_deref());
        if let Some(counted) = counted {
            recorder
                .device_counts
                .tell(recorder.ledger.done_steps(), counted);
        }
        let states = recorder.state.iter();
        let states: Vec<&[u8]> = states
            .map(|buffer| buffer.as_ref().and_then(|buffer| bytes.get(buffer)))
            .map(Option::unwrap_or_default)
            .collect();
        let values_of = |tensor: usize, section: usize| {
            let parts = recorder.plan.parts_of(tensor).iter();
            let bytes_of = |part: &Part| {
                let Range { start, end } = recorder.plan.state_bytes_of(part, section)?;
                states[part.piece].get(start as usize..end as usize)
            };
            let codec = recorder.tensors.as_slice()[tensor].storage.state[section];
            SectionValues::from_bytes(
                codec,
                parts.filter_map(bytes_of).flatten().copied().collect(),
            )
        };
        Ok(recorder.tensors.state(&self.groups, &counts, values_of))
    }

    /// Takes over a saved state of the same tensors. A slot that it comes without starts fresh, masters as the
    /// parameters at the next step. Takes effect before the commands of the next submission.
    ///
    /// Masters have to go with the parameters: of those that are `f32` the next step makes the parameters, and rests are
    /// what the parameters leave. Where rests are kept, a state that has [`MASTER_PARAMS`](crate::storage::MASTER_PARAMS) will do, too, if the parameters
    /// are its masters, rounded to the nearest; one that lay between two bf16 loses its last bit.
    ///
    /// # Errors
    /// [`LoadError::State`] if the state belongs to another form or to other tensors, by name or shape; then nothing has
    /// changed. [`LoadError::Transfer`] if the device fails half-way; then the state is undefined.
    pub fn load_state(&mut self, state: &OptimizerState<R>) -> Result<(), LoadError> {
        let recorder = &mut self.recorder;
        let matched = recorder.tensors.match_state(state, &self.groups)?;
        let queue = recorder.kernels.queue();
        recorder
            .moves
            .drain(..)
            .for_each(|moves| moves.cancel(queue));
        let tensors = self.recorder.tensors.as_slice().iter().zip(&matched);
        let sections = tensors.map(|(tensor, entry)| {
            let slots = self.groups.config(tensor.group).slots();
            let sections = Section::all(&slots, &tensor.storage);
            let saved = sections.map(|section| (section, entry.section(&section)));
            saved.collect::<Vec<SavedSection<'_>>>()
        });
        let sections: Vec<_> = sections.collect();
        for index in 0..self.recorder.plan.pieces.len() {
            self.load_piece(index, &sections)?;
        }
        let Counts { steps, applied } = self.recorder.tensors.counts_of(state.steps, &matched);
        let applied: Vec<_> = applied.into_iter().map(Some).collect();
        self.set_counts(&applied, Some(steps));
        Ok(())
    }

    /// Takes over a state of fewer tensors, or of tensors with fewer rows (elements of the first dimension), of which these
    /// are the first: an optimizer whose tensors have grown goes on. What there is keeps its momenta and step counts; new rows
    /// start as their slots do, and masters and the `z` of schedule-free rules as the parameters. New tensors start fresh. A new
    /// row has the step count of its tensor.
    ///
    /// ```
    /// use wgpu_optim::{AdamConfig, AdapterRequest, Gpu, GpuOptimizer, Kernels, Optimizer, TensorBinding, readback};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default())?;
    /// # let buffer = |values: &[f32]| readback::storage_buffer(&device, &queue, "buffer", values);
    /// # let (params, grads) = (buffer(&[1.0; 2])?, buffer(&[1.0; 2])?);
    /// # let (more_params, more_grads) = (buffer(&[1.0; 6])?, buffer(&[1.0; 6])?);
    /// let kernels = Kernels::new(&device, &queue)?;
    /// let config = AdamConfig::adamw(1e-3).build()?;
    /// let rows = TensorBinding::new("rows", &params, &grads, [1, 2]);
    /// let mut optimizer = GpuOptimizer::new(&kernels, config, &[rows])?;
    /// let mut encoder = device.create_command_encoder(&Default::default());
    /// optimizer.step(&mut encoder)?;
    /// encoder.copy_buffer_to_buffer(&params, 0, &more_params, 0, params.size());
    /// queue.submit([encoder.finish()]);
    ///
    /// let state = readback::block_on(&device, optimizer.state())?;
    /// let rows = TensorBinding::new("rows", &more_params, &more_grads, [3, 2]);
    /// let mut optimizer = GpuOptimizer::new(&kernels, config, &[rows])?;
    /// optimizer.load_grown_state(&state)?;
    /// assert_eq!((optimizer.steps(), optimizer.applied_steps("rows")), (1, Some(1)));
    /// # let state = readback::block_on(&device, optimizer.state())?;
    /// # assert_eq!(state.tensors[0].slot("exp_avg").unwrap_or_default()[1..4], [0.1, 0.0, 0.0]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`load_state`](Self::load_state): [`LoadError::State`] if a tensor has gone, has fewer rows, or rows of another shape.
    pub fn load_grown_state(&mut self, state: &OptimizerState<R>) -> Result<(), LoadError> {
        let grown = self.recorder.tensors.grown(state, &self.groups);
        self.load_state(&grown)
    }

    /// Uploads the state of a piece; `sections` are those of all tensors, with what is saved of them.
    fn load_piece(
        &self,
        index: usize,
        sections: &[Vec<SavedSection<'_>>],
    ) -> Result<(), TransferError> {
        let recorder = &self.recorder;
        let (device, queue) = (recorder.kernels.device(), recorder.kernels.queue());
        let piece = &recorder.plan.pieces[index];
        let Some(buffer) = &recorder.state[index] else {
            return Ok(());
        };
        // Neighbours share words of 16-bit values, so those go up in one.
        let is_whole = !piece.storage.is_f32();
        let mut whole = vec![0_u8; if is_whole { buffer.size() as usize } else { 0 }];
        for part in &recorder.plan.parts[piece.parts.clone()] {
            let elems = part.elems.start as usize..part.elems.end as usize;
            for (index, (section, saved)) in sections[part.tensor].iter().enumerate() {
                let Some(Range { start, end }) = recorder.plan.state_bytes_of(part, index) else {
                    continue;
                };
                let fresh;
                let values = match saved {
                    Some(saved) => saved.slice(elems.clone()),
                    None => {
                        let value = section.start.value();
                        fresh = SectionValues::filled(section.codec, value, elems.len());
                        fresh.bytes()
                    }
                };
                if is_whole {
                    whole[start as usize..end as usize].copy_from_slice(values);
                } else {
                    readback::upload_bytes(device, queue, buffer, start, values)?;
                }
            }
        }
        if is_whole {
            readback::upload_bytes(device, queue, buffer, 0, &whole)?;
        }
        Ok(())
    }
}
