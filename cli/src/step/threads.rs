//! Windows shared out among threads.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::ScopedJoinHandle;

use anyhow::anyhow;

use crate::Failure;
use crate::interrupt::Interrupt;

/// Does some work for every window from the first to the last, each worker on a thread of its own. What comes of it is in
/// the order of the windows; a failure is that of the first window that has one, whichever thread was faster.
pub fn in_turn<W: Send, T: Send>(
    workers: Vec<W>,
    windows: usize,
    interrupt: &Interrupt,
    work: impl Fn(&mut W, usize) -> Result<T, Failure> + Sync,
) -> Result<Vec<T>, Failure> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let run = |mut worker: W| {
        let mut done = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let window = next.fetch_add(1, Ordering::Relaxed);
            if window >= windows {
                break;
            }
            match interrupt.check().and_then(|()| work(&mut worker, window)) {
                Ok(outcome) => done.push((window, outcome)),
                Err(failure) => {
                    stop.store(true, Ordering::Relaxed);
                    return Err((window, failure));
                }
            }
        }
        Ok(done)
    };
    let run = &run;
    let joined: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = workers
            .into_iter()
            .map(|worker| scope.spawn(move || run(worker)))
            .collect();
        let join = |thread: ScopedJoinHandle<'_, _>| {
            let panicked = |_| Err((0, Failure::Failed(anyhow!("a thread of the step panicked"))));
            thread.join().unwrap_or_else(panicked)
        };
        threads.into_iter().map(join).collect()
    });
    let (mut outcomes, mut failures) = (Vec::with_capacity(windows), Vec::new());
    for done in joined {
        match done {
            Ok(done) => outcomes.extend(done),
            Err(failure) => failures.push(failure),
        }
    }
    if let Some((_, failure)) = failures.into_iter().min_by_key(|(window, _)| *window) {
        return Err(failure);
    }
    outcomes.sort_by_key(|(window, _)| *window);
    Ok(outcomes.into_iter().map(|(_, outcome)| outcome).collect())
}
