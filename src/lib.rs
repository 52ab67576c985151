//! GPU-accelerated optimizer kernels for [wgpu]: Adam and its relatives, and the fused momentum update
//!
//! ```text
//! d     = g + lambda*theta
//! v     <- alpha*v + c*d
//! theta <- rho*theta - (a*v + b*d)
//! ```
//!
//! over tensors of any number and size, on any Vulkan, Metal or DX12 GPU, recorded into an encoder that the
//! caller owns, with a twin on the CPU and an `f64` oracle that proves every result.
//!
//! # Where to look
//!
//! - [`SgdConfig`] says which update of the momentum family; it compiles to [`Coefficients`], the six numbers above.
//!   [`AdamConfig`] is Adam, AdamW and AMSGrad; [`NAdamConfig`], [`RAdamConfig`], [`AdamaxConfig`], [`RmsPropConfig`],
//!   [`AdagradConfig`], [`AdadeltaConfig`], [`LionConfig`], [`SignumConfig`], [`ScheduleFreeSgdConfig`],
//!   [`ScheduleFreeAdamWConfig`], [`AdaBeliefConfig`], [`YogiConfig`] and [`RpropConfig`] are what their names say. Each is
//!   a [`Rule`], which optimizers, groups and states are generic over; [`AnyRule`] is any of them, by name and library.
//! - [`GpuOptimizer`] records it: built from [`Kernels`] (once per device) and a list of [`TensorBinding`]s.
//! - [`ParamGroups`] gives tensors hyper-parameters of their own, by name.
//! - [`Arena`] lays many tensors out so that one dispatch updates them all.
//! - [`CpuOptimizer`] applies it to slices on all cores.
//! - [`storage`] is how values lie in memory: `f32`, `bf16` or `f16`, masters, rounding. [`Precision`] says it per
//!   parameter group, [`Converter`] converts on the device.
//! - [`StepControl`] says what is done to gradients before a step: unscaled, clipped, the step skipped where they are not
//!   finite. [`GpuControl`] decides it on the device, [`CpuControl`] in memory.
//! - [`plan`] turns tensors and device limits into dispatches; [`readback`] moves data; [`Gpu`] opens a device
//!   for programs that have none.
//! - [`RulePreset`] is a rule as the library has it that you come from, [`AnyRule::preset`] finds one, [`physics`] after mass and friction, [`schedule`]
//!   gives learning rate and momentum per step.
//! - [`mod@reference`] is the momentum family's CPU twin, [`oracle`] the textbook in double precision with bounds.
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

#![cfg_attr(
    not(feature = "gpu"),
    allow(dead_code, reason = "what only kernels on a device need")
)]

pub mod control;
mod cpu;
#[cfg(feature = "safetensors")]
pub mod files;
#[cfg(feature = "gpu")]
mod gpu;
mod optimizer;
pub mod oracle;
pub mod plan;
mod rules;
mod state;
pub mod storage;
mod wgsl;

pub use control::{
    ControlRecord, ControlState, GradNorm, LossScale, NonFinite, StepControl, Verdict,
};
pub use cpu::{
    CpuControl, CpuOptimizer, SliceError, TensorError, TensorSlice, TensorSliceMut, TensorValues,
};
#[cfg(all(feature = "gpu", feature = "safetensors"))]
pub use gpu::ArenaFileError;
#[cfg(feature = "gpu")]
pub use gpu::{
    AdapterRequest, Arena, ArenaBuffer, ArenaBuilder, ArenaError, ArenaLayout, ArenaTensor,
    BuildError, Controlled, Converter, Gpu, GpuControl, GpuError, GpuOptimizer, Kernels, LoadError,
    OPTIONAL_FEATURES, RebindError, StateSlice, StepError, TensorBinding, TransferError, adapters,
    readback,
};
pub use half;
pub use optimizer::Optimizer;
pub use plan::PlanError;
pub use rules::*;
pub use state::{
    DuplicateName, OptimizerState, SlotState, StateError, TensorSpec, TensorState, UnknownTensor,
};
#[cfg(feature = "safetensors")]
pub use state::{RecordError, Recorded, SlotEntry, StateFileError, StateRecord};
pub use storage::{Masters, Precision, StorageType};
#[cfg(feature = "gpu")]
pub use wgpu;
pub use wgsl::{KernelError, KernelVariant, NormVariant, ScalarPath};

/// The README's examples are compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;
