//! Parameters that somebody else writes between steps.

use super::*;

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
            (_, Some(rests)) if !is_said => joined(params, &rests),
            _ => params.to_vec(),
        };
        for slot in self.setup.rule.slots().kept() {
            let mut kept = state.slots.iter_mut();
            let kept = kept.find(|kept| kept.name == slot.name);
            if let Some(kept) = kept.filter(|_| is_said && slot.start == Start::Params) {
                kept.values = params.to_vec().into();
            }
        }
        let rule = Counted {
            rule: self.setup.rule.clone(),
            count: 0,
        };
        let oracle = match state.slots[..] {
            [] => Oracle::new(&theta, Roundoff::WGSL),
            _ => Oracle::resume(&rule, &theta, &state, Roundoff::WGSL),
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
        for masters in [Masters::LowBits, Masters::F32, Masters::None] {
            for zero in [0.0, -0.0] {
                let numel = 1000;
                let bf16 = |seed| encode(StorageType::Bf16, &values(seed, numel));
                let params = buffer_of_bytes(&bench, &bf16(1));
                let grads = buffer_of_bytes(&bench, &bf16(2));
                let tensor = TensorBinding::new("weight", &params, &grads, [numel])
                    .params_type(StorageType::Bf16)
                    .grads_type(StorageType::Bf16);
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
                    .params_type(stored.params)
                    .grads_type(stored.grads)
                    .params_at(at(stored.params))
                    .grads_at(at(stored.grads))
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
                        there => assert!(is_made || there == Some(slot.values.to_f32()), "{here}"),
                    }
                }
            }
        }
    }
}
