//! Upload and asynchronous download of `f32` data. Never used by a step.

use std::future::Future;
#[cfg(not(target_arch = "wasm32"))]
use std::{
    sync::Arc,
    sync::atomic::{AtomicBool, Ordering},
    task::Wake,
};

use futures_intrusive::channel::shared::oneshot_channel;

use crate::error::TransferError;
use crate::error_scope::checked;
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
    .map_err(|error| refused(&error))
}

/// Overwrites whole buffers, whose sizes are multiples of 4 bytes: `fill` gets a mapped staging buffer of zeros for
/// each. Submits one copy per buffer, all together.
///
/// Staging buffers of its own, because wgpu gives up the device where it has no memory for those of
/// `Queue::write_buffer`.
///
/// # Errors
/// [`TransferError::Device`] if the device is lost or out of memory; then nothing has been written.
pub(crate) fn overwrite(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    buffers: &[wgpu::Buffer],
    fill: impl FnOnce(&mut [wgpu::BufferViewMut]),
) -> Result<(), TransferError> {
    let stage = |buffer: &wgpu::Buffer| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("wgpu_optim.upload"),
            size: buffer.size(),
            usage: wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: true,
        })
    };
    let staging: Vec<_> =
        checked(device, || buffers.iter().map(stage).collect()).map_err(|error| refused(&error))?;
    let mapped = staging
        .iter()
        .map(|staging| staging.get_mapped_range_mut(..));
    let mut mapped =
        mapped
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| TransferError::Device {
                message: error.to_string(),
            })?;
    fill(&mut mapped);
    drop(mapped);
    checked(device, || {
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor {
            label: Some("wgpu_optim.upload"),
        });
        for (staging, buffer) in staging.iter().zip(buffers) {
            staging.unmap();
            encoder.copy_buffer_to_buffer(staging, 0, buffer, 0, buffer.size());
        }
        queue.submit([encoder.finish()]);
    })
    .map_err(|error| refused(&error))
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
    .map_err(|error| refused(&error))?;
    upload(device, queue, &buffer, 0, data)?;
    Ok(buffer)
}

/// Reads `numel` elements of `buffer` from byte `offset_bytes` on, after everything submitted so far.
///
/// Submits one copy into a staging buffer of its own and waits for the mapping. It never blocks, so outside a
/// browser somebody has to call `wgpu::Device::poll` or submit more work until it is done;
/// [`download_blocking`] does.
///
/// # Errors
/// [`TransferError`] if the buffer lacks `COPY_SRC`, the slice ends past it, the offset is not a multiple of
/// 4, or the device is lost or out of memory.
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
    if numel == 0 {
        return Ok(take(&[]));
    }
    let (sender, receiver) = oneshot_channel();
    let staging = checked(device, || {
        let staging = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("wgpu_optim.readback"),
            size: numel * ELEM_BYTES,
            usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ,
            mapped_at_creation: false,
        });
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor {
            label: Some("wgpu_optim.readback"),
        });
        encoder.copy_buffer_to_buffer(buffer, offset_bytes, &staging, 0, staging.size());
        queue.submit([encoder.finish()]);
        staging.map_async(wgpu::MapMode::Read, .., move |result| {
            // The receiver is gone if the caller has dropped the future.
            let _ = sender.send(result);
        });
        staging
    })
    .map_err(|error| refused(&error))?;

    let lost = || TransferError::Device {
        message: "the device was lost before the data could be mapped".to_owned(),
    };
    receiver
        .receive()
        .await
        .ok_or_else(lost)?
        .map_err(|_| lost())?;
    let bytes = staging
        .get_mapped_range(..)
        .map_err(|error| TransferError::Device {
            message: error.to_string(),
        })?;
    Ok(take(&bytes))
}

/// [`download`] for native programs: polls the device until the data is there.
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

/// Runs a transfer to its end, polling `device` whenever it waits. Blocks the thread; native programs only.
///
/// # Errors
/// Those of the transfer, or [`TransferError::Device`] if the device has had nothing to do for a second and the
/// transfer still waits.
#[cfg(not(target_arch = "wasm32"))]
pub fn block_on<T, E: From<TransferError>>(
    device: &wgpu::Device,
    transfer: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    use std::task::{Context, Poll, Waker};
    use std::time::{Duration, Instant};

    const PATIENCE: Duration = Duration::from_secs(1);

    /// Says whether a callback has moved the transfer on.
    #[derive(Default)]
    struct Woken(AtomicBool);
    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Release);
        }
    }

    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    let mut transfer = std::pin::pin!(transfer);
    let mut idle_since = None;
    pollster::block_on(std::future::poll_fn(|context| {
        let polled = transfer.as_mut().poll(&mut Context::from_waker(&waker));
        if polled.is_pending() {
            let status = device.poll(wgpu::PollType::wait_indefinitely());
            if woken.0.swap(false, Ordering::Acquire) {
                idle_since = None;
            } else if idle_since.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
                return Poll::Ready(Err(TransferError::Device {
                    message: format!("the transfer does not end: {status:?}"),
                }
                .into()));
            } else {
                // Another thread may have polled, and be about to run the callback.
                std::thread::yield_now();
            }
            context.waker().wake_by_ref();
        }
        polled
    }))
}

fn check(
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

fn refused(error: &wgpu::Error) -> TransferError {
    TransferError::Device {
        message: error.to_string(),
    }
}
