//! Seeds and past finds, as an ordinary test.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs;
use std::path::Path;

use wgpu_optim_fuzz::TARGETS;

/// One test for all of them, because each of them captures the process's streams.
#[test]
fn corpus() {
    for (name, target) in TARGETS {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("corpus")
            .join(name);
        let mut inputs: Vec<_> = fs::read_dir(&corpus)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        inputs.sort();
        assert!(!inputs.is_empty(), "no corpus in {}", corpus.display());
        for input in inputs {
            // Shown where the target panics.
            eprintln!("{}", input.display());
            target(&fs::read(input).unwrap());
        }
    }
}
