//! Sixteen bits on a real adapter: conversions bit for bit, every rule over every way to store against the oracle, masters.

use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::storage::{self, MASTER_PARAMS, PARAMS_REST, bf16, f16, rest};
use wgpu_optim::{
    AnyRule, Converter, GpuControl, GpuOptimizer, Masters, Optimizer, ParamGroups, Precision, Rule,
    SgdConfig, StepControl, StorageType, TensorBinding, wgpu,
};

use super::control::{momentum, rules};
use super::{Bench, gpu_test};
use crate::cases::{LRS, values};
use crate::stored::{Stored, all, decode, encode, rounded};

const CANARY: u8 = 0xa5;

/// A browser, which compiles each kernel twice as long, goes through a quarter of what a native run does.
const SPARSE: usize = if cfg!(target_arch = "wasm32") { 4 } else { 1 };

impl Bench {
    /// A buffer of whole words that starts with these bytes.
    fn buffer_of_bytes(&self, bytes: &[u8]) -> wgpu::Buffer {
        let mut whole = bytes.to_vec();
        whole.resize(bytes.len().next_multiple_of(4), CANARY);
        self.buffer_of_words(&whole)
    }

    /// Bytes of one type, as another.
    async fn converted(&self, from: StorageType, to: StorageType, bytes: &[u8]) -> Vec<u8> {
        let numel = bytes.len() / from.bytes() as usize;
        let source = self.buffer_of_bytes(bytes);
        let target = self.buffer_of_bytes(&vec![CANARY; numel * to.bytes() as usize]);
        let conversion = TensorBinding::new("x", &target, &source, [numel])
            .params_type(to)
            .grads_type(from);
        let mut converter = Converter::new(&self.kernels, &[conversion]).unwrap();
        let mut encoder = self.encoder();
        converter.record(&mut encoder).unwrap();
        self.queue.submit([encoder.finish()]);
        let mut bytes = self.bytes(&target).await;
        let rest = bytes.split_off(numel * to.bytes() as usize);
        assert!(rest.iter().all(|byte| *byte == CANARY));
        bytes
    }
}

type Unpack = fn(u16) -> u32;
type Nearest = fn(u32) -> u16;

const TYPES: [(StorageType, Unpack, Nearest); 2] = [
    (StorageType::Bf16, bf16::unpack, bf16::nearest),
    (StorageType::F16, f16::unpack, f16::nearest),
];

#[gpu_test]
async fn all_of_sixteen_bits_survive_load_and_store() {
    for bench in Bench::both().await {
        for (of, unpack, nearest) in TYPES {
            let halves: Vec<u16> = (0..=u16::MAX).collect();
            let bytes = bytemuck::cast_slice(&halves);
            let words = bench.converted(of, StorageType::F32, bytes).await;
            let words: Vec<u32> = bytemuck::pod_collect_to_vec(&words);
            for (half, word) in halves.iter().zip(&words) {
                let expected = unpack(*half);
                assert_eq!(*word, expected, "{of:?} {half:#06x}: {word:#010x}");
            }
            let again = bench.converted(of, of, bytes).await;
            let again: Vec<u16> = bytemuck::pod_collect_to_vec(&again);
            for (half, again) in halves.iter().zip(&again) {
                assert_eq!(*again, nearest(unpack(*half)), "{of:?} {half:#06x}");
            }
        }
    }
}

#[gpu_test]
async fn the_nearest_is_the_twins_on_every_exponent_tie_and_carry() {
    let bench = Bench::best().await;
    let bits: Vec<u32> = crate::no_device::storage::patterns().collect();
    for (of, _, nearest) in TYPES {
        let bytes = bytemuck::cast_slice(&bits);
        let halves = bench.converted(StorageType::F32, of, bytes).await;
        let halves: Vec<u16> = bytemuck::pod_collect_to_vec(&halves);
        for (bits, half) in bits.iter().zip(&halves) {
            let expected = nearest(*bits);
            assert_eq!(*half, expected, "{of:?} of {bits:#010x}: {half:#06x}");
        }
    }
}

/// Tensors of a run in one buffer of parameters and one of gradients, with canaries between.
#[derive(Clone)]
struct Scattered {
    numels: Vec<usize>,
    /// In elements.
    starts: Vec<usize>,
    shift: usize,
    params: Vec<Vec<f32>>,
    grads: Vec<Vec<f32>>,
}

impl Scattered {
    /// Gradients start as far modulo a unit as parameters, or not.
    fn new(stored: &Stored, numels: Vec<usize>, first: usize, shift: usize) -> Self {
        let mut next = first;
        let start = |numel: &usize| {
            let start = next;
            next += numel + 3;
            start
        };
        let of = |of, seed| move |numel: &usize| rounded(of, &values(seed + *numel as u64, *numel));
        Self {
            starts: numels.iter().map(start).collect(),
            shift,
            params: numels.iter().map(of(stored.params, 0)).collect(),
            grads: numels.iter().map(of(stored.grads, 77)).collect(),
            numels,
        }
    }

    /// All of one buffer, the values of each tensor where they lie and canaries elsewhere.
    fn bytes(&self, of: StorageType, values: &[Vec<f32>], shift: usize) -> Vec<u8> {
        let size = of.bytes() as usize;
        let end = self.starts.last().unwrap() + self.numels.last().unwrap() + shift + 9;
        let mut bytes = vec![CANARY; end * size];
        for (start, values) in self.starts.iter().zip(values) {
            let at = (start + shift) * size;
            bytes[at..at + values.len() * size].copy_from_slice(&encode(of, values));
        }
        bytes
    }

    fn params_bytes(&self, stored: &Stored) -> Vec<u8> {
        self.bytes(stored.params, &self.params, 0)
    }

    fn grads_bytes(&self, stored: &Stored) -> Vec<u8> {
        self.bytes(stored.grads, &self.grads, self.shift)
    }

    fn names(&self) -> Vec<String> {
        (0..self.numels.len())
            .map(|index| index.to_string())
            .collect()
    }

    fn bindings<'a>(
        &self,
        stored: &Stored,
        names: &'a [String],
        params: &'a wgpu::Buffer,
        grads: &'a wgpu::Buffer,
    ) -> Vec<TensorBinding<'a>> {
        let tensors = names.iter().zip(self.starts.iter().zip(&self.numels));
        tensors
            .map(|(name, (start, numel))| {
                let params_at = *start as u64 * stored.params.bytes();
                let grads_at = (start + self.shift) as u64 * stored.grads.bytes();
                TensorBinding::new(name, params, grads, [*numel])
                    .params_type(stored.params)
                    .grads_type(stored.grads)
                    .params_at(params_at)
                    .grads_at(grads_at)
            })
            .collect()
    }

    /// The values of each tensor, after a look at the canaries.
    fn split(&self, of: StorageType, bytes: &[u8]) -> Vec<Vec<f32>> {
        let size = of.bytes() as usize;
        let mut rest = bytes.to_vec();
        let tensors = self.starts.iter().zip(&self.numels);
        let values = tensors
            .map(|(start, numel)| {
                let at = start * size..(start + numel) * size;
                let values = decode(of, &bytes[at.clone()]);
                rest[at].fill(CANARY);
                values
            })
            .collect();
        assert!(rest.iter().all(|byte| *byte == CANARY));
        values
    }
}

fn sizes() -> Vec<usize> {
    (0..=18).chain([255, 256, 1031, 4099]).collect()
}

/// Steps over scattered tensors, one of which misses a step, each held against the oracle.
async fn follow(bench: &Bench, config: &AnyRule, stored: &Stored, case: usize) {
    follow_by(bench, config, stored, case, None).await;
}

/// The same under a control that divides by eight, which rounds nothing, with steps between that it skips.
async fn follow_under_control(bench: &Bench, config: &AnyRule, stored: &Stored, case: usize) {
    let control = StepControl::builder().grad_scale(8.0).build().unwrap();
    let control = GpuControl::new(&bench.kernels, control).unwrap();
    follow_by(bench, config, stored, case, Some(control)).await;
}

async fn follow_by(
    bench: &Bench,
    config: &AnyRule,
    stored: &Stored,
    case: usize,
    mut control: Option<GpuControl>,
) {
    let here = format!("{config:?} {stored:?}, control: {}", control.is_some());
    let shift = [0, 8, 1, 3][case % 4];
    let tensors = Scattered::new(stored, sizes(), case % 5, shift);
    let params = bench.buffer_of_bytes(&tensors.params_bytes(stored));
    let grads = bench.buffer_of_bytes(&tensors.grads_bytes(stored));
    let names = tensors.names();
    let bindings = tensors.bindings(stored, &names, &params, &grads);
    let groups = ParamGroups::new(config.clone()).with_precision(stored.precision);
    let mut optimizer = GpuOptimizer::with_groups(&bench.kernels, &groups, &bindings).unwrap();
    let slots = config.slots();
    let storage = stored.storage(&slots);
    let mut oracles: Vec<_> = tensors
        .params
        .iter()
        .map(|params| Oracle::new(params, Roundoff::WGSL).stored(storage))
        .collect();
    let mut scaled = tensors.clone();
    for grads in &mut scaled.grads {
        grads.iter_mut().for_each(|grad| *grad *= 8.0);
    }
    let scaled = scaled.grads_bytes(stored);
    let mut poisoned = tensors.clone();
    let last = poisoned.grads.len() - 1;
    poisoned.grads[last][case] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][case % 3];
    let poisoned = poisoned.grads_bytes(stored);
    let upload = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        bytes.resize(bytes.len().next_multiple_of(4), CANARY);
        bench.queue.write_buffer(&grads, 0, &bytes);
    };
    for (step, lr) in LRS.into_iter().enumerate() {
        optimizer.set_frozen("7", step == 1).unwrap();
        optimizer.set_lr(lr).unwrap();
        let mut encoder = bench.encoder();
        match &mut control {
            None => optimizer.step(&mut encoder).unwrap(),
            Some(control) => {
                for skipped in 0..2 - step % 2 {
                    upload(&poisoned);
                    let mut encoder = bench.encoder();
                    optimizer.step_with(&mut encoder, control).unwrap();
                    bench.queue.submit([encoder.finish()]);
                    // Read of now and then.
                    if (step + skipped) % 3 == 2 {
                        control.read();
                    }
                }
                upload(&scaled);
                optimizer.step_with(&mut encoder, control).unwrap();
            }
        }
        bench.queue.submit([encoder.finish()]);
        for (tensor, oracle) in oracles.iter_mut().enumerate() {
            if tensor != 7 || step != 1 {
                oracle.step(optimizer.config(), &tensors.grads[tensor]);
            }
        }
    }
    let mut stepped = bench.bytes(&params).await;
    stepped.truncate(tensors.params_bytes(stored).len());
    let stepped = tensors.split(stored.params, &stepped);
    let mut left = bench.bytes(&grads).await;
    left.truncate(tensors.grads_bytes(stored).len());
    let expected = match control {
        None => tensors.grads_bytes(stored),
        Some(_) => scaled,
    };
    assert_eq!(left, expected, "gradients are only read");
    let state = bench.wait(optimizer.state()).await.unwrap();
    for (tensor, oracle) in oracles.iter().enumerate() {
        let numel = tensors.numels[tensor];
        let fail = |e| panic!("{here}, {numel} elements: {e}");
        oracle
            .check_params(&stepped[tensor])
            .unwrap_or_else(|e| fail(e.to_string()));
        let state = &state.tensors[tensor];
        let missed = u64::from(tensor == 7);
        assert_eq!(state.applied_steps, LRS.len() as u64 - missed, "{here}");
        let masters = usize::from(storage.masters != Masters::None);
        assert_eq!(state.slots.len(), slots.kept().count() + masters, "{here}");
        for slot in &state.slots {
            match slot.name.as_str() {
                MASTER_PARAMS => oracle.check_masters(&slot.values.to_f32()),
                PARAMS_REST => {
                    let pairs = stepped[tensor].iter().zip(slot.values.to_f32());
                    let masters = pairs.map(|(param, rest)| {
                        let half = (param.to_bits() >> 16) as u16;
                        f32::from_bits(rest::join(half, rest as u16))
                    });
                    oracle.check_masters(&masters.collect::<Vec<_>>())
                }
                name => oracle.check_slot(name, &slot.values.to_f32()),
            }
            .unwrap_or_else(|e| fail(e.to_string()));
        }
    }
}

/// The same, or one where `WGPU_OPTIM_TEST_ALL` is set.
fn one_in(sparse: usize) -> usize {
    match std::env::var_os("WGPU_OPTIM_TEST_ALL") {
        Some(_) => 1,
        None => sparse,
    }
}

/// Every rule, and every way to store; all pairs of both where `WGPU_OPTIM_TEST_ALL` is set, which takes minutes of
/// compiling, else one in seven. The twins go through all of them (`no_device::mixed`).
#[gpu_test]
async fn every_rule_and_every_way_to_store() {
    let every = one_in(7 * SPARSE);
    let bench = Bench::best().await;
    for (index, rule) in rules().iter().enumerate() {
        for (case, stored) in all(&rule.slots()).iter().enumerate() {
            if (index + case) % every == 0 {
                follow(bench, rule, stored, index + case).await;
            }
        }
    }
}

/// One in so many of the ways to store momentum, on either road of the scalars.
async fn one_way_in(nth: usize) -> Vec<(&'static Bench, usize, Stored)> {
    let mut ways = Vec::new();
    for (road, bench) in Bench::both().await.enumerate() {
        let all = all(&momentum().slots()).into_iter().enumerate();
        let of_road = all.skip(road).step_by(nth);
        ways.extend(of_road.map(|(case, stored)| (bench, case, stored)));
    }
    ways
}

#[gpu_test]
async fn every_way_to_store_on_both_roads_of_the_scalars() {
    for (bench, case, stored) in one_way_in(2 * SPARSE).await {
        follow(bench, &momentum(), &stored, case).await;
    }
}

#[gpu_test]
async fn every_rule_and_some_ways_to_store_under_a_control() {
    let every = one_in(31 * SPARSE);
    for (road, bench) in Bench::both().await.enumerate() {
        for (index, rule) in rules().iter().enumerate() {
            for (case, stored) in all(&rule.slots()).iter().enumerate() {
                if (7 * index + case) % every == road {
                    follow_under_control(bench, rule, stored, index + case).await;
                }
            }
        }
    }
}

#[gpu_test]
async fn every_way_to_store_under_a_control() {
    for (bench, case, stored) in one_way_in(4 * SPARSE).await {
        follow_under_control(bench, &momentum(), &stored, case).await;
    }
}

/// One run of a tensor: its parameters and what is remembered of them, as bits.
async fn run(
    bench: &Bench,
    precision: Precision,
    params_type: StorageType,
    host_params: &[f32],
    host_grads: &[Vec<f32>],
) -> (Vec<u8>, Vec<u32>) {
    let grads_type = match params_type {
        StorageType::F32 => StorageType::F32,
        _ => StorageType::Bf16,
    };
    let config = AnyRule::preset("adamw", None, 0.01).unwrap();
    let params = bench.buffer_of_bytes(&encode(params_type, host_params));
    let grads = bench.buffer_of_bytes(&encode(grads_type, &host_grads[0]));
    let tensor = TensorBinding::new("weight", &params, &grads, [host_params.len()]);
    let tensor = tensor.params_type(params_type).grads_type(grads_type);
    let groups = ParamGroups::new(config).with_precision(precision);
    let mut optimizer = GpuOptimizer::with_groups(&bench.kernels, &groups, &[tensor]).unwrap();
    for values in host_grads {
        let mut bytes = encode(grads_type, values);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bench.queue.write_buffer(&grads, 0, &bytes);
        bench.step(&mut optimizer);
    }
    let mut bytes = bench.bytes(&params).await;
    bytes.truncate(host_params.len() * params_type.bytes() as usize);
    let state = bench.wait(optimizer.state()).await.unwrap();
    let state = &state.tensors[0];
    let masters = match (state.slot(MASTER_PARAMS), state.slot(PARAMS_REST)) {
        (Some(masters), _) => masters.iter().map(|value| value.to_bits()).collect(),
        (None, Some(rests)) => {
            let halves = bytemuck::pod_collect_to_vec::<u8, u16>(&bytes);
            let pairs = halves.into_iter().zip(rests);
            pairs
                .map(|(half, rest)| rest::join(half, rest as u16))
                .collect()
        }
        (None, None) => bytemuck::pod_collect_to_vec(&bytes),
    };
    (bytes, masters)
}

#[gpu_test]
async fn masters_are_the_run_in_f32_bit_for_bit_and_rests_are_the_masters() {
    for bench in Bench::both().await {
        let numel = 5003;
        let start = rounded(StorageType::Bf16, &values(1, numel));
        let grads: Vec<_> = (0..12)
            .map(|step| rounded(StorageType::Bf16, &values(100 + step, numel)))
            .collect();
        let precision = |masters| Precision {
            masters,
            ..Precision::default()
        };
        let none = precision(Masters::None);
        let (_, in_f32) = run(bench, none, StorageType::F32, &start, &grads).await;
        let with_masters = precision(Masters::F32);
        let (params, masters) = run(bench, with_masters, StorageType::Bf16, &start, &grads).await;
        assert_eq!(masters, in_f32);
        let nearest = masters.iter().map(|bits| bf16::nearest(*bits));
        let params: Vec<u16> = bytemuck::pod_collect_to_vec(&params);
        assert!(params.iter().copied().eq(nearest));
        let with_rests = precision(Masters::LowBits);
        let (halves, rests) = run(bench, with_rests, StorageType::Bf16, &start, &grads).await;
        assert_eq!(rests, in_f32);
        let halves: Vec<u16> = bytemuck::pod_collect_to_vec(&halves);
        for ((half, param), master) in halves.iter().zip(&params).zip(&masters) {
            assert!(half == param || master & 0xffff == 0x8000);
        }
    }
}

/// A step whose arithmetic is exact, so that adapters and the twin round the same `f32`.
#[gpu_test]
async fn random_bits_do_not_depend_on_how_a_dispatch_is_cut() {
    let bench = Bench::best().await;
    let numel = 9001;
    let precision = Precision {
        masters: Masters::None,
        rounding: storage::Rounding::Stochastic { seed: 5 },
        ..Precision::default()
    };
    let config = SgdConfig::builder(0.125).build().unwrap();
    for (of, unpack, _) in TYPES {
        let start = rounded(of, &values(3, numel));
        let grads = rounded(StorageType::Bf16, &values(4, numel))
            .iter()
            .map(|grad| grad / 512.0)
            .collect::<Vec<_>>();
        // An exact product, and a sum that no compiler can round in two ways.
        let expected = |step: u64, params: &[u16]| -> Vec<u16> {
            let key = storage::Key::new(5, "weight", step);
            let pairs = (0..).zip(params.iter().zip(&grads));
            pairs
                .map(|(index, (param, grad))| {
                    let theta = f32::from_bits(unpack(*param)) - 0.125 * grad;
                    let random = key.random(index, 0);
                    match of {
                        StorageType::F16 => f16::stochastic(theta.to_bits(), random),
                        _ => bf16::stochastic(theta.to_bits(), random),
                    }
                })
                .collect()
        };
        for (max_dispatch_elems, at) in [(1 << 20, 0), (1 << 20, 5), (64, 3), (1000, 8)] {
            let size = of.bytes() as usize;
            let mut bytes = vec![0; at * size];
            bytes.extend(encode(of, &start));
            let params = bench.buffer_of_bytes(&bytes);
            let grads = bench.buffer_of(&grads);
            let kernels = bench.kernels.clone();
            let kernels = kernels.with_max_dispatch_elems(max_dispatch_elems);
            let tensor = TensorBinding::new("weight", &params, &grads, [numel])
                .params_type(of)
                .params_at((at * size) as u64);
            let groups = ParamGroups::new(config).with_precision(precision);
            let mut optimizer = GpuOptimizer::with_groups(&kernels, &groups, &[tensor]).unwrap();
            let mut host: Vec<u16> = bytemuck::pod_collect_to_vec(&encode(of, &start));
            for step in 0..3 {
                bench.step(&mut optimizer);
                host = expected(step, &host);
                let bytes = bench.bytes(&params).await;
                let there: Vec<u16> =
                    bytemuck::pod_collect_to_vec(&bytes[at * size..(at + numel) * size]);
                assert_eq!(there, host, "{of:?}, step {step}, at {at}");
            }
        }
    }
}

#[gpu_test]
async fn a_state_of_sixteen_bits_goes_on_where_it_was() {
    let bench = Bench::best().await;
    let config = AnyRule::preset("adamw", None, 0.01).unwrap();
    for (case, stored) in all(&config.slots()).iter().enumerate().step_by(4 * SPARSE) {
        let tensors = Scattered::new(stored, vec![7, 64, 1031], case % 5, case % 3);
        let names = tensors.names();
        let groups = ParamGroups::new(config.clone()).with_precision(stored.precision);
        let grads = bench.buffer_of_bytes(&tensors.grads_bytes(stored));
        let params = bench.buffer_of_bytes(&tensors.params_bytes(stored));
        let bindings = tensors.bindings(stored, &names, &params, &grads);
        let mut optimizer = GpuOptimizer::with_groups(&bench.kernels, &groups, &bindings).unwrap();
        bench.step(&mut optimizer);
        bench.step(&mut optimizer);
        let state = bench.wait(optimizer.state()).await.unwrap();
        let then = bench.buffer_of_bytes(&bench.bytes(&params).await);
        let bindings = tensors.bindings(stored, &names, &then, &grads);
        let mut other = GpuOptimizer::with_groups(&bench.kernels, &groups, &bindings).unwrap();
        other.load_state(&state).unwrap();
        assert_eq!(
            bench.wait(other.state()).await.unwrap(),
            state,
            "{stored:?}"
        );
        bench.step(&mut optimizer);
        bench.step(&mut other);
        assert_eq!(bench.bytes(&params).await, bench.bytes(&then).await);
        let [state, others] = [&optimizer, &other].map(GpuOptimizer::state);
        assert_eq!(
            bench.wait(state).await.unwrap(),
            bench.wait(others).await.unwrap()
        );
    }
}

/// Small tensors in buffers of their own share dispatches: those of a whole number of units, and the others.
#[gpu_test]
async fn scattered_tensors_of_sixteen_bits_share_dispatches() {
    for (road, bench) in Bench::both().await.enumerate() {
        let config = AnyRule::preset("adamw", None, 0.05).unwrap();
        for stored in all(&config.slots())
            .into_iter()
            .skip(road)
            .step_by(4 * SPARSE)
        {
            let numels = [8, 64, 1000, 4096, 12, 1001, 7, 1];
            let host: Vec<_> = numels
                .iter()
                .map(|numel| {
                    let of = |of, seed| rounded(of, &values(seed + *numel as u64, *numel));
                    (of(stored.params, 0), of(stored.grads, 9))
                })
                .collect();
            let buffers: Vec<_> = host
                .iter()
                .map(|(params, grads)| {
                    let params = bench.buffer_of_bytes(&encode(stored.params, params));
                    (params, bench.buffer_of_bytes(&encode(stored.grads, grads)))
                })
                .collect();
            let names: Vec<_> = numels.iter().map(usize::to_string).collect();
            let tensors: Vec<_> = names
                .iter()
                .zip(numels)
                .zip(&buffers)
                .map(|((name, numel), (params, grads))| {
                    let tensor = TensorBinding::new(name, params, grads, [numel]);
                    tensor.params_type(stored.params).grads_type(stored.grads)
                })
                .collect();
            let groups = ParamGroups::new(config.clone()).with_precision(stored.precision);
            let mut optimizer =
                GpuOptimizer::with_groups(&bench.kernels, &groups, &tensors).unwrap();
            let storage = stored.storage(&config.slots());
            let mut oracles: Vec<_> = host
                .iter()
                .map(|(params, _)| Oracle::new(params, Roundoff::WGSL).stored(storage))
                .collect();
            for step in 0..3 {
                // A mask with a hole.
                optimizer.set_frozen("64", step == 1).unwrap();
                bench.step(&mut optimizer);
                for (tensor, oracle) in oracles.iter_mut().enumerate() {
                    if tensor != 1 || step != 1 {
                        oracle.step(&config, &host[tensor].1);
                    }
                }
            }
            if !storage.is_stochastic {
                // Where few buffers can be bound, the last one of a kind is left alone.
                let pieces = &optimizer.plan().pieces;
                for is_whole in [true, false] {
                    let alone = pieces.iter().filter(|piece| {
                        !piece.batched && piece.numel.is_multiple_of(4) == is_whole
                    });
                    assert!(alone.count() <= 1, "{stored:?}");
                }
            }
            for ((params, _), oracle) in buffers.iter().zip(&oracles) {
                let mut bytes = bench.bytes(params).await;
                let rest = bytes.split_off(oracle.params().len() * stored.params.bytes() as usize);
                oracle
                    .check_params(&decode(stored.params, &bytes))
                    .unwrap_or_else(|e| panic!("{stored:?}: {e}"));
                assert!(rest.iter().all(|byte| *byte == CANARY), "{stored:?}");
            }
        }
    }
}
