//! Every test runs itself on several ranks, under `mpirun` on this machine.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod checkpoint;
mod counts;
mod device;
mod failures;
mod model;
mod parity;
mod round;

use std::env;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use wgpu_optim_mpi::mpi;
use wgpu_optim_mpi::mpi::topology::SimpleCommunicator;

/// Set on ranks: the test that they run.
const TEST: &str = "WGPU_OPTIM_MPI_TEST";

/// Runs the test that calls it on each of these numbers of ranks, in turn; `body` on each rank.
fn on_ranks<F: FnOnce(&SimpleCommunicator)>(sizes: &[usize], body: F) {
    on_ranks_with(&[], sizes, body);
}

/// The same where `mpirun` has these variables, too.
fn on_ranks_with<F: FnOnce(&SimpleCommunicator)>(
    variables: &[(&str, &str)],
    sizes: &[usize],
    body: F,
) {
    let Some(test) = unless_on_rank(body) else {
        return;
    };
    let _alone = alone();
    for ranks in sizes {
        let output = test_on(*ranks, test)
            .envs(variables.iter().copied())
            .output()
            .expect("mpirun, of the package openmpi-bin");
        let [stdout, stderr] =
            [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        assert!(
            output.status.success() && stdout.matches("1 passed").count() == *ranks,
            "{test} on {ranks} ranks: {}\n{stdout}\n{stderr}",
            output.status
        );
    }
}

/// The same where the ranks are to be ended before they have come to theirs; returns what they have said.
fn on_ranks_that_are_ended<F: FnOnce(&SimpleCommunicator)>(ranks: usize, body: F) -> String {
    let Some(test) = unless_on_rank(body) else {
        return String::new();
    };
    let _alone = alone();
    let mut child = test_on(ranks, test)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("mpirun, of the package openmpi-bin");
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("{test}: ranks are still waiting");
        }
        thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{test}: {stderr}");
    stderr
}

/// The name of the test whose body this is, unless it runs on a rank: then the body is called.
fn unless_on_rank<F: FnOnce(&SimpleCommunicator)>(body: F) -> Option<&'static str> {
    // A closure is called after the function that it is in.
    let path = std::any::type_name::<F>();
    let test = path.trim_end_matches("::{{closure}}");
    let (_, test) = test.split_once("::").unwrap();
    if !env::var(TEST).is_ok_and(|running| running == test) {
        return Some(test);
    }
    let universe = mpi::initialize().unwrap();
    body(&universe.world());
    None
}

/// A test on so many ranks.
fn test_on(ranks: usize, test: &str) -> Command {
    let mut command = mpirun(ranks);
    command
        .arg(env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(TEST, test);
    command
}

/// `mpirun`s that start at one time may both make the folder of all, and one then fails.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `mpirun` on this machine, whoever runs it and however few cores there are.
fn mpirun(ranks: usize) -> Command {
    let mut command = Command::new("mpirun");
    command
        .args(["-n", &ranks.to_string()])
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env("OMPI_MCA_rmaps_base_oversubscribe", "1");
    command
}
