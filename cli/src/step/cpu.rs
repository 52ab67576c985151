//! Windows on the CPU twin.

use wgpu_optim::{AnyRule, Rule as _, Twin as _};

use super::stream::{Engine, Values};
use crate::Failure;

/// The twin on the thread that runs it: with as many windows in flight as threads, all cores have work.
pub struct OnCpu {
    config: AnyRule,
}

impl OnCpu {
    pub fn new(config: AnyRule) -> Self {
        Self { config }
    }
}

impl Engine for OnCpu {
    fn step(&mut self, values: &mut Values, phase: u64, times: u32) -> Result<(), Failure> {
        let Values {
            params,
            grads,
            slots,
        } = values;
        let mut slots: Vec<_> = slots.iter_mut().map(Vec::as_mut_slice).collect();
        let mut phase = phase;
        for _ in 0..times {
            self.config.step(phase, params, &mut slots, grads);
            phase = self.config.phase(phase.saturating_add(1));
        }
        Ok(())
    }
}
