//! Steps the parameters of [burn] modules with the kernels of [wgpu_optim], in place, on burn's own wgpu device.
//!
//! burn's optimizers are tensor operations, a chain of them for each parameter, which its fusion makes one kernel of.
//! Here the whole module is one compute pass: small tensors share dispatches, parameters are updated where they lie, and
//! any rule of [`wgpu_optim`] can be used, in parameter groups too.
//!
//! ```
//! use burn::module::Module;
//! use burn::nn::{Linear, LinearConfig};
//! use burn::optim::GradientsParams;
//! use burn::tensor::{Device, Distribution, Tensor};
//! use wgpu_optim_burn::wgpu_optim::SgdConfig;
//! use wgpu_optim_burn::{Init as _, SharedDevice};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Once, before anything else uses this device of burn's: its handles are shared from here on.
//! let (device, setup) = Device::wgpu_options().init_with_setup()?;
//! let shared = SharedDevice::new(&device, &setup)?;
//!
//! let device = device.autodiff();
//! let mut model: Linear = LinearConfig::new(20, 20).init(&device);
//! let mut optimizer = SgdConfig::builder(0.1).momentum(0.9).build()?.init(&shared);
//!
//! let input = Tensor::<2>::random([2, 20], Distribution::Default, &device);
//! let grads = model.forward(input).mean().backward();
//! let grads = GradientsParams::from_grads(grads, &model);
//! model = optimizer.step(0.1, model, grads)?;
//! # // A process that ends while its device is at work may end by a signal.
//! # model.weight.val().into_data();
//! # Ok(())
//! # }
//! ```
//!
//! # What a step does
//!
//! 1. Everything that burn has queued and the step depends on is executed and submitted first; what burn does later
//!    comes after the step on the same queue. No waiting for the GPU.
//! 2. Buffer, offset and size of each parameter and gradient are taken from burn's pools. Nothing is copied, but
//!    - a parameter whose memory is shared (the user has kept a clone of it, or a view, or it is tied to another) is
//!      copied first, as burn itself does before it writes: clones keep their values;
//!    - a parameter or gradient whose elements do not lie one after the other is laid out so by burn.
//!
//!    [`ModuleOptimizer::copied`] says how many that were.
//! 3. One compute pass is recorded and submitted.
//!
//! A parameter without a gradient is left as it is, step count and state included. A tensor that is of no float type that the kernels know, or
//! not on the shared device, is an error that names the parameter by its path in the module; nothing is computed elsewhere
//! instead. burn panics where one of its own operations has failed, and so does a step that needs its result.
//!
//! # Names
//!
//! Parameters are called by their paths in the module (`layer1.0.conv.weight`), in errors, in [parameter
//! groups](wgpu_optim::ParamGroups) and in records. So a record fits any module of the same structure, and it is an
//! [`OptimizerState`](wgpu_optim::OptimizerState), which the feature `safetensors` reads and writes as files that
//! PyTorch's users know.
//!
//! # Features
//!
//! - `fusion` (on by default): goes with burn's feature of the same name, which burn has by default, too. Where you turn
//!   off burn's, turn off this one.
//! - `safetensors`: records to and from state files.
//! - `train`: burn's own training loop, by `ModuleOptimizer::learner`.

mod control;
mod device;
mod engine;
mod error;
#[cfg(feature = "train")]
mod learner;
mod module;
mod optimizer;
mod primitive;
mod rates;
mod stepped;

pub use control::Control;
pub use device::SharedDevice;
pub use error::{ShareError, StepError};
#[cfg(feature = "train")]
pub use learner::LearnerModule;
pub use optimizer::{Init, ModuleOptimizer};
pub use stepped::Copied;
pub use wgpu_optim;

/// The README's example is compiled and run as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;
