//! The fate of recorded commands: submitted and done, dropped with their encoder, or neither yet.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// The fate of recorded commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Their encoder may still be submitted, or the device is not done with them.
    Pending,
    /// The device is done with them.
    Done,
    /// Their encoder or command buffer was dropped, so they never happen.
    Dropped,
}

/// The fate of the commands of one encoder. Clones tell of the same encoder.
#[derive(Clone, Debug)]
pub struct Submission(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    fate: AtomicU8,
    /// Done before others whose number is larger.
    order: AtomicU64,
}

/// The number of submissions that are done, of any optimizer or control: an optimizer's steps may be in the submissions of
/// its control.
static CLOCK: AtomicU64 = AtomicU64::new(0);

const PENDING: u8 = 0;
const DONE: u8 = 1;
const DROPPED: u8 = 2;

impl Submission {
    fn new() -> Self {
        Self(Arc::new(Inner {
            fate: AtomicU8::new(PENDING),
            order: AtomicU64::new(0),
        }))
    }

    pub(crate) fn fate(&self) -> Fate {
        match self.0.fate.load(Ordering::Acquire) {
            PENDING => Fate::Pending,
            DONE => Fate::Done,
            _ => Fate::Dropped,
        }
    }

    /// Whether both tell of the same encoder or pass.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether this one is done, and was before the other.
    pub(crate) fn was_done_before(&self, other: &Self) -> bool {
        let order = |of: &Self| of.0.order.load(Ordering::Acquire);
        self.fate() == Fate::Done && (other.fate() != Fate::Done || order(self) < order(other))
    }

    pub(crate) fn set_done(&self) {
        let now = CLOCK.fetch_add(1, Ordering::AcqRel);
        self.0.order.store(now, Ordering::Release);
        self.settle(DONE);
    }

    pub(crate) fn set_dropped(&self) {
        self.settle(DROPPED);
    }

    fn settle(&self, fate: u8) {
        let (success, failure) = (Ordering::AcqRel, Ordering::Relaxed);
        let _ = self
            .0
            .fate
            .compare_exchange(PENDING, fate, success, failure);
    }
}

/// Lies in an encoder, which drops it with itself, or calls it when the device is done.
struct Guard(Submission);

impl Guard {
    fn done(self) {
        self.0.set_done();
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.set_dropped();
    }
}

/// Follows the encoders that one optimizer or control records into.
#[derive(Debug, Default)]
pub(crate) struct Submissions {
    /// The last encoder or pass: steps that follow each other in one share its guard.
    last: Option<(u64, Submission)>,
}

impl Submissions {
    /// The submission of what is recorded into this encoder.
    pub(crate) fn of_encoder(&mut self, encoder: &wgpu::CommandEncoder) -> Submission {
        self.follow(hash((0, encoder)), |guard| {
            encoder.on_submitted_work_done(move || guard.done());
        })
    }

    /// The submission of what is recorded into this pass.
    pub(crate) fn of_pass(&mut self, pass: &wgpu::ComputePass<'_>) -> Submission {
        self.follow(hash((1, pass)), |guard| {
            pass.on_submitted_work_done(move || guard.done());
        })
    }

    /// All that has been submitted to the queue by now, as one submission.
    pub(crate) fn so_far(&self, queue: &wgpu::Queue) -> Submission {
        let submission = Submission::new();
        let guard = Guard(submission.clone());
        queue.on_submitted_work_done(move || guard.done());
        submission
    }

    fn follow(&mut self, id: u64, attach: impl FnOnce(Guard)) -> Submission {
        if let Some((last, submission)) = &self.last
            && *last == id
            && submission.fate() == Fate::Pending
        {
            return submission.clone();
        }
        let submission = Submission::new();
        attach(Guard(submission.clone()));
        self.last = Some((id, submission.clone()));
        submission
    }
}

/// wgpu gives no encoder the identity of an earlier one.
fn hash(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

#[cfg(all(test, not(target_arch = "wasm32")))]
impl Submission {
    /// A submission that a test settles by hand.
    pub(crate) fn of_test() -> Self {
        Self::new()
    }
}
