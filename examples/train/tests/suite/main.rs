//! Tests of the example. Those under `adapter` need an adapter; a software one will do.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]

mod adapter;
mod bounds;
mod command;
mod gradients;
mod speed;
mod steps;

use train::data::Dataset;
use train::model::Model;
use train::task::Task;
use wgpu_optim::{AdamConfig, AnyRule, SgdConfig};

/// The wines, and a network with two hidden layers that differ.
fn task(batch_rows: usize, epochs: usize) -> Task {
    let data = Dataset::wines();
    Task {
        model: Model::new(data.features(), &[9, 5]),
        data,
        batch_rows,
        epochs,
    }
}

/// Rules without state, with one slot, with one slot and look-ahead, and with two slots.
fn rules(lr: f64) -> [AnyRule; 4] {
    let sgd = SgdConfig::builder(lr);
    [
        sgd.build().unwrap().into(),
        sgd.momentum(0.9).build().unwrap().into(),
        sgd.momentum(0.9).nesterov(true).build().unwrap().into(),
        AdamConfig::adamw(lr).build().unwrap().into(),
    ]
}
