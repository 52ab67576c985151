//! The CPU twin: forward and backward of `model.wgsl` in the same order of statements, and the library's CPU optimizer.

use anyhow::Result;
use wgpu_optim::control::ControlRecord;
use wgpu_optim::{AnyRule, CpuControl, CpuOptimizer};

use crate::model::Layer;
use crate::task::{Batch, Losses, Start, Task};
use crate::training::{Device, Gradients, Outcome, Run, Started};

/// Invocations of the workgroup that sums up the loss.
const LANES: usize = 64;

/// The twin of a task.
#[derive(Debug)]
pub struct Twin<'t> {
    task: &'t Task,
    gradients: Gradients,
}

impl<'t> Twin<'t> {
    /// Makes the twin of a task.
    #[must_use]
    pub fn new(task: &'t Task) -> Self {
        Self::with_gradients(task, Gradients::default())
    }

    /// Makes the twin of a task with gradients that are stored and controlled otherwise.
    #[must_use]
    pub const fn with_gradients(task: &'t Task, gradients: Gradients) -> Self {
        Self { task, gradients }
    }

    /// A run from this start.
    ///
    /// # Errors
    /// If two tensors have one name.
    pub fn run<'d>(
        &'d self,
        rule: &AnyRule,
        start: &'d Start,
        evaluates: bool,
    ) -> Result<TwinRun<'d>> {
        Ok(TwinRun {
            network: Network::new(self.task, start),
            optimizer: CpuOptimizer::new(rule.clone(), self.task.model.tensors())?,
            gradients: &self.gradients,
            control: self.gradients.control.clone().map(CpuControl::new),
            record: None,
            slots: vec![0.0; self.task.batches().count()],
            steps: 0,
            evaluates,
        })
    }
}

impl Device for Twin<'_> {
    fn name(&self) -> &str {
        "CPU twin"
    }

    fn start<'d>(&'d self, rule: &AnyRule, from: &'d Start, evaluates: bool) -> Started<'d> {
        Ok(Box::new(self.run(rule, from, evaluates)?))
    }
}

/// A run on the twin.
#[derive(Debug)]
pub struct TwinRun<'d> {
    network: Network<'d>,
    optimizer: CpuOptimizer<AnyRule>,
    gradients: &'d Gradients,
    control: Option<CpuControl>,
    /// The control's record of the last step.
    record: Option<ControlRecord>,
    /// Losses, by the slots of their batches.
    slots: Vec<f32>,
    steps: usize,
    evaluates: bool,
}

impl<'d> TwinRun<'d> {
    /// The network as it is.
    #[must_use]
    pub const fn network(&self) -> &Network<'d> {
        &self.network
    }

    fn evaluate(&mut self, epoch: usize) {
        for batch in self.network.task.evaluation(epoch) {
            self.slots[batch.slot as usize] = self.network.loss(batch);
        }
    }
}

impl Run for TwinRun<'_> {
    fn step(&mut self) -> Result<()> {
        let task = self.network.task;
        if self.evaluates && self.steps == 0 {
            self.evaluate(0);
        }
        let mut batch = task.batch(self.steps);
        if let Some(control) = &self.control {
            batch.error_weight *= control.loss_scale();
        }
        self.slots[batch.slot as usize] = self.network.loss(batch);
        self.network.gradients(batch);
        let Network { params, grads, .. } = &mut self.network;
        let mut params: Vec<_> = params.iter_mut().map(Vec::as_mut_slice).collect();
        for grad in grads.iter_mut().flatten() {
            *grad = self.gradients.stored_as.rounded(*grad);
        }
        let grads: Vec<_> = grads.iter().map(Vec::as_slice).collect();
        match &mut self.control {
            None => self.optimizer.step(&mut params, &grads)?,
            Some(control) => {
                self.record = Some(self.optimizer.step_with(&mut params, &grads, control)?);
            }
        }
        self.steps += 1;
        if self.evaluates && self.steps.is_multiple_of(task.steps_per_epoch()) {
            self.evaluate(self.steps / task.steps_per_epoch());
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        Ok(())
    }

    fn losses(&self) -> Result<Losses> {
        let task = self.network.task;
        Ok(task.losses(&self.slots, self.steps, self.evaluates))
    }

    fn outcome(&self) -> Result<Option<Outcome>> {
        Ok(self.record.map(|record| Outcome {
            skipped: record.skipped,
            scale: record.scale,
        }))
    }
}

/// Parameters and gradients, and what is computed on the way from one to the other.
#[derive(Clone, Debug)]
pub struct Network<'d> {
    task: &'d Task,
    order: &'d [u32],
    /// The parameters, in the model's order.
    pub params: Vec<Vec<f32>>,
    /// The gradients, likewise.
    pub grads: Vec<Vec<f32>>,
    /// The outputs of each layer, row by row.
    activations: Vec<Vec<f32>>,
    /// The gradients of the loss by the sums of each layer, row by row.
    deltas: Vec<Vec<f32>>,
}

impl<'d> Network<'d> {
    /// Makes a network with the parameters of a start.
    #[must_use]
    pub fn new(task: &'d Task, start: &'d Start) -> Self {
        let rows = task.data.rows();
        let layers = &task.model.layers;
        let per_row: Vec<_> = layers.iter().map(|l| vec![0.0; rows * l.outputs]).collect();
        let zeros = |values: &Vec<f32>| vec![0.0; values.len()];
        Self {
            task,
            order: &start.order,
            params: start.params.clone(),
            grads: start.params.iter().map(zeros).collect(),
            activations: per_row.clone(),
            deltas: per_row,
        }
    }

    /// The mean squared error of a batch, and its gradient by each prediction.
    pub fn loss(&mut self, batch: Batch) -> f32 {
        for layer in 0..self.task.model.layers.len() {
            self.forward(layer, batch);
        }
        let target = self.task.data.features();
        let (mut lanes, last) = ([0.0_f32; LANES], self.activations.len() - 1);
        for row in 0..batch.rows as usize {
            let error = self.activations[last][row] - self.data(batch, row)[target];
            self.deltas[last][row] = batch.error_weight * error;
            lanes[row % LANES] += error * error;
        }
        let mut half = LANES / 2;
        while half > 0 {
            let (sums, others) = lanes.split_at_mut(half);
            for (sum, other) in sums.iter_mut().zip(others) {
                *sum += *other;
            }
            half /= 2;
        }
        lanes[0] / batch.rows as f32
    }

    /// The gradients of the batch whose loss was computed last.
    pub fn gradients(&mut self, batch: Batch) {
        for layer in (0..self.task.model.layers.len()).rev() {
            self.gradient(layer, batch);
            if layer > 0 {
                self.backward(layer, batch);
            }
        }
    }

    fn data(&self, batch: Batch, row: usize) -> &'d [f32] {
        self.task.data.row(self.order[batch.first as usize + row])
    }

    /// The inputs of a layer.
    fn inputs(&self, layer: usize, batch: Batch, row: usize) -> &[f32] {
        let Layer { inputs, .. } = self.task.model.layers[layer];
        match layer {
            0 => &self.data(batch, row)[..inputs],
            _ => &self.activations[layer - 1][row * inputs..][..inputs],
        }
    }

    fn forward(&mut self, layer: usize, batch: Batch) {
        let Layer { outputs, .. } = self.task.model.layers[layer];
        let is_last = layer + 1 == self.task.model.layers.len();
        let mut activations = std::mem::take(&mut self.activations[layer]);
        for row in 0..batch.rows as usize {
            let sums = &mut activations[row * outputs..][..outputs];
            sums.copy_from_slice(&self.params[2 * layer + 1]);
            let weights = self.params[2 * layer].chunks_exact(outputs);
            for (x, weights) in self.inputs(layer, batch, row).iter().zip(weights) {
                for (sum, weight) in sums.iter_mut().zip(weights) {
                    *sum += x * weight;
                }
            }
            if !is_last {
                sums.iter_mut().for_each(|sum| *sum = softsign(*sum));
            }
        }
        self.activations[layer] = activations;
    }

    fn backward(&mut self, layer: usize, batch: Batch) {
        let Layer { inputs, outputs } = self.task.model.layers[layer];
        let (below, above) = self.deltas.split_at_mut(layer);
        let rows = above[0].chunks_exact(outputs).take(batch.rows as usize);
        for (row, deltas) in rows.enumerate() {
            let weights = self.params[2 * layer].chunks_exact(outputs);
            let activations = &self.activations[layer - 1][row * inputs..];
            let below = &mut below[layer - 1][row * inputs..][..inputs];
            for ((below, activation), weights) in below.iter_mut().zip(activations).zip(weights) {
                let mut sum = 0.0;
                for (weight, delta) in weights.iter().zip(deltas) {
                    sum += weight * delta;
                }
                let rest = 1.0 - activation.abs();
                *below = sum * (rest * rest);
            }
        }
    }

    fn gradient(&mut self, layer: usize, batch: Batch) {
        let Layer { outputs, .. } = self.task.model.layers[layer];
        let mut weight_grads = std::mem::take(&mut self.grads[2 * layer]);
        let mut bias_grads = std::mem::take(&mut self.grads[2 * layer + 1]);
        weight_grads.fill(0.0);
        bias_grads.fill(0.0);
        for row in 0..batch.rows as usize {
            let deltas = &self.deltas[layer][row * outputs..][..outputs];
            let sums = weight_grads.chunks_exact_mut(outputs);
            for (x, sums) in self.inputs(layer, batch, row).iter().zip(sums) {
                for (sum, delta) in sums.iter_mut().zip(deltas) {
                    *sum += x * delta;
                }
            }
            for (sum, delta) in bias_grads.iter_mut().zip(deltas) {
                *sum += delta;
            }
        }
        self.grads[2 * layer] = weight_grads;
        self.grads[2 * layer + 1] = bias_grads;
    }
}

fn softsign(z: f32) -> f32 {
    z / (1.0 + z.abs())
}
