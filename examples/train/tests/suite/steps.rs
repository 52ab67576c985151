//! Order and number of batches, the data, and what can be typed.

use std::collections::HashSet;

use train::contender::{Contender, Lr};
use train::cpu::Twin;
use train::data::Dataset;
use train::training::train;

use crate::{rules, task};

/// 100 rows do not divide 1280, and 5000 are more than there are.
#[test]
fn every_epoch_has_every_row_once_whatever_the_batch() {
    for batch_rows in [1, 100, 256, 1279, 1280, 5000] {
        let task = task(batch_rows, 3);
        let start = task.start(7);
        let mut orders = HashSet::new();
        for epoch in 0..task.epochs {
            let steps = epoch * task.steps_per_epoch()..(epoch + 1) * task.steps_per_epoch();
            let batches = steps.map(|step| task.batch(step));
            let rows = batches.flat_map(|batch| {
                assert!(batch.rows as usize <= batch_rows && batch.rows > 0);
                start.order[batch.first as usize..][..batch.rows as usize].to_vec()
            });
            let rows: Vec<_> = rows.collect();
            let mut sorted = rows.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..1280).collect::<Vec<_>>());
            orders.insert(rows);
        }
        assert_eq!(orders.len(), 3);
    }
}

#[test]
fn slots_of_losses_do_not_meet() {
    let task = task(100, 3);
    let slots = task.batches().map(|batch| batch.slot);
    let expected = task.steps() as u32 + 2 * (task.epochs as u32 + 1);
    assert_eq!(slots.collect::<Vec<_>>(), (0..expected).collect::<Vec<_>>());
}

#[test]
fn held_out_rows_are_not_trained_on() {
    let data = Dataset::wines();
    assert_eq!(
        (data.rows(), data.columns, data.train_rows),
        (1599, 12, 1280)
    );
    for column in 0..data.columns {
        let values = (0..1280).map(|row| f64::from(data.row(row)[column]));
        let mean = values.clone().sum::<f64>() / 1280.0;
        let variance = values.map(|x| x * x).sum::<f64>() / 1280.0;
        // Each value is rounded once to 24 bits, and none is larger than 32.
        assert!(mean.abs() < 1e-6 && (variance - 1.0).abs() < 1e-5);
    }
    let held_out = |row: u32| data.row(row).iter().sum::<f32>();
    assert!((1280..1599).any(|row| held_out(row) != 0.0));
}

/// A batch of all rows sums up the same loss as the evaluation, but in another order.
#[test]
fn evaluation_is_of_all_rows() {
    let task = task(1280, 2);
    let start = task.start(2);
    let [rule, ..] = rules(0.1);
    let twin = Twin::new(&task);
    let losses = train(&twin, (&rule, &start), (2, true)).unwrap();
    let losses = losses.losses;
    assert_eq!((losses.train.len(), losses.held_out.len()), (3, 3));
    for (batch, all) in losses.batches.iter().zip(&losses.train) {
        // At most 32 sums round differently.
        assert!((batch - all).abs() <= 64.0 * f32::EPSILON * all);
    }
    assert!(losses.train[2] < losses.train[1] && losses.train[1] < losses.train[0]);
}

#[test]
fn rules_are_typed_by_name_library_and_learning_rate() {
    let typed = |text: &str| text.parse::<Contender>();
    let lion = typed("Lion:optax@3e-4").unwrap();
    assert_eq!(
        (lion.lr, lion.library.as_deref()),
        (Lr::Given(3e-4), Some("optax"))
    );
    assert_eq!(lion.label(), "Lion of optax");
    assert_eq!(typed("momentum@same").unwrap().lr, Lr::Same);
    assert_eq!(typed("plain").unwrap().label(), "plain descent");
    for (wrong, says) in [
        ("sgdd", "sgdd"),
        ("adam:nobody", "nobody"),
        ("plain@fast", "learning rate"),
        ("plain@-1", "lr"),
    ] {
        let error = format!("{:#}", typed(wrong).unwrap_err());
        assert!(error.contains(says), "{error}");
    }
}
