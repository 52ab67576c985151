//! From one storage type to another, on the device.

use super::binding::TensorBinding;
use super::error::{BuildError, StepError};
use super::kernels::Kernels;
use super::optimizer::GpuOptimizer;
use crate::rules::{ConfigError, ParamGroups, Rule, Scalars};
use crate::storage::{Masters, Precision};

/// Conversions between storage types, recorded into the caller's encoder, by the planner and the kernels' frame: an engine
/// gets its 16-bit copy of `f32` parameters without a readback.
///
/// Of each [`TensorBinding`] the gradients are read and the parameters written, rounded to the nearest, ties to even.
///
/// ```
/// use wgpu_optim::{AdapterRequest, Converter, Gpu, Kernels, StorageType, TensorBinding, readback};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default())?;
/// let weight = readback::storage_buffer(&device, &queue, "weight", &[1.0, 2.0, 3.0, 4.0])?;
/// let half = readback::storage_buffer(&device, &queue, "half", &[0.0; 2])?;
///
/// let conversion = TensorBinding::new("weight", &half, &weight, [4]);
/// let conversion = conversion.params_type(StorageType::Bf16);
/// let mut converter = Converter::new(&Kernels::new(&device, &queue)?, &[conversion])?;
/// let mut encoder = device.create_command_encoder(&Default::default());
/// converter.record(&mut encoder)?;
/// queue.submit([encoder.finish()]);
///
/// let words = readback::download_blocking(&device, &queue, &half, 0, 2)?;
/// // 2 and 1, 4 and 3.
/// assert_eq!(words.into_iter().map(f32::to_bits).collect::<Vec<_>>(), [0x4000_3f80, 0x4080_4040]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Converter(GpuOptimizer<Conversion>);

impl Converter {
    /// Checks every tensor, and builds bind groups and pipelines. Submits nothing.
    ///
    /// # Errors
    /// [`BuildError`] naming the tensor; what is written is called its parameters, what is read its gradients.
    pub fn new(kernels: &Kernels, tensors: &[TensorBinding<'_>]) -> Result<Self, BuildError> {
        let groups = ParamGroups::new(Conversion).with_precision(Precision {
            masters: Masters::None,
            ..Precision::default()
        });
        GpuOptimizer::with_groups(kernels, &groups, tensors).map(Self)
    }

    /// Records the conversions into `encoder`, as [`GpuOptimizer::step`] does a step. The caller submits.
    ///
    /// # Errors
    /// As [`GpuOptimizer::step`].
    pub fn record(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<(), StepError> {
        self.0.step(encoder)
    }
}

/// The rule by which parameters become their gradients.
#[derive(Clone, Debug, PartialEq)]
struct Conversion;

impl Rule for Conversion {
    fn stem(&self) -> &'static str {
        "convert"
    }

    fn wgsl(&self) -> String {
        include_str!("../../shaders/rules/convert.wgsl").to_owned()
    }

    fn scalar_names(&self) -> &'static [&'static str] {
        &[]
    }

    fn phase(&self, _applied_steps: u64) -> u64 {
        0
    }

    fn scalars(&self, _phase: u64) -> Scalars {
        [].into()
    }

    fn lr(&self) -> f64 {
        0.0
    }

    fn with_lr(&self, _lr: f64) -> Result<Self, ConfigError> {
        Ok(Self)
    }
}
