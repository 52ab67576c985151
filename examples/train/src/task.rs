//! The task: model, data and order of the rows, the same for every rule and every device.

use bytemuck::{Pod, Zeroable};
use fastrand::Rng;

use crate::data::Dataset;
use crate::model::Model;

/// A network, its data, and how often to go through them.
#[derive(Clone, Debug)]
pub struct Task {
    /// The data.
    pub data: Dataset,
    /// The network.
    pub model: Model,
    /// Rows in a batch; the last one of an epoch has what is left.
    pub batch_rows: usize,
    /// The number of passes over the rows to train on.
    pub epochs: usize,
}

/// Some rows, as the shader knows them: `Batch` in `model.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Batch {
    /// The index of its first row in the order.
    pub first: u32,
    /// The number of its rows.
    pub rows: u32,
    /// The index of its loss.
    pub slot: u32,
    /// The weight of a row's error in the gradient of the mean square, beside the loss scale.
    pub error_weight: f32,
}

/// A start, which follows from a seed.
#[derive(Clone, Debug, PartialEq)]
pub struct Start {
    /// Parameters to start from, in the model's order.
    pub params: Vec<Vec<f32>>,
    /// The indices of the rows: each once, then those of each epoch as they come. [`Batch::first`] points into it.
    pub order: Vec<u32>,
}

/// The losses of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Losses {
    /// The loss of each batch, before its step.
    pub batches: Vec<f32>,
    /// The loss over all rows to train on, at the start and after each epoch; empty where nobody asked.
    pub train: Vec<f32>,
    /// The loss over all rows held out, likewise.
    pub held_out: Vec<f32>,
}

impl Task {
    /// The number of steps of an epoch.
    #[must_use]
    pub const fn steps_per_epoch(&self) -> usize {
        self.data.train_rows.div_ceil(self.batch_rows)
    }

    /// The number of steps in all.
    #[must_use]
    pub const fn steps(&self) -> usize {
        self.steps_per_epoch() * self.epochs
    }

    /// The parameters and the order of the rows from this seed.
    #[must_use]
    pub fn start(&self, seed: u64) -> Start {
        let mut rng = Rng::with_seed(seed);
        let params = self.model.init(&mut rng);
        let mut order: Vec<_> = (0..self.data.rows() as u32).collect();
        let mut epoch = order[..self.data.train_rows].to_vec();
        for _ in 0..self.epochs {
            rng.shuffle(&mut epoch);
            order.extend(&epoch);
        }
        Start { params, order }
    }

    /// The rows of a step.
    #[must_use]
    pub fn batch(&self, step: usize) -> Batch {
        let (epoch, index) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let (trained, start) = (self.data.train_rows, index * self.batch_rows);
        let first = self.data.rows() + epoch * trained + start;
        Batch::new(first, self.batch_rows.min(trained - start), step)
    }

    /// Two batches after so many epochs: all rows to train on, and all that are held out.
    #[must_use]
    pub fn evaluation(&self, epoch: usize) -> [Batch; 2] {
        let slot = self.steps() + 2 * epoch;
        let (trained, rows) = (self.data.train_rows, self.data.rows());
        [
            Batch::new(0, trained, slot),
            Batch::new(trained, rows - trained, slot + 1),
        ]
    }

    /// The batches of all steps and evaluations, by slot.
    pub fn batches(&self) -> impl Iterator<Item = Batch> {
        let steps = (0..self.steps()).map(|step| self.batch(step));
        steps.chain((0..=self.epochs).flat_map(|epoch| self.evaluation(epoch)))
    }

    /// Sorts the losses in the slots by what they are of.
    #[must_use]
    pub fn losses(&self, slots: &[f32], steps: usize, evaluated: bool) -> Losses {
        let evaluations = if evaluated {
            1 + steps / self.steps_per_epoch()
        } else {
            0
        };
        let of = |which: usize| {
            let epochs = 0..evaluations;
            epochs.map(move |epoch| slots[self.steps() + 2 * epoch + which])
        };
        Losses {
            batches: slots[..steps].to_vec(),
            train: of(0).collect(),
            held_out: of(1).collect(),
        }
    }
}

impl Batch {
    fn new(first: usize, rows: usize, slot: usize) -> Self {
        Self {
            first: first as u32,
            rows: rows as u32,
            slot: slot as u32,
            error_weight: 2.0 / rows as f32,
        }
    }
}
