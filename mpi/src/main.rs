//! The command; see [`wgpu_optim_mpi::command`].

use std::env;
use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(wgpu_optim_mpi::command::run(env::args_os()))
}
