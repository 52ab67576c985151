//! Signals that ask the command to end: what was begun is cleaned up, what was there stays.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::Context as _;
#[cfg(unix)]
use signal_hook::consts::SIGHUP;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::Failure;

/// The signals that are caught.
const SIGNALS: &[i32] = &[
    SIGINT,
    SIGTERM,
    #[cfg(unix)]
    SIGHUP,
];

/// Says when to stop.
#[derive(Clone)]
pub struct Interrupt {
    /// The signal that has come; none is 0.
    signal: Arc<AtomicUsize>,
}

impl Interrupt {
    /// From now on the first signal is left to [`check`](Self::check); a second one ends the program at once.
    pub fn catch() -> Result<Self, Failure> {
        // Once, however often commands are run in one process.
        static CAUGHT: OnceLock<Interrupt> = OnceLock::new();
        if let Some(caught) = CAUGHT.get() {
            return Ok(caught.clone());
        }
        let signal = Arc::new(AtomicUsize::new(0));
        let asked = Arc::new(AtomicBool::new(false));
        let register = || -> io::Result<()> {
            for number in SIGNALS {
                // In this order: the first time `asked` is not yet set.
                flag::register_conditional_shutdown(*number, 128 + number, Arc::clone(&asked))?;
                flag::register(*number, Arc::clone(&asked))?;
                flag::register_usize(*number, Arc::clone(&signal), *number as usize)?;
            }
            Ok(())
        };
        register()
            .context("cannot wait for signals")
            .map_err(Failure::Failed)?;
        Ok(CAUGHT.get_or_init(|| Self { signal }).clone())
    }

    /// Whether to go on.
    ///
    /// # Errors
    /// [`Failure::Interrupted`] if a signal has come.
    pub fn check(&self) -> Result<(), Failure> {
        match self.signal.load(Ordering::Relaxed) {
            0 => Ok(()),
            signal => Err(Failure::Interrupted(signal as u8)),
        }
    }
}
