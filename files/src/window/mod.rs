//! The values of some elements in memory, what moves them there and back, and what steps them.

mod cpu;
mod gpu;
mod runs;

use std::ops::Range;

use wgpu_optim::{AnyRule, Rule as _};

use crate::error::{EngineError, NeedsTensors};
pub use cpu::OnCpu;
pub use gpu::OnGpu;
pub use runs::{NotRounded, Reader, Run, Writer, runs};

/// Bytes of an element as it is computed.
pub const ELEM_BYTES: u64 = 4;

/// Some elements of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The tensor, in the order in which they were given.
    pub tensor: usize,
    /// The elements, counted from the tensor's first.
    pub elems: Range<u64>,
}

impl Slice {
    /// The number of elements.
    pub const fn numel(&self) -> u64 {
        self.elems.end - self.elems.start
    }

    /// Each of the slices of a window, and which of the window's elements it is.
    pub fn in_window(slices: &[Self]) -> impl Iterator<Item = (&Self, Range<usize>)> {
        let mut end = 0;
        slices.iter().map(move |slice| {
            let start = end;
            end += slice.numel() as usize;
            (slice, start..end)
        })
    }

    /// The tensor of an element of a window, and the element's index in it.
    pub fn find(slices: &[Self], elem: usize) -> Option<(usize, u64)> {
        let mut slices = Self::in_window(slices);
        let (slice, elems) = slices.find(|(_, elems)| elems.contains(&elem))?;
        Some((
            slice.tensor,
            slice.elems.start + (elem - elems.start) as u64,
        ))
    }
}

/// Accepts rules whose every element moves on its own.
///
/// # Errors
/// [`NeedsTensors`] naming one that takes sums over tensors.
pub fn check_rule(rule: &AnyRule) -> Result<(), NeedsTensors> {
    match rule.sums().is_empty() {
        true => Ok(()),
        false => Err(NeedsTensors { rule: rule.stem() }),
    }
}

/// The values of a window, one slice after the other.
#[derive(Clone, Debug, Default)]
pub struct Values {
    /// Parameters; masters, where there are some.
    pub params: Vec<f32>,
    /// A gradient for each of them.
    pub grads: Vec<f32>,
    /// One for each slot that the rule keeps, with a value for each of them.
    pub slots: Vec<Vec<f32>>,
}

impl Values {
    /// Makes empty values for a rule that keeps so many slots.
    pub fn new(slots: usize) -> Self {
        Self {
            slots: vec![Vec::new(); slots],
            ..Self::default()
        }
    }
}

/// Computes the steps of a window.
pub trait Engine: Send {
    /// Applies the gradients so many times. All values are in one phase of the rule
    /// ([`Rule::phase`](wgpu_optim::Rule::phase)).
    ///
    /// # Errors
    /// [`EngineError`] if the device has failed.
    fn step(&mut self, values: &mut Values, phase: u64, times: u32) -> Result<(), EngineError>;
}
