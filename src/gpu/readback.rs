//! Upload and asynchronous download of `f32` data. Never used by a step.
//!
//! A browser tells of a lost device when it has its turn: then downloads say so, and steps and new optimizers on kernels
//! that were there before. All else does there as if nothing were.
//!
//! A download, here and elsewhere in the library, finishes under any executor. wgpu calls back only when somebody polls
//! the device; a browser does so by itself, and in a native program a thread of the download's own waits for it, as
//! long as it takes. [`block_on`] and [`download_blocking`] wait on the calling thread instead.

use std::ops::Range;
use std::sync::Arc;
#[cfg(not(target_arch = "wasm32"))]
use std::{
    cell::RefCell,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

#[cfg(not(target_arch = "wasm32"))]
use futures_intrusive::channel::shared::OneshotSender;
use futures_intrusive::channel::shared::oneshot_channel;

use super::error::TransferError;
use super::error_scope::{checked, checked_by_waiting, is_lost, is_lost_by_waiting};
use crate::plan::ELEM_BYTES;

/// Writes `data` into `buffer` from byte `offset_bytes` on; it takes effect before the commands of the next
/// submission. Submits nothing.
///
/// # Errors
/// [`TransferError`] if the buffer lacks `COPY_DST`, the slice ends past it, the offset is not a multiple of
/// 4, or the device is out of memory; wgpu then gives up the device.
pub fn upload(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    buffer: &wgpu::Buffer,
    offset_bytes: u64,
    data: &[f32],
) -> Result<(), TransferError> {
    check(
        buffer,
        offset_bytes,
        data.len() as u64,
        wgpu::BufferUsages::COPY_DST,
    )?;
    checked(device, || {
        queue.write_buffer(buffer, offset_bytes, bytemuck::cast_slice(data));
    })
    .map_err(|error| refused(device, &error))
}

/// [`upload`] of whole words, whatever they hold.
pub(crate) fn upload_bytes(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    buffer: &wgpu::Buffer,
    offset_bytes: u64,
    bytes: &[u8],
) -> Result<(), TransferError> {
    let words = (bytes.len() as u64).div_ceil(ELEM_BYTES);
    check(buffer, offset_bytes, words, wgpu::BufferUsages::COPY_DST)?;
    checked(device, || queue.write_buffer(buffer, offset_bytes, bytes))
        .map_err(|error| refused(device, &error))
}

/// A buffer and some of its bytes, from one multiple of 4 to another.
pub type Region<'b> = (&'b wgpu::Buffer, Range<u64>);

/// Whether buffers are mapped when they are created. In a browser that throws where there is no memory or no device any
/// more, and wgpu 30 then panics; what is written into the queue does neither.
pub(crate) const MAPS_AT_CREATION: bool = cfg!(not(target_arch = "wasm32"));

/// Overwrites whole regions, on multiples of 4 bytes: `fill` gets the bytes of each, zeros. Submits one copy per region,
/// all together.
///
/// Staging buffers of its own, because wgpu gives up the device where it has no memory for those of
/// `Queue::write_buffer`; but in a browser.
///
/// # Errors
/// [`TransferError`] if the device is lost or out of memory; then nothing has been written.
pub(crate) fn overwrite(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    regions: &[Region<'_>],
    fill: impl FnOnce(&mut [wgpu::WriteOnly<'_, [u8]>]),
) -> Result<(), TransferError> {
    if !MAPS_AT_CREATION {
        let zeros = |(_, bytes): &Region<'_>| vec![0; (bytes.end - bytes.start) as usize];
        let mut staging: Vec<Vec<u8>> = regions.iter().map(zeros).collect();
        let views = staging.iter_mut().map(Vec::as_mut_slice);
        fill(&mut views.map(wgpu::WriteOnly::from_mut).collect::<Vec<_>>());
        for (staging, (buffer, bytes)) in staging.iter().zip(regions) {
            queue.write_buffer(buffer, bytes.start, staging);
        }
        return Ok(());
    }
    let stage = |(_, bytes): &Region<'_>| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("wgpu_optim.upload"),
            size: bytes.end - bytes.start,
            usage: wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: true,
        })
    };
    let staging: Vec<_> = checked(device, || regions.iter().map(stage).collect())
        .map_err(|error| refused(device, &error))?;
    let mapped = staging
        .iter()
        .map(|staging| staging.get_mapped_range_mut(..));
    let mut mapped = mapped
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| unless_lost(device, error.to_string()))?;
    let views = mapped.iter_mut().map(|mapped| mapped.slice(..));
    fill(&mut views.collect::<Vec<_>>());
    drop(mapped);
    checked(device, || {
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor {
            label: Some("wgpu_optim.upload"),
        });
        for (staging, (buffer, bytes)) in staging.iter().zip(regions) {
            staging.unmap();
            let size = bytes.end - bytes.start;
            encoder.copy_buffer_to_buffer(staging, 0, buffer, bytes.start, size);
        }
        queue.submit([encoder.finish()]);
    })
    .map_err(|error| refused(device, &error))
}

/// Writes many regions, one after the other in `bytes`. Submits the copies, all together: they take effect after
/// everything submitted so far.
///
/// # Errors
/// [`TransferError`] as [`upload`], or if `bytes` are not as many as the regions have; then nothing has been written.
pub fn upload_regions(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    regions: &[Region<'_>],
    bytes: &[u8],
) -> Result<(), TransferError> {
    check_regions(regions, wgpu::BufferUsages::COPY_DST)?;
    let sizes = regions.iter().map(|(_, bytes)| bytes.end - bytes.start);
    let expected: u64 = sizes.sum();
    if bytes.len() as u64 != expected {
        return Err(TransferError::Length {
            expected,
            actual: bytes.len() as u64,
        });
    }
    if expected == 0 {
        return Ok(());
    }
    let staging = checked(device, || {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("wgpu_optim.upload"),
            size: expected,
            usage: wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: MAPS_AT_CREATION,
        })
    })
    .map_err(|error| refused(device, &error))?;
    if MAPS_AT_CREATION {
        let mapped = staging.get_mapped_range_mut(..);
        let mut mapped = mapped.map_err(|error| unless_lost(device, error.to_string()))?;
        mapped.copy_from_slice(bytes);
    }
    checked(device, || {
        if MAPS_AT_CREATION {
            staging.unmap();
        } else {
            queue.write_buffer(&staging, 0, bytes);
        }
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor {
            label: Some("wgpu_optim.upload"),
        });
        let mut start = 0;
        for (buffer, bytes) in regions {
            let size = bytes.end - bytes.start;
            encoder.copy_buffer_to_buffer(&staging, start, buffer, bytes.start, size);
            start += size;
        }
        queue.submit([encoder.finish()]);
    })
    .map_err(|error| refused(device, &error))
}

/// A buffer that holds `data` and can be stepped on, uploaded to and downloaded from: usages `STORAGE`,
/// `COPY_SRC` and `COPY_DST`. As with [`upload`], the data is there for the next submission.
///
/// # Errors
/// [`TransferError::Device`] if the data is larger than a buffer of this device may be, or the device is out of
/// memory.
pub fn storage_buffer(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    label: &str,
    data: &[f32],
) -> Result<wgpu::Buffer, TransferError> {
    let buffer = checked(device, || {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size: data.len() as u64 * ELEM_BYTES,
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_SRC
                | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    })
    .map_err(|error| refused(device, &error))?;
    upload(device, queue, &buffer, 0, data)?;
    Ok(buffer)
}

/// Reads `numel` elements of `buffer` from byte `offset_bytes` on, after everything submitted so far.
///
/// Submits one copy into a staging buffer of its own and waits for the mapping, without blocking the executor that it
/// runs under, whichever that is.
///
/// # Errors
/// [`TransferError`] if the buffer lacks `COPY_SRC`, the slice ends past it, the offset is not a multiple of
/// 4, or the device is out of memory, or lost, be it under way.
pub async fn download(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    buffer: &wgpu::Buffer,
    offset_bytes: u64,
    numel: u64,
) -> Result<Vec<f32>, TransferError> {
    let copied = |bytes: &[u8]| bytemuck::pod_collect_to_vec(bytes);
    read(device, queue, buffer, offset_bytes, numel, copied).await
}

/// [`download`] into what `take` makes of the bytes, before they are unmapped.
pub(crate) async fn read<T>(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    buffer: &wgpu::Buffer,
    offset_bytes: u64,
    numel: u64,
    take: impl FnOnce(&[u8]) -> T,
) -> Result<T, TransferError> {
    check(buffer, offset_bytes, numel, wgpu::BufferUsages::COPY_SRC)?;
    let region = offset_bytes..offset_bytes + numel * ELEM_BYTES;
    read_checked(device, queue, &[(buffer, region)], take).await
}

/// Reads many regions, one after the other, in one transfer as [`download`] makes it.
///
/// # Errors
/// As [`download`].
pub async fn download_regions(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    regions: &[Region<'_>],
) -> Result<Vec<u8>, TransferError> {
    check_regions(regions, wgpu::BufferUsages::COPY_SRC)?;
    read_checked(device, queue, regions, <[u8]>::to_vec).await
}

/// Waits until the device is done with all that was submitted so far.
///
/// # Errors
/// [`TransferError`] if the device is lost or out of memory.
pub(crate) async fn wait(device: &wgpu::Device, queue: &wgpu::Queue) -> Result<(), TransferError> {
    let nothing = checked(device, || {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("wgpu_optim.nothing"),
            size: ELEM_BYTES,
            usage: wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        })
    });
    let nothing = nothing.map_err(|error| refused(device, &error))?;
    read(device, queue, &nothing, 0, 1, |_| ()).await
}

/// Gives threads that poll the device a moment: one of them may have taken a callback that another transfer has overtaken,
/// and not called it yet.
pub(crate) fn wait_for_callbacks(are_pending: impl Fn() -> bool) {
    #[cfg(not(target_arch = "wasm32"))]
    for _ in 0..20 {
        if !are_pending() {
            break;
        }
        thread::sleep(Duration::from_micros(100));
    }
    #[cfg(target_arch = "wasm32")]
    let _ = are_pending;
}

/// Whole buffers as they were when they were downloaded.
pub(crate) struct Downloaded<'b> {
    /// Each buffer with its content, in the order of the buffers.
    bytes: Vec<(&'b wgpu::Buffer, Vec<u8>)>,
}

impl<'b> Downloaded<'b> {
    /// Downloads buffers, each once, in transfers of so many bytes or of one buffer that is larger.
    pub(crate) async fn of(
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        buffers: impl Iterator<Item = &'b wgpu::Buffer>,
        max_bytes: u64,
    ) -> Result<Self, TransferError> {
        let max_bytes = max_bytes.min(device.limits().max_buffer_size);
        let mut buffers: Vec<_> = buffers.collect();
        buffers.sort_unstable();
        buffers.dedup();
        let mut all = Vec::with_capacity(buffers.len());
        let mut buffers = buffers.into_iter().peekable();
        while buffers.peek().is_some() {
            let (mut regions, mut size) = (Vec::new(), 0);
            while let Some(buffer) =
                buffers.next_if(|buffer| size == 0 || size + buffer.size() <= max_bytes)
            {
                size += buffer.size();
                regions.push((buffer, 0..buffer.size()));
            }
            let split = |mut bytes: &[u8]| -> Vec<_> {
                let take = |(buffer, region): &Region<'b>| {
                    let (first, others) = bytes.split_at(region.end as usize);
                    bytes = others;
                    (*buffer, first.to_vec())
                };
                regions.iter().map(take).collect()
            };
            all.extend(read_checked(device, queue, &regions, split).await?);
        }
        Ok(Self { bytes: all })
    }

    /// The bytes of a buffer, if it was downloaded.
    pub(crate) fn get(&self, buffer: &wgpu::Buffer) -> Option<&[u8]> {
        let index = self.index_of(buffer)?;
        Some(&self.bytes[index].1)
    }

    /// The bytes of a buffer, if it was downloaded, to be changed.
    pub(crate) fn get_mut(&mut self, buffer: &wgpu::Buffer) -> Option<&mut [u8]> {
        let index = self.index_of(buffer)?;
        Some(&mut self.bytes[index].1)
    }

    fn index_of(&self, buffer: &wgpu::Buffer) -> Option<usize> {
        let found = self
            .bytes
            .binary_search_by(|(other, _)| (*other).cmp(buffer));
        found.ok()
    }
}

async fn read_checked<T>(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    regions: &[Region<'_>],
    take: impl FnOnce(&[u8]) -> T,
) -> Result<T, TransferError> {
    let size_of = |(_, bytes): &Region<'_>| bytes.end - bytes.start;
    let size = regions.iter().map(size_of).sum();
    if size == 0 {
        return Ok(take(&[]));
    }
    let (sender, receiver) = oneshot_channel();
    let sender = Arc::new(sender);
    let created = checked_by_waiting(device, || {
        let staging = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("wgpu_optim.readback"),
            size,
            usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ,
            mapped_at_creation: false,
        });
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor {
            label: Some("wgpu_optim.readback"),
        });
        let mut start = 0;
        for (buffer, bytes) in regions {
            let size = bytes.end - bytes.start;
            encoder.copy_buffer_to_buffer(buffer, bytes.start, &staging, start, size);
            start += size;
        }
        let submission = queue.submit([encoder.finish()]);
        let sender = Arc::clone(&sender);
        // The receiver is gone if the caller has dropped the future.
        let send = move |is_mapped| drop(sender.send(is_mapped));
        #[cfg(target_arch = "wasm32")]
        staging.map_async(wgpu::MapMode::Read, .., move |result| send(result.is_ok()));
        // Callbacks of all that was submitted before have been called when this one is, and mappings before it.
        #[cfg(not(target_arch = "wasm32"))]
        {
            let is_mapped = Arc::new(AtomicBool::new(false));
            let mapped = Arc::clone(&is_mapped);
            staging.map_async(wgpu::MapMode::Read, .., move |result| {
                mapped.store(result.is_ok(), Ordering::Release);
            });
            queue.on_submitted_work_done(move || send(is_mapped.load(Ordering::Acquire)));
        }
        (staging, submission)
    });
    let (staging, submission) = match created.await {
        Ok(created) => created,
        Err(error) => return Err(refused_by_waiting(device, &error).await),
    };

    #[cfg(target_arch = "wasm32")]
    drop((sender, submission));
    #[cfg(not(target_arch = "wasm32"))]
    let_poll(device, submission, sender);
    if receiver.receive().await != Some(true) {
        let message = "the data could not be mapped".to_owned();
        return Err(unless_lost_by_waiting(device, message).await);
    }
    let taken = match staging.get_mapped_range(..) {
        Ok(bytes) => take(&bytes),
        Err(error) => return Err(unless_lost_by_waiting(device, error.to_string()).await),
    };
    // A browser takes its time over what is only dropped.
    staging.destroy();
    Ok(taken)
}

#[cfg(not(target_arch = "wasm32"))]
thread_local! {
    /// The device for which [`block_on`] waits on this thread.
    static BLOCKED_ON: RefCell<Option<wgpu::Device>> = const { RefCell::new(None) };
}

/// Has `device` polled until it has done `submission`, on this thread if that is in [`block_on`], else on one of its
/// own. A device that is lost calls nobody back: then `false` is sent here.
#[cfg(not(target_arch = "wasm32"))]
fn let_poll(
    device: &wgpu::Device,
    submission: wgpu::SubmissionIndex,
    sender: Arc<OneshotSender<bool>>,
) {
    let here = BLOCKED_ON.with_borrow(|blocked_on| blocked_on.as_ref() == Some(device));
    let device = device.clone();
    let poll = move || {
        if !poll_until_done(&device, &submission) {
            let _ = sender.send(false);
        }
    };
    let thread = thread::Builder::new().name("wgpu_optim.readback".to_owned());
    if here || thread.spawn(poll.clone()).is_err() {
        // Better to hold up the executor than to wait for ever, where there is no thread to be had.
        poll();
    }
}

/// Returns whether the device has done the submission, and so has called back or is about to on another thread; else
/// it is lost.
#[cfg(not(target_arch = "wasm32"))]
fn poll_until_done(device: &wgpu::Device, submission: &wgpu::SubmissionIndex) -> bool {
    /// While wgpu waits it holds a lock, which others need to present or to destroy a resource.
    const SLICE: Duration = Duration::from_millis(5);

    loop {
        let poll = || {
            device.poll(wgpu::PollType::Wait {
                submission_index: Some(submission.clone()),
                timeout: Some(SLICE),
            })
        };
        match catch_unwind(AssertUnwindSafe(poll)) {
            Ok(Err(wgpu::PollError::Timeout)) => {}
            Ok(_) => return true,
            // wgpu panics if it loses the device while it waits. So may the callers' own callbacks, which it calls.
            Err(_) if is_lost(device) => return false,
            Err(_) => {}
        }
    }
}

/// [`download`] for native programs: blocks the thread until the data is there.
///
/// # Errors
/// As [`download`].
#[cfg(not(target_arch = "wasm32"))]
pub fn download_blocking(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    buffer: &wgpu::Buffer,
    offset_bytes: u64,
    numel: u64,
) -> Result<Vec<f32>, TransferError> {
    block_on(device, download(device, queue, buffer, offset_bytes, numel))
}

/// Runs a transfer of this device to its end, waiting on the calling thread, so that it needs no other. Native programs
/// only.
#[cfg(not(target_arch = "wasm32"))]
pub fn block_on<F: Future>(device: &wgpu::Device, transfer: F) -> F::Output {
    let before = BLOCKED_ON.replace(Some(device.clone()));
    let output = pollster::block_on(transfer);
    BLOCKED_ON.set(before);
    output
}

fn check_regions(
    regions: &[Region<'_>],
    required: wgpu::BufferUsages,
) -> Result<(), TransferError> {
    regions.iter().try_for_each(|(buffer, bytes)| {
        let Range { start, end } = *bytes;
        let Some(size) = end.checked_sub(start) else {
            return Err(TransferError::Backwards { start, end });
        };
        // Half a word too many is out of bounds, wherever it is.
        let start = start + size % ELEM_BYTES;
        check(buffer, start, size / ELEM_BYTES, required)
    })
}

pub(super) fn check(
    buffer: &wgpu::Buffer,
    offset_bytes: u64,
    numel: u64,
    required: wgpu::BufferUsages,
) -> Result<(), TransferError> {
    let end = numel
        .checked_mul(ELEM_BYTES)
        .and_then(|bytes| bytes.checked_add(offset_bytes));
    if !offset_bytes.is_multiple_of(ELEM_BYTES) || end.is_none_or(|end| end > buffer.size()) {
        return Err(TransferError::OutOfBounds {
            offset_bytes,
            numel,
            buffer_bytes: buffer.size(),
        });
    }
    if !buffer.usage().contains(required) {
        return Err(TransferError::MissingUsage {
            required,
            actual: buffer.usage(),
        });
    }
    Ok(())
}

pub(super) fn refused(device: &wgpu::Device, error: &wgpu::Error) -> TransferError {
    match out_of_memory(error) {
        Some(out_of_memory) => out_of_memory,
        None => unless_lost(device, error.to_string()),
    }
}

async fn refused_by_waiting(device: &wgpu::Device, error: &wgpu::Error) -> TransferError {
    match out_of_memory(error) {
        Some(out_of_memory) => out_of_memory,
        None => unless_lost_by_waiting(device, error.to_string()).await,
    }
}

/// wgpu may have given up the device for it: that is then not what went wrong.
fn out_of_memory(error: &wgpu::Error) -> Option<TransferError> {
    let message = error.to_string();
    matches!(error, wgpu::Error::OutOfMemory { .. }).then_some(TransferError::Device { message })
}

/// The error of a failure, which is the loss of the device if that is lost.
fn unless_lost(device: &wgpu::Device, message: String) -> TransferError {
    if is_lost(device) {
        TransferError::DeviceLost
    } else {
        TransferError::Device { message }
    }
}

async fn unless_lost_by_waiting(device: &wgpu::Device, message: String) -> TransferError {
    if is_lost_by_waiting(device).await {
        TransferError::DeviceLost
    } else {
        TransferError::Device { message }
    }
}
