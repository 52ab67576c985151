//! The counts of the steps that each tensor has had, as far as the host can know.
//!
//! A recorded step is a promise: its encoder may be dropped, its submission may fail, and under a control the device may
//! skip it. What has become of it is told by its [`Submission`], and under a control by the device, which counts the
//! steps that it applies. Until then a step without a control counts as applied, and one under a control as one that may
//! have been. Pure: property tests drive it against a simulated device.

#[cfg(all(test, not(target_arch = "wasm32")))]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::submission::{Fate, Submission};
use crate::state::Counts;

/// The steps of an optimizer on the device.
#[derive(Clone, Debug)]
pub(crate) struct Ledger {
    tallies: Vec<Tally>,
    /// Recorded steps, without those that are known to have been dropped.
    steps: u64,
    /// The number of the last recorded step: no two have the same.
    recorded: u64,
    /// The last step that is known to have been done on the device.
    reported: u64,
    /// Steps whose outcome is not known, in the order in which they were recorded.
    unsettled: VecDeque<Step>,
    /// Whether each tensor takes part in the next step.
    taking_part: Arc<[bool]>,
}

/// The counts of one tensor.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    /// Steps that the device has not counted.
    base: u64,
    /// The numbers that the device has counted from, and that it has counted to as far as it has told.
    origin: u64,
    counted: u64,
    /// Steps that the device may have counted besides.
    unread: u64,
}

#[derive(Clone, Debug)]
struct Step {
    number: u64,
    submission: Submission,
    taking_part: Arc<[bool]>,
    /// Whether the device counts it: a step under a control.
    is_counted: bool,
    /// Whether what the device has counted of it is known.
    is_told: bool,
    /// The times that counts were set since.
    overtaken: Vec<Overtaken>,
}

/// Counts that were set after a step had been recorded: it is part of them if it was submitted before.
#[derive(Clone, Debug)]
struct Overtaken {
    /// All that had been submitted when they were set.
    by: Submission,
    tensors: Vec<bool>,
    /// Whether the number of steps was set, too.
    steps: bool,
}

impl Ledger {
    pub(crate) fn new(tensors: usize) -> Self {
        Self {
            tallies: vec![Tally::default(); tensors],
            steps: 0,
            recorded: 0,
            reported: 0,
            unsettled: VecDeque::new(),
            taking_part: vec![true; tensors].into(),
        }
    }

    /// Says which tensors take part in the steps that are recorded from now on.
    pub(crate) fn set_taking_part(&mut self, taking_part: impl Iterator<Item = bool>) {
        self.taking_part = taking_part.collect();
    }

    /// Counts a step without a control: as applied, until it turns out to have been dropped.
    pub(crate) fn record(&mut self, submission: Submission) {
        for (tally, takes_part) in self.tallies.iter_mut().zip(&*self.taking_part) {
            tally.base = tally.base.saturating_add((*takes_part).into());
        }
        self.push(submission, false);
    }

    /// Counts a step under a control, which the device may skip. Returns its number.
    pub(crate) fn record_counted(&mut self, submission: Submission) -> u64 {
        for (tally, takes_part) in self.tallies.iter_mut().zip(&*self.taking_part) {
            tally.unread += u64::from(*takes_part);
        }
        self.push(submission, true);
        self.recorded
    }

    fn push(&mut self, submission: Submission, is_counted: bool) {
        // A loaded state may say any number.
        self.steps = self.steps.saturating_add(1);
        self.recorded += 1;
        self.unsettled.push_back(Step {
            number: self.recorded,
            submission,
            taking_part: Arc::clone(&self.taking_part),
            is_counted,
            is_told: false,
            overtaken: Vec::new(),
        });
    }

    /// Takes over a report of the step of this number, which the device has done: what it had counted of each tensor by
    /// then, modulo 2^32.
    pub(crate) fn learn_report(&mut self, number: u64, counted: &[u32]) {
        self.reported = self.reported.max(number);
        for step in self
            .unsettled
            .iter_mut()
            .filter(|step| step.number <= number)
        {
            // An earlier one that is not done may be counted later.
            step.is_told |= step.number == number || step.submission.fate() != Fate::Pending;
        }
        self.count(counted);
    }

    /// Takes over what the device had counted of each tensor when it was asked, and these steps were done.
    pub(crate) fn learn(&mut self, done: &[u64], counted: &[u32]) {
        for step in &mut self.unsettled {
            step.is_told |= done.contains(&step.number);
        }
        self.count(counted);
    }

    fn count(&mut self, counted: &[u32]) {
        for (tally, counted) in self.tallies.iter_mut().zip(counted) {
            tally.counted += u64::from(tally.news(*counted));
        }
    }

    /// The steps whose outcome is not known and which are done.
    pub(crate) fn done_steps(&self) -> Vec<u64> {
        let steps = self.unsettled.iter();
        let done = steps.filter(|step| step.submission.fate() == Fate::Done);
        done.map(|step| step.number).collect()
    }

    /// Whether there are steps that may be done, dropped, or still to be submitted.
    pub(crate) fn are_pending(&self) -> bool {
        let mut steps = self.unsettled.iter();
        steps.any(|step| step.submission.fate() == Fate::Pending)
    }

    /// Takes over what has become of the steps that were recorded. Returns whether the counts are others than they would
    /// be if all had been as they were recorded.
    pub(crate) fn settle(&mut self) -> bool {
        let mut has_changed = false;
        let mut unsettled = std::mem::take(&mut self.unsettled);
        unsettled.retain(|step| match step.submission.fate() {
            Fate::Pending => true,
            Fate::Dropped => {
                self.undo(step);
                has_changed = true;
                false
            }
            Fate::Done if step.is_told || !step.is_counted => {
                has_changed |= self.settle_done(step);
                false
            }
            Fate::Done => true,
        });
        self.unsettled = unsettled;
        has_changed
    }

    /// A step that never happens.
    fn undo(&mut self, step: &Step) {
        for (index, tally) in self.tallies.iter_mut().enumerate() {
            if step.taking_part[index] {
                match step.is_counted {
                    true => tally.unread = tally.unread.saturating_sub(1),
                    false if step.was_set(index) => {}
                    false => tally.base = tally.base.saturating_sub(1),
                }
            }
        }
        if !step.were_steps_set() {
            self.steps = self.steps.saturating_sub(1);
        }
    }

    /// A step of which all is known that will ever be. Returns whether it came after counts that were set behind it.
    fn settle_done(&mut self, step: &Step) -> bool {
        for (tally, _) in self
            .tallies
            .iter_mut()
            .zip(&*step.taking_part)
            .filter(|(_, part)| step.is_counted && **part)
        {
            tally.unread = tally.unread.saturating_sub(1);
        }
        let mut is_later = false;
        let overtaken = step.overtaken.iter();
        for set in overtaken.filter(|set| !step.submission.was_done_before(&set.by)) {
            for (index, tally) in self.tallies.iter_mut().enumerate() {
                let counts = set.tensors[index] && step.taking_part[index] && !step.is_counted;
                tally.base = tally.base.saturating_add(counts.into());
            }
            self.steps = self.steps.saturating_add(set.steps.into());
            is_later = true;
        }
        is_later
    }

    /// Says how many steps some tensors have had, and how many there have been at all if that is given too. The device is to
    /// count theirs from another [`origin`](Self::origin), behind what has been submitted `so_far`: one that none of the
    /// steps so far has reached, so that their reports are told apart.
    pub(crate) fn set(&mut self, applied: &[Option<u64>], steps: Option<u64>, so_far: &Submission) {
        self.settle();
        for step in &mut self.unsettled {
            step.set(applied, steps.is_some(), so_far);
        }
        self.steps = steps.unwrap_or(self.steps);
        for (index, applied) in applied.iter().enumerate() {
            if let Some(applied) = *applied {
                let unread = self.unsettled.iter();
                let unread = unread.filter(|step| step.is_counted && step.taking_part[index]);
                let before = &self.tallies[index];
                let origin = before.counted + before.unread + 1;
                self.tallies[index] = Tally {
                    base: applied,
                    origin,
                    counted: origin,
                    unread: unread.count() as u64,
                };
            }
        }
    }

    /// The number that the device counts a tensor's steps from, modulo 2^32.
    pub(crate) fn origin(&self, tensor: usize) -> u32 {
        self.tallies[tensor].origin as u32
    }

    /// The numbers that the device counts from, by tensor.
    pub(crate) fn origins(&self) -> Vec<u32> {
        (0..self.tallies.len())
            .map(|tensor| self.origin(tensor))
            .collect()
    }

    /// The number of steps that have been recorded, those left out that are known to have been dropped.
    pub(crate) fn steps(&self) -> u64 {
        let dropped = self.unsettled.iter().filter(|step| step.is_dropped());
        let counted = dropped.filter(|step| !step.were_steps_set());
        self.steps.saturating_sub(counted.count() as u64)
    }

    /// The number of steps that a tensor has had: those under a control as far as the device has told, by its last report perhaps,
    /// all others as far as they are not known to have been dropped.
    pub(crate) fn known_by(&self, tensor: usize, report: Option<u32>) -> u64 {
        let tally = &self.tallies[tensor];
        let news = report.map_or(0, |counted| tally.news(counted));
        self.known(tensor).saturating_add(news.into())
    }

    fn known(&self, tensor: usize) -> u64 {
        let tally = &self.tallies[tensor];
        let dropped = self.unsettled.iter().filter(|step| {
            let counts = step.taking_part[tensor] && !step.was_set(tensor);
            counts && !step.is_counted && step.is_dropped()
        });
        let known = tally.known();
        known.saturating_sub(dropped.count() as u64)
    }

    /// The most steps that a tensor may have had.
    pub(crate) fn most(&self, tensor: usize) -> u64 {
        let tally = &self.tallies[tensor];
        tally.known().saturating_add(tally.unread)
    }

    /// The number of a tensor's steps that are not certain.
    pub(crate) fn unread(&self, tensor: usize) -> u64 {
        self.tallies[tensor].unread
    }

    /// The device's count of a tensor if that has had [`most`](Self::most) steps, modulo 2^32.
    pub(crate) fn most_counted(&self, tensor: usize) -> u32 {
        let tally = &self.tallies[tensor];
        (tally.counted + tally.unread) as u32
    }

    /// Whether there are steps under a control whose outcome is not known.
    pub(crate) fn are_unread(&self) -> bool {
        self.unsettled.iter().any(|step| step.is_counted)
    }

    /// The last step that the device is known to have done.
    pub(crate) fn reported(&self) -> u64 {
        self.reported
    }

    /// Numbers for tensors that are alike where they took part in the same of the steps whose outcome is not known. One
    /// number is not given out, since it is everybody's, where they differ in nothing.
    pub(crate) fn histories(&self) -> Option<Vec<u32>> {
        let mut steps: Vec<&Step> = Vec::new();
        for step in self.unsettled.iter().filter(|step| step.is_counted) {
            // A step that counts were set behind may be part of them, and then has nothing to do with what they come to.
            let is_alike = |other: &&Step| {
                let are_set = !step.overtaken.is_empty() || !other.overtaken.is_empty();
                !are_set && Arc::ptr_eq(&step.taking_part, &other.taking_part)
            };
            if !steps.last().is_some_and(is_alike) {
                steps.push(step);
            }
        }
        if steps.len() < 2 && steps.iter().all(|step| step.overtaken.is_empty()) {
            return None;
        }
        let mut numbers = HashMap::new();
        let of_tensor = |tensor: usize| {
            let of_step = |step: &&Step| [step.taking_part[tensor], step.was_set(tensor)];
            let history: Vec<_> = steps.iter().map(of_step).collect();
            let next = numbers.len() as u32;
            *numbers.entry(history).or_insert(next)
        };
        Some((0..self.tallies.len()).map(of_tensor).collect())
    }

    /// The counts by all that is done: of steps under a control by what the device has `counted`, where it has been asked
    /// just now.
    pub(crate) fn done(&self, counted: Option<&[u32]>) -> Counts {
        let mut ledger = self.clone();
        if let Some(counted) = counted {
            ledger.learn(&self.done_steps(), counted);
        }
        ledger.settle();
        for step in std::mem::take(&mut ledger.unsettled) {
            ledger.undo(&step);
        }
        Counts {
            steps: ledger.steps,
            applied: (0..ledger.tallies.len())
                .map(|tensor| ledger.known(tensor))
                .collect(),
        }
    }
}

impl Tally {
    fn known(&self) -> u64 {
        self.base.saturating_add(self.counted - self.origin)
    }

    /// The number of steps that the device has counted beyond what it had told; none where an older report says fewer.
    fn news(&self, counted: u32) -> u32 {
        let news = counted.wrapping_sub(self.counted as u32);
        if news < 1 << 31 { news } else { 0 }
    }
}

impl Step {
    fn is_dropped(&self) -> bool {
        self.submission.fate() == Fate::Dropped
    }

    /// Whether the count of a tensor was set after the step had been recorded.
    fn was_set(&self, tensor: usize) -> bool {
        self.overtaken.iter().any(|set| set.tensors[tensor])
    }

    /// Whether the number of steps was.
    fn were_steps_set(&self) -> bool {
        self.overtaken.iter().any(|set| set.steps)
    }

    /// Counts of some tensors are set, and the number of steps perhaps, behind what has been submitted `so_far`.
    fn set(&mut self, applied: &[Option<u64>], steps: bool, so_far: &Submission) {
        for set in &mut self.overtaken {
            let tensors = set.tensors.iter_mut().zip(applied);
            tensors.for_each(|(was_set, now)| *was_set &= now.is_none());
            set.steps &= !steps;
        }
        self.overtaken.push(Overtaken {
            by: so_far.clone(),
            tensors: applied.iter().map(Option::is_some).collect(),
            steps,
        });
        if self.is_counted && self.submission.fate() != Fate::Pending {
            // What it has come to is overwritten.
            let parts = self.taking_part.iter().zip(applied);
            self.taking_part = parts.map(|(part, set)| *part && set.is_none()).collect();
        }
    }
}
