//! Balls: two parameters each, and the optimizer that moves them.

use anyhow::Result;
use wgpu_optim::wgpu::{self, BufferUsages};
use wgpu_optim::{AnyRule, GpuOptimizer, Kernels, Optimizer, TensorBinding, readback};

use crate::settings::RuleSettings;
use crate::terrain::{Domain, Terrain};

/// A side's balls. Its parameter buffer is stepped, counted and drawn as it is.
pub struct Population {
    /// x and y of each ball, one after the other; an odd last ball has an unused one beside it, because the slopes are
    /// written two at a time.
    pub params: wgpu::Buffer,
    /// The slope under each ball.
    pub grads: wgpu::Buffer,
    pub optimizer: GpuOptimizer<AnyRule>,
    rule: RuleSettings,
    /// Under the rules before this one.
    steps_before: u64,
}

impl Population {
    pub fn new(kernels: &Kernels, starts: &[f32], rule: &RuleSettings) -> Result<Self> {
        let device = kernels.device();
        let buffer = |label, usage| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size: 4 * starts.len().next_multiple_of(4) as u64,
                usage: usage
                    | BufferUsages::STORAGE
                    | BufferUsages::COPY_DST
                    | BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            })
        };
        let params = buffer("landscape.params", BufferUsages::VERTEX);
        let grads = buffer("landscape.grads", BufferUsages::empty());
        let mut population = Self {
            optimizer: optimizer(kernels, &params, &grads, starts.len(), rule)?,
            params,
            grads,
            rule: rule.clone(),
            steps_before: 0,
        };
        population.restart(kernels, starts)?;
        Ok(population)
    }

    /// Steps since the start. One whose encoder was dropped is none.
    pub fn steps(&self) -> u64 {
        self.steps_before + self.optimizer.steps()
    }

    /// Puts every ball back where it started, at rest.
    pub fn restart(&mut self, kernels: &Kernels, starts: &[f32]) -> Result<()> {
        readback::upload(kernels.device(), kernels.queue(), &self.params, 0, starts)?;
        self.optimizer = optimizer(kernels, &self.params, &self.grads, starts.len(), &self.rule)?;
        self.steps_before = 0;
        Ok(())
    }

    /// Prepares another rule that goes on from where the balls are. Another learning rate or momentum keeps what they
    /// remember; anything else lets them start from rest.
    pub fn change(&self, kernels: &Kernels, numel: usize, rule: &RuleSettings) -> Result<Change> {
        rule.config()?;
        let old = &self.rule;
        let same_but_numbers = RuleSettings {
            lr: old.lr,
            momentum: old.momentum,
            ..rule.clone()
        };
        let keeps_velocity = (rule.momentum == 0.0) == (old.momentum == 0.0);
        let is_by_numbers = same_but_numbers == *old && keeps_velocity && !rule.is_particle();
        let anew = || optimizer(kernels, &self.params, &self.grads, numel, rule);
        Ok(Change {
            optimizer: (!is_by_numbers).then(anew).transpose()?,
            rule: rule.clone(),
        })
    }

    /// Goes on so.
    pub fn apply(&mut self, Change { optimizer, rule }: Change) -> Result<()> {
        match optimizer {
            Some(optimizer) => {
                self.steps_before = self.steps();
                self.optimizer = optimizer;
            }
            None => {
                self.optimizer.set_lr(rule.lr)?;
                if rule.rule == RuleSettings::SGD && rule.momentum != 0.0 {
                    self.optimizer.set_momentum(rule.momentum)?;
                }
            }
        }
        self.rule = rule;
        Ok(())
    }
}

/// A change to another rule, checked, with a new optimizer where the old one cannot take it.
pub struct Change {
    optimizer: Option<GpuOptimizer<AnyRule>>,
    rule: RuleSettings,
}

/// Makes the optimizer of all balls, which are one tensor.
fn optimizer(
    kernels: &Kernels,
    params: &wgpu::Buffer,
    grads: &wgpu::Buffer,
    numel: usize,
    rule: &RuleSettings,
) -> Result<GpuOptimizer<AnyRule>> {
    let balls = TensorBinding::new("balls", params, grads, [numel / 2, 2]);
    Ok(GpuOptimizer::new(kernels, rule.config()?, &[balls])?)
}

/// The points where balls start: anywhere in the domain. On the saddle they lie beside its crest, from where plain
/// descent takes long.
pub fn starts(terrain: Terrain, balls: u32, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    let Domain { centre, half_width } = terrain.domain();
    let height = match terrain {
        Terrain::Saddle => 0.01,
        _ => half_width,
    };
    let mut starts = Vec::with_capacity(2 * balls as usize);
    for _ in 0..balls {
        for (centre, half_width) in centre.into_iter().zip([half_width, height]) {
            starts.push((centre + half_width * (2.0 * random.f64() - 1.0)) as f32);
        }
    }
    starts
}
