//! GPU-accelerated optimizer kernels for [wgpu]: Adam and its relatives, and the fused momentum update
//!
//! ```text
//! d     = g + lambda*theta
//! v     <- alpha*v + c*d
//! theta <- rho*theta - (a*v + b*d)
//! ```
//!
//! over tensors of any number and size, on any Vulkan, Metal or DX12 GPU, recorded into an encoder that the
//! caller owns, with a twin on the CPU and an `f64` oracle that bounds the error of every result.
//!
//! # Where to look
//!
//! The root has what most programs name:
//!
//! - [`GpuOptimizer`] records a step: it is built from [`Kernels`] (once per device) and a list of [`TensorBinding`]s.
//!   [`CpuOptimizer`] makes the same step over slices, on all cores. [`Optimizer`] is the trait of both: learning rates,
//!   momentum, frozen tensors and step counts.
//! - [`SgdConfig`] is the momentum family, [`AdamConfig`] is Adam, AdamW and AMSGrad; [`NAdamConfig`], [`RAdamConfig`],
//!   [`AdamaxConfig`], [`RmsPropConfig`], [`AdagradConfig`], [`AdadeltaConfig`], [`LionConfig`], [`SignumConfig`],
//!   [`ScheduleFreeSgdConfig`], [`ScheduleFreeAdamWConfig`], [`AdaBeliefConfig`], [`YogiConfig`] and [`RpropConfig`] are
//!   what their names say. Each is a [`Rule`], which optimizers, groups and states are generic over. [`AnyRule`] is any of
//!   them, and [`AnyRule::preset`] finds one by its name and the library that you come from.
//! - [`ParamGroups`] gives tensors hyper-parameters of their own, by name, and a [`Precision`]: [`StorageType`]s and
//!   [`Masters`].
//! - [`StepControl`] says what is done to gradients before a step: unscaled, clipped, the step skipped where they are not
//!   finite. [`GpuControl`] decides it on the device, [`CpuControl`] in memory.
//! - [`Arena`] lays many tensors out so that one dispatch updates them all, [`Converter`] converts values on the device,
//!   [`readback`] moves them, and [`Gpu`] opens a device for programs that have none.
//!
//! The modules have the rest:
//!
//! | module | content |
//! |---|---|
//! | [`rules`] | builders of configurations, presets, and what a rule of one's own is made of; [`rules::sgd`]: momentum forms, their [coefficients](rules::sgd::Coefficients) and conversion, [mass and friction](rules::sgd::physics) |
//! | [`schedule`] | learning rate and momentum per step |
//! | [`control`] | records and state of a control, norms of gradients over several processes |
//! | [`storage`] | how values of 16 and 32 bits lie in memory and are rounded |
//! | [`gpu`], [`cpu`] | everything about devices, arenas and transfers; everything about slices |
//! | [`state`] | what optimizers remember, and its form in files |
//! | [`files`] | headers and indexes of safetensors files |
//! | [`guide`] | a page for each task, from embedding a step to what an error means; their code runs as tests |
//! | [`oracle`] | every rule in double precision, with bounds on the error of an `f32` step |
//! | [`plan`], [`wgsl`] | how tensors become dispatches and rules become kernels, for tools and for hosts other than wgpu; they change with every version |
//!
//! # Embedding
//!
//! ```
//! # use wgpu_optim::{AdapterRequest, Gpu, readback};
//! use wgpu_optim::{GpuOptimizer, Kernels, Optimizer, SgdConfig, TensorBinding, wgpu};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default())?;
//! # let params = readback::storage_buffer(&device, &queue, "params", &[1.0, 2.0, 3.0])?;
//! # let grads = readback::storage_buffer(&device, &queue, "grads", &[1.0, 0.0, -1.0])?;
//! // Your device, your queue, your buffers.
//! let kernels = Kernels::new(&device, &queue)?;
//! let config = SgdConfig::builder(0.1).momentum(0.9).build()?;
//! let weight = TensorBinding::new("weight", &params, &grads, [3]);
//! let mut optimizer = GpuOptimizer::new(&kernels, config, &[weight])?;
//!
//! // Your frame. Two steps in one encoder each see their own learning rate.
//! let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
//! optimizer.step(&mut encoder)?;
//! optimizer.set_lr(0.05)?;
//! optimizer.step(&mut encoder)?;
//! queue.submit([encoder.finish()]);
//! # Ok(())
//! # }
//! ```
//!
//! [`GpuOptimizer::step`] records and never submits, polls, maps, compiles, or allocates GPU memory after the
//! first step. Mistakes come back as typed errors that name the tensor; no panic reaches the caller.
//!
//! # Features
//!
//! - `gpu` (on by default): everything that needs wgpu. Without it rules, CPU twins, oracles, plans, states, files and the
//!   WGSL text of the kernels are left, for hosts of another kind.
//! - `backends` (on by default): wgpu's default backends. An engine that chooses its own turns it off, and `gpu` on.
//! - `safetensors`: [`Arena`] and [`OptimizerState`] to and from files, and what PyTorch's optimizers remember.

#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(
    not(feature = "gpu"),
    allow(dead_code, reason = "what only kernels on a device need")
)]

pub mod control;
pub mod cpu;
#[cfg(feature = "safetensors")]
pub mod files;
#[cfg(feature = "gpu")]
pub mod gpu;
#[cfg(feature = "gpu")]
pub mod guide;
mod optimizer;
pub mod oracle;
pub mod plan;
pub mod rules;
pub mod schedule;
pub mod state;
pub mod storage;
pub mod wgsl;

#[doc(inline)]
pub use control::{LossScale, StepControl};
#[doc(inline)]
pub use cpu::{CpuControl, CpuOptimizer, TensorSlice, TensorSliceMut};
#[cfg(feature = "gpu")]
#[doc(inline)]
pub use gpu::{
    AdapterRequest, Arena, BuildError, Converter, Gpu, GpuControl, GpuOptimizer, Kernels, Metrics,
    OPTIONAL_FEATURES, StepError, TensorBinding, TransferError, readback,
};
pub use half;
pub use optimizer::Optimizer;
#[doc(inline)]
pub use rules::{
    AdaBeliefConfig, AdadeltaConfig, AdagradConfig, AdamConfig, AdamaxConfig, AnyRule, ConfigError,
    LambConfig, LionConfig, NAdamConfig, ParamGroups, RAdamConfig, RmsPropConfig, RpropConfig,
    Rule, ScheduleFreeAdamWConfig, ScheduleFreeSgdConfig, SgdConfig, SignumConfig, YogiConfig,
};
#[doc(inline)]
pub use state::{OptimizerState, StateError, TensorSpec};
#[doc(inline)]
pub use storage::{Masters, Precision, StorageType};
#[cfg(feature = "gpu")]
pub use wgpu;

/// The README's examples are compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;
