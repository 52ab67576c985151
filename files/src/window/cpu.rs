//! Windows on the CPU twin.

use rayon::prelude::*;
use wgpu_optim::rules::Twin as _;
use wgpu_optim::{AnyRule, Rule as _};

use super::{Engine, Values};
use crate::error::EngineError;

/// Elements that stay in a core's cache from one step to the next. Larger windows are cut, for all cores to have work; of
/// smaller ones there are as many as threads.
const TASK_ELEMS: usize = 1 << 18;

/// The twin.
pub struct OnCpu {
    config: AnyRule,
}

impl OnCpu {
    /// One for windows of a rule.
    pub fn new(config: AnyRule) -> Self {
        Self { config }
    }

    fn step_task(&self, task: Task<'_>, mut phase: u64, times: u32) {
        let Task {
            params,
            grads,
            mut slots,
        } = task;
        for _ in 0..times {
            let scalars = self.config.scalars(phase);
            self.config.step(&scalars, params, &mut slots, grads);
            phase = self.config.phase(phase.saturating_add(1));
        }
    }
}

/// A part of a window.
struct Task<'v> {
    params: &'v mut [f32],
    grads: &'v [f32],
    slots: Vec<&'v mut [f32]>,
}

impl Engine for OnCpu {
    fn step(&mut self, values: &mut Values, phase: u64, times: u32) -> Result<(), EngineError> {
        let params = values.params.chunks_mut(TASK_ELEMS);
        let mut slots: Vec<_> = values
            .slots
            .iter_mut()
            .map(|slot| slot.chunks_mut(TASK_ELEMS))
            .collect();
        let mut tasks: Vec<_> = params
            .zip(values.grads.chunks(TASK_ELEMS))
            .map(|(params, grads)| Task {
                params,
                grads,
                slots: slots.iter_mut().filter_map(Iterator::next).collect(),
            })
            .collect();
        match tasks.len() {
            0 | 1 => tasks
                .drain(..)
                .for_each(|task| self.step_task(task, phase, times)),
            _ => tasks
                .into_par_iter()
                .for_each(|task| self.step_task(task, phase, times)),
        }
        Ok(())
    }
}
