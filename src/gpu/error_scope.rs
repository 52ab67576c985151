//! Turns what a device reports while something is created into a `Result`, instead of wgpu's panic.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The errors that are caught. In a browser wgpu 30 panics over an internal error that a scope has caught; without one it goes to the
/// browser's console.
#[cfg(target_arch = "wasm32")]
const FILTERS: [wgpu::ErrorFilter; 2] = [
    wgpu::ErrorFilter::Validation,
    wgpu::ErrorFilter::OutOfMemory,
];
#[cfg(not(target_arch = "wasm32"))]
const FILTERS: [wgpu::ErrorFilter; 3] = [
    wgpu::ErrorFilter::Internal,
    wgpu::ErrorFilter::Validation,
    wgpu::ErrorFilter::OutOfMemory,
];

/// Runs `create`, and returns with what it makes the errors that the device is going to report of it, scope by scope.
fn scoped<T>(
    device: &wgpu::Device,
    create: impl FnOnce() -> T,
) -> (T, Vec<impl Future<Output = Option<wgpu::Error>>>) {
    let scopes = FILTERS.map(|filter| device.push_error_scope(filter));
    let value = create();
    // All scopes are popped, the one pushed last first.
    let errors = scopes.into_iter().rev().map(wgpu::ErrorScopeGuard::pop);
    (value, errors.collect())
}

/// Runs `create` and returns the first error that the device reports meanwhile.
///
/// In a browser errors arrive later than this function can wait: there they go to the handler set with
/// `wgpu::Device::on_uncaptured_error`.
pub(crate) fn checked<T>(
    device: &wgpu::Device,
    create: impl FnOnce() -> T,
) -> Result<T, wgpu::Error> {
    #[cfg(target_arch = "wasm32")]
    {
        let _ = device;
        Ok(create())
    }
    #[cfg(not(target_arch = "wasm32"))]
    {
        let (value, errors) = scoped(device, create);
        let errors = errors.into_iter().filter_map(pollster::block_on);
        match errors.reduce(|first, _| first) {
            Some(error) => Err(error),
            None => Ok(value),
        }
    }
}

/// [`checked`] for what can wait, in a browser too. `create` has run when this returns a future.
pub(crate) fn checked_by_waiting<T>(
    device: &wgpu::Device,
    create: impl FnOnce() -> T,
) -> impl Future<Output = Result<T, wgpu::Error>> {
    let (value, errors) = scoped(device, create);
    async {
        let mut first = None;
        for error in errors {
            let error = error.await;
            first = first.or(error);
        }
        match first {
            Some(error) => Err(error),
            None => Ok(value),
        }
    }
}

/// Whether the device is lost. wgpu reports that to a callback which belongs to the caller, and hands out objects
/// that do nothing; mapping a buffer is what still fails. Where even that is out of memory, the device is not lost.
///
/// In a browser even that works, and nobody knows without waiting.
pub(crate) fn is_lost(device: &wgpu::Device) -> bool {
    if cfg!(target_arch = "wasm32") {
        return false;
    }
    // A mappable buffer, because wgpu gives up the device if it has no memory to map another.
    let probe = checked(device, || {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("wgpu_optim.probe"),
            size: 4,
            usage: wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: true,
        })
    });
    probe.is_ok_and(|probe| probe.get_mapped_range(..).is_err())
}

/// [`is_lost`] for what can wait, in a browser too.
pub(crate) async fn is_lost_by_waiting(device: &wgpu::Device) -> bool {
    if cfg!(not(target_arch = "wasm32")) {
        return is_lost(device);
    }
    let watch = LossWatch::new(device);
    // The browser calls back those who ask after the loss too, before it answers what was asked later.
    let _ = checked_by_waiting(device, || ()).await;
    watch.has_seen_loss()
}

/// Is called back by a browser when a device is lost, before anything else runs there. Elsewhere it sees nothing: there
/// is one callback, which belongs to the caller.
#[derive(Clone, Debug)]
pub(crate) struct LossWatch(Arc<AtomicBool>);

impl LossWatch {
    pub(crate) fn new(device: &wgpu::Device) -> Self {
        let seen = Arc::new(AtomicBool::new(false));
        if device.adapter_info().backend == wgpu::Backend::BrowserWebGpu {
            let seen = Arc::clone(&seen);
            device.set_device_lost_callback(move |_, _| seen.store(true, Ordering::Relaxed));
        }
        Self(seen)
    }

    pub(crate) fn has_seen_loss(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The message of a lost device.
pub(crate) const LOST: &str = "the device is lost";
