//! Windows on the CPU twin.

use wgpu_optim::{Coefficients, SgdConfig, Terms, reference};

use super::stream::{Engine, Values};
use crate::Failure;

/// The twin on the thread that runs it: with as many windows in flight as threads, all cores have work.
pub struct OnCpu {
    config: SgdConfig,
    repeat: u32,
}

impl OnCpu {
    pub fn new(config: SgdConfig, repeat: u32) -> Self {
        Self { config, repeat }
    }
}

impl Engine for OnCpu {
    fn step(&mut self, values: &mut Values, is_first: bool) -> Result<(), Failure> {
        let has = Terms::of(&self.config);
        let Values {
            params,
            grads,
            velocity,
        } = values;
        for repeat in 0..self.repeat {
            let k = Coefficients::new(&self.config, is_first && repeat == 0).cast();
            if has.velocity {
                reference::sgd(&k, has, params, velocity, grads);
            } else {
                reference::sgd_plain(&k, has, params, grads);
            }
        }
        Ok(())
    }
}
