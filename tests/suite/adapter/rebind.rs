//! Tensors that lie elsewhere at every step.

use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::{
    AdamConfig, AnyRule, GpuOptimizer, Optimizer, SgdConfig, SignumConfig, TensorBinding,
};

use super::{Bench, gpu_test};
use crate::cases::values;

const CANARY: f32 = 12_345.678;
const NUMELS: [usize; 9] = [1, 5, 64, 1000, 1023, 0, 4096, 8193, 20_001];
/// It is left out of some steps.
const FROZEN: usize = 4;
/// Elements in the offset alignment of any device.
const ALIGNMENT: usize = 64;

/// Two slots, one that does not start at zero, one, and none.
fn rules() -> [AnyRule; 4] {
    [
        AdamConfig::adamw(0.05).build().unwrap().into(),
        AnyRule::preset("adagrad", Some("keras"), 0.05).unwrap(),
        SgdConfig::builder(0.1)
            .momentum(0.9)
            .dampening(0.3)
            .build()
            .unwrap()
            .into(),
        SignumConfig::sign_sgd(0.1).build().unwrap().into(),
    ]
}

/// Where tensors lie: parameters and gradients, each in buffer 0 or 1 from some element on.
type Places = Vec<[(usize, usize); 2]>;

/// One after the other without a gap, parameters in one buffer and gradients in the other.
fn in_a_row() -> Places {
    let starts = NUMELS.iter().scan(0, |end, numel| {
        let start = *end;
        *end += numel;
        Some(start)
    });
    starts.map(|start| [(0, start), (1, start)]).collect()
}

/// In any order, with gaps, the parameters as a pool has them or anywhere.
fn scattered(rng: &mut fastrand::Rng, aligned: bool) -> Places {
    let mut order: Vec<_> = (0..2 * NUMELS.len()).collect();
    rng.shuffle(&mut order);
    let mut places = vec![[(0, 0); 2]; NUMELS.len()];
    let mut ends = [0; 2];
    for index in order {
        let (tensor, role) = (index / 2, index % 2);
        let buffer = rng.usize(0..2);
        let shift = if aligned || role == 1 {
            0
        } else {
            rng.usize(0..ALIGNMENT)
        };
        let start = ends[buffer] + ALIGNMENT * rng.usize(0..3) + shift;
        places[tensor][role] = (buffer, start);
        // Bindings of one buffer do not overlap.
        ends[buffer] = (start + NUMELS[tensor] + 1).next_multiple_of(ALIGNMENT);
    }
    places
}

struct Model {
    names: Vec<String>,
    params: Vec<Vec<f32>>,
    oracles: Vec<Oracle<AnyRule>>,
}

impl Model {
    fn new() -> Self {
        let params: Vec<_> = NUMELS.map(|numel| values(numel as u64, numel)).into();
        Self {
            names: NUMELS.map(|numel| format!("t{numel}")).into(),
            oracles: params
                .iter()
                .map(|params| Oracle::new(params, Roundoff::WGSL))
                .collect(),
            params,
        }
    }

    /// Lays parameters and these gradients out, calls `step`, and holds everything in the buffers against the oracle
    /// and the canaries between.
    async fn step(
        &mut self,
        bench: &Bench,
        rule: &AnyRule,
        places: &Places,
        seed: u64,
        step: impl FnOnce(&[TensorBinding<'_>]),
    ) {
        let grads = NUMELS.map(|numel| values(seed + numel as u64, numel));
        let mut host = [vec![CANARY; 100_000], vec![CANARY; 100_000]];
        for (tensor, places) in places.iter().enumerate() {
            for ((buffer, start), data) in places.iter().zip([&self.params[tensor], &grads[tensor]])
            {
                host[*buffer][*start..start + data.len()].copy_from_slice(data);
            }
        }
        let buffers = [0, 1].map(|buffer| bench.buffer_of(&host[buffer]));
        let bindings: Vec<_> = places
            .iter()
            .zip(&self.names)
            .zip(NUMELS)
            .map(|(([params, grads], name), numel)| {
                TensorBinding::new(name, &buffers[params.0], &buffers[grads.0], [numel])
                    .params_at(4 * params.1 as u64)
                    .grads_at(4 * grads.1 as u64)
            })
            .collect();
        step(&bindings);
        let mut stepped = [
            bench.download(&buffers[0]).await,
            bench.download(&buffers[1]).await,
        ];
        for (tensor, [(buffer, start), _]) in places.iter().enumerate() {
            let range = *start..start + NUMELS[tensor];
            if tensor != FROZEN || seed < 1000 {
                self.oracles[tensor].step(rule, &grads[tensor]);
            }
            self.params[tensor].copy_from_slice(&stepped[*buffer][range.clone()]);
            let name = &self.names[tensor];
            self.oracles[tensor]
                .check_params(&self.params[tensor])
                .unwrap_or_else(|e| panic!("{rule:?}, {name}, step of seed {seed}: {e}"));
            stepped[*buffer][range.clone()].copy_from_slice(&host[*buffer][range]);
        }
        assert!(stepped == host, "{rule:?}: what lies between is as it was");
    }
}

#[gpu_test]
async fn state_stays_with_tensors_that_move() {
    for bench in Bench::both().await {
        for rule in rules() {
            let mut model = Model::new();
            let mut optimizer = None;
            // Neighbours share a piece at first, so that their states have to part.
            let places = in_a_row();
            let first = model.step(bench, &rule, &places, 0, |bindings| {
                let mut new = GpuOptimizer::new(&bench.kernels, rule.clone(), bindings).unwrap();
                assert_eq!(new.plan().pieces.len(), 1);
                bench.step(&mut new);
                optimizer = Some(new);
            });
            first.await;
            let mut optimizer = optimizer.unwrap();
            let mut rng = fastrand::Rng::with_seed(7);
            for round in 1..7 {
                let places = scattered(&mut rng, round % 2 == 0);
                // Seeds from 1000 on leave a tensor out: first it is frozen, then it has no place.
                optimizer
                    .set_frozen(&model.names[FROZEN], round == 4)
                    .unwrap();
                let left_out = [4, 5].contains(&round);
                let seed = if left_out { 1000 * round } else { round };
                let next = model.step(bench, &rule, &places, seed, |bindings| {
                    let mut bindings = bindings.to_vec();
                    if round == 5 {
                        bindings.remove(FROZEN);
                    }
                    let mut encoder = bench.encoder();
                    optimizer.rebind(&mut encoder, &bindings).unwrap();
                    optimizer.step(&mut encoder).unwrap();
                    bench.queue.submit([encoder.finish()]);
                });
                next.await;
            }
            let state = bench.wait(optimizer.state()).await.unwrap();
            assert_eq!(state.steps, 7);
            for (tensor, entry) in state.tensors.iter().enumerate() {
                let frozen = if tensor == FROZEN { 2 } else { 0 };
                assert_eq!(entry.applied_steps, 7 - frozen);
                for slot in &entry.slots {
                    model.oracles[tensor]
                        .check_slot(&slot.name, &slot.values.to_f32())
                        .unwrap();
                }
            }
        }
    }
}

#[gpu_test]
async fn a_step_after_a_rebind_takes_the_dispatches_of_new_places() {
    let bench = Bench::best().await;
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    // As a pool lays them out: each on an alignment of its own, small ones of one size.
    let pool = bench.buffer(64 * 1024);
    let names: Vec<_> = (0..20).map(|index| index.to_string()).collect();
    let at = |shift: u64| -> Vec<_> {
        let binding = |(index, name): (u64, &'static str)| {
            TensorBinding::new(name, &pool, &pool, [100])
                .params_at(512 * index + shift)
                .grads_at(64 * 1024 + 512 * ((7 * index) % 20))
        };
        let names = names.iter().map(|name| &*name.clone().leak());
        (0..).zip(names).map(binding).collect()
    };
    let mut optimizer = GpuOptimizer::new(&bench.kernels, config, &at(0)).unwrap();
    for shift in [0, 20_480, 0] {
        let mut encoder = bench.encoder();
        optimizer.rebind(&mut encoder, &at(shift)).unwrap();
        optimizer.step(&mut encoder).unwrap();
        bench.queue.submit([encoder.finish()]);
        let together = bench.device.limits().max_storage_buffers_per_shader_stage / 3;
        let batches = 20_usize.div_ceil(together.min(10) as usize);
        assert_eq!(optimizer.dispatches(), batches);
    }
}
