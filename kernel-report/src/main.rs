//! What real GPU compilers and software adapters make of the kernels, and of variants of them: `cargo xtask isa` and
//! `cargo xtask variants`.

mod figures;
mod isa;
mod kernels;
mod radv;
mod spirv;

use anyhow::Result;
use clap::Parser;

#[derive(Debug, Parser)]
enum Command {
    /// The kernels as machine code for AMD GPUs, which need not be there
    Isa(isa::IsaArgs),
    /// Compiles on this process's driver, for another process of this program
    #[command(name = radv::CHILD, hide = true)]
    RadvChild,
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Isa(args) => isa::run(&args),
        Command::RadvChild => radv::run_child(),
    }
}
