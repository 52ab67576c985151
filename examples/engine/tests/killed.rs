//! The engine as a person runs it, and kills it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests fail by panicking"
)]

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

const STEPS: u64 = 430;

/// Runs the engine until it says that it has made a step, or to its end. Returns the losses that it shows.
fn run(checkpoint: &Path, kill_at: Option<u64>) -> Vec<(u64, String)> {
    let mut engine = Command::new(env!("CARGO_BIN_EXE_engine"))
        .arg(checkpoint)
        .arg(STEPS.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut losses = Vec::new();
    for line in BufReader::new(engine.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some((step, loss)) = line
            .strip_prefix("step ")
            .and_then(|line| line.split_once(": loss "))
        {
            losses.push((step.parse().unwrap(), loss.to_owned()));
            if kill_at.is_some_and(|kill_at| losses[losses.len() - 1].0 >= kill_at) {
                engine.kill().unwrap();
                break;
            }
        }
    }
    let status = engine.wait().unwrap();
    // It may have come to its end before it was killed.
    assert!(status.success() || kill_at.is_some());
    losses
}

#[test]
fn killed_anywhere_it_goes_on_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let expected = folder.path().join("whole.safetensors");
    let losses = run(&expected, None);
    let steps: Vec<_> = losses.iter().map(|(step, _)| *step).collect();
    assert_eq!(steps[..400], (1..=400).collect::<Vec<_>>());
    let loss_at = |step: usize| losses[step].1.parse::<f32>().unwrap();
    assert!(loss_at(399) < 0.1 * loss_at(0), "{losses:?}");

    let mut rng = fastrand::Rng::new();
    let seed = rng.get_seed();
    for round in 0..3 {
        let path = folder.path().join(format!("killed-{round}.safetensors"));
        let mut kills = [(); 3].map(|()| rng.u64(1..STEPS - 20));
        kills.sort_unstable();
        for kill_at in kills {
            let shown = run(&path, Some(kill_at));
            assert!(
                shown.iter().all(|loss| losses.contains(loss)),
                "seed {seed}"
            );
        }
        run(&path, None);
        let [killed, whole] = [&path, &expected].map(|path| std::fs::read(path).unwrap());
        assert!(killed == whole, "seed {seed}, killed at {kills:?}");
    }
}
