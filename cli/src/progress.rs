//! A progress bar for work that takes over a second, where stderr is a terminal.

use std::sync::Once;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const PATIENCE: Duration = Duration::from_secs(1);

/// Says how far long work has come.
pub struct Progress {
    bar: ProgressBar,
    started: Instant,
    shown: Once,
}

impl Progress {
    /// Makes a progress bar of so many units.
    pub fn new(units: u64) -> Self {
        Self::with_template(units, "{msg:>10} [{bar:40}] {percent:>3}% {eta}")
    }

    /// Units are bytes, which are shown.
    pub fn of_bytes(bytes: u64) -> Self {
        Self::with_template(
            bytes,
            "{msg:>10} [{bar:40}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta}",
        )
    }

    fn with_template(units: u64, template: &str) -> Self {
        let bar = ProgressBar::with_draw_target(Some(units), ProgressDrawTarget::hidden());
        // The template is checked by indicatif's own default if it should ever not parse.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        Self {
            bar,
            started: Instant::now(),
            shown: Once::new(),
        }
    }

    /// Says what is going on and that `units` more are done.
    pub fn advance(&self, what: &'static str, units: u64) {
        if self.started.elapsed() > PATIENCE {
            // Hidden by indicatif where stderr is not a terminal.
            self.shown
                .call_once(|| self.bar.set_draw_target(ProgressDrawTarget::stderr()));
        }
        self.bar.set_message(what);
        self.bar.inc(units);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
