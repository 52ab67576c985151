//! Bytes on the wire and in memory, as `docs/scale.md` has them.

use std::fs;
use std::path::PathBuf;

use wgpu_optim::cpu::TensorValues;
use wgpu_optim::{AdamConfig, Masters, ParamGroups, SgdConfig, StepControl, StorageType};
use wgpu_optim_mpi::mpi::traits::Communicator as _;
use wgpu_optim_mpi::{ALIGN_ELEMS, ShardedOptimizer, Sharding};

use crate::model::{Model, numel};
use crate::{on_ranks, on_ranks_with};

/// Of `values` in all: N - 1 ranks each send a rank its share of the gradients, and each gets its share of the parameters.
#[test]
fn a_step_moves_the_bytes_of_the_formulas() {
    on_ranks(&[1, 2, 4], |world| {
        use StorageType::{Bf16, F16, F32};
        let (rank, ranks) = (world.rank() as usize, world.size() as usize);
        for (types, clips) in [
            ((F32, F32), false),
            ((Bf16, F16), false),
            ((F32, F32), true),
        ] {
            let model = Model::new(5, &[types]);
            let sharding = Sharding {
                bucket_bytes: 2 << 10,
                control: clips.then(|| StepControl::builder().max_norm(1.0).build().unwrap()),
                ..Sharding::default()
            };
            let config = AdamConfig::adamw(1e-3).build().unwrap();
            let groups = ParamGroups::new(config);
            let mut optimizer =
                ShardedOptimizer::on_cpu(world, &groups, model.tensors.clone(), &sharding).unwrap();
            let built = optimizer.traffic();
            let mut params = model.params.clone();
            let grads = model.grads(rank, 0);
            let mut slices: Vec<_> = params.iter_mut().map(TensorValues::slice_mut).collect();
            let grads: Vec<_> = grads.iter().map(TensorValues::slice).collect();
            optimizer.step(&mut slices, &grads).unwrap();

            // Two buckets as they are sent and two as they are received, by the larger of both exchanges; sums; the share.
            let part = (2 << 10) / 4 / ranks + ALIGN_ELEMS as usize;
            let [params_elem, grads_elem] = [types.0, types.1].map(|of| of.bytes() as usize);
            let sent = ranks * part * grads_elem;
            let received = ranks * part * grads_elem.max(params_elem);
            let share = optimizer.shares().of(rank);
            let reduced = 4 * (share.end - share.start) as usize;
            let most = 2 * (sent.max(part * params_elem) + received) + 8 * part + reduced;
            let working = optimizer.working_bytes();
            assert!(
                working <= most && working > most * 3 / 4,
                "{working} of {most}"
            );

            let total: u64 = model
                .tensors
                .iter()
                .map(|tensor| numel(tensor) as u64)
                .sum();
            let share = optimizer.shares().of(rank);
            let share = share.end - share.start;
            let others = ranks as u64 - 1;
            let [params_bytes, grads_bytes] = [types.0, types.1].map(StorageType::bytes);
            let buckets = optimizer
                .shares()
                .largest()
                .div_ceil((2 << 10) / 4 / ranks as u64);
            // Agreement: 1 and 8 bytes. One before each bucket and after the last, down and up, and one for the step itself.
            let small = 9 + 2 * (buckets + 1) + 1;
            let small = small + if clips { 1 + 12 } else { 0 };
            let traffic = optimizer.traffic();
            assert_eq!(
                traffic.sent - built.sent,
                (total - share) * grads_bytes + others * share * params_bytes + others * small
            );
            assert_eq!(
                traffic.received - built.received,
                others * share * grads_bytes + (total - share) * params_bytes + others * small
            );
        }
    });
}

/// What Open MPI itself says that each rank has sent to others, beside what the optimizer says.
#[test]
fn open_mpi_counts_the_same() {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("monitored");
    let is_rank = std::env::var_os(crate::TEST).is_some();
    if !is_rank {
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
    }
    let files = folder.join("sent");
    let monitored = [
        ("OMPI_MCA_pml_monitoring_enable", "2"),
        ("OMPI_MCA_pml_monitoring_enable_output", "3"),
        ("OMPI_MCA_pml_monitoring_filename", files.to_str().unwrap()),
    ];
    const RANKS: usize = 4;
    on_ranks_with(&monitored, &[RANKS], |world| {
        let groups = ParamGroups::new(AdamConfig::adamw(1e-3).build().unwrap());
        const NUMEL: usize = 1_000_003;
        let tensors = [("w", [NUMEL])];
        let mut optimizer =
            ShardedOptimizer::on_cpu(world, &groups, tensors, &Sharding::default()).unwrap();
        let (mut params, grads) = (vec![0.5; NUMEL], vec![0.25; NUMEL]);
        optimizer
            .step(&mut [(&mut params[..]).into()], &[(&grads[..]).into()])
            .unwrap();
        let said = folder.join(format!("said.{}", world.rank()));
        fs::write(said, optimizer.traffic().sent.to_string()).unwrap();
    });
    if is_rank {
        return;
    }
    for rank in 0..RANKS {
        let said = fs::read_to_string(folder.join(format!("said.{rank}"))).unwrap();
        let said: u64 = said.parse().unwrap();
        let counted = fs::read_to_string(folder.join(format!("sent.{rank}.prof"))).unwrap();
        let counted: u64 = counted
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            // Point to point, within this machine and beyond it.
            .filter(|fields| matches!(fields.first(), Some(&"I" | &"E")))
            .map(|fields| fields[3].parse::<u64>().unwrap())
            .sum();
        // Small messages may go by way of others.
        assert!(
            counted.abs_diff(said) < 4096,
            "rank {rank}: {counted} bytes, said {said}"
        );
    }
}

#[test]
fn a_rank_keeps_its_part_of_the_state() {
    on_ranks(&[1, 2, 3, 4], |world| {
        let (rank, ranks) = (world.rank() as usize, world.size() as usize);
        let model = Model::new(5, &[(StorageType::Bf16, StorageType::F32)]);
        assert_eq!(wgpu_optim::Precision::default().masters, Masters::F32);
        let groups = ParamGroups::new(SgdConfig::builder(0.1).momentum(0.9).build().unwrap());
        let mut optimizer =
            ShardedOptimizer::on_cpu(world, &groups, model.tensors.clone(), &Sharding::default())
                .unwrap();
        let mut params = model.params.clone();
        let grads = model.grads(rank, 0);
        let mut slices: Vec<_> = params.iter_mut().map(TensorValues::slice_mut).collect();
        let grads: Vec<_> = grads.iter().map(TensorValues::slice).collect();
        optimizer.step(&mut slices, &grads).unwrap();
        let state = optimizer.state().unwrap();
        let slots = state.tensors.iter().flat_map(|tensor| &tensor.slots);
        let bytes: usize = slots.map(|slot| slot.values.bytes().len()).sum();
        let total: usize = model.tensors.iter().map(numel).sum();
        // Momentum and masters.
        let even = 8.0 * total as f64 / ranks as f64;
        assert!(
            (bytes as f64 - even).abs() <= 8.0 * ALIGN_ELEMS as f64,
            "{bytes} of {even}"
        );
    });
}
