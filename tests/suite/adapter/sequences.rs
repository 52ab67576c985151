//! Steps that are recorded, dropped and submitted in any order, held against an oracle in which a dropped one never was;
//! and parameters that somebody else writes between steps.

use std::borrow::Cow;
use std::collections::VecDeque;

use wgpu_optim::oracle::{
    Arithmetic, Bounded, ControlOracle, Decision, Oracle, Rounding, Textbook,
};
use wgpu_optim::storage::{self, MASTER_PARAMS, PARAMS_REST, Storage, rest};
use wgpu_optim::{
    AnyRule, ConfigError, ControlRecord, ControlState, GpuControl, GpuOptimizer, LossScale,
    Masters, OPTIONAL_FEATURES, OptimizerState, ParamGroups, Precision, Rule, ScalarPath, Scalars,
    SgdConfig, Slot, Slots, Start, StepControl, StepError, StorageType, TensorBinding, wgpu,
};

use super::{Bench, gpu_test, whole};
use crate::cases::values;
use crate::stored::{Stored, decode, encode, rounded};

const CANARY: u8 = 0xa5;

/// A device of its own for each road of the scalars: others who poll a device may be told first of what is done.
async fn benches() -> Vec<Bench> {
    let best = Bench::with(OPTIONAL_FEATURES).await;
    let uniforms = Bench::with(wgpu::Features::empty()).await;
    vec![best, uniforms]
}

/// A step of a rule with the scalars of a count that may not be the oracle's own: what is started is started at the first
/// step that is done, whichever it was when it was recorded.
#[derive(Clone, Debug, PartialEq)]
struct Counted<R> {
    rule: R,
    count: u64,
}

impl<R: Rule> Rule for Counted<R> {
    fn stem(&self) -> &'static str {
        self.rule.stem()
    }
    fn slots(&self) -> Slots {
        self.rule.slots()
    }
    fn terms(&self) -> Cow<'static, [(&'static str, bool)]> {
        self.rule.terms()
    }
    fn wgsl(&self) -> Cow<'static, str> {
        self.rule.wgsl()
    }
    fn scalar_names(&self) -> &'static [&'static str] {
        self.rule.scalar_names()
    }
    fn scalars(&self, phase: u64) -> Scalars {
        self.rule.scalars(phase)
    }
    fn lr(&self) -> f64 {
        self.rule.lr()
    }
    fn with_lr(&self, lr: f64) -> Result<Self, ConfigError> {
        let rule = self.rule.with_lr(lr)?;
        Ok(Self { rule, ..*self })
    }
}

impl<R: Textbook> Textbook for Counted<R> {
    fn follow(&self, step: u64, theta: &mut f64, slots: &mut [f64], grad: f64) {
        for (value, slot) in slots.iter_mut().zip(&*self.slots()) {
            match slot.start {
                Start::Params if step == 1 => *value = *theta,
                Start::FirstStep if step == 1 => *value = self.lr(),
                _ => {}
            }
        }
        self.rule.follow(self.count, theta, slots, grad);
    }

    fn bound(
        &self,
        step: u64,
        at: Arithmetic,
        theta: &mut Bounded,
        slots: &mut [Bounded],
        grad: Bounded,
    ) {
        for (value, slot) in slots.iter_mut().zip(&*self.slots()) {
            match slot.start {
                Start::Params if step == 1 => *value = *theta,
                Start::FirstStep if step == 1 => *value = at.scalar(self.lr()),
                _ => {}
            }
        }
        self.rule.bound(self.count, at, theta, slots, grad);
    }
}

/// Momentum whose learning rate goes down a stair at every third step: a phase that stays for some steps and moves on.
#[derive(Clone, Debug, PartialEq)]
struct Stairs {
    lr: f64,
}

impl Stairs {
    fn lr_of(&self, phase: u64) -> f64 {
        self.lr / (1 + phase) as f64
    }
}

impl Rule for Stairs {
    fn stem(&self) -> &'static str {
        "stairs"
    }
    fn slots(&self) -> Slots {
        [Slot::new("sum")].into()
    }
    fn terms(&self) -> Cow<'static, [(&'static str, bool)]> {
        Cow::Borrowed(&[])
    }
    fn wgsl(&self) -> Cow<'static, str> {
        "
fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
    (*state).sum = 0.5 * (*state).sum + g;
    return theta - k.lr * (*state).sum;
}"
        .into()
    }
    fn scalar_names(&self) -> &'static [&'static str] {
        &["lr"]
    }
    fn phase(&self, applied_steps: u64) -> u64 {
        applied_steps / 3 * 3
    }
    fn scalars(&self, phase: u64) -> Scalars {
        [self.lr_of(phase) as f32].into()
    }
    fn lr(&self) -> f64 {
        self.lr
    }
    fn with_lr(&self, lr: f64) -> Result<Self, ConfigError> {
        Ok(Self { lr })
    }
}

impl Textbook for Stairs {
    fn follow(&self, step: u64, theta: &mut f64, slots: &mut [f64], grad: f64) {
        slots[0] = 0.5 * slots[0] + grad;
        *theta -= self.lr_of((step - 1) / 3 * 3) * slots[0];
    }

    fn bound(
        &self,
        step: u64,
        at: Arithmetic,
        theta: &mut Bounded,
        slots: &mut [Bounded],
        grad: Bounded,
    ) {
        slots[0] = at.sum([at.product(at.scalar(0.5), slots[0]), grad]);
        let lr = at.scalar(self.lr_of((step - 1) / 3 * 3));
        *theta = at.difference(*theta, at.product(lr, slots[0]));
    }
}

/// What is run.
#[derive(Clone, Debug)]
struct Setup<R> {
    rule: R,
    stored: Stored,
    control: Option<StepControl>,
}

impl<R: Rule> Setup<R> {
    fn storage(&self) -> Storage {
        self.stored.storage(self.rule.slots().kept().count())
    }

    /// Whether every step has the same scalars, whatever has been counted.
    fn is_constant(&self) -> bool {
        let slots = self.rule.slots();
        let mut kept = slots.kept();
        let is_value = kept.all(|slot| matches!(slot.start, Start::Value(_)));
        is_value && (0..50).all(|count| self.rule.phase(count) == self.rule.phase(0))
    }

    /// Neighbours in memory, small ones apart, a larger one. State of sixteen bits moves by the word, so that neighbours end
    /// on words there.
    fn numels(&self) -> Vec<usize> {
        let in_a_row = match self.storage().is_f32() {
            true => [5, 1000, 64, 1, 333],
            false => [6, 1000, 64, 2, 334],
        };
        in_a_row.into_iter().chain([8, 12, 64, 4099]).collect()
    }
}

const IN_A_ROW: usize = 5;

/// Elements in the offset alignment of any device, of any type.
const ALIGNMENT: usize = 128;

/// Where tensors may lie: neighbours in a row, all apart, all apart on no alignment.
const PLACES: usize = 3;

/// Sets of gradients: ordinary, small, large, and one that is not finite.
const GRADIENTS: usize = 4;
const POISONED: usize = 3;

/// One buffer of parameters and one of gradients.
struct Place {
    /// In elements.
    starts: Vec<usize>,
    params: wgpu::Buffer,
    grads: wgpu::Buffer,
    /// What the gradients may be.
    gradients: Vec<wgpu::Buffer>,
}

impl Place {
    fn new(bench: &Bench, stored: &Stored, place: usize, host: &Host) -> Self {
        let mut starts = vec![0; host.numels.len()];
        let mut next = 0;
        let mut order: Vec<_> = (0..starts.len()).collect();
        if place == 1 {
            order.reverse();
        }
        for tensor in order {
            starts[tensor] = match place {
                0 if tensor < IN_A_ROW => next,
                // Whole words of sixteen bits.
                2 => next + if stored.storage(1).is_f32() { 5 } else { 6 },
                _ => next,
            };
            next = starts[tensor] + host.numels[tensor];
            if place != 0 || tensor + 1 >= IN_A_ROW {
                next = (next + 2).next_multiple_of(ALIGNMENT);
            }
        }
        let image = |of, values: &[Vec<f32>]| {
            let image = image(of, &starts, next, values);
            buffer_of_bytes(bench, &image)
        };
        let gradients = host.grads.iter().map(|grads| image(stored.grads, grads));
        Self {
            params: image(stored.params, &host.params),
            grads: image(stored.grads, &host.grads[0]),
            gradients: gradients.collect(),
            starts,
        }
    }
}

/// A buffer's bytes: values where tensors lie, canaries elsewhere.
fn image(of: StorageType, starts: &[usize], end: usize, values: &[Vec<f32>]) -> Vec<u8> {
    let size = of.bytes() as usize;
    let mut bytes = vec![CANARY; end * size];
    for (start, values) in starts.iter().zip(values) {
        bytes[start * size..(start + values.len()) * size].copy_from_slice(&encode(of, values));
    }
    bytes
}

fn buffer_of_bytes(bench: &Bench, bytes: &[u8]) -> wgpu::Buffer {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(4), CANARY);
    bench.buffer_of(&bytemuck::pod_collect_to_vec::<u8, f32>(&bytes))
}

/// What tensors start as, and the sets of their gradients.
struct Host {
    numels: Vec<usize>,
    params: Vec<Vec<f32>>,
    grads: Vec<Vec<Vec<f32>>>,
}

impl Host {
    fn new(stored: &Stored, numels: Vec<usize>, seed: u64) -> Self {
        let of = |of: StorageType, seed: u64, size: f32| -> Vec<Vec<f32>> {
            let tensors = (0..).zip(&numels);
            let values = tensors.map(|(i, numel)| values(seed + i, *numel));
            let scaled = values.map(|values| values.iter().map(|x| size * x).collect::<Vec<_>>());
            scaled.map(|values| rounded(of, &values)).collect()
        };
        let sizes = [1.0, 0.125, 3.0, 1.0];
        let mut grads: Vec<_> = (0..)
            .zip(sizes)
            .map(|(i, size)| of(stored.grads, seed + 100 * (i + 1), size))
            .collect();
        grads[POISONED][1][999] = f32::NAN;
        Self {
            params: of(stored.params, seed, 1.0),
            grads,
            numels,
        }
    }
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
    /// Records that are yet to come, and the last number given out to a step that has been submitted.
    expected: Vec<(u64, Decision)>,
    records: Vec<ControlRecord>,
    number: u64,
    skipped: u64,
}

impl<'b, R: Textbook> Run<'b, R> {
    fn new(bench: &'b Bench, setup: &Setup<R>, seed: u64) -> Self {
        let host = Host::new(&setup.stored, setup.numels(), seed);
        let places = (0..PLACES).map(|place| Place::new(bench, &setup.stored, place, &host));
        let places: Vec<_> = places.collect();
        let names: Vec<_> = (0..host.numels.len()).map(|i| format!("t{i}")).collect();
        let storage = setup.storage();
        let oracle = |params: &Vec<f32>| Oracle::new(params, Rounding::WGSL).stored(storage);
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
            (on_device, ControlOracle::new(control, Rounding::WGSL))
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
        match self.rng.u32(0..30) {
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
            _ => self.optimizer.step(encoder).unwrap(),
        }
        flight.steps.push(Recorded {
            rule: self.optimizer.config().clone(),
            counts,
            takes_part,
            gradient,
            number,
        });
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
            factors = Some(decision.of_group("default"));
            let is_skipped = decision.is_skipped;
            self.expected.push((number, decision));
            self.number = number;
            if is_skipped {
                return;
            }
        }
        for tensor in taking_part() {
            let count = match factors {
                Some(_) => self.model.applied[tensor],
                None => step.counts[tensor],
            };
            let rule = Counted {
                rule: step.rule.clone(),
                count: count + 1,
            };
            let oracle = &mut self.model.oracles[tensor];
            match &factors {
                Some(factors) => oracle.step_by(&rule, &grads[tensor], factors),
                None => oracle.step(&rule, &grads[tensor]),
            }
            self.model.applied[tensor] += 1;
            self.model.made[tensor] += 1;
        }
    }

    fn freeze(&mut self) {
        let tensor = self.rng.usize(0..self.names.len());
        self.frozen[tensor] ^= true;
        self.log
            .push(format!("set_frozen({tensor}, {})", self.frozen[tensor]));
        let frozen = self.frozen[tensor];
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
            self.log.push("load control".to_owned());
            control.load_state(&state).unwrap();
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
                    MASTER_PARAMS => oracle.check_masters(&slot.values),
                    PARAMS_REST => oracle.check_masters(&joined(&params[tensor], &slot.values)),
                    name => oracle.check_slot(name, &slot.values),
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
        let in_flight: usize = self.flights.iter().map(|flight| flight.steps.len()).sum();
        assert_eq!(control.unread(), in_flight as u64, "{}", self.here());
        assert_eq!(
            self.records.len(),
            self.expected.len(),
            "{:?}: {}",
            self.records,
            self.here()
        );
        for (record, (number, decision)) in self.records.iter().zip(&self.expected) {
            self.skipped += u64::from(decision.is_skipped);
            let there = (record.step, record.is_skipped, record.skipped);
            let expected = (*number, decision.is_skipped, self.skipped);
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

fn groups<R: Rule>(setup: &Setup<R>) -> ParamGroups<R> {
    ParamGroups::new(setup.rule.clone()).with_precision(setup.stored.precision)
}

fn bindings<'a, R: Rule>(
    setup: &Setup<R>,
    host: &Host,
    names: &'a [String],
    place: &'a Place,
    absent: &[bool],
) -> Vec<TensorBinding<'a>> {
    let stored = &setup.stored;
    let present = (0..names.len()).filter(|tensor| !absent[*tensor]);
    let binding = |tensor: usize| {
        let [params, grads] =
            [stored.params, stored.grads].map(|of| of.bytes() * place.starts[tensor] as u64);
        let numel = host.numels[tensor];
        TensorBinding::new(&names[tensor], &place.params, &place.grads, [numel])
            .stored_as(stored.params, stored.grads)
            .at(params, grads)
    };
    present.map(binding).collect()
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

fn stored(
    params: StorageType,
    grads: StorageType,
    state: StorageType,
    masters: Masters,
    rounding: storage::Rounding,
) -> Stored {
    let precision = Precision {
        state,
        masters,
        rounding,
    };
    Stored {
        params,
        grads,
        precision,
    }
}

/// Ways to store, of which each has something that starts with a first step or goes with each.
fn ways_to_store() -> [Stored; 8] {
    use StorageType::{Bf16, F16, F32};
    use storage::Rounding::{Nearest, Stochastic};
    let random = Stochastic { seed: 3 };
    [
        stored(F32, F32, F32, Masters::None, Nearest),
        stored(Bf16, Bf16, F32, Masters::F32, Nearest),
        stored(Bf16, F32, F32, Masters::Rest, Nearest),
        stored(Bf16, Bf16, Bf16, Masters::None, Nearest),
        stored(Bf16, Bf16, F32, Masters::None, random),
        stored(F16, F16, F32, Masters::F32, Nearest),
        stored(F16, F32, F32, Masters::None, Nearest),
        stored(F32, F32, Bf16, Masters::None, random),
    ]
}

fn momentum() -> AnyRule {
    let config = SgdConfig::builder(0.05).momentum(0.9).dampening(0.3);
    config.build().unwrap().into()
}

fn preset(rule: &str, library: Option<&str>) -> AnyRule {
    AnyRule::preset(rule, library, 0.05).unwrap()
}

/// Scalars of the first step, of every step, slots that start as the parameters, by the first step, at a value, and nothing of
/// the kind.
fn rules() -> [AnyRule; 6] {
    [
        momentum(),
        preset("adamw", None),
        preset("schedule-free-adamw", None),
        preset("rprop", None),
        preset("adagrad", Some("keras")),
        SgdConfig::builder(0.05)
            .momentum(0.5)
            .build()
            .unwrap()
            .into(),
    ]
}

fn controls() -> [StepControl; 3] {
    let scale = LossScale {
        initial: 4.0,
        growth_interval: 2,
        ..LossScale::default()
    };
    [
        StepControl::builder(),
        StepControl::builder().max_norm(40.0),
        StepControl::builder().max_norm(10.0).loss_scale(scale),
    ]
    .map(|control| control.build().unwrap())
}

const ACTIONS: usize = 30;

async fn run<R: Textbook>(bench: &Bench, setup: &Setup<R>, seed: u64) {
    let mut run = Run::new(bench, setup, seed);
    run.log.push(format!("seed {seed}"));
    for _ in 0..ACTIONS {
        run.act().await;
    }
    run.land();
    run.check().await;
}

async fn sequences<R: Textbook>(
    benches: &[Bench],
    rules: &[R],
    mut control: impl FnMut(usize) -> Option<StepControl>,
) {
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
                run(bench, &setup, seed).await;
            }
        }
    }
}

#[gpu_test]
async fn any_sequence_is_as_if_dropped_steps_had_never_been_recorded() {
    let benches = benches().await;
    sequences(&benches, &rules(), |_| None).await;
    sequences(&benches, &[Stairs { lr: 0.05 }], |_| None).await;
}

#[gpu_test]
async fn any_sequence_under_a_control_is_as_if_dropped_steps_had_never_been_recorded() {
    let benches = benches().await;
    let control = |case: usize| Some(controls()[case % 3].clone());
    sequences(&benches, &rules(), control).await;
    sequences(&benches, &[Stairs { lr: 0.05 }], control).await;
}

/// What somebody else makes of parameters: pruned by a mask, of zeros of either sign, cut, or written anew.
fn edited(rng: &mut fastrand::Rng, of: StorageType, params: &[f32]) -> Vec<f32> {
    let kind = rng.u32(0..4);
    let mut edit = |param: &f32| match kind {
        0 if rng.bool() => 0.0,
        1 if rng.bool() => -0.0,
        2 => param.clamp(-0.25, 0.1),
        3 => 4.0 * rng.f32() - 2.0,
        _ => *param,
    };
    let edited: Vec<_> = params.iter().map(&mut edit).collect();
    rounded(of, &edited)
}

impl<R: Textbook> Run<'_, R> {
    /// An oracle of a step after an edit: what the parameters are and what is remembered of them, and all slots as they were.
    fn oracle_after(
        &self,
        tensor: usize,
        state: &OptimizerState<R>,
        params: &[f32],
        is_said: bool,
    ) -> Oracle<Counted<R>> {
        let mut state = state.tensors[tensor].clone();
        let theta = match (state.slot(MASTER_PARAMS), state.slot(PARAMS_REST)) {
            (Some(masters), _) if !is_said => {
                let pairs = masters.iter().zip(params);
                let theta = pairs.map(|(master, param)| match master.to_bits() {
                    0 => *param,
                    _ => *master,
                });
                theta.collect()
            }
            (_, Some(rests)) if !is_said => joined(params, rests),
            _ => params.to_vec(),
        };
        for slot in self.setup.rule.slots().kept() {
            let mut kept = state.slots.iter_mut();
            let kept = kept.find(|kept| kept.name == slot.name);
            if let Some(kept) = kept.filter(|_| is_said && slot.start == Start::Params) {
                kept.values = params.to_vec();
            }
        }
        let rule = Counted {
            rule: self.setup.rule.clone(),
            count: 0,
        };
        let oracle = match state.slots[..] {
            [] => Oracle::new(&theta, Rounding::WGSL),
            _ => Oracle::resume(&rule, &theta, &state, Rounding::WGSL),
        };
        oracle.stored(self.setup.storage())
    }

    /// A step behind an edit of parameters, of which the optimizer is told for some tensors.
    async fn edit(&mut self) {
        let state = self.bench.wait(self.optimizer.state()).await.unwrap();
        let before = self.params().await;
        let of = self.setup.stored.params;
        let params: Vec<_> = before
            .iter()
            .map(|params| match self.rng.bool() {
                true => edited(&mut self.rng, of, params),
                false => params.clone(),
            })
            .collect();
        let is_said: Vec<_> = params.iter().map(|_| self.rng.bool()).collect();
        if self.rng.u32(0..3) == 0 && self.setup.storage().is_f32() {
            // State on its way elsewhere is still told.
            let mut flight = self.open();
            self.rebind(&mut flight);
        }
        let mut flight = self.open();
        self.bring(&mut flight, self.bound);
        let place = &self.places[self.bound];
        let end = (place.params.size() / of.bytes()) as usize;
        let image = image(of, &place.starts, end, &params);
        let image = buffer_of_bytes(self.bench, &image);
        let size = image.size();
        let encoder = flight.encoder();
        encoder.copy_buffer_to_buffer(&image, 0, &place.params, 0, size);
        for tensor in (0..self.names.len()).filter(|tensor| is_said[*tensor]) {
            let name = &self.names[tensor];
            let encoder = flight.encoder();
            self.optimizer.params_changed(encoder, name).unwrap();
        }
        self.log.push(format!("edit, said of {is_said:?}"));
        self.record_step(&mut flight, false);
        self.flights.push_back(flight);
        if self.rng.u32(0..4) == 0 {
            self.drop_all();
            return;
        }
        for tensor in 0..self.names.len() {
            self.model.oracles[tensor] =
                self.oracle_after(tensor, &state, &params[tensor], is_said[tensor]);
        }
        self.submit(1);
    }
}

async fn edits(bench: &Bench, setup: &Setup<AnyRule>, seed: u64) {
    let mut run = Run::new(bench, setup, seed);
    run.log.push(format!("seed {seed}"));
    for _ in 0..8 {
        run.edit().await;
        run.check().await;
        let params = run.params().await.concat();
        assert!(params.iter().all(|x| x.is_finite()), "{}", run.here());
    }
}

#[gpu_test]
async fn edits_of_parameters_make_no_nan_and_stay() {
    let benches = benches().await;
    for (index, rule) in rules().into_iter().enumerate() {
        for (case, stored) in ways_to_store().into_iter().enumerate() {
            let setup = Setup {
                rule: rule.clone(),
                stored,
                control: None,
            };
            let bench = &benches[(index + case) % benches.len()];
            edits(bench, &setup, 100_000 * index as u64 + 1000 * case as u64).await;
        }
    }
}

/// Half of the parameters are zero behind every step.
#[gpu_test]
async fn a_mask_after_every_step_makes_no_nan() {
    for bench in benches().await {
        for masters in [Masters::Rest, Masters::F32, Masters::None] {
            for zero in [0.0, -0.0] {
                let numel = 1000;
                let bf16 = |seed| encode(StorageType::Bf16, &values(seed, numel));
                let params = buffer_of_bytes(&bench, &bf16(1));
                let grads = buffer_of_bytes(&bench, &bf16(2));
                let tensor = TensorBinding::new("weight", &params, &grads, [numel])
                    .stored_as(StorageType::Bf16, StorageType::Bf16);
                let groups = ParamGroups::new(momentum()).with_precision(Precision {
                    masters,
                    ..Precision::default()
                });
                let mut optimizer =
                    GpuOptimizer::with_groups(&bench.kernels, &groups, &[tensor]).unwrap();
                for step in 0..20 {
                    bench.submit(|encoder| optimizer.step(encoder).unwrap());
                    let words = bench.download(&params).await;
                    let mut stepped = decode(StorageType::Bf16, bytemuck::cast_slice(&words));
                    let nans = stepped.iter().filter(|param| param.is_nan()).count();
                    assert_eq!(nans, 0, "{masters:?}, {zero}, step {step}");
                    stepped
                        .iter_mut()
                        .step_by(2)
                        .for_each(|param| *param = zero);
                    let bytes = encode(StorageType::Bf16, &stepped);
                    bench.queue.write_buffer(&params, 0, &bytes);
                }
            }
        }
    }
}

/// egui's callbacks record into an encoder that egui drops where the window has no texture.
#[gpu_test]
async fn an_encoder_of_an_engine_is_dropped_every_third_frame() {
    let (start, gradient) = (values(1, 1003), values(2, 1003));
    for bench in benches().await {
        let has_ring = bench.kernels.scalar_path() == ScalarPath::Uniforms;
        for control in [
            None,
            Some(StepControl::builder().max_norm(1.0).build().unwrap()),
        ] {
            let (params, grads) = (bench.buffer_of(&start), bench.buffer_of(&gradient));
            let tensor = [whole("theta", &params, &grads)];
            let rule = preset("adamw", None);
            let mut optimizer = GpuOptimizer::new(&bench.kernels, rule.clone(), &tensor).unwrap();
            let mut oracle = Oracle::new(&start, Rounding::WGSL);
            let mut decisions = control
                .as_ref()
                .map(|c| ControlOracle::new(c, Rounding::WGSL));
            let control = control.map(|control| GpuControl::new(&bench.kernels, control));
            let mut control = control.transpose().unwrap();
            let mut done = 0;
            for frame in 0..18 {
                let mut encoder = bench.encoder();
                match &mut control {
                    Some(control) => control.prepare(&mut encoder, &mut [&mut optimizer]),
                    None => optimizer.prepare(&mut encoder),
                }
                .unwrap();
                if frame % 9 == 8 {
                    // What has been prepared there is not prepared any more.
                    drop(encoder);
                    let mut encoder = bench.encoder();
                    let mut pass =
                        encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                    let recorded = match &mut control {
                        Some(control) => control.record(&mut pass, &mut [&mut optimizer]),
                        None => optimizer.record(&mut pass),
                    };
                    let needs_it = has_ring || control.is_some();
                    let refused = Err(StepError::NotPrepared);
                    assert_eq!(recorded, if needs_it { refused } else { Ok(()) });
                    continue;
                }
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                match &mut control {
                    Some(control) => control.record(&mut pass, &mut [&mut optimizer]),
                    None => optimizer.record(&mut pass),
                }
                .unwrap();
                drop(pass);
                if let Some(control) = &mut control {
                    control.report(&mut encoder);
                }
                match frame % 9 {
                    2 => drop(encoder),
                    5 => drop(encoder.finish()),
                    _ => {
                        bench.queue.submit([encoder.finish()]);
                        match &mut decisions {
                            Some(decisions) => {
                                let decision = decisions.decide(&[("default", &gradient)]);
                                oracle.step_by(&rule, &gradient, &decision.of_group("default"));
                            }
                            None => oracle.step(&rule, &gradient),
                        }
                        done += 1;
                    }
                }
                assert_eq!(optimizer.steps(), done);
                oracle.check_params(&bench.download(&params).await).unwrap();
            }
            if let Some(control) = &mut control {
                let norms: Vec<_> = control.read().iter().map(|record| record.norm).collect();
                assert_eq!(norms.len(), done as usize);
                assert!(norms.iter().all(|norm| *norm == norms[0] && *norm > 1.0));
                assert_eq!(control.steps(), done);
            }
            assert_eq!(optimizer.applied_steps("theta"), Some(done));
        }
    }
}

/// State is on its way into other buffers, and what was recorded before goes on in the old ones.
#[gpu_test]
async fn a_state_does_not_overtake_the_steps_before_a_rebind() {
    for bench in benches().await {
        let (start, gradient) = (values(1, 100), values(2, 100));
        let (params, grads) = (bench.buffer_of(&start), bench.buffer_of(&gradient));
        let halves = |name, at| TensorBinding::new(name, &params, &grads, [50]).at(at, at);
        let tensors = [halves("a", 0), halves("b", 200)];
        let mut optimizer = GpuOptimizer::new(&bench.kernels, momentum(), &tensors).unwrap();
        let mut first = bench.encoder();
        optimizer.step(&mut first).unwrap();
        let mut second = bench.encoder();
        optimizer.rebind(&mut second, &tensors).unwrap();
        optimizer.step(&mut second).unwrap();
        let state = bench.wait(optimizer.state()).await.unwrap();
        assert_eq!((state.steps, state.tensors[0].applied_steps), (0, 0));
        bench.queue.submit([first.finish(), second.finish()]);
        let mut oracle = Oracle::new(&start, Rounding::WGSL);
        oracle.step(&momentum(), &gradient);
        oracle.step(&momentum(), &gradient);
        oracle.check_params(&bench.download(&params).await).unwrap();
    }
}

/// The numbers of a loaded state are those of what was submitted before.
#[gpu_test]
async fn a_state_that_is_loaded_stands_for_what_was_submitted_before() {
    for bench in benches().await {
        let (params, grads) = (bench.buffer(8), bench.buffer(8));
        let tensor = [whole("theta", &params, &grads)];
        let mut optimizer = GpuOptimizer::new(&bench.kernels, momentum(), &tensor).unwrap();
        let control = StepControl::builder().build().unwrap();
        let mut control = GpuControl::new(&bench.kernels, control).unwrap();
        bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
        let state = bench.wait(optimizer.state()).await.unwrap();
        bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
        bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
        optimizer.load_state(&state).unwrap();
        bench.outcomes(&mut control).await;
        assert_eq!(bench.wait(optimizer.state()).await.unwrap(), state);
        assert_eq!(
            (optimizer.steps(), optimizer.applied_steps("theta")),
            (1, Some(1))
        );
    }
}

/// What was in flight when somebody looked has not been seen.
#[gpu_test]
async fn a_state_says_nothing_of_what_is_submitted_later() {
    for bench in benches().await {
        let (start, gradient) = (values(1, 100), values(2, 100));
        let (params, grads) = (bench.buffer_of(&start), bench.buffer_of(&gradient));
        let tensor = [whole("theta", &params, &grads)];
        let rule = preset("adamw", None);
        let mut optimizer = GpuOptimizer::new(&bench.kernels, rule.clone(), &tensor).unwrap();
        let control = StepControl::builder().build().unwrap();
        let mut control = GpuControl::new(&bench.kernels, control).unwrap();
        let mut encoder = bench.encoder();
        for _ in 0..3 {
            optimizer.step_with(&mut encoder, &mut control).unwrap();
        }
        bench.wait(optimizer.state()).await.unwrap();
        bench.queue.submit([encoder.finish()]);
        bench
            .device
            .poll(wgpu::PollType::wait_indefinitely())
            .unwrap();
        // Nobody has read of them.
        let mut encoder = bench.encoder();
        assert_eq!(optimizer.step(&mut encoder), Err(StepError::Unread));
        bench.outcomes(&mut control).await;
        bench.submit(|encoder| optimizer.step(encoder).unwrap());
        let mut oracle = Oracle::new(&start, Rounding::WGSL);
        (0..4).for_each(|_| oracle.step(&rule, &gradient));
        oracle.check_params(&bench.download(&params).await).unwrap();
        assert_eq!(optimizer.applied_steps("theta"), Some(4));
    }
}

/// What is submitted and not done yet is part of one tensor's count, and not of another's that was set behind it.
#[gpu_test]
async fn tensors_share_no_scalars_where_a_count_was_set_behind_steps_on_their_way() {
    for bench in benches().await {
        let gradient = values(2, 64);
        let starts = [values(1, 64), values(3, 64)];
        let buffers = starts
            .each_ref()
            .map(|start| (bench.buffer_of(start), bench.buffer_of(&gradient)));
        // Something that takes its time.
        let large = (bench.buffer(1 << 21), bench.buffer(1 << 21));
        let tensors = [
            whole("a", &buffers[0].0, &buffers[0].1),
            whole("b", &buffers[1].0, &buffers[1].1),
            whole("large", &large.0, &large.1),
        ];
        let rule = preset("adamw", None);
        let mut optimizer = GpuOptimizer::new(&bench.kernels, rule.clone(), &tensors).unwrap();
        let control = StepControl::builder().build().unwrap();
        let mut control = GpuControl::new(&bench.kernels, control).unwrap();
        let mut oracles = starts
            .each_ref()
            .map(|start| Oracle::new(start, Rounding::WGSL));
        for counts in [[1, 1], [2, 1]] {
            bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
            for (oracle, count) in oracles.iter_mut().zip(counts) {
                let rule = Counted {
                    rule: rule.clone(),
                    count,
                };
                oracle.step(&rule, &gradient);
            }
            optimizer.set_applied_steps("b", 0).unwrap();
        }
        for (oracle, (params, _)) in oracles.iter().zip(&buffers) {
            oracle.check_params(&bench.download(params).await).unwrap();
        }
    }
}

/// The last element of sixteen bits lies alone in a word, or beside a neighbour's first.
#[gpu_test]
async fn what_is_made_of_changed_parameters_is_made_to_the_last_element() {
    let [_, _, rests, halves, ..] = ways_to_store();
    for bench in benches().await {
        for (rule, stored) in [
            (momentum(), rests),
            (preset("schedule-free-adamw", None), halves),
        ] {
            let setup = Setup {
                rule,
                stored,
                control: None,
            };
            let (numels, starts, names) = ([5, 7, 3], [0, 5, 12], ["a", "b", "c"]);
            let bytes = |of: StorageType, seed| encode(of, &rounded(of, &values(seed, 15)));
            let params = buffer_of_bytes(&bench, &bytes(stored.params, 1));
            let grads = buffer_of_bytes(&bench, &bytes(stored.grads, 2));
            let tensors = [0, 1, 2].map(|tensor| {
                let at = |of: StorageType| of.bytes() * starts[tensor];
                TensorBinding::new(names[tensor], &params, &grads, [numels[tensor]])
                    .stored_as(stored.params, stored.grads)
                    .at(at(stored.params), at(stored.grads))
            });
            let optimizer = GpuOptimizer::with_groups(&bench.kernels, &groups(&setup), &tensors);
            let mut optimizer = optimizer.unwrap();
            bench.submit(|encoder| optimizer.step(encoder).unwrap());
            let before = bench.wait(optimizer.state()).await.unwrap();
            bench.submit(|encoder| {
                optimizer.params_changed(encoder, "a").unwrap();
                optimizer.params_changed(encoder, "c").unwrap();
            });
            let after = bench.wait(optimizer.state()).await.unwrap();
            for (before, after) in before.tensors.iter().zip(&after.tensors) {
                for slot in &before.slots {
                    let here = format!("{} of {}", slot.name, before.name);
                    let is_made = ["z", PARAMS_REST].contains(&&*slot.name) && before.name != "b";
                    match after.slot(&slot.name) {
                        Some(there) if is_made => {
                            assert!(
                                there.iter().all(|x| *x == 0.0 || x.is_nan()),
                                "{here}: {there:?}"
                            );
                        }
                        there => assert!(is_made || there == Some(&slot.values[..]), "{here}"),
                    }
                }
            }
        }
    }
}
