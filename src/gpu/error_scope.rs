//! Turns what a device reports while something is created into a `Result`, instead of wgpu's panic.

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
        let scopes = [
            wgpu::ErrorFilter::Internal,
            wgpu::ErrorFilter::Validation,
            wgpu::ErrorFilter::OutOfMemory,
        ]
        .map(|filter| device.push_error_scope(filter));
        let value = create();
        // All scopes are popped, the one pushed last first.
        let errors = scopes
            .into_iter()
            .rev()
            .filter_map(|scope| pollster::block_on(scope.pop()));
        match errors.reduce(|first, _| first) {
            Some(error) => Err(error),
            None => Ok(value),
        }
    }
}

/// Whether the device is lost. wgpu reports that to a callback which belongs to the caller, and hands out objects
/// that do nothing; mapping a buffer is what still fails. Where even that is out of memory, the device is not lost.
pub(crate) fn is_lost(device: &wgpu::Device) -> bool {
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

/// What to say of a lost device.
pub(crate) const LOST: &str = "the device is lost";
