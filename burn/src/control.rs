//! The control of steps, on burn's device.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::backend::Cube;
use burn::tensor::{DType, Tensor};
use wgpu_optim::control::{ControlRecord, ControlState};
use wgpu_optim::readback::block_on;
use wgpu_optim::{BuildError, GpuControl, StepControl, TransferError};

use crate::device::SharedDevice;
use crate::error::StepError;
use crate::primitive;

/// Decides on the device what becomes of gradients and of each step: see [`StepControl`]. Nothing is read back for it, and
/// nothing waited for.
///
/// [`ModuleOptimizer::with_control`](crate::ModuleOptimizer::with_control) puts an optimizer under it. Clones are the same
/// control, so one may stay in a model or in a loop that reads the records.
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::optim::GradientsParams;
/// use burn::tensor::{Device, Distribution, Tensor};
/// use wgpu_optim_burn::wgpu_optim::{AdamConfig, LossScale, StepControl};
/// use wgpu_optim_burn::{Control, Init as _, SharedDevice};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (device, setup) = Device::wgpu_options().init_with_setup()?;
/// let shared = SharedDevice::new(&device, &setup)?;
/// let control = StepControl::builder().max_norm(1.0).loss_scale(LossScale::default()).build()?;
/// let control = Control::new(&shared, control)?;
/// let mut optimizer = AdamConfig::adamw(1e-3).build()?.init(&shared).with_control(&control);
///
/// let device = device.autodiff();
/// let mut model = LinearConfig::new(20, 20).init(&device);
/// let input = Tensor::<2>::random([2, 20], Distribution::Default, &device);
/// let loss = model.forward(input).mean();
/// let grads = control.scale_loss(loss)?.backward();
/// let grads = GradientsParams::from_grads(grads, &model);
/// model = optimizer.step(1e-3, model, grads)?;
///
/// for record in control.read() { // whatever has arrived by now
///     println!("{}: norm {}, skipped: {}", record.step, record.norm, record.is_skipped);
/// }
/// # model.weight.val().into_data();
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Control {
    shared: SharedDevice,
    gpu: Arc<Mutex<GpuControl>>,
}

impl Control {
    /// Builds the kernels and buffers of a control. Submits nothing.
    ///
    /// # Errors
    /// [`BuildError`] if the device binds too few storage buffers, is lost or out of memory.
    pub fn new(shared: &SharedDevice, control: StepControl) -> Result<Self, BuildError> {
        Ok(Self {
            shared: shared.clone(),
            gpu: Arc::new(Mutex::new(GpuControl::new(&shared.kernels, control)?)),
        })
    }

    /// Multiplies a loss by the loss scale of the next step, by which that divides the gradients. The scale is read on the
    /// device, in burn's order of work.
    ///
    /// # Errors
    /// [`StepError`] if the loss is on another device or not `f32`, or burn's runtime fails.
    pub fn scale_loss(&self, loss: Tensor<1>) -> Result<Tensor<1>, StepError> {
        let device = loss.device();
        if device != self.shared.device {
            return Err(StepError::Device {
                param: "loss".to_owned(),
                role: "values",
                expected: format!("{:?}", self.shared.device),
                actual: format!("{:?}", device.inner()),
            });
        }
        if loss.dtype() != DType::F32 {
            return Err(StepError::DType {
                param: "loss".to_owned(),
                role: "values",
                actual: loss.dtype(),
            });
        }
        let source = self.lock().loss_scale_buffer().clone();
        let place = Tensor::<1>::zeros([1], &self.shared.device);
        let scale = primitive::filled(place, source, &self.shared)?;
        let mut scale = Tensor::from_primitive::<Cube>(scale);
        if loss.is_autodiff() {
            scale = Tensor::from_inner(scale);
            if let Some(strategy) = loss.gradient_checkpointing_strategy() {
                scale = scale.with_gradient_checkpointing_strategy(strategy);
            }
        }
        Ok(loss * scale)
    }

    /// The records of steps that have arrived and were not returned before, oldest first, as [`GpuControl::read`] has them.
    /// Does not wait.
    #[must_use]
    pub fn read(&self) -> Vec<ControlRecord> {
        self.lock().read()
    }

    /// How many steps have been recorded of which nothing has arrived yet.
    #[must_use]
    pub fn unread(&self) -> u64 {
        self.lock().unread()
    }

    /// How many steps have been made under it, skipped ones included.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.lock().steps()
    }

    /// Does something else from the next step on, as [`GpuControl::set_control`] says.
    pub fn set_control(&self, control: StepControl) {
        self.lock().set_control(control);
    }

    /// The loss scale and its count, which are part of an optimizer's record, too. Waits for the GPU.
    ///
    /// # Errors
    /// [`TransferError`] if the device is lost or out of memory.
    pub fn state(&self) -> Result<ControlState, TransferError> {
        block_on(self.shared.kernels.device(), self.lock().state())
    }

    /// Goes on with a loss scale that was saved, if it is dynamic here and was there.
    ///
    /// # Errors
    /// [`TransferError`] if the device is out of memory.
    pub fn load_state(&self, state: &ControlState) -> Result<(), TransferError> {
        self.lock().load_state(state)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, GpuControl> {
        self.gpu.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Control").field(&*self.lock()).finish()
    }
}
