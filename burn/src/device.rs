//! burn's device and queue, shared.

use burn::backend::DispatchDevice;
use burn::backend::wgpu::WgpuSetup;
use burn::tensor::Device;
use burn_cubecl::CubeDevice;
use wgpu_optim::Kernels;

use crate::error::ShareError;

/// A wgpu device of burn's, with the kernels on it. Cheap to clone; one is enough for all optimizers of a device.
#[derive(Clone, Debug)]
pub struct SharedDevice {
    pub(crate) device: Device,
    /// The device as its backend has it.
    pub(crate) cube_device: CubeDevice,
    pub(crate) kernels: Kernels,
}

impl SharedDevice {
    /// Shares a device of burn's, with the handles that `Device::wgpu_options().init_with_setup()` returned beside it, or
    /// that were given to `Device::wgpu_options().setup(setup)`, where an engine brings its own.
    ///
    /// burn does not give out the handles of a device that it has opened by itself, at the first use of
    /// `Device::wgpu(..)`. Handles of another device than this one are an error at the first step.
    ///
    /// # Errors
    /// [`ShareError`] if it is no device of the wgpu backend, or its limits are too low.
    pub fn new(device: &Device, setup: &WgpuSetup) -> Result<Self, ShareError> {
        let device = device.clone().inner();
        let cube_device = match device.as_dispatch() {
            DispatchDevice::Cube(cube @ CubeDevice::Wgpu(_)) => cube.clone(),
            _ => {
                return Err(ShareError::Backend {
                    actual: format!("{device:?}"),
                });
            }
        };
        Ok(Self {
            device,
            cube_device,
            kernels: Kernels::new(&setup.device, &setup.queue)?,
        })
    }

    /// The device, without autodiff.
    #[must_use]
    pub const fn device(&self) -> &Device {
        &self.device
    }

    /// The kernels, for optimizers over buffers of your own on the same device.
    #[must_use]
    pub const fn kernels(&self) -> &Kernels {
        &self.kernels
    }
}
