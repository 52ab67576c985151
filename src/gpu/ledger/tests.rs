//! The ledger against a device that is simulated step by step.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::Ledger;
use crate::gpu::submission::{Fate, Submission};

const TENSORS: usize = 3;

/// The scalars that a step was recorded with, for each tensor that takes part.
#[derive(Clone)]
struct Recorded {
    number: u64,
    submission: Submission,
    is_counted: bool,
    taking_part: [bool; TENSORS],
    most: [u64; TENSORS],
    most_counted: [u32; TENSORS],
    unread: [u64; TENSORS],
    /// Steps without a control that were recorded before and were not known to be done.
    promised: Vec<Recorded>,
    /// How often counts had been set.
    sets: [usize; TENSORS],
}

/// Work that waits in the device's queue.
enum Work {
    Step {
        step: Recorded,
        skip: bool,
        fails: bool,
    },
    Set {
        tensors: [bool; TENSORS],
        applied: u64,
        steps: Option<u64>,
        origins: [u32; TENSORS],
        marker: Submission,
    },
    /// Somebody asks what has been counted.
    Ask,
}

struct Device {
    applied: [u64; TENSORS],
    counted: [u32; TENSORS],
    steps: u64,
    queue: VecDeque<Work>,
    /// Counts that it has told and nobody has read, with the steps that they are of, and whether they are a step's report.
    told: VecDeque<(Vec<u64>, bool, [u32; TENSORS])>,
    /// The numbers of the steps that are done.
    done: Vec<u64>,
}

struct World {
    ledger: Ledger,
    device: Device,
    /// Recorded, and neither submitted nor dropped.
    open: Vec<Recorded>,
    taking_part: [bool; TENSORS],
    sets: [usize; TENSORS],
}

impl World {
    fn new() -> Self {
        Self {
            ledger: Ledger::new(TENSORS),
            device: Device {
                applied: [0; TENSORS],
                counted: [0; TENSORS],
                steps: 0,
                queue: VecDeque::new(),
                told: VecDeque::new(),
                done: Vec::new(),
            },
            open: Vec::new(),
            taking_part: [true; TENSORS],
            sets: [0; TENSORS],
        }
    }

    fn settle(&mut self) {
        self.ledger.settle();
    }

    fn record(&mut self, is_counted: bool) {
        self.settle();
        if !is_counted && self.ledger.are_unread() {
            return;
        }
        let of = |value: &dyn Fn(usize) -> u64| [0, 1, 2].map(value);
        let mut step = Recorded {
            number: 0,
            submission: Submission::of_test(),
            is_counted,
            taking_part: self.taking_part,
            most: of(&|tensor| self.ledger.most(tensor)),
            most_counted: [0, 1, 2].map(|tensor| self.ledger.most_counted(tensor)),
            unread: of(&|tensor| self.ledger.unread(tensor)),
            promised: Vec::new(),
            sets: self.sets,
        };
        let waiting = self.device.queue.iter().filter_map(|work| match work {
            Work::Step { step, .. } => Some(step),
            _ => None,
        });
        let promised = waiting.chain(&self.open).filter(|step| !step.is_counted);
        step.promised = promised
            .map(|step| Recorded {
                promised: Vec::new(),
                ..step.clone()
            })
            .collect();
        if is_counted {
            step.number = self.ledger.record_counted(step.submission.clone());
        } else {
            self.ledger.record(step.submission.clone());
            step.number = self.ledger.recorded;
        }
        self.open.push(step);
    }

    /// Drops an encoder that is open.
    fn discard(&mut self, index: u8) {
        if !self.open.is_empty() {
            let step = self.open.remove(index as usize % self.open.len());
            step.submission.set_dropped();
        }
    }

    /// Submits the encoder that was recorded first.
    fn submit(&mut self, skip: bool, fails: bool) {
        if !self.open.is_empty() {
            let step = self.open.remove(0);
            let skip = skip && step.is_counted;
            // Nobody can tell where a step without a control fails.
            let fails = fails && step.is_counted;
            self.device
                .queue
                .push_back(Work::Step { step, skip, fails });
        }
    }

    /// The device does what comes next.
    fn run(&mut self) {
        match self.device.queue.pop_front() {
            Some(Work::Step { step, skip, fails }) => self.run_step(&step, skip, fails),
            Some(Work::Set {
                tensors,
                applied,
                steps,
                origins,
                marker,
            }) => {
                for tensor in (0..TENSORS).filter(|tensor| tensors[*tensor]) {
                    self.device.applied[tensor] = applied;
                    self.device.counted[tensor] = origins[tensor];
                }
                self.device.steps = steps.unwrap_or(self.device.steps);
                marker.set_done();
            }
            Some(Work::Ask) => {
                let told = (self.device.done.clone(), false, self.device.counted);
                self.device.told.push_back(told);
            }
            None => {}
        }
    }

    fn run_step(&mut self, step: &Recorded, skip: bool, fails: bool) {
        let device = &mut self.device;
        for tensor in (0..TENSORS).filter(|tensor| step.taking_part[*tensor] && !fails) {
            let dropped = step.promised.iter().filter(|other| {
                other.taking_part[tensor] && other.submission.fate() == Fate::Dropped
            });
            let dropped = dropped.count() as u64;
            let was_set = step.sets[tensor] != self.sets[tensor]
                || step
                    .promised
                    .iter()
                    .any(|other| other.sets[tensor] != step.sets[tensor]);
            if step.is_counted {
                let behind = step.most_counted[tensor].wrapping_sub(device.counted[tensor]) as i32;
                if !was_set {
                    assert!(behind >= 0, "the device is never ahead");
                    assert!(
                        behind as u64 <= step.unread[tensor],
                        "there are scalars for every case"
                    );
                    // What was promised and dropped since makes a step late, and no more.
                    let expected = device.applied[tensor] + dropped;
                    assert_eq!(
                        step.most[tensor] - behind as u64,
                        expected,
                        "tensor {tensor}"
                    );
                }
            } else if !was_set {
                assert_eq!(
                    step.most[tensor],
                    device.applied[tensor] + dropped,
                    "tensor {tensor}"
                );
            }
            if !skip {
                device.applied[tensor] += 1;
                device.counted[tensor] += u32::from(step.is_counted);
            }
        }
        device.steps += 1;
        if step.is_counted && !fails {
            device
                .told
                .push_back((vec![step.number], true, device.counted));
        }
        device.done.push(step.number);
        step.submission.set_done();
    }

    fn read(&mut self) {
        for (steps, is_report, counted) in self.device.told.drain(..) {
            match is_report {
                true => self.ledger.learn_report(steps[0], &counted),
                false => self.ledger.learn(&steps, &counted),
            }
        }
    }

    fn freeze(&mut self, tensor: usize) {
        self.taking_part[tensor] ^= true;
        self.ledger.set_taking_part(self.taking_part.into_iter());
    }

    fn set(&mut self, tensors: [bool; TENSORS], applied: u64, steps: Option<u64>) {
        self.read();
        let marker = Submission::of_test();
        let of_tensor = |set| if set { Some(applied) } else { None };
        self.ledger.set(&tensors.map(of_tensor), steps, &marker);
        let work = Work::Set {
            tensors,
            applied,
            steps,
            origins: [0, 1, 2].map(|tensor| self.ledger.origin(tensor)),
            marker,
        };
        self.device.queue.push_back(work);
        for tensor in (0..TENSORS).filter(|tensor| tensors[*tensor]) {
            self.sets[tensor] += 1;
        }
    }

    fn act(&mut self, (action, detail): (u8, u8)) {
        let bit = |bit: u8| detail >> bit & 1 == 1;
        match action % 16 {
            0..4 => self.record(bit(0)),
            4 => self.discard(detail),
            5..8 => self.submit(detail % 3 == 0, detail % 7 == 0),
            8..11 => self.run(),
            11 => self.read(),
            12 => self.freeze(detail as usize % TENSORS),
            13 => {
                let tensors = [bit(0), bit(1), bit(2)];
                self.set(tensors, u64::from(detail >> 3), None);
            }
            14 => self.set([true; TENSORS], 100, Some(detail.into())),
            _ => self.device.queue.push_back(Work::Ask),
        }
    }

    /// Lets everything come to its end, and compares.
    fn check_end(mut self) {
        while !self.device.queue.is_empty() {
            self.run();
        }
        // What a state says now leaves out what is open.
        let done = self.ledger.done(Some(&self.device.counted));
        assert_eq!(
            done.applied, self.device.applied,
            "a state while encoders are open"
        );
        assert_eq!(
            done.steps, self.device.steps,
            "steps of a state while encoders are open"
        );
        while !self.open.is_empty() {
            self.discard(0);
        }
        let told = (self.device.done.clone(), false, self.device.counted);
        self.device.told.push_back(told);
        self.read();
        self.settle();
        assert!(!self.ledger.are_unread(), "all is known");
        let known = [0, 1, 2].map(|tensor| self.ledger.known_by(tensor, None));
        assert_eq!(known, self.device.applied, "what is known in the end");
        assert_eq!([0, 1, 2].map(|tensor| self.ledger.most(tensor)), known);
        assert_eq!(self.ledger.steps(), self.device.steps);
        assert_eq!(self.ledger.histories(), None);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn counts_are_those_of_a_device_whatever_is_skipped_dropped_failed_set_or_read(
        actions in proptest::collection::vec(any::<(u8, u8)>(), 0..80),
    ) {
        let mut world = World::new();
        for action in actions {
            world.act(action);
        }
        world.check_end();
    }
}

#[test]
fn tensors_have_one_history_while_they_take_part_in_the_same_unread_steps() {
    let submission = || Submission::of_test();
    let mut ledger = Ledger::new(3);
    assert_eq!(ledger.histories(), None);
    let (first, second) = (submission(), submission());
    ledger.record_counted(first.clone());
    ledger.record_counted(second.clone());
    assert_eq!(ledger.histories(), None);
    ledger.set_taking_part([true, false, true].into_iter());
    ledger.record_counted(submission());
    let histories = ledger.histories().unwrap();
    assert_eq!(histories[0], histories[2]);
    assert_ne!(histories[0], histories[1]);
    // What two of the three were is known; only the last is left, and with it one set.
    first.set_done();
    second.set_dropped();
    ledger.learn_report(1, &[1, 1, 1]);
    assert!(ledger.settle());
    assert_eq!(ledger.histories(), None);
    assert_eq!([0, 1, 2].map(|tensor| ledger.most(tensor)), [2, 1, 2]);
    assert_eq!([0, 1, 2].map(|tensor| ledger.unread(tensor)), [1, 0, 1]);
}

#[test]
fn a_dropped_step_shows_at_once_and_costs_nothing_afterwards() {
    let mut ledger = Ledger::new(1);
    let [first, second] = [(); 2].map(|()| Submission::of_test());
    ledger.record(first.clone());
    ledger.record(second.clone());
    assert_eq!((ledger.steps(), ledger.known_by(0, None)), (2, 2));
    first.set_dropped();
    // Before anybody settles, too.
    assert_eq!((ledger.steps(), ledger.known_by(0, None)), (1, 1));
    assert!(ledger.settle());
    assert_eq!((ledger.steps(), ledger.most(0)), (1, 1));
    second.set_done();
    assert!(!ledger.settle());
    assert_eq!((ledger.steps(), ledger.most(0)), (1, 1));
}
