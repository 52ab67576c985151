//! `wgpu-optim`, see the library of this package.

use std::process::ExitCode;

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("error")).init();
    let args = wgpu_optim_cli::with_bench_under_cargo(std::env::args_os());
    wgpu_optim_cli::run(args).into()
}
