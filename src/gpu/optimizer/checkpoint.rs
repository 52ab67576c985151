//! Checkpoints of parameters that lie in the caller's buffers.

use std::ops::Range;

use super::recorder::ParamsPlace;
use super::transfer::MAX_TRANSFER_BYTES;
use super::{GpuOptimizer, Recorder};
use crate::gpu::control::GpuControl;
use crate::gpu::error::{CheckpointError, TransferError};
use crate::gpu::readback::{self, Region};
use crate::plan::ELEM_BYTES;
use crate::rules::Rule;
use crate::state::{Checkpoint, OptimizerState};
use crate::storage::{Codec, SectionValues};

impl<R: Rule> GpuOptimizer<R> {
    /// Copies the parameters, what the optimizer remembers of them and what the control of its steps does off the device, after
    /// everything submitted so far; see [`Checkpoint`]. Submits and waits as [`readback::download`] does, under any executor:
    /// nothing that steps may be submitted meanwhile. Parameters are read from the buffers that the tensors are bound to, which
    /// have the usage `COPY_SRC` for it.
    ///
    /// ```
    /// # #[cfg(feature = "safetensors")] {
    /// use wgpu_optim::readback::block_on;
    /// use wgpu_optim::state::Checkpoint;
    /// # use wgpu_optim::{
    /// #     AdamConfig, AdapterRequest, Gpu, GpuControl, GpuOptimizer, Kernels, LossScale, Optimizer, StepControl,
    /// #     TensorBinding, readback,
    /// # };
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default())?;
    /// # let params = readback::storage_buffer(&device, &queue, "params", &[1.0, 2.0, 3.0])?;
    /// # let grads = readback::storage_buffer(&device, &queue, "grads", &[65536.0, 0.0, -65536.0])?;
    /// # let kernels = Kernels::new(&device, &queue)?;
    /// # let weight = TensorBinding::new("weight", &params, &grads, [3]);
    /// # let mut optimizer = GpuOptimizer::new(&kernels, AdamConfig::adamw(1e-3).build()?, &[weight])?;
    /// # let scaled = StepControl::builder().loss_scale(LossScale::default()).build()?;
    /// # let mut control = GpuControl::new(&kernels, scaled)?;
    /// # let mut encoder = device.create_command_encoder(&Default::default());
    /// # optimizer.step_with(&mut encoder, &mut control)?;
    /// # queue.submit([encoder.finish()]);
    /// # let path = std::env::temp_dir().join(format!("wgpu-optim-gpu-doc-{}.safetensors", std::process::id()));
    /// block_on(&device, optimizer.checkpoint(Some(&control)))?.save(&path)?;
    ///
    /// // Later, in another process: the same tensors, the same rule, a control.
    /// block_on(&device, optimizer.load_checkpoint(&Checkpoint::load(&path)?, Some(&mut control)))?;
    /// assert_eq!((optimizer.steps(), control.steps()), (1, 1));
    /// # std::fs::remove_file(&path)?;
    /// # Ok(())
    /// # }
    /// # main().unwrap();
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`CheckpointError`] if a tensor lies nowhere, its buffer lacks the usage, or the device is lost or out of memory.
    pub async fn checkpoint(
        &self,
        control: Option<&GpuControl>,
    ) -> Result<Checkpoint<R>, CheckpointError> {
        let recorder = &self.recorder;
        let stored = recorder.stored_params(wgpu::BufferUsages::COPY_SRC)?;
        let params = recorder.download_params(&stored).await?;
        let state = self.state().await?;
        let control = match control {
            Some(control) => Some(control.state().await?),
            None => None,
        };
        Ok(Checkpoint {
            params: recorder.tensors.params(params.into_iter()),
            state: OptimizerState { control, ..state },
        })
    }

    /// Takes over a checkpoint of the same tensors: parameters, state, step counts, and the memory of the control, which is
    /// given if the checkpoint was made with one. Parameters are written into the buffers that the tensors are bound to, which
    /// have the usages `COPY_SRC` and `COPY_DST` for it. Submits copies and waits for some, under any executor; all of it takes
    /// effect before the commands of the next submission.
    ///
    /// # Errors
    /// [`CheckpointError::Mismatch`] if the checkpoint is of other tensors, by name, shape or type, of another rule, or made with
    /// a control where none is given or the other way round, [`CheckpointError::Unbound`] and
    /// [`CheckpointError::MissingUsage`]: then nothing has been written. [`CheckpointError::Transfer`] if the device fails
    /// half-way; then parameters and state are undefined.
    pub async fn load_checkpoint(
        &mut self,
        checkpoint: &Checkpoint<R>,
        control: Option<&mut GpuControl>,
    ) -> Result<(), CheckpointError> {
        use wgpu::BufferUsages as Usages;
        let recorder = &self.recorder;
        let saved = checkpoint.params_of(&recorder.tensors, control.is_some())?;
        recorder
            .tensors
            .match_state(&checkpoint.state, &self.groups)
            .map_err(|error| CheckpointError::Mismatch(error.into()))?;
        let stored = recorder.stored_params(Usages::COPY_SRC | Usages::COPY_DST)?;
        let values: Vec<_> = saved.iter().map(|params| params.values.bytes()).collect();
        recorder.upload_params(&stored, &values).await?;
        self.load_state(&checkpoint.state)?;
        if let Some((control, state)) = control.zip(checkpoint.state.control) {
            control.load_state(&state)?;
        }
        Ok(())
    }
}

/// The parameters of a tensor in their buffer.
struct StoredParams<'o> {
    buffer: &'o wgpu::Buffer,
    /// Those of 16 bits may start and end within a word.
    bytes: Range<u64>,
    codec: Codec,
}

impl<'o> StoredParams<'o> {
    /// The words that they lie in.
    fn words(&self) -> Region<'o> {
        let Range { start, end } = self.bytes;
        let start = start - start % ELEM_BYTES;
        (self.buffer, start..end.next_multiple_of(ELEM_BYTES))
    }

    /// The words that they fill.
    fn whole_words(&self) -> Range<u64> {
        let Range { start, end } = self.bytes;
        let start = start.next_multiple_of(ELEM_BYTES);
        start..(end - end % ELEM_BYTES).max(start)
    }

    /// The words that they share with others, each with the bytes that are theirs, in the buffer.
    fn shared_words(&self) -> impl Iterator<Item = (u64, Range<u64>)> + use<'o> {
        let (Range { start, end }, whole) = (self.bytes.clone(), self.whole_words());
        let before = start..whole.start.min(end);
        let behind = whole.end.max(before.end)..end;
        let some = [before, behind].into_iter();
        some.filter(|bytes| !bytes.is_empty())
            .map(|bytes| (bytes.start - bytes.start % ELEM_BYTES, bytes))
    }
}

impl Recorder {
    /// Where the parameters of all tensors lie, in buffers of these usages.
    fn stored_params(
        &self,
        required: wgpu::BufferUsages,
    ) -> Result<Vec<StoredParams<'_>>, CheckpointError> {
        let tensors = self.tensors.as_slice().iter().zip(&self.params);
        let stored = tensors.map(|(tensor, place)| {
            let name = || tensor.name.clone();
            let Some(ParamsPlace {
                buffer,
                offset_bytes,
            }) = place
            else {
                return Err(CheckpointError::Unbound { tensor: name() });
            };
            if !buffer.usage().contains(required) {
                return Err(CheckpointError::MissingUsage {
                    tensor: name(),
                    required,
                    actual: buffer.usage(),
                });
            }
            let size = tensor.numel * tensor.storage.params.bytes();
            Ok(StoredParams {
                buffer,
                bytes: *offset_bytes..*offset_bytes + size,
                codec: tensor.storage.params.into(),
            })
        });
        stored.collect()
    }

    async fn download_params(
        &self,
        stored: &[StoredParams<'_>],
    ) -> Result<Vec<SectionValues>, TransferError> {
        let (device, queue) = (self.kernels.device(), self.kernels.queue());
        let mut values = Vec::with_capacity(stored.len());
        for stored in transfers(stored, |stored| stored.bytes.end - stored.bytes.start) {
            let regions: Vec<_> = stored.iter().map(StoredParams::words).collect();
            let downloaded = readback::download_regions(device, queue, &regions).await?;
            let mut rest = &*downloaded;
            for (stored, (_, words)) in stored.iter().zip(&regions) {
                let (own, others) = rest.split_at((words.end - words.start) as usize);
                rest = others;
                let bytes = stored.bytes.start - words.start..stored.bytes.end - words.start;
                let own = &own[bytes.start as usize..bytes.end as usize];
                values.push(SectionValues::from_bytes(stored.codec, own.to_vec()));
            }
        }
        Ok(values)
    }

    async fn upload_params(
        &self,
        stored: &[StoredParams<'_>],
        values: &[&[u8]],
    ) -> Result<(), TransferError> {
        let (device, queue) = (self.kernels.device(), self.kernels.queue());
        // What shares a word with other tensors, or with what is nobody's, is put into it here.
        let shared_words = stored.iter().flat_map(|stored| {
            let shared = stored.shared_words();
            shared.map(|(word, _)| (stored.buffer, word..word + ELEM_BYTES))
        });
        let mut regions: Vec<Region<'_>> = shared_words.collect();
        regions.sort_unstable_by(|left, right| order_of(left).cmp(&order_of(right)));
        regions.dedup();
        let mut shared = readback::download_regions(device, queue, &regions).await?;
        let mut words = shared
            .chunks_exact_mut(ELEM_BYTES as usize)
            .collect::<Vec<_>>();
        for (stored, values) in stored.iter().zip(values) {
            for (word, bytes) in stored.shared_words() {
                let from =
                    |start: u64| (bytes.start - start) as usize..(bytes.end - start) as usize;
                let place = (stored.buffer, word);
                if let Ok(index) = regions.binary_search_by(|region| order_of(region).cmp(&place)) {
                    words[index][from(word)].copy_from_slice(&values[from(stored.bytes.start)]);
                }
            }
        }
        let pairs: Vec<_> = stored.iter().zip(values).collect();
        for pairs in transfers(&pairs, |(_, values)| values.len() as u64) {
            let mut bytes = Vec::new();
            let regions = pairs.iter().map(|(stored, values)| {
                let whole = stored.whole_words();
                let start = (whole.start - stored.bytes.start).min(values.len() as u64) as usize;
                bytes.extend(&values[start..start + (whole.end - whole.start) as usize]);
                (stored.buffer, whole)
            });
            let whole: Vec<Region<'_>> = regions.collect();
            readback::upload_regions(device, queue, &whole, &bytes)?;
        }
        readback::upload_regions(device, queue, &regions, &shared)
    }
}

/// Regions are in the order of their buffers, and in one from its start on.
fn order_of<'b>((buffer, bytes): &Region<'b>) -> (&'b wgpu::Buffer, u64) {
    (buffer, bytes.start)
}

/// Runs of some items, each of so many bytes as one transfer moves, or of one item that is larger.
fn transfers<T>(mut items: &[T], bytes_of: impl Fn(&T) -> u64) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let mut size = 0;
        let fits = |item: &&T| {
            size += bytes_of(item);
            size <= MAX_TRANSFER_BYTES
        };
        let count = items.iter().take_while(fits).count();
        let (run, rest) = items.split_at(count.max(1).min(items.len()));
        items = rest;
        (!run.is_empty()).then_some(run)
    })
}
