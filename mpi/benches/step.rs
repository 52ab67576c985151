//! A step over 1, 2 and 4 ranks of this machine: bytes counted beside the formulas of docs/scale.md, and time beside the step
//! of one process. Starts itself again under `mpirun`. `cargo bench -p wgpu-optim-mpi --bench step [-- NUMEL]`.

use std::env;
use std::error::Error;
use std::hint::black_box;
use std::process::Command;
use std::time::{Duration, Instant};

use wgpu_optim::{AdamConfig, CpuOptimizer, ParamGroups};
use wgpu_optim_mpi::mpi::collective::SystemOperation;
use wgpu_optim_mpi::mpi::traits::*;
use wgpu_optim_mpi::{ShardedOptimizer, Sharding, mpi};

const RANKS: &str = "WGPU_OPTIM_MPI_BENCH";
const ROUNDS: usize = 9;
const NUMEL: usize = 1 << 24;

fn main() -> Result<(), Box<dyn Error>> {
    let numel = env::args().skip(1).find_map(|arg| arg.parse().ok());
    let numel = numel.unwrap_or(NUMEL);
    if env::var_os(RANKS).is_some() {
        return on_ranks(numel);
    }
    println!("AdamW, {numel} elements; bytes of the rank that has the most, and by the formula\n");
    println!(
        "{:>5} {:>10} {:>22} {:>24} {:>24} {:>9} {:>7} {:>7}",
        "ranks", "bucket", "state", "sent", "received", "step ms", "/ one", "/ copy"
    );
    for ranks in ["1", "2", "4"] {
        let status = Command::new("mpirun")
            .args(["-n", ranks])
            .arg(env::current_exe()?)
            .arg(numel.to_string())
            .env(RANKS, ranks)
            // Whoever runs it, and however few cores there are.
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
            .env("OMPI_MCA_rmaps_base_oversubscribe", "1")
            .status()?;
        if !status.success() {
            return Err(format!("{ranks} ranks: {status}").into());
        }
    }
    Ok(())
}

fn on_ranks(numel: usize) -> Result<(), Box<dyn Error>> {
    let universe = mpi::initialize().ok_or("MPI has been initialized already")?;
    let world = universe.world();
    let (rank, ranks) = (world.rank(), world.size() as u64);
    let config = AdamConfig::adamw(1e-3).build()?;
    let groups = ParamGroups::new(config);
    let mut params = vec![0.5; numel];
    let grads = vec![0.25; numel];
    // On one rank while the others wait, so that it has the cores that they have together.
    let (mut one, mut copy) = (Duration::ZERO, Duration::ZERO);
    if rank == 0 {
        let mut optimizer = CpuOptimizer::new(config, [("w", [numel])])?;
        one = median(|| {
            optimizer
                .step(&mut [&mut params], &[&grads])
                .map_err(Into::into)
        })?;
        copy = median(|| {
            params.copy_from_slice(black_box(&grads));
            Ok(())
        })?;
    }
    world.barrier();
    for bucket_bytes in [1 << 20, 16 << 20, 4 * numel as u64 + 4096] {
        let sharding = Sharding {
            bucket_bytes,
            ..Sharding::default()
        };
        let mut optimizer = ShardedOptimizer::on_cpu(&world, &groups, [("w", [numel])], &sharding)?;
        let mut steps = 0;
        let before = optimizer.traffic();
        let time = median(|| {
            steps += 1;
            world.barrier();
            let stepped = optimizer.step(&mut [(&mut params[..]).into()], &[(&grads[..]).into()]);
            stepped.map(drop).map_err(Into::into)
        })?;
        let traffic = optimizer.traffic();
        let state = optimizer.state()?;
        let slots = state.tensors.iter().flat_map(|tensor| &tensor.slots);
        let state: u64 = slots.map(|slot| slot.values.bytes().len() as u64).sum();
        let own = [
            state,
            (traffic.sent - before.sent) / steps,
            (traffic.received - before.received) / steps,
        ];
        let mut most = [0_u64; 3];
        world.all_reduce_into(&own[..], &mut most[..], SystemOperation::max());
        if rank == 0 {
            let bytes = 4 * numel as u64;
            let exchanged = 2 * bytes * (ranks - 1) / ranks;
            let [state, sent, received] = most;
            println!(
                "{ranks:>5} {bucket_bytes:>10} {:>22} {:>24} {:>24} {:>9.1} {:>7.2} {:>7.2}",
                format!("{state} / {}", 2 * bytes / ranks),
                format!("{sent} / {exchanged}"),
                format!("{received} / {exchanged}"),
                time.as_secs_f64() * 1e3,
                time.as_secs_f64() / one.as_secs_f64(),
                time.as_secs_f64() / copy.as_secs_f64(),
            );
        }
    }
    Ok(())
}

fn median(mut run: impl FnMut() -> Result<(), Box<dyn Error>>) -> Result<Duration, Box<dyn Error>> {
    let mut times = Vec::with_capacity(ROUNDS);
    run()?;
    for _ in 0..ROUNDS {
        let started = Instant::now();
        run()?;
        times.push(started.elapsed());
    }
    times.sort_unstable();
    Ok(times[ROUNDS / 2])
}
