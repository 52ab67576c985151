//! Steps that are recorded, dropped and submitted in any order, held against an oracle in which a dropped one never was;
//! and parameters that somebody else writes between steps.

mod edits;
mod orders;
mod rules;
mod setup;

use std::collections::VecDeque;

use wgpu_optim::control::{ControlRecord, ControlState};
use wgpu_optim::oracle::{ControlOracle, Decision, Oracle, Roundoff, Textbook};
use wgpu_optim::rules::Start;
use wgpu_optim::storage::{self, MASTER_PARAMS, PARAMS_REST, Storage, rest};
use wgpu_optim::wgsl::ScalarPath;
use wgpu_optim::{
    AnyRule, GpuControl, GpuOptimizer, LossScale, Masters, OPTIONAL_FEATURES, Optimizer,
    OptimizerState, ParamGroups, Precision, Rule, SgdConfig, StepControl, StepError, StorageType,
    TensorBinding, wgpu,
};

use super::{Bench, gpu_test, whole};
use crate::cases::values;
use crate::stored::{Stored, decode, encode, rounded};
use rules::{Counted, Stairs};
use setup::*;

/// A device of its own for each path of the scalars: others who poll a device may be told first of what is done.
async fn benches() -> Vec<Bench> {
    let best = Bench::with(OPTIONAL_FEATURES).await;
    let uniforms = Bench::with(wgpu::Features::empty()).await;
    vec![best, uniforms]
}

/// A step that has been recorded.
#[derive(Debug)]
struct Recorded<R> {
    rule: R,
    /// How many steps each tensor had had by what had been recorded; under a control the device knows.
    counts: Vec<u64>,
    takes_part: Vec<bool>,
    gradient: usize,
    /// Its number in the control's records.
    number: Option<u64>,
}

enum Commands {
    Open(wgpu::CommandEncoder),
    Finished(wgpu::CommandBuffer),
}

impl Commands {
    fn finish(self) -> wgpu::CommandBuffer {
        match self {
            Self::Open(encoder) => encoder.finish(),
            Self::Finished(buffer) => buffer,
        }
    }
}

/// An encoder that has been neither submitted nor dropped.
struct Flight<R> {
    commands: Commands,
    /// Where the parameters are before and after it.
    from: usize,
    to: usize,
    steps: Vec<Recorded<R>>,
    /// Whether it has a `rebind`.
    rebinds: bool,
}

impl<R> Flight<R> {
    fn encoder(&mut self) -> &mut wgpu::CommandEncoder {
        match &mut self.commands {
            Commands::Open(encoder) => encoder,
            Commands::Finished(_) => panic!("nothing more can be recorded into it"),
        }
    }
}

/// What has come of all that has been submitted.
#[derive(Clone)]
struct Model<R: Textbook> {
    oracles: Vec<Oracle<Counted<R>>>,
    /// Steps of each oracle; the counts may have been set.
    made: Vec<u64>,
    applied: Vec<u64>,
    steps: u64,
}

/// What a program writes down to go on from.
#[derive(Clone)]
struct Saved<R: Textbook> {
    state: OptimizerState<R>,
    params: Vec<Vec<f32>>,
    model: Model<R>,
    control: Option<(ControlState, ControlOracle)>,
}

struct Run<'b, R: Textbook> {
    bench: &'b Bench,
    setup: Setup<R>,
    rng: fastrand::Rng,
    /// What has been done, for whoever has to find out why it was wrong.
    log: Vec<String>,
    host: Host,
    names: Vec<String>,
    places: Vec<Place>,
    optimizer: GpuOptimizer<R>,
    control: Option<(GpuControl, ControlOracle)>,
    /// Where the optimizer believes the tensors to be, and where they are by what has been submitted.
    bound: usize,
    data_at: usize,
    frozen: Vec<bool>,
    absent: Vec<bool>,
    flights: VecDeque<Flight<R>>,
    model: Model<R>,
    saved: Option<Saved<R>>,
    /// Records that are yet to come, each with how many steps are skipped by then, and the last number given out to a step that
    /// has been submitted.
    expected: Vec<(u64, u64, Decision)>,
    records: Vec<ControlRecord>,
    number: u64,
    skipped: u64,
    /// Steps in which workgroups have looked up their elements.
    in_chunks: usize,
}

impl<'b, R: Textbook> Run<'b, R> {
    fn new(bench: &'b Bench, setup: &Setup<R>, seed: u64) -> Self {
        let host = Host::new(&setup.stored, setup.numels(), seed);
        let places = (0..PLACES).map(|place| Place::new(bench, setup, place, &host));
        let places: Vec<_> = places.collect();
        let names: Vec<_> = (0..host.numels.len()).map(|i| format!("t{i}")).collect();
        let storage = setup.storage();
        let oracle = |params: &Vec<f32>| Oracle::new(params, Roundoff::WGSL).stored(storage);
        let model = Model {
            oracles: host.params.iter().map(oracle).collect(),
            made: vec![0; names.len()],
            applied: vec![0; names.len()],
            steps: 0,
        };
        let none = vec![false; names.len()];
        let bindings = bindings(setup, &host, &names, &places[0], &none);
        let optimizer = GpuOptimizer::with_groups(&bench.kernels, &groups(setup), &bindings);
        let control = setup.control.as_ref().map(|control| {
            let on_device = GpuControl::new(&bench.kernels, control.clone()).unwrap();
            (on_device, ControlOracle::new(control, Roundoff::WGSL))
        });
        Self {
            bench,
            setup: setup.clone(),
            rng: fastrand::Rng::with_seed(seed),
            log: Vec::new(),
            optimizer: optimizer.unwrap(),
            control,
            bound: 0,
            data_at: 0,
            frozen: none.clone(),
            absent: none,
            flights: VecDeque::new(),
            model,
            saved: None,
            expected: Vec::new(),
            records: Vec::new(),
            number: 0,
            skipped: 0,
            in_chunks: 0,
            host,
            names,
            places,
        }
    }

    fn bindings(&self, place: usize, absent: &[bool]) -> Vec<TensorBinding<'_>> {
        let place = &self.places[place];
        bindings(&self.setup, &self.host, &self.names, place, absent)
    }

    async fn act(&mut self) {
        match self.rng.u32(0..32) {
            0..=9 => self.record(),
            10 | 11 => self.drop_one(),
            12 => {
                let newest = self.flights.len().checked_sub(1);
                newest.into_iter().for_each(|newest| self.drop_at(newest));
            }
            13..=17 => {
                let count = self.rng.usize(0..=self.flights.len());
                self.submit(count.max(1));
            }
            18 | 19 => self.freeze(),
            20 => {
                let lr = 0.01 * f64::from(self.rng.u32(1..6));
                self.log.push(format!("set_lr({lr})"));
                self.optimizer.set_lr(lr).unwrap();
            }
            21 => {
                self.log.push("poll".to_owned());
                let _ = self.bench.device.poll(wgpu::PollType::Poll);
            }
            22 => self.wait(),
            23 => {
                if let Some((control, _)) = &mut self.control {
                    self.log.push("read".to_owned());
                    self.records.extend(control.read());
                }
            }
            24 => self.check().await,
            25 => self.save().await,
            26 | 27 => self.load(),
            28 => self.set_count(),
            29 | 30 => self.freeze_many(),
            _ => self.step_without_control(),
        }
    }

    fn wait(&mut self) {
        self.log.push("wait".to_owned());
        let waited = self.bench.device.poll(wgpu::PollType::wait_indefinitely());
        waited.unwrap();
    }

    /// Where the parameters are when all that is recorded has been done.
    fn end(&self) -> usize {
        self.flights.back().map_or(self.data_at, |last| last.to)
    }

    /// Some steps into the last encoder or a new one, perhaps behind a `rebind`.
    fn record(&mut self) {
        let is_open = |last: &Flight<R>| matches!(last.commands, Commands::Open(_));
        let goes_on = self.flights.back().is_some_and(is_open) && self.rng.bool();
        let last = self.flights.pop_back_if(|_| goes_on);
        let mut flight = match last {
            Some(last) => last,
            None => self.open(),
        };
        self.bring(&mut flight, self.bound);
        if self.rng.u32(0..6) == 0 {
            self.rebind(&mut flight);
        }
        for _ in 0..self.rng.u32(1..3) {
            self.record_step(&mut flight, self.control.is_some());
        }
        if self.rng.bool() {
            flight = Flight {
                commands: Commands::Finished(flight.commands.finish()),
                ..flight
            };
        }
        self.flights.push_back(flight);
    }

    fn open(&mut self) -> Flight<R> {
        self.log.push("encoder".to_owned());
        Flight {
            commands: Commands::Open(self.bench.encoder()),
            from: self.end(),
            to: self.end(),
            steps: Vec::new(),
            rebinds: false,
        }
    }

    /// What whoever moves tensors does: copies their parameters.
    fn bring(&mut self, flight: &mut Flight<R>, to: usize) {
        if flight.to == to {
            return;
        }
        self.log.push(format!("params {} -> {to}", flight.to));
        let [source, target] = [flight.to, to].map(|place| &self.places[place]);
        let size = self.setup.stored.params.bytes();
        for (tensor, numel) in self.host.numels.iter().enumerate() {
            let [from, to] = [source, target].map(|place| size * place.starts[tensor] as u64);
            let bytes = (size * *numel as u64).next_multiple_of(4);
            let encoder = flight.encoder();
            encoder.copy_buffer_to_buffer(&source.params, from, &target.params, to, bytes);
        }
        flight.to = to;
    }

    fn rebind(&mut self, flight: &mut Flight<R>) {
        let place = self.rng.usize(0..PLACES);
        self.absent = vec![false; self.names.len()];
        if self.rng.bool() {
            let tensor = self.rng.usize(0..self.names.len());
            self.absent[tensor] = true;
        }
        self.bring(flight, place);
        self.log.push(format!("rebind({place}, {:?})", self.absent));
        let bindings = bindings(
            &self.setup,
            &self.host,
            &self.names,
            &self.places[place],
            &self.absent,
        );
        self.optimizer.rebind(flight.encoder(), &bindings).unwrap();
        self.bound = place;
        flight.rebinds = true;
    }

    fn recorded_steps<'r>(
        &'r self,
        flight: &'r Flight<R>,
    ) -> impl Iterator<Item = &'r Recorded<R>> {
        let before = self.flights.iter().flat_map(|flight| &flight.steps);
        before.chain(&flight.steps)
    }

    fn record_step(&mut self, flight: &mut Flight<R>, is_controlled: bool) {
        let sets = if is_controlled { GRADIENTS } else { POISONED };
        let gradient = self.rng.usize(0..sets);
        let place = &self.places[self.bound];
        let source = &place.gradients[gradient];
        let size = place.grads.size();
        let encoder = flight.encoder();
        encoder.copy_buffer_to_buffer(source, 0, &place.grads, 0, size);
        let takes_part = self.frozen.iter().zip(&self.absent);
        let takes_part: Vec<_> = takes_part.map(|(a, b)| !a && !b).collect();
        let count = |tensor: usize| {
            let recorded = self.recorded_steps(flight);
            let recorded = recorded.filter(|step| step.takes_part[tensor]);
            self.model.applied[tensor] + recorded.count() as u64
        };
        let counts = (0..self.names.len()).map(count).collect();
        let last = self.recorded_steps(flight).filter_map(|step| step.number);
        let number = is_controlled.then_some(last.max().unwrap_or(0).max(self.number) + 1);
        self.log
            .push(format!("step {number:?} gradient {gradient} {counts:?}"));
        let encoder = flight.encoder();
        match &mut self.control {
            Some((control, _)) if is_controlled => {
                self.optimizer.step_with(encoder, control).unwrap();
            }
            _ => {
                self.optimizer.step(encoder).unwrap();
                let apart = self.dispatches_apart(&takes_part);
                self.in_chunks += usize::from(self.optimizer.dispatches() < apart);
            }
        }
        flight.steps.push(Recorded {
            rule: self.optimizer.config().clone(),
            counts,
            takes_part,
            gradient,
            number,
        });
    }

    /// The fewest dispatches of a step in which none looks up its elements, where there are many runs of neighbours.
    fn dispatches_apart(&self, takes_part: &[bool]) -> usize {
        if self.bound != 0 || self.absent.contains(&true) {
            return 0;
        }
        let (in_a_row, others) = takes_part.split_at(IN_A_ROW);
        let starts = |tensor: &usize| in_a_row[*tensor] && (*tensor == 0 || !in_a_row[tensor - 1]);
        let runs = (0..IN_A_ROW).filter(starts).count();
        let (small, large) = others.split_at(others.len() - 1);
        match runs {
            0..5 => 0,
            _ => runs + usize::from(small.contains(&true)) + usize::from(large[0]),
        }
    }

    fn drop_one(&mut self) {
        if !self.flights.is_empty() {
            let index = self.rng.usize(0..self.flights.len());
            self.drop_at(index);
        }
    }

    /// Drops an encoder, and where it has moved parameters all behind it, which would find nothing.
    fn drop_at(&mut self, index: usize) {
        let flight = self.flights.remove(index).unwrap();
        self.log.push(format!("drop {index}"));
        if flight.from != flight.to {
            while self.flights.len() > index {
                self.drop_at(self.flights.len() - 1);
            }
        }
    }

    fn drop_all(&mut self) {
        while !self.flights.is_empty() {
            self.drop_one();
        }
    }

    fn submit(&mut self, count: usize) {
        let count = count.min(self.flights.len());
        let flights: Vec<_> = self.flights.drain(..count).collect();
        let together = self.rng.bool();
        self.log.push(format!("submit {count}"));
        let mut buffers = Vec::new();
        for flight in flights {
            let buffer = flight.commands.finish();
            match together {
                true => buffers.push(buffer),
                false => drop(self.bench.queue.submit([buffer])),
            }
            for step in flight.steps {
                self.apply(step);
            }
            self.data_at = flight.to;
        }
        self.bench.queue.submit(buffers);
    }

    /// What a step comes to that has been submitted.
    fn apply(&mut self, step: Recorded<R>) {
        self.model.steps += 1;
        let grads = &self.host.grads[step.gradient];
        let taking_part = || (0..self.names.len()).filter(|tensor| step.takes_part[*tensor]);
        let mut factors = None;
        if let (Some(number), Some((_, decisions))) = (step.number, &mut self.control) {
            let seen: Vec<_> = taking_part()
                .map(|tensor| ("default", &grads[tensor][..]))
                .collect();
            let decision = decisions.decide(&seen);
            let of_tensor = |place| decision.of_tensor(place, "default");
            factors = Some((0..seen.len()).map(of_tensor).collect::<Vec<_>>());
            let is_skipped = decision.is_skipped;
            self.skipped += u64::from(is_skipped);
            self.expected.push((number, self.skipped, decision));
            self.number = number;
            if is_skipped {
                return;
            }
        }
        for (place, tensor) in taking_part().enumerate() {
            let count = match &factors {
                Some(_) => self.model.applied[tensor],
                None => step.counts[tensor],
            };
            let rule = Counted {
                rule: step.rule.clone(),
                count: count + 1,
            };
            let oracle = &mut self.model.oracles[tensor];
            match &factors {
                Some(factors) => oracle.step_by(&rule, &grads[tensor], &factors[place]),
                None => oracle.step(&rule, &grads[tensor]),
            }
            self.model.applied[tensor] += 1;
            self.model.made[tensor] += 1;
        }
    }

    fn freeze(&mut self) {
        let tensor = self.rng.usize(0..self.names.len());
        self.set_frozen(tensor, !self.frozen[tensor]);
    }

    /// Leaves about every other tensor out, so that many runs of elements are left; or none.
    fn freeze_many(&mut self) {
        let (parity, is_over) = (self.rng.usize(0..2), self.rng.u32(0..3) == 0);
        for tensor in 0..self.names.len() {
            let is_other = self.rng.u32(0..8) == 0;
            self.set_frozen(tensor, !is_over && (tensor % 2 == parity) != is_other);
        }
    }

    fn set_frozen(&mut self, tensor: usize, frozen: bool) {
        self.frozen[tensor] = frozen;
        self.log.push(format!("set_frozen({tensor}, {frozen})"));
        self.optimizer
            .set_frozen(&self.names[tensor], frozen)
            .unwrap();
    }

    /// Resolves what is in flight, one way or the other.
    fn land(&mut self) {
        match self.rng.bool() {
            true => self.submit(usize::MAX),
            false => self.drop_all(),
        }
    }

    /// A step without a control where others had one needs to know what has come of those.
    fn step_without_control(&mut self) {
        if self.control.is_none() {
            return;
        }
        let mut probe = self.bench.encoder();
        if self.flights.iter().any(|flight| !flight.steps.is_empty()) {
            assert_eq!(self.optimizer.step(&mut probe), Err(StepError::Unread));
        }
        self.land();
        self.wait();
        if let Some((control, _)) = &mut self.control {
            self.records.extend(control.read());
        }
        let mut flight = self.open();
        self.bring(&mut flight, self.bound);
        self.record_step(&mut flight, false);
        self.flights.push_back(flight);
        self.land();
    }

    async fn params(&self) -> Vec<Vec<f32>> {
        let place = &self.places[self.data_at];
        let words = self.bench.download(&place.params).await;
        let mut bytes: Vec<u8> = bytemuck::cast_slice(&words).to_vec();
        let of = self.setup.stored.params;
        let size = of.bytes() as usize;
        let values = place.starts.iter().zip(&self.host.numels);
        let values = values.map(|(start, numel)| {
            let range = start * size..(start + numel) * size;
            let values = decode(of, &bytes[range.clone()]);
            bytes[range].fill(CANARY);
            values
        });
        let values = values.collect();
        assert!(bytes.iter().all(|byte| *byte == CANARY), "{}", self.here());
        values
    }

    async fn save(&mut self) {
        self.log.push("state".to_owned());
        let state = self.bench.wait(self.optimizer.state()).await.unwrap();
        let control = match &self.control {
            Some((control, oracle)) => {
                let state = self.bench.wait(control.state()).await.unwrap();
                Some((state, oracle.clone()))
            }
            None => None,
        };
        self.saved = Some(Saved {
            state,
            params: self.params().await,
            model: self.model.clone(),
            control,
        });
    }

    /// Goes on from what was saved, in this optimizer or a new one.
    fn load(&mut self) {
        let Some(saved) = self.saved.clone() else {
            return;
        };
        let is_fresh = self.rng.bool();
        match self.rng.u32(0..3) {
            0 => self.submit(usize::MAX),
            1 => self.drop_all(),
            _ => {}
        }
        if is_fresh {
            self.drop_all();
            self.absent = vec![false; self.names.len()];
            let bindings = self.bindings(self.bound, &self.absent);
            let groups = groups(&self.setup);
            let fresh = GpuOptimizer::with_groups(&self.bench.kernels, &groups, &bindings);
            let mut fresh = fresh.unwrap();
            fresh.set_lr(self.optimizer.config().lr()).unwrap();
            for (name, frozen) in self.names.iter().zip(&self.frozen) {
                fresh.set_frozen(name, *frozen).unwrap();
            }
            self.optimizer = fresh;
        }
        self.log.push(format!("load, fresh: {is_fresh}"));
        self.optimizer.load_state(&saved.state).unwrap();
        if let (Some((control, oracle)), Some((state, at_the_time))) =
            (&mut self.control, saved.control)
            && self.rng.bool()
        {
            self.records.extend(control.read());
            let unread = control.unread();
            self.log.push(format!("load control, unread: {unread}"));
            control.load_state(&state).unwrap();
            if unread == 0 {
                (self.number, self.skipped) = (state.steps, state.skipped);
            }
            *oracle = at_the_time;
        }
        let place = &self.places[self.data_at];
        let end = place.params.size() / self.setup.stored.params.bytes();
        let bytes = image(
            self.setup.stored.params,
            &place.starts,
            end as usize,
            &saved.params,
        );
        self.bench.queue.write_buffer(&place.params, 0, &bytes);
        self.model = saved.model;
        self.overtaken();
    }

    /// What is in flight when counts are set goes on with the scalars that it was recorded with: where these are not the
    /// same for ever it is dropped here.
    fn overtaken(&mut self) {
        let moves = self.flights.iter().any(|flight| flight.rebinds);
        if moves || !self.setup.is_constant() || self.rng.bool() {
            self.drop_all();
        } else {
            self.submit(usize::MAX);
            // What is told of it is taken in by a step.
            self.wait();
            let mut encoder = self.bench.encoder();
            let prepared = match &mut self.control {
                Some((control, _)) => {
                    self.records.extend(control.read());
                    control.prepare(&mut encoder, &mut [&mut self.optimizer])
                }
                None => self.optimizer.prepare(&mut encoder),
            };
            prepared.unwrap();
        }
    }

    fn set_count(&mut self) {
        if self.rng.bool() {
            self.land();
        }
        let tensor = self.rng.usize(0..self.names.len());
        let count = self.rng.u64(1..20);
        self.log
            .push(format!("set_applied_steps({tensor}, {count})"));
        let name = &self.names[tensor];
        self.optimizer.set_applied_steps(name, count).unwrap();
        self.model.applied[tensor] = count;
        self.overtaken();
    }

    fn here(&self) -> String {
        format!(
            "{:?}, {:?}:\n{}",
            self.setup,
            self.bench.kernels.scalar_path(),
            self.log.join("\n")
        )
    }

    /// Holds everything against the model.
    async fn check(&mut self) {
        self.log.push("check".to_owned());
        let state = self.bench.wait(self.optimizer.state()).await.unwrap();
        let params = self.params().await;
        let storage = self.setup.storage();
        assert_eq!(state.steps, self.model.steps, "{}", self.here());
        for (tensor, oracle) in self.model.oracles.iter().enumerate() {
            let entry = &state.tensors[tensor];
            let (applied, here) = (self.model.applied[tensor], || {
                format!("tensor {tensor}, {}", self.here())
            });
            assert_eq!(entry.applied_steps, applied, "{}", here());
            let checked = oracle.check_params(&params[tensor]);
            checked.unwrap_or_else(|e| panic!("{e}: {}", here()));
            if self.model.made[tensor] == 0 {
                continue;
            }
            let masters = usize::from(storage.masters != Masters::None);
            let kept = self.setup.rule.slots().kept().count();
            assert_eq!(entry.slots.len(), kept + masters, "{}", here());
            for slot in &entry.slots {
                let checked = match slot.name.as_str() {
                    MASTER_PARAMS => oracle.check_masters(&slot.values.to_f32()),
                    PARAMS_REST => {
                        oracle.check_masters(&joined(&params[tensor], &slot.values.to_f32()))
                    }
                    name => oracle.check_slot(name, &slot.values.to_f32()),
                };
                checked.unwrap_or_else(|e| panic!("{e}: {}", here()));
            }
        }
        self.check_counts();
        self.check_records().await;
    }

    fn check_counts(&mut self) {
        let is_controlled = self.control.is_some();
        if let Some((control, _)) = &mut self.control {
            self.records.extend(control.read());
        }
        let in_flight: Vec<_> = self.flights.iter().flat_map(|f| &f.steps).collect();
        let steps = self.model.steps + in_flight.len() as u64;
        assert_eq!(self.optimizer.steps(), steps, "{}", self.here());
        for (tensor, name) in self.names.iter().enumerate() {
            let recorded = in_flight.iter().filter(|step| step.takes_part[tensor]);
            // Those under a control may be skipped.
            let recorded = if is_controlled { 0 } else { recorded.count() };
            let applied = self.model.applied[tensor] + recorded as u64;
            let there = self.optimizer.applied_steps(name);
            assert_eq!(there, Some(applied), "tensor {tensor}, {}", self.here());
        }
    }

    async fn check_records(&mut self) {
        let Some((control, oracle)) = &self.control else {
            return;
        };
        let state = self.bench.wait(control.state()).await.unwrap();
        assert_eq!(f64::from(state.scale), oracle.scale(), "{}", self.here());
        let numbers = (state.steps, state.skipped);
        assert_eq!(numbers, (self.number, self.skipped), "{}", self.here());
        let in_flight: usize = self.flights.iter().map(|flight| flight.steps.len()).sum();
        assert_eq!(control.unread(), in_flight as u64, "{}", self.here());
        assert_eq!(
            self.records.len(),
            self.expected.len(),
            "{:?}: {}",
            self.records,
            self.here()
        );
        for (record, (number, skipped, decision)) in self.records.iter().zip(&self.expected) {
            let there = (record.step, record.is_skipped, record.skipped);
            let expected = (*number, decision.is_skipped, *skipped);
            assert_eq!(there, expected, "{}", self.here());
            assert_eq!(record.found_nonfinite, decision.found_nonfinite);
            let (norm, bound) = (f64::from(record.norm), &decision.norm);
            let fits = bound.low <= norm && norm <= bound.high;
            assert!(
                fits || decision.found_nonfinite,
                "{norm}, expected {bound:?}: {}",
                self.here()
            );
        }
        self.records.clear();
        self.expected.clear();
    }
}

/// The masters that parameters and rests make up.
fn joined(params: &[f32], rests: &[f32]) -> Vec<f32> {
    let pairs = params.iter().zip(rests);
    let joined = pairs.map(|(param, rest)| {
        let half = (param.to_bits() >> 16) as u16;
        f32::from_bits(rest::join(half, *rest as u16))
    });
    joined.collect()
}

const ACTIONS: usize = 30;

/// Returns how many of the steps without a control were in chunks.
async fn run<R: Textbook>(bench: &Bench, setup: &Setup<R>, seed: u64) -> usize {
    let mut run = Run::new(bench, setup, seed);
    run.log.push(format!("seed {seed}"));
    for _ in 0..ACTIONS {
        run.act().await;
    }
    run.land();
    run.check().await;
    run.in_chunks
}

async fn sequences<R: Textbook>(
    benches: &[Bench],
    rules: &[R],
    mut control: impl FnMut(usize) -> Option<StepControl>,
) -> usize {
    let mut in_chunks = 0;
    for (index, rule) in rules.iter().enumerate() {
        for (case, stored) in ways_to_store().into_iter().enumerate() {
            let setup = Setup {
                rule: rule.clone(),
                stored,
                control: control(index + case),
            };
            let bench = &benches[(index + case) % benches.len()];
            for seed in 0..3 {
                let seed = 100_000 * index as u64 + 1000 * case as u64 + seed;
                in_chunks += run(bench, &setup, seed).await;
            }
        }
    }
    in_chunks
}

#[gpu_test]
async fn any_sequence_is_as_if_dropped_steps_had_never_been_recorded() {
    let benches = benches().await;
    let in_chunks = sequences(&benches, &rules(), |_| None).await;
    assert!(in_chunks > 20, "{in_chunks}");
    sequences(&benches, &[Stairs { lr: 0.05 }], |_| None).await;
}

#[gpu_test]
async fn any_sequence_under_a_control_is_as_if_dropped_steps_had_never_been_recorded() {
    let benches = benches().await;
    let control = |case: usize| Some(controls()[case % 4].clone());
    sequences(&benches, &rules(), control).await;
    sequences(&benches, &[Stairs { lr: 0.05 }], control).await;
}
