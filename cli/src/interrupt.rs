//! Ctrl-C between two rounds of work: what was begun is cleaned up, what was there stays.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;

use crate::Failure;

static ASKED: AtomicBool = AtomicBool::new(false);

/// Says when to stop.
pub struct Interrupt;

impl Interrupt {
    /// From now on the first Ctrl-C is left to [`check`](Self::check); a second one ends the program at once.
    pub fn catch() -> Result<Self, Failure> {
        ctrlc::set_handler(|| {
            if ASKED.swap(true, Ordering::Relaxed) {
                std::process::exit(Failure::INTERRUPTED.into());
            }
        })
        .context("cannot wait for Ctrl-C")
        .map_err(Failure::Failed)?;
        Ok(Self)
    }

    pub fn check(&self) -> Result<(), Failure> {
        match ASKED.load(Ordering::Relaxed) {
            true => Err(Failure::Interrupted),
            false => Ok(()),
        }
    }
}
