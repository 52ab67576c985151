//! The values of some elements in memory, and what steps them.

mod cpu;
mod gpu;

use wgpu_optim::AnyRule;

use crate::Failure;
use crate::backend::{Backend, Choice};
pub use cpu::OnCpu;
pub use gpu::OnGpu;

/// Bytes of an element as it is computed.
pub const ELEM_BYTES: u64 = 4;

/// The values of a window, one tensor after the other.
#[derive(Clone, Debug, Default)]
pub struct Values {
    /// Parameters; masters, where there are some.
    pub params: Vec<f32>,
    /// A gradient for each of them.
    pub grads: Vec<f32>,
    /// One for each slot that the rule keeps, with a value for each of them.
    pub slots: Vec<Vec<f32>>,
}

/// Computes the steps of a window.
pub trait Engine: Send {
    /// Applies the gradients so many times. All values are in one phase of the rule
    /// ([`Rule::phase`](wgpu_optim::Rule::phase)).
    ///
    /// # Errors
    /// [`Failure::Failed`] if the device has failed.
    fn step(&mut self, values: &mut Values, phase: u64, times: u32) -> Result<(), Failure>;
}

impl Choice {
    /// What steps windows of at most `max_elems` elements on the chosen device.
    ///
    /// # Errors
    /// [`Failure::Failed`] if the device has no memory for such windows, or is lost.
    pub fn engine(&self, config: AnyRule, max_elems: u64) -> Result<Box<dyn Engine + '_>, Failure> {
        Ok(match &self.backend {
            Backend::Gpu(open) => Box::new(OnGpu::new(open, config, max_elems)?),
            Backend::Cpu => Box::new(OnCpu::new(config)),
        })
    }
}
