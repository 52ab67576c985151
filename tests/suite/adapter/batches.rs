//! Small tensors in different places share dispatches, and stay tensors of their own.

use wgpu_optim::oracle::{ControlOracle, Oracle, Roundoff};
use wgpu_optim::storage::{MASTER_PARAMS, PARAMS_REST, rest};
use wgpu_optim::{
    AdamConfig, AnyRule, GpuControl, GpuOptimizer, Masters, OPTIONAL_FEATURES, Optimizer,
    ParamGroups, Precision, Rule, SgdConfig, StepControl, StorageType, TensorBinding, wgpu,
};

use super::{Bench, gpu_test};
use crate::cases::{LRS, sizes, values};
use crate::no_device::groups::{group_of, groups};
use crate::stored::{Stored, decode, encode, rounded};

const CANARY: f32 = -12_345.678;

/// A tensor in one of several buffers, in elements.
struct Slot {
    name: String,
    numel: usize,
    buffer: usize,
    start: usize,
}

impl Slot {
    fn elems(&self) -> std::ops::Range<usize> {
        self.start..self.start + self.numel
    }
}

/// Tensors of awkward sizes in four groups, by turns in a buffer of its own, where a binding may start in a buffer
/// that several share (the first), and one element further on there. Canaries end each.
fn slots(alignment_bytes: usize) -> (Vec<Slot>, Vec<usize>) {
    let (mut slots, mut buffers) = (Vec::new(), vec![0]);
    let names = ["weight", "bias", "norm", "embed", "weight"];
    for (index, numel) in sizes().chain(sizes()).chain([8192, 8193]).enumerate() {
        let name = format!("{index}.{}", names[index % names.len()]);
        let (buffer, start) = if index % 3 == 0 {
            buffers.push(numel + 2);
            (buffers.len() - 1, 0)
        } else {
            let start = buffers[0] + usize::from(index % 9 == 1);
            buffers[0] = (start + numel + 2).next_multiple_of(alignment_bytes / 4);
            (0, start)
        };
        slots.push(Slot {
            name,
            numel,
            buffer,
            start,
        });
    }
    (slots, buffers)
}

/// Steps all tensors with a random few frozen, compares every element, and returns the dispatches of the last step, in
/// which none is frozen.
async fn check(bench: &Bench, seed: u64) -> usize {
    let alignment = bench.device.limits().min_storage_buffer_offset_alignment;
    let (slots, sizes) = slots(alignment as usize);
    let mut host_params: Vec<_> = sizes.iter().map(|numel| vec![CANARY; *numel]).collect();
    let mut host_grads = host_params.clone();
    for (index, slot) in slots.iter().enumerate() {
        let start = values(seed + index as u64, slot.numel);
        host_params[slot.buffer][slot.elems()].copy_from_slice(&start);
    }
    let buffers =
        |host: &[Vec<f32>]| -> Vec<_> { host.iter().map(|h| bench.buffer_of(h)).collect() };
    let (params, grads) = (buffers(&host_params), buffers(&host_grads));
    let tensors: Vec<_> = slots
        .iter()
        .map(|slot| {
            let (params, grads) = (&params[slot.buffer], &grads[slot.buffer]);
            let offset_bytes = 4 * slot.start as u64;
            TensorBinding::new(&slot.name, params, grads, [slot.numel])
                .params_at(offset_bytes)
                .grads_at(offset_bytes)
        })
        .collect();
    let mut optimizer = GpuOptimizer::with_groups(&bench.kernels, &groups(), &tensors).unwrap();
    let mut oracles: Vec<_> = slots
        .iter()
        .map(|slot| Oracle::new(&host_params[slot.buffer][slot.elems()], Roundoff::WGSL))
        .collect();

    let mut rng = fastrand::Rng::with_seed(seed);
    for (step, lr) in LRS.into_iter().enumerate() {
        optimizer.set_lr(lr).unwrap();
        for (index, (slot, oracle)) in slots.iter().zip(&mut oracles).enumerate() {
            let grads = values(seed + (1000 * step + index) as u64, slot.numel);
            host_grads[slot.buffer][slot.elems()].copy_from_slice(&grads);
            // At the last two steps all go on, so that some have their first step beside later ones of others.
            let frozen = step < 2 && rng.u8(..3) == 0;
            optimizer.set_frozen(&slot.name, frozen).unwrap();
            if !frozen {
                let config = optimizer.group_config(group_of(&slot.name)).unwrap();
                oracle.step(config, &grads);
            }
        }
        for (buffer, host) in grads.iter().zip(&host_grads) {
            bench.upload(buffer, host);
        }
        bench.step(&mut optimizer);
    }

    let mut after = Vec::new();
    for buffer in &params {
        after.push(bench.download(buffer).await);
    }
    let state = bench.wait(optimizer.state()).await.unwrap();
    for ((slot, oracle), state) in slots.iter().zip(&oracles).zip(&state.tensors) {
        let here = format!("{} of {} elements", slot.name, slot.numel);
        let slice = &mut after[slot.buffer][slot.elems()];
        oracle
            .check_params(slice)
            .unwrap_or_else(|e| panic!("{here}: {e}"));
        slice.fill(CANARY);
        match state.slot("momentum_buffer") {
            Some(velocity) => drop(
                oracle
                    .check_velocity(&velocity)
                    .unwrap_or_else(|e| panic!("{here}: {e}")),
            ),
            None => assert_eq!(group_of(&slot.name), "embeddings"),
        }
    }
    for (buffer, host) in grads.iter().zip(&host_grads) {
        let same = |(x, y): (&f32, &f32)| x.to_bits() == y.to_bits();
        assert!(bench.download(buffer).await.iter().zip(host).all(same));
    }
    let is_canary = |x: &f32| x.to_bits() == CANARY.to_bits();
    assert!(after.iter().flatten().all(is_canary), "a canary died");
    optimizer.dispatches()
}

#[gpu_test]
async fn scattered_tensors_keep_their_own_group_state_and_ends() {
    let mut counts = Vec::new();
    for bench in Bench::both().await {
        counts.push(check(bench, 1).await);
    }
    assert!(counts.iter().all(|count| *count == counts[0]), "{counts:?}");

    // WebGPU's own limits: eight buffers, so two tensors with momentum in a dispatch and four without.
    for optional in [wgpu::Features::empty(), OPTIONAL_FEATURES] {
        let adapter = &super::gpu().await.adapter;
        let optional = optional & adapter.features();
        let mut limits = wgpu::Limits::default();
        if optional.contains(wgpu::Features::IMMEDIATES) {
            limits.max_immediate_size = adapter.limits().max_immediate_size;
        }
        let bench = Bench::open(optional, limits.or_worse_values_from(&adapter.limits())).await;
        assert!(check(&bench, 2).await >= counts[0]);
    }
}

/// As many tensors as the models that this is for have, in buffers of their own.
#[gpu_test]
async fn a_thousand_scattered_tensors_take_a_dispatch_for_every_few() {
    for bench in Bench::both().await {
        let buffers: Vec<_> = (0..1000)
            .map(|index| {
                let name = index.to_string();
                let params = bench.buffer_of(&values(index, 1000));
                (name, params, bench.buffer_of(&values(7, 1000)))
            })
            .collect();
        let tensors: Vec<_> = buffers
            .iter()
            .map(|(name, params, grads)| TensorBinding::new(name, params, grads, [1000]))
            .collect();
        let config = SgdConfig::builder(0.1).momentum(0.9).build();
        let config = config.unwrap();
        let mut optimizer = GpuOptimizer::new(&bench.kernels, config, &tensors).unwrap();
        for _ in 0..2 {
            bench.step(&mut optimizer);
        }
        let bound = bench.device.limits().max_storage_buffers_per_shader_stage as usize;
        assert_eq!(
            optimizer.dispatches(),
            1000usize.div_ceil((bound / 3).min(10))
        );
        for (index, (name, params, _)) in buffers.iter().enumerate() {
            let mut oracle = Oracle::new(&values(index as u64, 1000), Roundoff::WGSL);
            for _ in 0..2 {
                oracle.step(&config, &values(7, 1000));
            }
            oracle
                .check_params(&bench.download(params).await)
                .unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }
}

/// Elements of tensors that do not fill units of eight: most of them do not fill a word either.
const UNEVEN: [usize; 30] = [
    1, 3, 5, 7, 9, 11, 13, 15, 17, 31, 33, 63, 65, 127, 129, 255, 257, 511, 513, 1023, 1025, 2047,
    4095, 8191, 2, 4, 6, 12, 1002, 8190,
];

/// Elements of a tensor of another group that follows right behind some of them, in the other half of the last word.
const BEHIND: usize = 3;

/// Bytes of nobody's: as gradients they are NaN, of any type.
const NOBODYS: u8 = 0xff;

/// Parameters or gradients of all tensors, in buffers of their own: each with what follows behind it, if anything does, and
/// then some elements of nobody's.
#[derive(Clone)]
struct Values {
    of: StorageType,
    tensors: Vec<Vec<f32>>,
    behind: Vec<Vec<f32>>,
}

impl Values {
    fn new(of: StorageType, seed: u64) -> Self {
        let mut seeds = seed..;
        let mut values = |numel| rounded(of, &values(seeds.next().unwrap(), numel));
        let tensors: Vec<_> = UNEVEN.into_iter().map(&mut values).collect();
        let numels = (0..UNEVEN.len()).map(|index| if index % 4 == 0 { BEHIND } else { 0 });
        Self {
            of,
            tensors,
            behind: numels.map(values).collect(),
        }
    }

    fn scaled(mut self, factor: f32) -> Self {
        for value in self.tensors.iter_mut().chain(&mut self.behind).flatten() {
            *value *= factor;
        }
        self
    }

    fn all(&self) -> impl Iterator<Item = &Vec<f32>> {
        self.tensors.iter().chain(&self.behind)
    }

    fn bytes(&self) -> Vec<Vec<u8>> {
        let pairs = self.tensors.iter().zip(&self.behind);
        let bytes = pairs.map(|(values, behind)| {
            let mut bytes = encode(self.of, &[&values[..], behind].concat());
            bytes.resize((bytes.len() + 5).next_multiple_of(4), NOBODYS);
            bytes
        });
        bytes.collect()
    }

    /// What has become of them, after a look at what is nobody's.
    fn after(&self, bytes: &[Vec<u8>]) -> Self {
        let (mut tensors, mut behind) = (Vec::new(), Vec::new());
        for (index, bytes) in bytes.iter().enumerate() {
            let size = self.of.bytes() as usize;
            let end = size * self.tensors[index].len();
            let end_behind = end + size * self.behind[index].len();
            tensors.push(decode(self.of, &bytes[..end]));
            behind.push(decode(self.of, &bytes[end..end_behind]));
            let nobodys = &bytes[end_behind..];
            assert!(!nobodys.is_empty() && nobodys.iter().all(|byte| *byte == NOBODYS));
        }
        Self {
            of: self.of,
            tensors,
            behind,
        }
    }
}

/// Steps tensors that do not fill units, with some frozen and under a control or without, and holds every element against
/// the oracle.
async fn check_uneven(bench: &Bench, config: &AnyRule, stored: &Stored, is_controlled: bool) {
    let here = format!("{config:?} {stored:?}, control: {is_controlled}");
    let start = Values::new(stored.params, 1);
    let steps: Vec<_> = (0..LRS.len())
        .map(|step| Values::new(stored.grads, 1000 * (step as u64 + 1)).scaled(0.25))
        .collect();
    let buffers = |values: &Values| -> Vec<_> {
        let bytes = values.bytes();
        bytes.iter().map(|b| bench.buffer_of_words(b)).collect()
    };
    let (params, grads) = (buffers(&start), buffers(&steps[0]));
    let names: Vec<_> = (0..UNEVEN.len()).map(|index| index.to_string()).collect();
    let names_behind: Vec<_> = names.iter().map(|name| format!("behind.{name}")).collect();
    let mut tensors = Vec::new();
    for (index, name) in names.iter().enumerate() {
        let bind = |name, numel, at: usize| {
            let at = |of: StorageType| of.bytes() * at as u64;
            TensorBinding::new(name, &params[index], &grads[index], [numel])
                .params_type(stored.params)
                .grads_type(stored.grads)
                .params_at(at(stored.params))
                .grads_at(at(stored.grads))
        };
        tensors.push(bind(name, UNEVEN[index], 0));
        let behind = start.behind[index].len();
        tensors.push(bind(&names_behind[index], behind, UNEVEN[index]));
    }
    let groups = ParamGroups::new(config.clone())
        .with("behind", config.with_lr(0.01).unwrap(), |name| {
            name.starts_with("behind")
        })
        .unwrap()
        .with_precision(stored.precision);
    let mut optimizer = GpuOptimizer::with_groups(&bench.kernels, &groups, &tensors).unwrap();

    let slots = config.slots();
    let storage = stored.storage(&slots);
    let bindings = if storage.state.is_empty() { 2 } else { 3 };
    let bound = bench.device.limits().max_storage_buffers_per_shader_stage as usize;
    let plan = optimizer.plan();
    let batched: usize = plan.batches.iter().map(|batch| batch.pieces.len()).sum();
    assert_eq!(batched, UNEVEN.len(), "{here}");
    let of_ten = UNEVEN.len().div_ceil((bound / bindings).min(10));
    assert_eq!(plan.batches.len(), of_ten, "{here}");
    let behind = start.behind.iter().filter(|values| !values.is_empty());
    let dispatches = plan.dispatches(|_| Some(())).len();
    assert_eq!(dispatches, of_ten + behind.count(), "{here}");

    let oracle = |params: &Vec<f32>| Oracle::new(params, Roundoff::WGSL).stored(storage);
    let mut oracles: Vec<_> = start.all().map(oracle).collect();
    // It clips at every step.
    let control = StepControl::builder().grad_scale(4.0).max_norm(2.0);
    let control = control.build().unwrap();
    let mut decisions = ControlOracle::new(&control, Roundoff::WGSL);
    let mut control = is_controlled.then(|| GpuControl::new(&bench.kernels, control).unwrap());
    let mut rng = fastrand::Rng::with_seed(slots.kept().count() as u64);
    for (step, lr) in LRS.into_iter().enumerate() {
        optimizer.set_lr(lr).unwrap();
        for (buffer, bytes) in grads.iter().zip(steps[step].bytes()) {
            bench.queue.write_buffer(buffer, 0, &bytes);
        }
        let mut taking_part = Vec::new();
        for (index, name) in names.iter().chain(&names_behind).enumerate() {
            let frozen = step < 2 && rng.u8(..3) == 0;
            optimizer.set_frozen(name, frozen).unwrap();
            if !frozen {
                let group = if index < names.len() {
                    "default"
                } else {
                    "behind"
                };
                taking_part.push((index, group));
            }
        }
        let step_grads: Vec<_> = steps[step].all().collect();
        match &mut control {
            None => {
                bench.submit(|encoder| optimizer.step(encoder).unwrap());
                for (index, group) in taking_part {
                    let config = optimizer.group_config(group).unwrap();
                    oracles[index].step(config, step_grads[index]);
                }
            }
            Some(control) => {
                bench.submit(|encoder| optimizer.step_with(encoder, control).unwrap());
                let seen = taking_part.iter();
                let seen: Vec<_> = seen
                    .map(|(index, group)| (*group, &step_grads[*index][..]))
                    .collect();
                let decision = decisions.decide(&seen);
                assert!(!decision.is_skipped && decision.norm.low > 4.0, "{here}");
                let records = bench.outcomes(control).await;
                let norm = f64::from(records[0].norm);
                let bound = &decision.norm;
                assert!(!records[0].is_skipped, "{here}");
                assert!(bound.low <= norm && norm <= bound.high, "{here}: {norm}");
                for (index, group) in taking_part {
                    let config = optimizer.group_config(group).unwrap();
                    let factors = decision.of_group(group);
                    oracles[index].step_by(config, step_grads[index], &factors);
                }
            }
        }
    }

    let mut after = Vec::new();
    for buffer in &params {
        after.push(bench.bytes(buffer).await);
    }
    let after = start.after(&after);
    let state = bench.wait(optimizer.state()).await.unwrap();
    let all_names = names.iter().chain(&names_behind);
    for ((name, oracle), params) in all_names.zip(&oracles).zip(after.all()) {
        let fail = |e| panic!("{here}, tensor {name} of {} elements: {e}", params.len());
        oracle.check_params(params).unwrap_or_else(fail);
        let mut states = state.tensors.iter();
        let state = states.find(|tensor| tensor.name == *name).unwrap();
        assert_eq!(state.slots.len(), storage.state.len());
        for slot in &state.slots {
            match slot.name.as_str() {
                MASTER_PARAMS => oracle.check_masters(&slot.values.to_f32()),
                PARAMS_REST => {
                    let pairs = params.iter().zip(slot.values.to_f32());
                    let masters = pairs.map(|(param, rest)| {
                        let half = (param.to_bits() >> 16) as u16;
                        f32::from_bits(rest::join(half, rest as u16))
                    });
                    oracle.check_masters(&masters.collect::<Vec<_>>())
                }
                name => oracle.check_slot(name, &slot.values.to_f32()),
            }
            .unwrap_or_else(fail);
        }
    }
    let last = steps[LRS.len() - 1].bytes();
    for (buffer, expected) in grads.iter().zip(last) {
        assert_eq!(bench.bytes(buffer).await, expected, "gradients are read");
    }
}

/// Tensors of 16 bits whose lengths fill neither units nor, most of them, words: they share dispatches, and what lies in the
/// other half of their last word stays what it is.
#[gpu_test]
async fn scattered_tensors_of_sixteen_bits_that_end_within_a_word_share_dispatches() {
    use StorageType::{Bf16, F16, F32};
    let momentum = SgdConfig::builder(0.05).momentum(0.9).dampening(0.3);
    let plain = SgdConfig::builder(0.05).build().unwrap();
    let rules: [AnyRule; 3] = [
        momentum.build().unwrap().into(),
        AdamConfig::adamw(0.05).build().unwrap().into(),
        plain.into(),
    ];
    let cases = [
        (Bf16, Bf16, F32, Masters::F32),
        (Bf16, F32, F32, Masters::LowBits),
        (Bf16, Bf16, Bf16, Masters::None),
        (F32, Bf16, F32, Masters::None),
        (F16, F16, F16, Masters::None),
        (F16, F32, F32, Masters::F32),
        (Bf16, F16, F16, Masters::LowBits),
        (F32, F32, Bf16, Masters::None),
    ];
    for (road, bench) in Bench::both().await.enumerate() {
        for (case, (params, grads, state, masters)) in cases.into_iter().enumerate() {
            let stored = Stored {
                params,
                grads,
                precision: Precision {
                    state,
                    masters,
                    ..Precision::default()
                },
            };
            for (index, rule) in rules.iter().enumerate() {
                // Each on one road with a control, and without on the other.
                let is_controlled = (case + index + road) % 2 == 0;
                let is_f32 = stored.storage(&rule.slots()).is_f32();
                if !is_f32 {
                    check_uneven(bench, rule, &stored, is_controlled).await;
                }
            }
        }
    }
}
